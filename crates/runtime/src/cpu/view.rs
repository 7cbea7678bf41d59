//! Operands as typed, strided views: the pointers stay in this file, the kernels see slices and rows.

use crate::cpu::gemm::Kept;
use crate::cpu::matrix::Mat;
use crate::cpu::number::{Accumulator, Number};
use crate::element::Element;
use metal_candle_compiler::{Layout, Operand};
use metal_candle_graph::{DType, MAX_RANK, Shape};
use std::marker::PhantomData;

/// An operand that a call reads.
#[derive(Clone, Copy)]
pub(crate) struct Arg<'a> {
    base: *const u8,
    operand: &'a Operand,
    kept: Option<&'a Kept>,
}

// SAFETY: memory that nobody writes.
unsafe impl Send for Arg<'_> {}
// SAFETY: memory that nobody writes.
unsafe impl Sync for Arg<'_> {}

impl<'a> Arg<'a> {
    /// # Safety
    /// Every element that the operand's layout reaches from `base`, the start of its buffer, is initialised
    /// and aligned, and nobody writes it during `'a`.
    pub(crate) unsafe fn new(base: *const u8, operand: &'a Operand) -> Arg<'a> {
        Arg { base, operand, kept: None }
    }

    pub(crate) fn dtype(&self) -> DType {
        self.operand.dtype
    }

    pub(crate) fn shape(&self) -> &'a Shape {
        &self.operand.layout.shape
    }

    /// A matrix whose panels, as a factor of this call, were packed before.
    pub(crate) fn keeping(self, kept: Option<&'a Kept>) -> Arg<'a> {
        Arg { kept, ..self }
    }

    pub(crate) fn kept(&self) -> Option<&'a Kept> {
        self.kept
    }

    pub(crate) fn layout(&self) -> &'a Layout {
        &self.operand.layout
    }

    pub(crate) fn read<T: Element>(&self) -> Strided<'a, T> {
        check_dtype::<T>(self.operand);
        let layout = &self.operand.layout;
        let first = if layout.shape.is_empty() { 0 } else { layout.offset };
        Strided {
            data: self.base.cast::<T>().wrapping_offset(first),
            shape: layout.shape,
            strides: layout.strides,
            _lives: PhantomData,
        }
    }

    /// The elements of a dense operand.
    pub(crate) fn slice<T: Element>(&self) -> &'a [T] {
        assert!(self.operand.layout.is_dense(), "metal-candle bug: expected a dense operand");
        let view = self.read::<T>();
        // SAFETY: a dense layout reaches exactly these elements.
        unsafe { std::slice::from_raw_parts(view.data, view.shape.len()) }
    }

    /// The only element.
    pub(crate) fn scalar<T: Element>(&self) -> T {
        assert_eq!(self.shape().len(), 1, "metal-candle bug: expected one element");
        self.read::<T>().row(0).get(0)
    }
}

/// An operand that a call writes; the call is the only one to touch it.
pub(crate) struct Out<'a> {
    base: *mut u8,
    operand: &'a Operand,
}

impl<'a> Out<'a> {
    /// # Safety
    /// As for [`Arg::new`], and nobody else reads or writes those elements during `'a`. They may be
    /// uninitialised where the call is a GEMM of f32 or f64 that does not accumulate: that writes through
    /// pointers.
    pub(crate) unsafe fn new(base: *mut u8, operand: &'a Operand) -> Out<'a> {
        Out { base, operand }
    }

    pub(crate) fn dtype(&self) -> DType {
        self.operand.dtype
    }

    pub(crate) fn shape(&self) -> &'a Shape {
        &self.operand.layout.shape
    }

    pub(crate) fn layout(&self) -> &'a Layout {
        &self.operand.layout
    }

    /// What has been written, to be read while nobody writes more.
    pub(crate) fn written(&self) -> Arg<'_> {
        Arg { base: self.base, operand: self.operand, kept: None }
    }

    /// The elements, dense.
    pub(crate) fn slice<T: Element>(&mut self) -> &mut [T] {
        check_dtype::<T>(self.operand);
        let layout = &self.operand.layout;
        assert!(layout.is_dense(), "metal-candle bug: expected a dense output");
        let first = if layout.shape.is_empty() { 0 } else { layout.offset };
        // SAFETY: a dense layout reaches exactly these elements; `new` promises that they are ours.
        unsafe {
            let data = self.base.cast::<T>().wrapping_offset(first);
            std::slice::from_raw_parts_mut(data, layout.shape.len())
        }
    }

    /// The first element, and whose strides lead to the others.
    pub(crate) fn data<T: Element>(&mut self) -> (*mut T, &'a [isize]) {
        check_dtype::<T>(self.operand);
        let layout = &self.operand.layout;
        let first = if layout.shape.is_empty() { 0 } else { layout.offset };
        (self.base.cast::<T>().wrapping_offset(first), layout.strides())
    }
}

fn check_dtype<T: Element>(operand: &Operand) {
    let (expected, got) = (T::DTYPE, operand.dtype);
    assert_eq!(expected, got, "metal-candle bug: an operand of another dtype");
}

/// Element `(i0, i1, ..)` lies at `data + Σ i·stride`. All of them may be read during `'a`.
#[derive(Clone, Copy)]
pub(crate) struct Strided<'a, T> {
    data: *const T,
    shape: Shape,
    strides: [isize; MAX_RANK],
    _lives: PhantomData<&'a [T]>,
}

// SAFETY: as a `&[T]`.
unsafe impl<T: Sync> Send for Strided<'_, T> {}
// SAFETY: as a `&[T]`.
unsafe impl<T: Sync> Sync for Strided<'_, T> {}

impl<'a, T: Element> Strided<'a, T> {
    pub(crate) fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The extent of the last dim; 1 for a scalar.
    pub(crate) fn cols(&self) -> usize {
        self.shape.last().unwrap_or(1)
    }

    /// The number of rows: how often the last dim is there.
    pub(crate) fn rows(&self) -> usize {
        leading(&self.shape).iter().product()
    }

    /// The `row`-th of the rows in row-major order.
    pub(crate) fn row(&self, row: usize) -> Row<'a, T> {
        assert!(row < self.rows(), "metal-candle bug: row {row} of {}", self.shape);
        let at = offset_of(row, leading(&self.shape), &self.strides);
        let stride = self.shape.rank().checked_sub(1).map_or(0, |last| self.strides[last]);
        Row { data: self.data.wrapping_offset(at), len: self.cols(), stride, _lives: PhantomData }
    }

    /// The rows from `first` on that lie at the same distance from each other, as those of the last dim but one do.
    pub(crate) fn run(&self, first: usize) -> Mat<'a, T> {
        assert!(first < self.rows(), "metal-candle bug: row {first} of {}", self.shape);
        let rank = self.shape.rank();
        let row_dim = rank.checked_sub(2);
        let (inner, row_stride) = row_dim.map_or((1, 0), |d| (self.shape[d], self.strides[d]));
        let col_stride = rank.checked_sub(1).map_or(1, |d| self.strides[d]);
        let at = offset_of(first, leading(&self.shape), &self.strides);
        let extents = [inner - first % inner, self.cols()];
        // SAFETY: rows of this view.
        unsafe { Mat::new(self.data.wrapping_offset(at), extents, [row_stride, col_stride]) }
    }

    /// Position `at` of `dim`, which is gone afterwards.
    pub(crate) fn index(&self, dim: usize, at: usize) -> Strided<'a, T> {
        let mut out = self.narrow(dim, at, 1);
        let mut dims = [0; MAX_RANK];
        let rank = self.shape.rank() - 1;
        for (to, from) in (0..=rank).filter(|from| *from != dim).enumerate() {
            dims[to] = self.shape[from];
            out.strides[to] = self.strides[from];
        }
        out.shape = shape_of(&dims[..rank]);
        out
    }

    /// Position `at`, in row-major order, of the dims before `dim`, which are gone afterwards.
    pub(crate) fn outer(&self, dim: usize, at: usize) -> Strided<'a, T> {
        let dims = self.shape.dims();
        let outer: usize = dims[..dim].iter().product();
        assert!(at < outer, "metal-candle bug: {at} of {outer} positions");
        let offset = offset_of(at, &dims[..dim], &self.strides);
        let data = self.data.wrapping_offset(offset);
        let mut out = Strided { data, shape: shape_of(&dims[dim..]), ..*self };
        out.strides.copy_within(dim.., 0);
        out
    }

    /// Positions `start..start + len` of `dim`.
    pub(crate) fn narrow(&self, dim: usize, start: usize, len: usize) -> Strided<'a, T> {
        let extent = self.shape[dim];
        let fits = start.checked_add(len).is_some_and(|end| end <= extent);
        assert!(fits, "metal-candle bug: {start} + {len} of {extent} positions");
        let data = self.data.wrapping_offset(start as isize * self.strides[dim]);
        Strided { data, shape: self.shape.with(dim, len), ..*self }
    }

    pub(crate) fn strides(&self) -> [isize; MAX_RANK] {
        self.strides
    }

    pub(crate) fn stride(&self, dim: usize) -> isize {
        self.strides[dim]
    }

    /// A view of rank 2.
    pub(crate) fn matrix(&self) -> Mat<'a, T> {
        assert_eq!(self.shape.rank(), 2, "metal-candle bug: expected a matrix");
        let (rows, cols) = (self.shape[0], self.shape[1]);
        // SAFETY: the same elements, for as long.
        unsafe { Mat::new(self.data, [rows, cols], [self.strides[0], self.strides[1]]) }
    }

    /// All rows as those of one matrix, if they are equally far apart.
    pub(crate) fn as_rows(&self) -> Option<Mat<'a, T>> {
        let rank = self.shape.rank();
        let (rows, cols) = (self.rows(), self.cols());
        let dims = self.shape.dims();
        // The distance of rows, from the last dim of more than one row on.
        let mut strides = (0..rank.saturating_sub(1)).rev().filter(|d| dims[*d] != 1);
        let (row_stride, mut len) = match strides.next() {
            Some(d) => (self.strides[d], dims[d] as isize),
            None => (0, 1),
        };
        for d in strides {
            if self.strides[d] != row_stride * len {
                return None;
            }
            len *= dims[d] as isize;
        }
        let col_stride = if rank == 0 { 1 } else { self.strides[rank - 1] };
        // SAFETY: the same elements, for as long.
        Some(unsafe { Mat::new(self.data, [rows, cols], [row_stride, col_stride]) })
    }

    pub(crate) fn as_ptr(&self) -> *const T {
        self.data
    }

    /// # Safety
    /// `offset` is that of an element of this view.
    pub(crate) unsafe fn at_offset(&self, offset: isize) -> T {
        // SAFETY: the caller's promise.
        unsafe { *self.data.offset(offset) }
    }
}

fn shape_of(part: &[usize]) -> Shape {
    Shape::new(part).expect("metal-candle bug: a part of a shape is no shape")
}

/// All dims but the last.
pub(crate) fn leading(shape: &Shape) -> &[usize] {
    shape.dims().split_last().map_or(&[], |(_, leading)| leading)
}

/// `Σ i·stride` of the `index`-th position of `dims` in row-major order.
pub(crate) fn offset_of(index: usize, dims: &[usize], strides: &[isize]) -> isize {
    let (mut rest, mut offset) = (index, 0);
    for (extent, stride) in dims.iter().zip(strides).rev() {
        if *extent != 1 {
            offset += (rest % extent) as isize * stride;
            rest /= extent;
        }
    }
    offset
}

/// Elements at a fixed distance from each other.
#[derive(Clone, Copy)]
pub(crate) struct Row<'a, T> {
    data: *const T,
    len: usize,
    stride: isize,
    _lives: PhantomData<&'a [T]>,
}

impl<'a, T: Element> Row<'a, T> {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    #[inline]
    pub(crate) fn get(&self, i: usize) -> T {
        assert!(i < self.len, "metal-candle bug: element {i} of {}", self.len);
        // SAFETY: the row has this element.
        unsafe { *self.data.offset(i as isize * self.stride) }
    }

    pub(crate) fn iter(self) -> impl DoubleEndedIterator<Item = T> + ExactSizeIterator + 'a {
        // SAFETY: the row has these elements.
        (0..self.len).map(move |i| unsafe { *self.data.offset(i as isize * self.stride) })
    }

    /// The elements from `start` on.
    pub(crate) fn from(self, start: usize) -> Row<'a, T> {
        assert!(start <= self.len, "metal-candle bug: from {start} of {}", self.len);
        let data = self.data.wrapping_offset(start as isize * self.stride);
        Row { data, len: self.len - start, ..self }
    }

    /// The elements in place, if they lie side by side.
    pub(crate) fn as_slice(&self) -> Option<&'a [T]> {
        // SAFETY: with a stride of 1 these are the row's elements, in order.
        (self.stride == 1 || self.len <= 1)
            .then(|| unsafe { std::slice::from_raw_parts(self.data, self.len) })
    }

    pub(crate) fn copy_to(&self, to: &mut [T]) {
        match self.as_slice() {
            Some(row) => to.copy_from_slice(row),
            None => to.iter_mut().zip(self.iter()).for_each(|(to, x)| *to = x),
        }
    }
}

impl<T: Number> Row<'_, T> {
    /// `to += self`
    pub(crate) fn add_to(&self, to: &mut [T::Acc]) {
        assert_eq!(self.len, to.len(), "metal-candle bug: rows of different lengths");
        let add = |(to, x): (&mut T::Acc, T)| *to = to.plus(x.widen());
        match self.as_slice() {
            Some(row) => to.iter_mut().zip(row.iter().copied()).for_each(add),
            None => to.iter_mut().zip(self.iter()).for_each(add),
        }
    }

    pub(crate) fn widen_to(&self, to: &mut [T::Acc]) {
        assert_eq!(self.len, to.len(), "metal-candle bug: rows of different lengths");
        match self.as_slice() {
            Some(row) => T::widen_all(row, to),
            None => to.iter_mut().zip(self.iter()).for_each(|(to, x)| *to = x.widen()),
        }
    }
}

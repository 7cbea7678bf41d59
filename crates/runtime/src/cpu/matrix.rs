//! Matrices in memory, as the GEMM takes them.

use crate::cpu::number::{Number, Real};
use crate::element::Element;
use std::marker::PhantomData;

/// A matrix that may be read during `'a`.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a, T> {
    data: *const T,
    rows: usize,
    cols: usize,
    row_stride: isize,
    col_stride: isize,
    _lives: PhantomData<&'a [T]>,
}

// SAFETY: as a `&[T]`.
unsafe impl<T: Sync> Send for Mat<'_, T> {}
// SAFETY: as a `&[T]`.
unsafe impl<T: Sync> Sync for Mat<'_, T> {}

impl<'a, T: Element> Mat<'a, T> {
    /// # Safety
    /// Element `(i, j)`, for every one within `extents`, lies at `data + i·strides[0] + j·strides[1]`, is
    /// initialised, and is not written during `'a`.
    pub(crate) unsafe fn new(
        data: *const T,
        [rows, cols]: [usize; 2],
        [row_stride, col_stride]: [isize; 2],
    ) -> Mat<'a, T> {
        Mat { data, rows, cols, row_stride, col_stride, _lives: PhantomData }
    }

    /// `data` as `rows` rows, one after the other.
    pub(crate) fn dense(data: &'a [T], rows: usize, cols: usize) -> Mat<'a, T> {
        assert_eq!(data.len(), rows * cols, "metal-candle bug: a matrix of another size");
        // SAFETY: exactly the elements of the slice.
        unsafe { Mat::new(data.as_ptr(), [rows, cols], [cols as isize, 1]) }
    }

    pub(crate) fn as_ptr(&self) -> *const T {
        self.data
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    pub(crate) fn row_stride(&self) -> isize {
        self.row_stride
    }

    pub(crate) fn col_stride(&self) -> isize {
        self.col_stride
    }

    pub(crate) fn transposed(self) -> Mat<'a, T> {
        Mat {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// `len` rows from `start`.
    pub(crate) fn row_range(self, start: usize, len: usize) -> Mat<'a, T> {
        assert!(
            start + len <= self.rows,
            "metal-candle bug: {start} + {len} of {} rows",
            self.rows
        );
        let data = self.data.wrapping_offset(start as isize * self.row_stride);
        Mat { data, rows: len, ..self }
    }

    /// `len` columns from `start`.
    pub(crate) fn col_range(self, start: usize, len: usize) -> Mat<'a, T> {
        self.transposed().row_range(start, len).transposed()
    }

    /// The elements of a row in place, if they lie side by side.
    pub(crate) fn row_slice(&self, row: usize) -> Option<&'a [T]> {
        assert!(row < self.rows, "metal-candle bug: row {row} of {}", self.rows);
        let data = self.data.wrapping_offset(row as isize * self.row_stride);
        // SAFETY: with a column stride of 1 these are the row's elements, in order.
        (self.col_stride == 1 || self.cols <= 1)
            .then(|| unsafe { std::slice::from_raw_parts(data, self.cols) })
    }

    pub(crate) fn get(&self, row: usize, col: usize) -> T {
        assert!(row < self.rows && col < self.cols, "metal-candle bug: outside of a matrix");
        // SAFETY: within the matrix.
        unsafe {
            *self.data.offset(row as isize * self.row_stride + col as isize * self.col_stride)
        }
    }
}

impl<'a, T: Number> Mat<'a, T> {
    /// The matrix in its accumulator: itself if it is its own, else a copy in `to`.
    pub(crate) fn widened<'b>(self, to: &'b mut [T::Acc]) -> Mat<'b, T::Acc>
    where
        'a: 'b,
    {
        if T::DTYPE != T::Acc::DTYPE {
            return self.packed(to);
        }
        let (extents, strides) = ([self.rows, self.cols], [self.row_stride, self.col_stride]);
        // SAFETY: one dtype, one type: the same elements.
        unsafe { Mat::new(self.data.cast(), extents, strides) }
    }

    /// A dense copy in `to`, in the accumulator.
    pub(crate) fn packed<'b>(self, to: &'b mut [T::Acc]) -> Mat<'b, T::Acc> {
        let by_columns = self.col_stride != 1 && self.row_stride == 1 && self.cols > 1;
        let from = if by_columns { self.transposed() } else { self };
        let to = &mut to[..from.rows * from.cols];
        for (i, to) in to.chunks_exact_mut(from.cols.max(1)).enumerate() {
            match from.row_slice(i) {
                Some(row) => T::widen_all(row, to),
                None => to.iter_mut().enumerate().for_each(|(j, x)| *x = from.get(i, j).widen()),
            }
        }
        let packed = Mat::dense(to, from.rows, from.cols);
        if by_columns { packed.transposed() } else { packed }
    }
}

impl Mat<'_, f32> {
    /// A copy in `to`, row by row.
    pub(crate) fn packed_rows<'b>(&self, to: &'b mut [f32]) -> &'b mut [f32] {
        let to = &mut to[..self.rows * self.cols];
        for (i, to) in to.chunks_exact_mut(self.cols.max(1)).enumerate() {
            match self.row_slice(i) {
                Some(row) => to.copy_from_slice(row),
                None => to.iter_mut().enumerate().for_each(|(j, x)| *x = self.get(i, j)),
            }
        }
        to
    }
}

/// A matrix that may be written during `'a`, and that nobody else touches.
pub(crate) struct MatMut<'a, T> {
    data: *mut T,
    rows: usize,
    cols: usize,
    row_stride: isize,
    col_stride: isize,
    _lives: PhantomData<&'a mut [T]>,
}

// SAFETY: as a `&mut [T]`.
unsafe impl<T: Send> Send for MatMut<'_, T> {}

impl<'a, T: Element> MatMut<'a, T> {
    /// # Safety
    /// As for [`Mat::new`], no two elements share memory, and nobody else touches them during `'a`.
    /// They may be uninitialised if they are written before they are read.
    pub(crate) unsafe fn new(
        data: *mut T,
        [rows, cols]: [usize; 2],
        [row_stride, col_stride]: [isize; 2],
    ) -> MatMut<'a, T> {
        MatMut { data, rows, cols, row_stride, col_stride, _lives: PhantomData }
    }

    /// `data` as `rows` rows, one after the other.
    pub(crate) fn dense(data: &'a mut [T], rows: usize, cols: usize) -> MatMut<'a, T> {
        assert_eq!(data.len(), rows * cols, "metal-candle bug: a matrix of another size");
        // SAFETY: exactly the elements of the slice.
        unsafe { MatMut::new(data.as_mut_ptr(), [rows, cols], [cols as isize, 1]) }
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut T {
        self.data
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    pub(crate) fn row_stride(&self) -> isize {
        self.row_stride
    }

    pub(crate) fn col_stride(&self) -> isize {
        self.col_stride
    }

    pub(crate) fn transposed(self) -> MatMut<'a, T> {
        MatMut {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// Writes `value` to every element.
    pub(crate) fn fill(&mut self, value: T) {
        for i in 0..self.rows {
            for j in 0..self.cols {
                let at = i as isize * self.row_stride + j as isize * self.col_stride;
                // SAFETY: within the matrix, which is ours.
                unsafe { self.data.offset(at).write(value) }
            }
        }
    }
}

impl<T: Number<Acc: Real>> MatMut<'_, T> {
    /// Writes `row` to every row, or adds it to what is there.
    pub(crate) fn start_rows_from(&mut self, row: &[T], accumulate: bool) {
        assert_eq!(row.len(), self.cols, "metal-candle bug: a row of another length");
        for i in 0..self.rows {
            for (j, x) in row.iter().enumerate() {
                let at = i as isize * self.row_stride + j as isize * self.col_stride;
                // SAFETY: within the matrix, which is ours; read only where it is accumulated onto.
                unsafe {
                    let to = self.data.offset(at);
                    to.write(if accumulate { T::narrow((*to).widen() + x.widen()) } else { *x });
                }
            }
        }
    }
}

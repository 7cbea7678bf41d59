//! Matrix products: `out = alpha · a b`, or `out += alpha · a b`.
//!
//! ```text
//! lanes ── vectors of every instruction set        micro ─── a tile whose sums stay in registers
//! pack ─── operands laid out for it                blocked ─ all tiles, on all threads
//! ```
//!
//! The rows and columns of the result are split among threads, never the sums: any number of them gives the same bits.
//! bf16 and f16 are summed in f32. bf16 is multiplied as it is where the processor can, else widened.

mod blocked;
mod lanes;
mod micro;
mod pack;

use crate::cpu::matrix::{Mat, MatMut};
use crate::cpu::number::{Accumulator, Float, Number, Real, for_float};
use crate::cpu::view::{Arg, Out, offset_of};
use crate::cpu::{parallel, scratch};
use crate::element::Element;
use blocked::Product;
use half::{bf16, f16};
pub(crate) use pack::Source;
use smallvec::SmallVec;

/// Results of one task of a matrix-vector product.
const VECTOR_CHUNK: usize = 256;
/// Elements that are widened at a time.
const WIDE: usize = 512;

pub(crate) fn call(args: &[Arg], outs: &mut [Out], alpha: f64, accumulate: bool, parallel: bool) {
    let ([a, b], [out]) = (args, outs) else {
        panic!("metal-candle bug: gemm takes two operands and gives one")
    };
    for_float!(out.dtype(), T => {
        Batch::<T>::new(a, b, out).run(parallel, |out, a, b, parallel| {
            gemm(out, a, b, <T as Number>::Acc::from_f64(alpha), accumulate, parallel);
        });
    });
}

/// Products of one shape at regular distances.
struct Batch<T> {
    a: *const T,
    b: *const T,
    out: *mut T,
    m: usize,
    n: usize,
    k: usize,
    /// `[row, column]` of a, b and out.
    strides: [[isize; 2]; 3],
    /// The remaining batch dims: the extents, and the strides of a, b and out.
    extents: SmallVec<[usize; 8]>,
    batch: [SmallVec<[isize; 8]>; 3],
}

// SAFETY: the pointers are those of an `Arg`, an `Arg` and an `Out`, which `run` hands out product by product.
unsafe impl<T: Sync> Sync for Batch<T> {}

impl<T: Float> Batch<T> {
    fn new(a: &Arg, b: &Arg, out: &mut Out) -> Batch<T> {
        let (out_shape, (data, out_strides)) = (out.shape(), out.data::<T>());
        let (a, b) = (a.read::<T>(), b.read::<T>());
        let rank = out_shape.rank();
        let [m, n, k] = [out_shape[rank - 2], out_shape[rank - 1], a.shape()[rank - 1]];
        for (operand, extents) in [(a.shape(), [m, k]), (b.shape(), [k, n])] {
            let batched = operand.dims()[..rank - 2] == out_shape.dims()[..rank - 2];
            let fits = batched && operand.dims()[rank - 2..] == extents;
            assert!(
                fits,
                "metal-candle bug: gemm of {} and {} to {out_shape}",
                a.shape(),
                b.shape()
            );
        }
        let row_col = |stride: &dyn Fn(usize) -> isize| [stride(rank - 2), stride(rank - 1)];
        let all = [&|d| a.stride(d), &|d| b.stride(d), &|d| out_strides[d]] as [&dyn Fn(_) -> _; 3];
        let mut it = Batch {
            a: a.as_ptr(),
            b: b.as_ptr(),
            out: data,
            m,
            n,
            k,
            strides: all.map(row_col),
            extents: SmallVec::new(),
            batch: Default::default(),
        };
        for d in (0..rank - 2).rev().filter(|d| out_shape[*d] != 1) {
            it.add_dim(out_shape[d], all.map(|stride| stride(d)));
        }
        it.extents.reverse();
        it.batch.iter_mut().for_each(|strides| strides.reverse());
        it
    }

    /// Adds the next outer batch dim. Products that share b, and whose rows follow each other, are one with more
    /// rows.
    fn add_dim(&mut self, extent: usize, [a, b, out]: [isize; 3]) {
        let m = self.m as isize;
        let follows = |stride: isize, row: isize| m == 1 || stride == m * row;
        let [[a_row, _], _, [out_row, _]] = &mut self.strides;
        let rows =
            b == 0 && self.extents.is_empty() && follows(a, *a_row) && follows(out, *out_row);
        if rows && m != 0 {
            if m == 1 {
                (*a_row, *out_row) = (a, out);
            }
            self.m *= extent;
            return;
        }
        self.extents.push(extent);
        for (strides, stride) in self.batch.iter_mut().zip([a, b, out]) {
            strides.push(stride);
        }
    }

    /// Runs every product: several at a time if there are enough of them, else each on all threads. Either
    /// way gives the same bits.
    fn run(
        &self,
        parallel: bool,
        product: impl Fn(MatMut<'_, T>, Mat<'_, T>, Mat<'_, T>, bool) + Send + Sync,
    ) {
        let products: usize = self.extents.iter().product();
        let side_by_side = parallel && products >= rayon::current_num_threads();
        parallel::for_each(side_by_side, products, |i| {
            let [a, b, out] = [0, 1, 2].map(|x| offset_of(i, &self.extents, &self.batch[x]));
            let (m, n, k, strides) = (self.m, self.n, self.k, &self.strides);
            // SAFETY: the operands' elements, as `Arg` and `Out` promise; products write disjoint parts of an
            // output whose elements are distinct.
            unsafe {
                let a = Mat::new(self.a.wrapping_offset(a), [m, k], strides[0]);
                let b = Mat::new(self.b.wrapping_offset(b), [k, n], strides[1]);
                let out = MatMut::new(self.out.wrapping_offset(out), [m, n], strides[2]);
                product(out, a, b, parallel && !side_by_side);
            }
        });
    }
}

/// `out = alpha · a b`, added to what is there if `accumulate`.
pub(crate) fn gemm<T: Multiply<Acc: Real>>(
    mut out: MatMut<'_, T>,
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    alpha: T::Acc,
    accumulate: bool,
    parallel: bool,
) {
    let fits = out.rows() == a.rows() && out.cols() == b.cols() && a.cols() == b.rows();
    assert!(fits, "metal-candle bug: gemm of matrices that do not fit");
    if out.rows() == 0 || out.cols() == 0 {
        return;
    }
    if a.cols() == 0 {
        if !accumulate {
            out.fill(T::narrow(T::Acc::ZERO));
        }
        return;
    }
    // `(x M)ᵀ = Mᵀ xᵀ`: a row of dot products is a column of them, and rows of a result lie side by side.
    let turned = match (out.rows(), out.cols()) {
        (1, _) => b.row_stride() == 1,
        (_, 1) => a.col_stride() != 1 && a.row_stride() == 1,
        _ => out.col_stride() != 1 && out.row_stride() == 1,
    };
    let (out, a, b) =
        if turned { (out.transposed(), b.transposed(), a.transposed()) } else { (out, a, b) };
    if out.cols() == 1 && a.col_stride() == 1 {
        return times_vector(out, a, b, alpha, accumulate, parallel);
    }
    T::multiply(out, a, b, alpha, accumulate, parallel);
}

/// [`gemm`] of factors that may be rounded to bf16, on this thread.
pub(crate) fn gemm_rounded<T: Real>(
    out: MatMut<'_, T>,
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    accumulate: bool,
) {
    let few = out.rows() == 1 || out.cols() == 1 || a.cols() == 0;
    if few || out.rows() == 0 || out.cols() == 0 {
        return gemm(out, a, b, T::from_f64(1.0), accumulate, false);
    }
    T::multiply_rounded(out, a, b, accumulate);
}

/// A product with a column of a matrix whose rows lie side by side: a dot product for every row.
fn times_vector<T: Multiply<Acc: Real>>(
    mut out: MatMut<'_, T>,
    a: Mat<'_, T>,
    x: Mat<'_, T>,
    alpha: T::Acc,
    accumulate: bool,
    parallel: bool,
) {
    scratch::with(x.rows(), |packed: &mut [T::Acc]| {
        let x = x.transposed().packed(packed);
        let x = x.row_slice(0).expect("metal-candle bug: a packed row is dense");
        let rows = SharedRows(out.as_mut_ptr(), out.row_stride());
        parallel::for_each(parallel, a.rows().div_ceil(VECTOR_CHUNK), |chunk| {
            let start = chunk * VECTOR_CHUNK;
            for i in start..(start + VECTOR_CHUNK).min(a.rows()) {
                let product = alpha * dot(a, i, x);
                // SAFETY: chunks are disjoint rows of `out`, which is borrowed until all are done.
                unsafe {
                    let to = rows.at(i);
                    let sum = if accumulate { (*to).widen() + product } else { product };
                    to.write(T::narrow(sum));
                }
            }
        });
    });
}

/// `Σ a[row, k] x[k]`
fn dot<T: Multiply<Acc: Real>>(a: Mat<'_, T>, row: usize, x: &[T::Acc]) -> T::Acc {
    let mut wide = [T::Acc::ZERO; WIDE];
    let row = a.row_range(row, 1);
    if T::DTYPE == T::Acc::DTYPE {
        let row = row.widened(&mut wide);
        return T::Acc::dot(row.row_slice(0).unwrap_or(&[]), x);
    }
    let mut sum = T::Acc::ZERO;
    for (start, x) in x.chunks(WIDE).enumerate() {
        let part = row.col_range(start * WIDE, x.len()).packed(&mut wide[..x.len()]);
        sum += T::Acc::dot(part.row_slice(0).unwrap_or(&[]), x);
    }
    sum
}

struct SharedRows<T>(*mut T, isize);
// SAFETY: `times_vector` gives every task rows of its own.
unsafe impl<T: Send> Sync for SharedRows<T> {}

impl<T> SharedRows<T> {
    fn at(&self, row: usize) -> *mut T {
        self.0.wrapping_offset(row as isize * self.1)
    }
}

/// Elements that the blocked product takes.
pub(crate) trait Multiply: Number {
    /// `out = alpha · a b`, added to what is there if `accumulate`; nothing is empty.
    fn multiply(
        out: MatMut<'_, Self>,
        a: Mat<'_, Self>,
        b: Mat<'_, Self>,
        alpha: Self::Acc,
        accumulate: bool,
        parallel: bool,
    );

    /// `out = a b`, added to what is there if `accumulate`, of factors in the accumulator that may be rounded to
    /// bf16; on this thread.
    fn multiply_rounded(
        out: MatMut<'_, Self::Acc>,
        a: Mat<'_, Self::Acc>,
        b: Mat<'_, Self::Acc>,
        accumulate: bool,
    );

    /// `out = a b` of a factor that knows how to pack itself. Both may be rounded to bf16.
    fn multiply_packed<B: Source<u32> + Source<f32> + Source<f64>>(
        out: MatMut<'_, Self>,
        a: Mat<'_, Self::Acc>,
        b: &B,
        parallel: bool,
    );
}

/// The product of f32 and a factor that packs itself, in bf16 where the processor multiplies it.
macro_rules! multiply_packed {
    () => {
        fn multiply_rounded(
            out: MatMut<'_, f32>,
            a: Mat<'_, f32>,
            b: Mat<'_, f32>,
            accumulate: bool,
        ) {
            let extents = [out.rows(), out.cols(), a.cols()];
            let Some(kernels) = micro::for_bf16_pairs() else {
                return f32::multiply(out, a, b, 1.0, accumulate, false);
            };
            let it = Product { extents, steps: 2, alpha: 1.0, accumulate };
            blocked::product(kernels, out, &a, &b.transposed(), &it, false);
        }

        fn multiply_packed<B: Source<u32> + Source<f32> + Source<f64>>(
            out: MatMut<'_, Self>,
            a: Mat<'_, f32>,
            b: &B,
            parallel: bool,
        ) {
            let extents = [out.rows(), out.cols(), a.cols()];
            let product = |steps| Product { extents, steps, alpha: 1.0, accumulate: false };
            match micro::for_bf16_pairs() {
                Some(kernels) => blocked::product(kernels, out, &a, b, &product(2), parallel),
                None => blocked::product(micro::for_f32(), out, &a, b, &product(1), parallel),
            }
        }
    };
}

macro_rules! multiply {
    ($($ty:ty: $kernels:path, { $($packed:tt)* }),*) => {$(
        impl Multiply for $ty {
            $($packed)*


            fn multiply(
                out: MatMut<'_, $ty>,
                a: Mat<'_, $ty>,
                b: Mat<'_, $ty>,
                alpha: <$ty as Number>::Acc,
                accumulate: bool,
                parallel: bool,
            ) {
                let extents = [out.rows(), out.cols(), a.cols()];
                let it = Product { extents, steps: 1, alpha, accumulate };
                blocked::product($kernels(), out, &a, &b.transposed(), &it, parallel);
            }
        }
    )*};
}
multiply!(
    f16: micro::for_f32, { multiply_packed!(); },
    f32: micro::for_f32, { multiply_packed!(); },
    f64: micro::for_f64, {
        fn multiply_rounded(
            out: MatMut<'_, f64>,
            a: Mat<'_, f64>,
            b: Mat<'_, f64>,
            accumulate: bool,
        ) {
            f64::multiply(out, a, b, 1.0, accumulate, false);
        }

        fn multiply_packed<B: Source<u32> + Source<f32> + Source<f64>>(
            out: MatMut<'_, f64>,
            a: Mat<'_, f64>,
            b: &B,
            parallel: bool,
        ) {
            let extents = [out.rows(), out.cols(), a.cols()];
            let it = Product { extents, steps: 1, alpha: 1.0, accumulate: false };
            blocked::product(micro::for_f64(), out, &a, b, &it, parallel);
        }
    }
);

impl Multiply for bf16 {
    multiply_packed!();

    fn multiply(
        out: MatMut<'_, bf16>,
        a: Mat<'_, bf16>,
        b: Mat<'_, bf16>,
        alpha: f32,
        accumulate: bool,
        parallel: bool,
    ) {
        let (extents, b) = ([out.rows(), out.cols(), a.cols()], b.transposed());
        let product = |steps| Product { extents, steps, alpha, accumulate };
        match micro::for_bf16_pairs() {
            Some(kernels) => blocked::product(kernels, out, &a, &b, &product(2), parallel),
            None => blocked::product(micro::for_f32(), out, &a, &b, &product(1), parallel),
        }
    }
}

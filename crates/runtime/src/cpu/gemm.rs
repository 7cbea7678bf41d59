//! Matrix products: `out = alpha · a b`, or `out += alpha · a b`, and a bias for every row.
//!
//! ```text
//! multiply ─ which kernels a dtype goes to         blocked ─ all tiles, on all threads
//! pack ───── operands laid out for the kernels     micro ─── one tile, whose sums stay in registers
//! few_rows ─ a few rows times a matrix as it lies  thin ──── what is made of it
//! lanes ──── vectors of every instruction set      sum ───── products that are added up as they are made
//! kept ───── factors that are packed once          shared ── the same for the products of one call
//! ```
//!
//! The rows and columns of the result are split among threads, never the sums: any number of them gives the same bits.
//! bf16 and f16 are summed in f32. bf16 is multiplied as it is where the processor can, else widened.

mod blocked;
pub(crate) mod few_rows;
mod kept;
mod lanes;
mod micro;
mod multiply;
mod pack;
mod shared;
pub(crate) mod sum;
mod thin;

use crate::cpu::matrix::{Mat, MatMut};
use crate::cpu::number::{Accumulator, Float, Number, Real, for_float};
use crate::cpu::view::{Arg, Out, offset_of};
use crate::cpu::{parallel, scratch};
use crate::element::Element;
use crate::team;
use kept::Keeping;
pub(crate) use kept::{FactorShape, Kept};
use metal_candle_compiler::Layout;
use metal_candle_graph::DType;
pub(crate) use multiply::{Multiply, Product};
pub(crate) use pack::{Factor, Source};
pub(crate) use shared::packed_once;
use smallvec::SmallVec;

/// Results of one task of a matrix-vector product.
const VECTOR_CHUNK: usize = 256;
/// Elements that are widened at a time.
const WIDE: usize = 512;

pub(crate) fn call(args: &[Arg], outs: &mut [Out], alpha: f64, accumulate: bool, parallel: bool) {
    let ([a, b, bias @ ..], [out]) = (args, outs) else {
        panic!("metal-candle bug: gemm takes two operands and gives one")
    };
    for_float!(out.dtype(), T => {
        let bias = bias.first().map(|bias| {
            let row = bias.read::<T>().run(0).row_slice(0);
            row.expect("metal-candle bug: a bias with gaps")
        });
        let alpha = <T as Number>::Acc::from_f64(alpha);
        Batch::<T>::new(a, b, out).run(parallel, |mut out, a, b, kept, parallel| {
            if let Some(bias) = bias {
                out.start_rows_from(bias, accumulate);
            }
            gemm_keeping(out, [a, b], kept, alpha, accumulate || bias.is_some(), parallel);
        });
    });
}

/// Products of one shape at regular distances.
struct Batch<'a, T> {
    a: *const T,
    b: *const T,
    out: *mut T,
    /// Those of a and b.
    kept: [Option<&'a Kept>; 2],
    shape: BatchShape,
}

/// How many products, and of what shape.
struct BatchShape {
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
unsafe impl<T: Sync> Sync for Batch<'_, T> {}

impl BatchShape {
    /// Of a, b and out.
    fn new(layouts: [&Layout; 3]) -> BatchShape {
        let [a, b, out] = layouts.map(|layout| layout.shape);
        let rank = out.rank();
        let [m, n, k] = [out[rank - 2], out[rank - 1], a[rank - 1]];
        for (operand, extents) in [(a, [m, k]), (b, [k, n])] {
            let batched = operand.dims()[..rank - 2] == out.dims()[..rank - 2];
            let fits = batched && operand.dims()[rank - 2..] == extents;
            assert!(fits, "metal-candle bug: gemm of {a} and {b} to {out}");
        }
        let row_col = |layout: &Layout| [layout.strides[rank - 2], layout.strides[rank - 1]];
        let strides = layouts.map(row_col);
        let (extents, batch) = (SmallVec::new(), Default::default());
        let mut it = BatchShape { m, n, k, strides, extents, batch };
        for d in (0..rank - 2).rev().filter(|d| out[*d] != 1) {
            it.add_dim(out[d], layouts.map(|layout| layout.strides[d]));
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
}

impl<'a, T: Float> Batch<'a, T> {
    fn new(a: &Arg<'a>, b: &Arg<'a>, out: &mut Out) -> Batch<'a, T> {
        let shape = BatchShape::new([a.layout(), b.layout(), out.layout()]);
        let kept = [a.kept(), b.kept()];
        let (a, b) = (a.read::<T>().as_ptr(), b.read::<T>().as_ptr());
        Batch { a, b, out: out.data::<T>().0, kept, shape }
    }

    /// Runs every product: several at a time if there are enough of them, else each on all threads. Either
    /// way gives the same bits.
    fn run(
        &self,
        parallel: bool,
        product: impl Fn(MatMut<'_, T>, Mat<'_, T>, Mat<'_, T>, KeptPair<'a>, bool) + Send + Sync,
    ) {
        let BatchShape { m, n, k, strides, extents, batch } = &self.shape;
        let (m, n, k) = (*m, *n, *k);
        let products: usize = extents.iter().product();
        // Those of a whole operand.
        let kept = if products == 1 { self.kept } else { [None; 2] };
        let side_by_side = parallel && products >= team::threads();
        parallel::for_each(side_by_side, products, |i| {
            let [a, b, out] = [0, 1, 2].map(|x| offset_of(i, extents, &batch[x]));
            // SAFETY: the operands' elements, as `Arg` and `Out` promise; products write disjoint parts of an
            // output whose elements are distinct.
            unsafe {
                let a = Mat::new(self.a.wrapping_offset(a), [m, k], strides[0]);
                let b = Mat::new(self.b.wrapping_offset(b), [k, n], strides[1]);
                let out = MatMut::new(self.out.wrapping_offset(out), [m, n], strides[2]);
                product(out, a, b, kept, parallel && !side_by_side);
            }
        });
    }
}

/// The kept panels of two factors, if there are any.
type KeptPair<'a> = [Option<&'a Kept>; 2];

/// `out = alpha · a b`, added to what is there if `accumulate`.
pub(crate) fn gemm<T: Multiply<Acc: Real>>(
    out: MatMut<'_, T>,
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    alpha: T::Acc,
    accumulate: bool,
    parallel: bool,
) {
    gemm_keeping(out, [a, b], [None; 2], alpha, accumulate, parallel);
}

/// [`gemm`] of matrices whose panels may be kept.
fn gemm_keeping<T: Multiply<Acc: Real>>(
    out: MatMut<'_, T>,
    [a, b]: [Mat<'_, T>; 2],
    kept: KeptPair,
    alpha: T::Acc,
    accumulate: bool,
    parallel: bool,
) {
    let columns = b.transposed();
    let [rows, columns] = [(&a, kept[0]), (&columns, kept[1])]
        .map(|(matrix, kept)| Keeping { factor: T::factor(matrix), kept });
    gemm_with(out, [a, b], [Some(&rows), Some(&columns)], alpha, accumulate, parallel);
}

/// [`gemm`] of matrices, of which these are the factors where there are any: rows of a, and columns of b.
fn gemm_with<T: Multiply<Acc: Real>>(
    mut out: MatMut<'_, T>,
    [a, b]: [Mat<'_, T>; 2],
    factors: [Option<&dyn Factor>; 2],
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
        _ => is_turned([out.row_stride(), out.col_stride()]),
    };
    let (mut out, a, b, factors) = match turned {
        true => (out.transposed(), b.transposed(), a.transposed(), [factors[1], factors[0]]),
        false => (out, a, b, factors),
    };
    if out.cols() == 1 && a.col_stride() == 1 {
        return times_vector(out, a, b, alpha, accumulate, parallel);
    }
    let extents = [out.rows(), out.cols(), a.cols()];
    let product = Product { extents, alpha, accumulate, rounded: false };
    if T::multiply_thin(&mut out, a, b, product, parallel) {
        return;
    }
    let b = b.transposed();
    let [rows, columns] = factors;
    let rows = rows.unwrap_or_else(|| T::factor(&a));
    let columns = columns.unwrap_or_else(|| T::factor(&b));
    T::multiply(out, rows, columns, product, parallel);
}

/// Whether a result of several rows and columns is made column by column: they lie side by side, unlike rows.
fn is_turned([row_stride, col_stride]: [isize; 2]) -> bool {
    col_stride != 1 && row_stride == 1
}

/// [`gemm`] for a result that is summed on this thread, of factors of dtype `T` or made of such: if that is bf16, they
/// may be rounded to it.
pub(crate) fn gemm_of<T: Float, A, B>(
    out: MatMut<'_, T::Acc>,
    a: Mat<'_, A>,
    b: Mat<'_, B>,
    alpha: T::Acc,
    accumulate: bool,
) where
    A: Multiply<Acc = T::Acc>,
    B: Multiply<Acc = T::Acc>,
{
    if A::DTYPE == T::Acc::DTYPE && B::DTYPE == T::Acc::DTYPE && T::DTYPE != DType::BF16 {
        return gemm(out, a.widened(&mut []), b.widened(&mut []), alpha, accumulate, false);
    }
    gemm_factors(out, a, b, alpha, accumulate, T::DTYPE == DType::BF16);
}

/// `out = a b` on this thread, as [`gemm_of`], of rows that were [packed before](packed_once): for a result that may
/// be rounded if `T` is bf16.
pub(crate) fn gemm_of_packed<T: Float>(
    out: MatMut<'_, T::Acc>,
    (a, packed): (Mat<'_, T>, &dyn Factor),
    b: Mat<'_, T>,
) {
    let alpha = T::Acc::from_f64(1.0);
    if T::DTYPE == T::Acc::DTYPE {
        let matrices = [a.widened(&mut []), b.widened(&mut [])];
        return gemm_with(out, matrices, [Some(packed), None], alpha, false, false);
    }
    let extents = [out.rows(), out.cols(), a.cols()];
    let rounded = T::DTYPE == DType::BF16;
    let product = Product { extents, alpha, accumulate: false, rounded };
    multiply_factors(out, [packed, T::factor(&b.transposed())], product);
}

/// [`gemm`] on this thread, of factors that are packed as they are, and may be rounded to bf16 if `rounded`.
pub(crate) fn gemm_factors<S: Real, A: Multiply<Acc = S>, B: Multiply<Acc = S>>(
    out: MatMut<'_, S>,
    a: Mat<'_, A>,
    b: Mat<'_, B>,
    alpha: S,
    accumulate: bool,
    rounded: bool,
) {
    let extents = [out.rows(), out.cols(), a.cols()];
    let fits = extents == [a.rows(), b.cols(), b.rows()];
    assert!(fits, "metal-candle bug: gemm of matrices that do not fit");
    let product = Product { extents, alpha, accumulate, rounded };
    multiply_factors(out, [A::factor(&a), B::factor(&b.transposed())], product);
}

/// A product on this thread, of factors that pack themselves, or were packed before; any extent may be 0.
pub(crate) fn multiply_factors<S: Real>(
    mut out: MatMut<'_, S>,
    [a, b]: [&dyn Factor; 2],
    product: Product<S>,
) {
    if !product.extents.contains(&0) {
        S::multiply(out, a, b, product, false);
    } else if !product.accumulate {
        out.fill(S::ZERO);
    }
}

/// `out = a b` of a factor that packs itself. Both may be rounded to bf16; nothing is empty.
pub(crate) fn gemm_packed<T: Multiply<Acc: Real>, A: Multiply>(
    out: MatMut<'_, T>,
    a: Mat<'_, A>,
    b: &dyn Factor,
    parallel: bool,
) {
    let extents = [out.rows(), out.cols(), a.cols()];
    let alpha = T::Acc::from_f64(1.0);
    let product = Product { extents, alpha, accumulate: false, rounded: true };
    T::multiply(out, A::factor(&a), b, product, parallel);
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

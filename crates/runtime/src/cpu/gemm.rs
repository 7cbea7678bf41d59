//! Matrix products: `out = alpha · a b`, or `out += alpha · a b`.
//!
//! f32 and f64 go to the `gemm` crate as they lie. It splits the rows and columns of the result among threads,
//! never the sums, and so gives the same bits with any number of them. bf16 and f16 are widened block by block and
//! summed in f32.

use crate::cpu::matrix::{Mat, MatMut};
use crate::cpu::number::{Accumulator, Float, Number, Real, for_float};
use crate::cpu::view::{Arg, Out, offset_of};
use crate::cpu::{parallel, scratch};
use ::gemm::Parallelism;
use metal_candle_graph::DType;
use smallvec::SmallVec;

/// Result elements that one task of a matrix-vector product computes, where the matrix lies by columns: they stay
/// in the L1 cache while it streams by once.
const VECTOR_CHUNK: usize = 1024;
/// The same where it lies by rows: that many dot products.
const DOTS_CHUNK: usize = 256;

/// Extents of the blocks that are widened at a time: rows of a, columns of b, and what is summed over.
const BLOCK_M: usize = 128;
const BLOCK_N: usize = 256;
const BLOCK_K: usize = 256;

pub(crate) fn call(args: &[Arg], outs: &mut [Out], alpha: f64, accumulate: bool, parallel: bool) {
    let ([a, b], [out]) = (args, outs) else {
        panic!("metal-candle bug: gemm takes two operands and gives one")
    };
    match out.dtype() {
        DType::F32 => Batch::<f32>::new(a, b, out).run(parallel, |out, a, b, parallel| {
            gemm(out, a, b, alpha as f32, accumulate, parallel);
        }),
        DType::F64 => Batch::<f64>::new(a, b, out).run(parallel, |out, a, b, parallel| {
            gemm(out, a, b, alpha, accumulate, parallel);
        }),
        dtype => for_float!(dtype, T => {
            Batch::<T>::new(a, b, out).run(parallel, |out, a, b, parallel| {
                let alpha = <T as Number>::Acc::from_f64(alpha);
                gemm_widened(out, a, b, alpha, accumulate, parallel);
            });
        }),
    }
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
pub(crate) fn gemm<T: Real>(
    mut out: MatMut<'_, T>,
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    alpha: T,
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
            out.fill(T::ZERO);
        }
        return;
    }
    if out.rows() == 1 {
        // `x M = (Mᵀ xᵀ)ᵀ`
        return gemv(out.transposed(), b.transposed(), a.transposed(), alpha, accumulate, parallel);
    }
    if out.cols() == 1 {
        return gemv(out, a, b, alpha, accumulate, parallel);
    }
    call_crate(&mut out, a, b, alpha, accumulate, parallel);
}

/// A product with a column, cut into chunks of the result.
fn gemv<T: Real>(
    mut out: MatMut<'_, T>,
    a: Mat<'_, T>,
    x: Mat<'_, T>,
    alpha: T,
    accumulate: bool,
    parallel: bool,
) {
    scratch::with(x.rows(), |packed: &mut [T]| {
        let x = if x.row_stride() == 1 { x } else { x.packed(packed) };
        let chunk_len = if a.row_stride() == 1 { VECTOR_CHUNK } else { DOTS_CHUNK };
        let chunks = out.rows().div_ceil(chunk_len);
        let rows = SharedRows(out.as_mut_ptr(), out.row_stride());
        parallel::for_each(parallel, chunks, |chunk| {
            let start = chunk * chunk_len;
            let len = chunk_len.min(a.rows() - start);
            // SAFETY: chunks are disjoint rows of `out`, which is borrowed until all are done.
            let mut out = unsafe { MatMut::new(rows.at(start), [len, 1], [rows.1, 1]) };
            call_crate(&mut out, a.row_range(start, len), x, alpha, accumulate, false);
        });
    });
}

struct SharedRows<T>(*mut T, isize);
// SAFETY: `gemv` gives every task rows of its own.
unsafe impl<T: Send> Sync for SharedRows<T> {}

impl<T> SharedRows<T> {
    fn at(&self, row: usize) -> *mut T {
        self.0.wrapping_offset(row as isize * self.1)
    }
}

fn call_crate<T: Real>(
    out: &mut MatMut<'_, T>,
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    alpha: T,
    accumulate: bool,
    parallel: bool,
) {
    let parallelism = if parallel { Parallelism::Rayon(0) } else { Parallelism::None };
    let (m, n, k) = (out.rows(), out.cols(), a.cols());
    let (out_col, out_row) = (out.col_stride(), out.row_stride());
    // SAFETY: the matrices are valid for their extents and strides, and `out` overlaps neither operand, for it
    // is ours alone. The crate computes `alpha · dst + beta · lhs rhs`, and reads `dst` only if told to.
    unsafe {
        ::gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            out_col,
            out_row,
            accumulate,
            a.as_ptr(),
            a.col_stride(),
            a.row_stride(),
            b.as_ptr(),
            b.col_stride(),
            b.row_stride(),
            T::from_f64(1.0),
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// [`gemm`] of types that are summed in a wider one. Blocks of the result are independent tasks; the sum of
/// each is rounded once.
fn gemm_widened<T: Float>(
    mut out: MatMut<'_, T>,
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    alpha: T::Acc,
    accumulate: bool,
    parallel: bool,
) {
    let (m, n, k) = (out.rows(), out.cols(), a.cols());
    let (across, down) = (n.div_ceil(BLOCK_N), m.div_ceil(BLOCK_M));
    let strides = [out.row_stride(), out.col_stride()];
    let blocks = SharedRows(out.as_mut_ptr(), strides[0]);
    parallel::for_each(parallel, across * down, |block| {
        let (i, j) = (block / across * BLOCK_M, block % across * BLOCK_N);
        let (rows, cols) = (BLOCK_M.min(m - i), BLOCK_N.min(n - j));
        let data = blocks.at(i).wrapping_offset(j as isize * strides[1]);
        // SAFETY: blocks are disjoint parts of `out`, which is borrowed until all are done.
        let mut out = unsafe { MatMut::new(data, [rows, cols], strides) };
        scratch::with(rows * cols, |sums: &mut [T::Acc]| {
            sum_block(a.row_range(i, rows), b.col_range(j, cols), k, sums);
            out.update(|x, i, j| {
                let product = alpha * sums[i * cols + j];
                T::narrow(if accumulate { product + x.widen() } else { product })
            });
        });
    });
}

/// `sums = a b`
fn sum_block<T: Float>(a: Mat<'_, T>, b: Mat<'_, T>, k: usize, sums: &mut [T::Acc]) {
    let (rows, cols) = (a.rows(), b.cols());
    let one = T::Acc::from_f64(1.0);
    let depth = BLOCK_K.min(k);
    sums.fill(T::Acc::ZERO);
    scratch::split([rows * depth, depth * cols], |[wide_a, wide_b]| {
        for start in (0..k).step_by(BLOCK_K) {
            let len = BLOCK_K.min(k - start);
            let a = a.col_range(start, len).widened(wide_a);
            let b = b.row_range(start, len).widened(wide_b);
            gemm(MatMut::dense(sums, rows, cols), a, b, one, true, false);
        }
    });
}

//! Products with a thin side, as LoRA's: the thick factor is read where it lies, and nothing of it is packed.
//!
//! bf16 is multiplied in pairs where the processor can ([`pairs`]); else halves are widened as they are read.

#[cfg(target_arch = "x86_64")]
mod pairs;

use super::Product;
use super::few_rows::InRows;
#[cfg(target_arch = "x86_64")]
use super::pack::Source;
use crate::cpu::matrix::{Mat, MatMut};
use crate::cpu::{parallel, scratch};
use half::bf16;

/// The longest thin side, and that of pairs.
const THIN: usize = 16;
const THIN_PAIRS: usize = 24;
/// Of sides longer than this, nothing is thin.
pub(super) const LONGEST: usize = THIN_PAIRS;
/// Rows of the result that a task makes; and where the thick factor lies across them, so that a task reads some
/// cache lines of each of its rows.
const TASK: usize = 32;
const TASK_ACROSS: usize = 96;
/// Rows of the thick factor that are added up at a time: the task's part of them stays in the L1 cache.
const BLOCK: usize = 64;
/// Multiplications from which on another thread is worth waking.
const PARALLEL_WORK: usize = 1 << 18;

/// The product, if one side is thin and the others lie as the loops need them; whether it was made.
pub(super) fn product<T: Thick>(
    out: &mut MatMut<'_, T>,
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    product: Product<f32>,
    parallel: bool,
) -> bool {
    let [m, n, k] = product.extents;
    let thin = if T::has_pairs() { THIN_PAIRS } else { THIN };
    let to = Result::new(out, product);
    // `(a b)ᵀ = bᵀ aᵀ`: the thin side is that of columns.
    let (to, thick, other) = match (n <= thin && m > thin, m <= thin && n > thin) {
        _ if k <= THIN => return false,
        (true, _) => (to, a, b.transposed()),
        (_, true) => (to.transposed(), b.transposed(), a),
        _ => return false,
    };
    let parallel = parallel && m * n * k >= PARALLEL_WORK;
    if thick.col_stride() == 1 {
        to.inner(thick, other, parallel);
    } else if thick.row_stride() == 1 {
        to.inner_across(thick, other, parallel);
    } else {
        return false;
    }
    true
}

/// [`product`], or one of short sums.
pub(super) fn product_f32(
    out: &mut MatMut<'_, f32>,
    a: Mat<'_, f32>,
    b: Mat<'_, f32>,
    product: Product<f32>,
    parallel: bool,
) -> bool {
    let [m, n, k] = product.extents;
    let dense = b.col_stride() == 1 && out.col_stride() == 1;
    if k <= THIN && n > THIN && dense {
        Result::new(out, product).outer(a, b, parallel && m * n * k >= PARALLEL_WORK);
        return true;
    }
    self::product(out, a, b, product, parallel)
}

/// Elements of a thick factor.
pub(super) trait Thick: InRows {
    /// Whether [`pairs`] multiplies them.
    fn has_pairs() -> bool {
        false
    }

    /// The factors themselves, where that is so.
    #[cfg(target_arch = "x86_64")]
    fn as_pairs<'m>(_factors: [Mat<'m, Self>; 2]) -> Option<[Mat<'m, bf16>; 2]> {
        None
    }
}

impl Thick for f32 {}
impl Thick for half::f16 {}
impl Thick for bf16 {
    fn has_pairs() -> bool {
        cfg!(target_arch = "x86_64") && super::micro::for_bf16_pairs().is_some()
    }

    #[cfg(target_arch = "x86_64")]
    fn as_pairs<'m>(factors: [Mat<'m, bf16>; 2]) -> Option<[Mat<'m, bf16>; 2]> {
        Self::has_pairs().then_some(factors)
    }
}

/// Where the result goes; tasks write disjoint parts of it.
struct Result<T> {
    data: *mut T,
    strides: [isize; 2],
    product: Product<f32>,
}

// SAFETY: a matrix that is borrowed for the product; every part of it belongs to one task.
unsafe impl<T: Send> Sync for Result<T> {}

impl Result<f32> {
    /// A short sum for each element: rows of `b` are added up, weighted, in rows of the result.
    fn outer(&self, a: Mat<'_, f32>, b: Mat<'_, f32>, parallel: bool) {
        let [m, n, k] = self.product.extents;
        parallel::for_each(parallel, m.div_ceil(TASK), |task| {
            let rows = task * TASK..((task + 1) * TASK).min(m);
            scratch::with(rows.len() * k, |weights: &mut [f32]| {
                let a = a.row_range(rows.start, rows.len()).packed_rows(weights);
                a.iter_mut().for_each(|a| *a *= self.product.alpha);
                for (row, weights) in rows.zip(a.chunks_exact(k)) {
                    // SAFETY: a row of the result, whose elements lie side by side, belongs to one task. It may be
                    // uninitialised, and is then written first.
                    let to = unsafe {
                        let to = self.data.offset(row as isize * self.strides[0]);
                        if !self.product.accumulate {
                            std::ptr::write_bytes(to, 0, n);
                        }
                        std::slice::from_raw_parts_mut(to, n)
                    };
                    // SAFETY: this processor has what the loops were compiled for.
                    unsafe { (f32::loops().weigh)(weights, k, b, to) };
                }
            });
        });
    }
}

impl<T: Thick> Result<T> {
    fn new(out: &mut MatMut<'_, T>, product: Product<f32>) -> Result<T> {
        let strides = [out.row_stride(), out.col_stride()];
        Result { data: out.as_mut_ptr(), strides, product }
    }

    fn transposed(mut self) -> Result<T> {
        self.strides.swap(0, 1);
        self.product.extents.swap(0, 1);
        self
    }

    /// Dot products of rows of `thick`, whose elements lie side by side, and of `thin`.
    fn inner(&self, thick: Mat<'_, T>, thin: Mat<'_, T>, parallel: bool) {
        let [_, n, k] = self.product.extents;
        #[cfg(target_arch = "x86_64")]
        if let Some([thick, thin]) = T::as_pairs([thick, thin]) {
            return scratch::with(n * k.div_ceil(2), |packed: &mut [u32]| {
                pack_rows(thin, packed);
                self.by_rows(TASK, 1, parallel, |start, rows, sums, stride| {
                    // SAFETY: this processor has what the loops were compiled for.
                    unsafe { pairs::dots(packed, thick.row_range(start, rows), sums, stride) };
                });
            });
        }
        scratch::with(n * k, |packed: &mut [f32]| {
            widen_rows(thin, packed);
            self.by_rows(TASK, 1, parallel, |start, rows, sums, stride| {
                // SAFETY: as above.
                unsafe { (T::loops().dots)(packed, thick.row_range(start, rows), sums, stride) };
            });
        });
    }

    /// The same where the elements of a column of `thick` lie side by side: its rows are added up, weighted.
    fn inner_across(&self, thick: Mat<'_, T>, thin: Mat<'_, T>, parallel: bool) {
        let [_, n, k] = self.product.extents;
        #[cfg(target_arch = "x86_64")]
        if let Some([thick, thin]) = T::as_pairs([thick, thin]) {
            return scratch::with(n * k.div_ceil(2), |packed: &mut [u32]| {
                Source::<u32>::pack(&thin, 0..n, 0..k, n, packed);
                self.by_rows(
                    TASK_ACROSS,
                    pairs::ELEMENTS,
                    parallel,
                    |start, rows, sums, stride| {
                        let thick = thick.row_range(start, rows).transposed();
                        // SAFETY: as above.
                        unsafe { pairs::weigh(packed, thick, sums, stride) };
                    },
                );
            });
        }
        scratch::with(n * k, |packed: &mut [f32]| {
            widen_rows(thin, packed);
            self.by_rows(TASK_ACROSS, 1, parallel, |start, rows, sums, _| {
                sums.fill(0.0);
                let thick = thick.row_range(start, rows).transposed();
                for start in (0..k).step_by(BLOCK) {
                    let thick = thick.row_range(start, BLOCK.min(k - start));
                    // SAFETY: as above.
                    unsafe { (T::loops().weigh)(&packed[start..], k, thick, sums) };
                }
            });
        });
    }

    /// Some rows of the result for each task: `sum(start, rows, sums, stride)` makes `[n, rows]`, whose rows are `stride` apart,
    /// a multiple of `align`.
    fn by_rows(
        &self,
        task_rows: usize,
        align: usize,
        parallel: bool,
        sum: impl Fn(usize, usize, &mut [f32], usize) + Send + Sync,
    ) {
        let [m, n, _] = self.product.extents;
        parallel::for_each(parallel, m.div_ceil(task_rows), |task| {
            let start = task * task_rows;
            let rows = task_rows.min(m - start);
            let stride = rows.next_multiple_of(align);
            scratch::with(n * stride, |sums: &mut [f32]| {
                sum(start, rows, sums, stride);
                self.store(sums, stride, start, rows);
            });
        });
    }

    /// Stores `[n, rows]`, of the result's rows from `start` on.
    fn store(&self, sums: &[f32], stride: usize, start: usize, rows: usize) {
        let Product { alpha, accumulate, .. } = self.product;
        for (col, sums) in sums.chunks_exact(stride).enumerate() {
            for (row, sum) in sums[..rows].iter().enumerate() {
                let at = (start + row) as isize * self.strides[0] + col as isize * self.strides[1];
                // SAFETY: within the result; rows belong to one task; read only where it is accumulated onto.
                unsafe {
                    let to = self.data.offset(at);
                    let sum = alpha * sum;
                    to.write(T::narrow(if accumulate { (*to).widen() + sum } else { sum }));
                }
            }
        }
    }
}

/// The rows one after the other, in pairs; what is missing of the last one is 0.
#[cfg(target_arch = "x86_64")]
fn pack_rows(from: Mat<'_, bf16>, to: &mut [u32]) {
    let (by_k, words) = (from.transposed(), from.cols().div_ceil(2));
    let word = |x: bf16, y: bf16| u32::from(x.to_bits()) | u32::from(y.to_bits()) << 16;
    if by_k.col_stride() != 1 {
        for (i, to) in to.chunks_exact_mut(words).enumerate() {
            for (k, to) in to.iter_mut().enumerate() {
                let last =
                    if 2 * k + 1 < from.cols() { from.get(i, 2 * k + 1) } else { bf16::ZERO };
                *to = word(from.get(i, 2 * k), last);
            }
        }
        return;
    }
    // The rows' elements of one `k` lie side by side.
    let zeros = [bf16::ZERO; THIN_PAIRS];
    for at in 0..words {
        let first = by_k.row_slice(2 * at).unwrap_or(&[]);
        let last = (2 * at + 1 < from.cols()).then(|| by_k.row_slice(2 * at + 1)).flatten();
        for (i, (x, y)) in first.iter().zip(last.unwrap_or(&zeros)).enumerate() {
            to[i * words + at] = word(*x, *y);
        }
    }
}

/// The rows one after the other, in f32.
fn widen_rows<T: Thick>(from: Mat<'_, T>, to: &mut [f32]) {
    for (i, to) in to.chunks_exact_mut(from.cols()).enumerate() {
        match from.row_slice(i) {
            Some(row) => T::widen_all(row, to),
            None => to.iter_mut().enumerate().for_each(|(k, x)| *x = from.get(i, k).widen()),
        }
    }
}

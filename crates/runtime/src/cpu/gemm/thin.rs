//! Products of f32 with a thin side, as LoRA's: nothing is packed, and the thick factor is read where it lies.

use super::Product;
use super::few_rows::InRows;
use crate::cpu::matrix::{Mat, MatMut};
use crate::cpu::{parallel, scratch};

/// The longest thin side.
const THIN: usize = 16;
/// Rows or columns of the result that a task makes.
const TASK: usize = 32;
/// Multiplications from which on another thread is worth waking.
const PARALLEL_WORK: usize = 1 << 18;

/// The product, if one side is thin and the others lie as the loops need them; whether it was made.
pub(super) fn product(
    out: &mut MatMut<'_, f32>,
    a: Mat<'_, f32>,
    b: Mat<'_, f32>,
    product: Product<f32>,
    parallel: bool,
) -> bool {
    let [m, n, k] = product.extents;
    let parallel = parallel && m * n * k >= PARALLEL_WORK;
    let strides = [out.row_stride(), out.col_stride()];
    let to = Result { data: out.as_mut_ptr(), strides, product };
    if k <= THIN {
        let dense = b.col_stride() == 1 && out.col_stride() == 1 && n > THIN;
        if dense {
            to.outer(a, b, parallel);
        }
        return dense;
    }
    // `(a b)ᵀ = bᵀ aᵀ`: the thin side is that of columns.
    let (to, thick, thin) = match (n <= THIN && m > THIN, m <= THIN && n > THIN) {
        (true, _) => (to, a, b.transposed()),
        (_, true) => (to.transposed(), b.transposed(), a),
        _ => return false,
    };
    if thick.col_stride() == 1 {
        to.inner(thick, thin, parallel);
    } else if thick.row_stride() == 1 {
        to.inner_across(thick, thin, parallel);
    } else {
        return false;
    }
    true
}

/// Where the result goes; tasks write disjoint parts of it.
struct Result {
    data: *mut f32,
    strides: [isize; 2],
    product: Product<f32>,
}

// SAFETY: a matrix that is borrowed for the product; every part of it belongs to one task.
unsafe impl Sync for Result {}

impl Result {
    fn transposed(mut self) -> Result {
        self.strides.swap(0, 1);
        self.product.extents.swap(0, 1);
        self
    }

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

    /// Dot products of rows of `thick`, whose elements lie side by side, and of `thin`.
    fn inner(&self, thick: Mat<'_, f32>, thin: Mat<'_, f32>, parallel: bool) {
        self.by_rows(thick, thin, parallel, |thin, thick, sums, rows| {
            // SAFETY: this processor has what the loops were compiled for.
            unsafe { (f32::loops().dots)(thin, thick, sums, rows) };
        });
    }

    /// The same where the elements of a column of `thick` lie side by side: its rows are added up, weighted.
    fn inner_across(&self, thick: Mat<'_, f32>, thin: Mat<'_, f32>, parallel: bool) {
        let k = self.product.extents[2];
        self.by_rows(thick, thin, parallel, |thin, thick, sums, _| {
            // SAFETY: as above.
            unsafe { (f32::loops().weigh)(thin, k, thick.transposed(), sums) };
        });
    }

    /// Some rows of `thick` for each task: `sum` makes `[n, rows]` of the packed `thin` and of them.
    fn by_rows(
        &self,
        thick: Mat<'_, f32>,
        thin: Mat<'_, f32>,
        parallel: bool,
        sum: impl Fn(&[f32], Mat<'_, f32>, &mut [f32], usize) + Sync,
    ) {
        let [m, n, k] = self.product.extents;
        scratch::with(n * k, |packed: &mut [f32]| {
            let thin = &*thin.packed_rows(packed);
            parallel::for_each(parallel, m.div_ceil(TASK), |task| {
                let start = task * TASK;
                let rows = TASK.min(m - start);
                let mut sums = [0.0; THIN * TASK];
                let sums = &mut sums[..n * rows];
                sum(thin, thick.row_range(start, rows), sums, rows);
                self.store(sums, start, rows);
            });
        });
    }

    /// Stores `[n, rows]`, of the result's rows from `start` on.
    fn store(&self, sums: &[f32], start: usize, rows: usize) {
        let Product { alpha, accumulate, .. } = self.product;
        for (col, sums) in sums.chunks_exact(rows).enumerate() {
            for (row, sum) in sums.iter().enumerate() {
                let at = (start + row) as isize * self.strides[0] + col as isize * self.strides[1];
                // SAFETY: within the result; rows belong to one task; read only where it is accumulated onto.
                unsafe {
                    let to = self.data.offset(at);
                    to.write(if accumulate { *to + alpha * sum } else { alpha * sum });
                }
            }
        }
    }
}

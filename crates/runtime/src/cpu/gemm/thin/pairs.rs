//! The loops of thin products by dot products of pairs of bf16, which AVX-512 BF16 has.
//!
//! Closures are compiled apart, for no instruction set in particular: the loops have none.

use crate::cpu::gemm::lanes::Lanes;
use crate::cpu::gemm::lanes::x86::Bf16Pairs;
use crate::cpu::matrix::Mat;
use half::bf16;

/// Elements of a vector.
pub(super) const ELEMENTS: usize = 32;
/// Pairs of rows whose part of a task stays in the L1 cache.
const BLOCK: usize = 32;

/// `sums[i, row] = Σ thin[i, k] thick[row, k]`, rows of `sums` being `stride` apart: `thin [n, k / 2]` in pairs. Elements of
/// a row of `thick` lie side by side.
///
/// # Safety
/// The processor has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
pub(super) unsafe fn dots(thin: &[u32], thick: Mat<'_, bf16>, sums: &mut [f32], stride: usize) {
    let (rows, words) = (thick.rows(), thick.cols().div_ceil(2));
    for first in (0..rows).step_by(4) {
        let mut four = [&[][..]; 4];
        for (i, row) in four.iter_mut().enumerate() {
            *row =
                thick.row_slice((first + i).min(rows - 1)).expect("metal-candle bug: dense rows");
        }
        for (thin, sums) in thin.chunks(4 * words).zip(sums.chunks_mut(4 * stride)) {
            let sums = &mut sums[first..];
            // SAFETY: the caller's promise.
            unsafe {
                match thin.len() / words {
                    1 => dots_of::<1>(thin, four, sums, [rows - first, stride]),
                    2 => dots_of::<2>(thin, four, sums, [rows - first, stride]),
                    3 => dots_of::<3>(thin, four, sums, [rows - first, stride]),
                    _ => dots_of::<4>(thin, four, sums, [rows - first, stride]),
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn dots_of<const ROWS: usize>(
    thin: &[u32],
    thick: [&[bf16]; 4],
    to: &mut [f32],
    [rows, stride]: [usize; 2],
) {
    let (k, words) = (thick[0].len(), thin.len() / ROWS);
    assert!(words == k.div_ceil(2), "metal-candle bug: a thin factor of its size");
    // SAFETY: the caller's promise; `k` elements are in each row of `thick`, and their pairs in each of `thin`.
    unsafe {
        let mut sums = [[Bf16Pairs::zero(); 4]; ROWS];
        for at in (0..k).step_by(ELEMENTS) {
            let len = k - at;
            let mut x = [Bf16Pairs::zero(); 4];
            for (x, row) in x.iter_mut().zip(thick) {
                *x = Bf16Pairs::load_first(row.as_ptr().add(at).cast(), len);
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let pairs = thin.as_ptr().add(i * words + at / 2);
                let y = Bf16Pairs::load_first(pairs.cast(), len.next_multiple_of(2));
                for (sum, x) in sums.iter_mut().zip(x) {
                    *sum = sum.multiply_add(x, y);
                }
            }
        }
        for (i, sums) in sums.into_iter().enumerate() {
            let to = &mut to[i * stride..][..rows.min(4)];
            to.copy_from_slice(&Bf16Pairs::sums(sums)[..to.len()]);
        }
    }
}

/// `sums[i, col] = Σ weights[k, i] thick[k, col]`, rows of `sums` being `stride` apart, whole vectors of
/// [`ELEMENTS`]: `weights [k / 2, n]` in pairs. Elements of a row of `thick` lie side by side.
///
/// # Safety
/// The processor has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
pub(super) unsafe fn weigh(weights: &[u32], thick: Mat<'_, bf16>, sums: &mut [f32], stride: usize) {
    let n = weights.len() / thick.rows().div_ceil(2);
    sums.fill(0.0);
    for (block, weights) in weights.chunks(BLOCK * n).enumerate() {
        let start = 2 * BLOCK * block;
        let thick = thick.row_range(start, (thick.rows() - start).min(2 * BLOCK));
        for col in (0..thick.cols()).step_by(ELEMENTS) {
            let mut i = 0;
            while i < n {
                let (weights, sums) = (&weights[i..], &mut sums[i * stride + col..]);
                // SAFETY: the caller's promise.
                i += unsafe {
                    match n - i {
                        8.. => weigh_of::<8>(weights, n, thick, col, sums, stride),
                        4.. => weigh_of::<4>(weights, n, thick, col, sums, stride),
                        2.. => weigh_of::<2>(weights, n, thick, col, sums, stride),
                        _ => weigh_of::<1>(weights, n, thick, col, sums, stride),
                    }
                };
            }
        }
    }
}

/// Adds to `ROWS` rows of sums, a vector of elements wide.
#[inline(always)]
unsafe fn weigh_of<const ROWS: usize>(
    weights: &[u32],
    n: usize,
    thick: Mat<'_, bf16>,
    col: usize,
    to: &mut [f32],
    stride: usize,
) -> usize {
    let (rows, len) = (thick.rows(), thick.cols() - col);
    let pairs = rows.div_ceil(2);
    let fits =
        weights.len() >= (pairs - 1) * n + ROWS && to.len() >= (ROWS - 1) * stride + ELEMENTS;
    assert!(fits && thick.col_stride() == 1, "metal-candle bug: a thin factor of its size");
    // SAFETY: the caller's promise; the rows and columns are there, as was seen.
    unsafe {
        let mut sums = [[Bf16Pairs::zero(); 2]; ROWS];
        for (i, sums) in sums.iter_mut().enumerate() {
            for (half, sum) in sums.iter_mut().enumerate() {
                *sum = Bf16Pairs::load_sums(to.as_ptr().add(i * stride + half * Bf16Pairs::LANES));
            }
        }
        let row = |k: usize| thick.as_ptr().offset(k as isize * thick.row_stride()).add(col);
        for pair in 0..pairs {
            let above = Bf16Pairs::load_first(row(2 * pair).cast(), len);
            let below = match 2 * pair + 1 < rows {
                true => Bf16Pairs::load_first(row(2 * pair + 1).cast(), len),
                false => Bf16Pairs::zero(),
            };
            let x = Bf16Pairs::paired(above, below);
            for (i, sums) in sums.iter_mut().enumerate() {
                let weight = Bf16Pairs::splat(weights.as_ptr().add(pair * n + i));
                for (sum, x) in sums.iter_mut().zip(x) {
                    *sum = sum.multiply_add(weight, x);
                }
            }
        }
        for (i, sums) in sums.into_iter().enumerate() {
            for (half, sum) in sums.into_iter().enumerate() {
                sum.store(to.as_mut_ptr().add(i * stride + half * Bf16Pairs::LANES));
            }
        }
    }
    ROWS
}

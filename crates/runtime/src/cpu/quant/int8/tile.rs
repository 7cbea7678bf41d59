//! The products of a panel of rows and a panel of weights, which stay in registers.

use super::{COLS, ROWS, STEPS, row_words, weight_words};
use crate::cpu::simd::prefetch_near;
use std::arch::x86_64::*;

/// Results, where they cannot be written in place.
#[repr(align(64))]
pub(super) struct Tile(pub(super) [[f32; COLS]; ROWS]);

impl Tile {
    pub(super) const ZERO: Tile = Tile([[0.0; COLS]; ROWS]);
}

/// A panel of rows times one of weights, to rows of [`COLS`] that lie so many elements apart.
pub(super) type TileFn = unsafe fn(rows: &[u32], weights: &[u32], to: *mut f32, row_stride: usize);

/// # Safety
/// The processor has the instructions, and the results are ours to be written.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
pub(super) unsafe fn tile<const R: usize, const HALVES: usize, const OFFSET: i32>(
    rows: &[u32],
    weights: &[u32],
    to: *mut f32,
    row_stride: usize,
) {
    let (row_words, weight_words) = (row_words(HALVES) * R, weight_words(HALVES, OFFSET));
    let parts = rows.len() / row_words;
    assert!(weights.len() >= parts * weight_words, "metal-candle bug: a panel of its size");
    let (mut x, mut w) = (rows.as_ptr(), weights.as_ptr());
    // A long row away from each other: the results of one tile are in no cache when the next one is written.
    for i in 0..R {
        prefetch_near(to.wrapping_add(i * row_stride));
        prefetch_near(to.wrapping_add(i * row_stride + 16));
    }
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    for _ in 0..parts {
        // SAFETY: within the panels, as was seen.
        unsafe {
            let (x_scales, w_scales) = (x.add(STEPS * R), w.add(STEPS * COLS));
            for half in 0..HALVES {
                let x_sums = x_scales.add((1 + half) * R);
                let mut products = [[_mm512_setzero_si512(); 2]; R];
                if OFFSET != 0 {
                    for (i, products) in products.iter_mut().enumerate() {
                        let offset = _mm512_set1_epi32((*x_sums.add(i)).cast_signed());
                        *products = [offset; 2];
                    }
                }
                for step in half * STEPS / HALVES..(half + 1) * STEPS / HALVES {
                    let w = [0, 16].map(|v| w.add(step * COLS + v));
                    let w = [_mm512_loadu_si512(w[0].cast()), _mm512_loadu_si512(w[1].cast())];
                    for (i, products) in products.iter_mut().enumerate() {
                        let x = _mm512_set1_epi32((*x.add(i * STEPS + step)).cast_signed());
                        products[0] = _mm512_dpbusd_epi32(products[0], w[0], x);
                        products[1] = _mm512_dpbusd_epi32(products[1], w[1], x);
                    }
                }
                // Row by row: what belongs to a row takes registers for as long as the row does.
                let at = w_scales.add(half * COLS).cast::<f32>();
                let scales = [_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(16))];
                for (i, (sums, products)) in sums.iter_mut().zip(products).enumerate() {
                    let x_scale = _mm512_set1_ps(*x_scales.add(i).cast::<f32>());
                    for v in 0..2 {
                        let (scale, product) = (_mm512_mul_ps(scales[v], x_scale), products[v]);
                        sums[v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), scale, sums[v]);
                        if OFFSET == 0 {
                            let shifts = _mm512_loadu_ps(at.add(HALVES * COLS + v * 16));
                            let x_sum = _mm512_set1_ps(*x_sums.add(i).cast::<f32>());
                            sums[v] = _mm512_fmadd_ps(shifts, x_sum, sums[v]);
                        }
                    }
                }
            }
            (x, w) = (x.add(row_words), w.add(weight_words));
        }
    }
    for (i, sums) in sums.iter().enumerate() {
        // SAFETY: a row of two vectors.
        unsafe {
            _mm512_storeu_ps(to.add(i * row_stride), sums[0]);
            _mm512_storeu_ps(to.add(i * row_stride + 16), sums[1]);
        }
    }
}

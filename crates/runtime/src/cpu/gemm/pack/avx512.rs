//! Packing by the instructions of AVX-512: tiles of 16 by 16 words are transposed in registers.

use super::TILE;
use crate::cpu::matrix::Mat;
use crate::cpu::number::Number;
use half::bf16;
use std::arch::x86_64::*;

/// Elements that become words of a panel.
pub(super) trait Load<P>: Number {
    /// Elements of a vector of words.
    const ELEMENTS: usize;

    /// The words of `len` elements, at most [`Load::ELEMENTS`], and zeros.
    ///
    /// # Safety
    /// The elements are there, and the processor has the instructions.
    unsafe fn load(from: *const Self, len: usize) -> __m512i;
}

impl Load<f32> for f32 {
    const ELEMENTS: usize = TILE;

    #[inline(always)]
    unsafe fn load(from: *const f32, len: usize) -> __m512i {
        // SAFETY: the caller's promise; what is masked out is not read.
        unsafe { _mm512_castps_si512(_mm512_maskz_loadu_ps(first(len) as __mmask16, from)) }
    }
}

impl Load<u32> for bf16 {
    const ELEMENTS: usize = 2 * TILE;

    #[inline(always)]
    unsafe fn load(from: *const bf16, len: usize) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_maskz_loadu_epi16(first(len), from.cast()) }
    }
}

impl Load<u32> for f32 {
    const ELEMENTS: usize = 2 * TILE;

    /// Subnormal numbers become 0, which is also what the dot products take them for.
    #[inline(always)]
    unsafe fn load(from: *const f32, len: usize) -> __m512i {
        let mask = first(len);
        // SAFETY: as above; a vector of bf16 is one of 64 bytes.
        unsafe {
            let low = _mm512_maskz_loadu_ps(mask as __mmask16, from);
            let high = from.wrapping_add(TILE);
            let high = _mm512_maskz_loadu_ps((mask >> TILE) as __mmask16, high);
            std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
        }
    }
}

/// A bit for each of the first `len` elements.
#[inline(always)]
fn first(len: usize) -> u32 {
    if len >= 32 { u32::MAX } else { (1 << len) - 1 }
}

fn has_avx512() -> bool {
    matches!(crate::cpu::simd::level(), crate::cpu::simd::Level::Avx512)
}

/// [`super::pack_along`] in pairs of bf16, if this processor has AVX-512 BF16; whether it did.
pub(super) fn pack_pairs<T: Load<u32>>(from: Mat<'_, T>, width: usize, to: &mut [u32]) -> bool {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn compiled<T: Load<u32>>(from: Mat<'_, T>, width: usize, to: &mut [u32]) {
        // SAFETY: the caller's promise, and that the processor has the instructions.
        unsafe { pack::<u32, T>(from, width, to) }
    }
    let has = has_avx512() && std::arch::is_x86_feature_detected!("avx512bf16");
    if has {
        // SAFETY: the processor has the instructions; rows are dense, as everywhere here.
        unsafe { compiled(from, width, to) };
    }
    has
}

/// [`super::pack_along`] of f32, if this processor has AVX-512; whether it did.
pub(super) fn pack_f32(from: Mat<'_, f32>, width: usize, to: &mut [f32]) -> bool {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn compiled(from: Mat<'_, f32>, width: usize, to: &mut [f32]) {
        // SAFETY: the caller's promise, and that the processor has the instructions.
        unsafe { pack::<f32, f32>(from, width, to) }
    }
    let has = has_avx512();
    if has {
        // SAFETY: as above.
        unsafe { compiled(from, width, to) };
    }
    has
}

/// # Safety
/// The processor has the instructions of the load. Elements of a row lie side by side.
#[inline(always)]
unsafe fn pack<P, T: Load<P>>(from: Mat<'_, T>, width: usize, to: &mut [P]) {
    let (outer, k) = (from.rows(), from.cols());
    // Elements of a word.
    let steps = T::ELEMENTS / TILE;
    let fits = outer <= width && to.len() >= k.div_ceil(steps) * width;
    assert!(fits && size_of::<P>() == 4, "metal-candle bug: a panel of its size");
    for left in (0..width).step_by(TILE) {
        let lanes = TILE.min(width - left);
        let rows = outer.saturating_sub(left).min(TILE);
        for start in (0..k).step_by(T::ELEMENTS) {
            let len = T::ELEMENTS.min(k - start);
            let at = |row: usize| {
                let row = from.as_ptr().wrapping_offset((left + row) as isize * from.row_stride());
                row.wrapping_add(start)
            };
            let to = to.as_mut_ptr().wrapping_add(start / steps * width + left).cast();
            // SAFETY: `len` elements of the rows that there are, from `start` on; the panel has these steps, and
            // `lanes` words from `left` on in each.
            unsafe {
                let mut tile = [_mm512_setzero_si512(); TILE];
                for (i, words) in tile.iter_mut().enumerate() {
                    if i < rows {
                        *words = T::load(at(i), len);
                    }
                }
                store_transposed(tile, to, width, lanes, len.div_ceil(steps));
            }
        }
    }
}

/// # Safety
/// As [`super::transpose`], with a tile of `TILE` rows of `TILE` words.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn transpose(
    tile: *const u32,
    to: *mut u32,
    stride: usize,
    width: usize,
    steps: usize,
) {
    let mut x = [_mm512_setzero_si512(); TILE];
    for (i, x) in x.iter_mut().enumerate() {
        // SAFETY: one of the tile's rows.
        *x = unsafe { _mm512_loadu_si512(tile.add(i * TILE).cast()) };
    }
    // SAFETY: the caller's promise.
    unsafe { store_transposed(x, to, stride, width, steps) }
}

/// Four rounds of pairwise exchanges, of words, pairs, quarters and halves.
///
/// # Safety
/// As [`super::transpose`].
#[inline(always)]
unsafe fn store_transposed(
    x: [__m512i; TILE],
    to: *mut u32,
    stride: usize,
    width: usize,
    steps: usize,
) {
    // SAFETY: the caller's promise: `width` words of every step.
    unsafe {
        let mut y = [_mm512_setzero_si512(); TILE];
        for i in (0..TILE).step_by(2) {
            y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
            y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
        }
        // z[4 q + c]: column c of every lane, of rows 4 q .. 4 q + 4.
        let mut z = [_mm512_setzero_si512(); TILE];
        for i in (0..TILE).step_by(4) {
            z[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
            z[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
            z[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
            z[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
        }
        let mask = ((1u32 << width) - 1) as __mmask16;
        for c in 0..4 {
            let (a, b) = (z[c], z[c + 4]);
            let (p, q) = (z[c + 8], z[c + 12]);
            let (ab_low, ab_high) =
                (_mm512_shuffle_i32x4::<0x44>(a, b), _mm512_shuffle_i32x4::<0xee>(a, b));
            let (pq_low, pq_high) =
                (_mm512_shuffle_i32x4::<0x44>(p, q), _mm512_shuffle_i32x4::<0xee>(p, q));
            let columns = [
                _mm512_shuffle_i32x4::<0x88>(ab_low, pq_low),
                _mm512_shuffle_i32x4::<0xdd>(ab_low, pq_low),
                _mm512_shuffle_i32x4::<0x88>(ab_high, pq_high),
                _mm512_shuffle_i32x4::<0xdd>(ab_high, pq_high),
            ];
            for (lane, column) in columns.into_iter().enumerate() {
                let step = 4 * lane + c;
                if step < steps {
                    let to = to.add(step * stride).cast();
                    if width == TILE {
                        _mm512_storeu_epi32(to, column);
                    } else {
                        _mm512_mask_storeu_epi32(to, mask, column);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Packed;
    use super::*;

    /// The panel, word by word.
    fn plain<T: Number, P: Packed<T>>(from: Mat<'_, T>, width: usize) -> Vec<P> {
        let mut to = vec![P::ZERO; from.cols().div_ceil(P::STEPS) * width];
        super::super::pack_strided(from, width, &mut to);
        to
    }

    #[test]
    fn panels_are_those_of_single_words() {
        let value = |i: usize| ((i * 7919) % 1013) as f32 * 0.37 - 180.0;
        for (rows, width, k, stride) in
            [(14, 14, 64, 64), (32, 32, 576, 600), (9, 14, 33, 40), (17, 32, 1, 3), (1, 1, 31, 31)]
        {
            let wide: Vec<f32> = (0..rows * stride).map(value).collect();
            let half: Vec<bf16> = wide.iter().map(|x| bf16::from_f32(*x)).collect();
            let (wide, half) = (
                Mat::dense(&wide, rows, stride).col_range(0, k),
                Mat::dense(&half, rows, stride).col_range(0, k),
            );
            let mut got = vec![7; k.div_ceil(2) * width];
            if !pack_pairs(wide, width, &mut got) {
                return;
            }
            assert_eq!(got, plain::<f32, u32>(wide, width), "{rows} rows of {k} f32, {width} wide");
            got.fill(7);
            assert!(pack_pairs(half, width, &mut got));
            assert_eq!(
                got,
                plain::<bf16, u32>(half, width),
                "{rows} rows of {k} bf16, {width} wide"
            );
            let mut got = vec![7.0; k * width];
            assert!(pack_f32(wide, width, &mut got));
            assert_eq!(got, plain::<f32, f32>(wide, width), "{rows} rows of {k} f32 as they are");
        }
    }

    #[test]
    fn a_nan_stays_one_and_halves_go_to_even() {
        let x = [f32::NAN, f32::INFINITY, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, -0.0, 3.0e38];
        let mut got = [0; 3];
        let row = Mat::dense(&x, 1, 6);
        if pack_pairs(row, 1, &mut got) {
            assert_eq!(got[..], plain::<f32, u32>(row, 1)[..]);
        }
    }
}

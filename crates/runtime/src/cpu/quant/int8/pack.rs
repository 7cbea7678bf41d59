//! Panels of rows, and of weights.

use super::super::format::{Format, LEN};
use super::super::isa::x86::Vnni;
use super::{COLS, STEPS, row_words, weight_words};
use std::arch::x86_64::*;

/// Rounds a row into its place in a panel of so many.
///
/// # Safety
/// The processor has the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn row<const HALVES: usize, const OFFSET: i32>(
    x: &[f32],
    row: usize,
    rows: usize,
    to: &mut [u32],
) {
    let words = row_words(HALVES) * rows;
    let (fours, rest) = x.as_chunks::<LEN>().0.as_chunks::<4>();
    let (to, last) = to.split_at_mut(4 * fours.len() * words);
    for (parts, to) in fours.iter().zip(to.chunks_exact_mut(4 * words)) {
        let (scales, inverses) = scales(parts);
        for i in 0..4 {
            let to = &mut to[i * words..(i + 1) * words];
            round::<HALVES, OFFSET>(&parts[i], [scales[i], inverses[i]], row, rows, to);
        }
    }
    if rest.is_empty() {
        return;
    }
    let mut parts = [[0.0; LEN]; 4];
    parts[..rest.len()].copy_from_slice(rest);
    let (scales, inverses) = scales(&parts);
    for (i, to) in last.chunks_exact_mut(words).enumerate().take(rest.len()) {
        round::<HALVES, OFFSET>(&parts[i], [scales[i], inverses[i]], row, rows, to);
    }
}

/// What the parts are divided by, and its inverse: found across vectors for all of them at once.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn scales(parts: &[[f32; LEN]; 4]) -> ([f32; 4], [f32; 4]) {
    let [a, b] = [larger(&parts[0], &parts[1]), larger(&parts[2], &parts[3])];
    // In every lane, the largest of each part.
    let most = _mm512_max_epu32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    let (a, b) = (_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64::<1>(most));
    let most = _mm256_max_epu32(a, b);
    let (a, b) = (_mm256_castsi256_si128(most), _mm256_extracti128_si256::<1>(most));
    let scale = _mm_div_ps(_mm_castsi128_ps(_mm_max_epu32(a, b)), _mm_set1_ps(127.0));
    let some = _mm_cmp_ps_mask::<_CMP_NEQ_UQ>(scale, _mm_setzero_ps());
    let inverse = _mm_maskz_div_ps(some, _mm_set1_ps(1.0), scale);
    let (mut scales, mut inverses) = ([0.0; 4], [0.0; 4]);
    // SAFETY: four elements each.
    unsafe {
        _mm_storeu_ps(scales.as_mut_ptr(), scale);
        _mm_storeu_ps(inverses.as_mut_ptr(), inverse);
    }
    (scales, inverses)
}

/// Magnitudes of two parts: in every lane, the larger of what it has of each, by turns.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn larger(a: &[f32; LEN], b: &[f32; LEN]) -> __m512i {
    let [a, b] = [largest(a), largest(b)];
    _mm512_max_epu32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b))
}

/// The larger magnitudes of both halves. As integers, magnitudes are in order, and a NaN is the largest.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn largest(part: &[f32; LEN]) -> __m512i {
    let sign = _mm512_set1_epi32(0x7fff_ffff);
    // SAFETY: 32 elements.
    let [a, b] = unsafe {
        [_mm512_loadu_si512(part.as_ptr().cast()), _mm512_loadu_si512(part[16..].as_ptr().cast())]
    };
    _mm512_max_epu32(_mm512_and_si512(a, sign), _mm512_and_si512(b, sign))
}

/// A part in eight bits, its scale and its sums, where they belong.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn round<const HALVES: usize, const OFFSET: i32>(
    part: &[f32; LEN],
    [scale, inverse]: [f32; 2],
    row: usize,
    rows: usize,
    to: &mut [u32],
) {
    let by = _mm512_set1_ps(inverse);
    // SAFETY: 32 elements.
    let [a, b] = unsafe { [_mm512_loadu_ps(part.as_ptr()), _mm512_loadu_ps(part[16..].as_ptr())] };
    let a = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(a, by)));
    let b = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(b, by)));
    let steps = &mut to[row * STEPS..(row + 1) * STEPS];
    // SAFETY: eight words.
    unsafe { _mm256_storeu_si256(steps.as_mut_ptr().cast(), _mm256_set_m128i(b, a)) };
    let rest = &mut to[STEPS * rows..(STEPS + 1 + HALVES) * rows];
    rest[row] = scale.to_bits();
    let ones = _mm_set1_epi8(1);
    let a = _mm_dpbusd_epi32(_mm_setzero_si128(), ones, a);
    if HALVES == 1 {
        rest[rows + row] = sum::<OFFSET>(_mm_dpbusd_epi32(a, ones, b), scale);
    } else {
        let b = _mm_dpbusd_epi32(_mm_setzero_si128(), ones, b);
        rest[rows + row] = sum::<OFFSET>(a, scale);
        rest[2 * rows + row] = sum::<OFFSET>(b, scale);
    }
}

/// What a shift of one comes to, or what the offset does.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn sum<const OFFSET: i32>(fours: __m128i, scale: f32) -> u32 {
    let twos = _mm_add_epi32(fours, _mm_shuffle_epi32::<0b01_00_11_10>(fours));
    let sum = _mm_cvtsi128_si32(_mm_add_epi32(twos, _mm_shuffle_epi32::<0b10_11_00_01>(twos)));
    match OFFSET {
        0 => (sum as f32 * scale).to_bits(),
        // Far from an overflow: 32 times 127, and 128 times that.
        _ => (sum * OFFSET).cast_unsigned(),
    }
}

/// Packs `count` rows of blocks.
///
/// # Safety
/// The processor has the instructions.
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn weights<F: Format, const HALVES: usize, const OFFSET: i32>(
    rows: &[u8],
    count: usize,
    to: &mut [u32],
) {
    let row_bytes = rows.len() / count;
    for (index, to) in to.chunks_exact_mut(weight_words(HALVES, OFFSET)).enumerate() {
        let (steps, rest) = to.split_at_mut(STEPS * COLS);
        let (scales, shifts) = rest.split_at_mut(HALVES * COLS);
        let at = index / F::PARTS * F::BLOCK_BYTES;
        // Of columns that are not there, too: they are zeros.
        let mut q = [[0; LEN]; COLS];
        if count < COLS {
            scales.fill(0);
            shifts.fill(0);
        }
        for ((col, row), q) in rows.chunks_exact(row_bytes).enumerate().zip(&mut q) {
            let part = F::part::<Vnni>(&row[at..at + F::BLOCK_BYTES], index % F::PARTS);
            *q = part.q;
            for half in 0..HALVES {
                scales[half * COLS + col] = part.scale[half].to_bits();
                if OFFSET == 0 {
                    shifts[half * COLS + col] = part.shift[half].to_bits();
                }
            }
        }
        transpose(&q, steps);
    }
}

/// `[32 columns][8 steps]` to `[8 steps][32 columns]`, of fours.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(q: &[[u8; LEN]; COLS], to: &mut [u32]) {
    assert!(to.len() >= STEPS * COLS, "metal-candle bug: a panel of its size");
    // SAFETY: the columns of a step, one behind the other.
    let row = |i: usize| unsafe { _mm256_loadu_si256(q[i].as_ptr().cast()) };
    for v in 0..2 {
        // The first eight columns of sixteen in the lower half, the others above them.
        let rows: [__m512i; 8] = std::array::from_fn(|i| {
            let lower = _mm512_castsi256_si512(row(16 * v + i));
            _mm512_inserti64x4::<1>(lower, row(16 * v + 8 + i))
        });
        // In every lane: two steps of two columns.
        let twos: [__m512i; 8] = std::array::from_fn(|i| {
            let (a, b) = (rows[i / 2 * 2], rows[i / 2 * 2 + 1]);
            match i % 2 {
                0 => _mm512_unpacklo_epi32(a, b),
                _ => _mm512_unpackhi_epi32(a, b),
            }
        });
        // In every lane: a step of four columns; of step s and of step s + 4.
        let fours = |of: usize, step: usize| {
            let (a, b) = (twos[4 * of + step / 2], twos[4 * of + 2 + step / 2]);
            match step % 2 {
                0 => _mm512_unpacklo_epi64(a, b),
                _ => _mm512_unpackhi_epi64(a, b),
            }
        };
        for step in 0..STEPS / 2 {
            let [a, b] = [fours(0, step), fours(1, step)];
            let lower = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
            let upper = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
            for (step, index) in [(step, lower), (step + STEPS / 2, upper)] {
                let columns = _mm512_permutex2var_epi64(a, index, b);
                let to = to[step * COLS + 16 * v..].as_mut_ptr();
                // SAFETY: sixteen of the columns of a step, of which there are as many as was seen.
                unsafe { _mm512_storeu_si512(to.cast(), columns) };
            }
        }
    }
}

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
    let put = |part: &Rounded, to: &mut [u32]| {
        let (steps, rest) = to.split_at_mut(STEPS * rows);
        // SAFETY: as many bytes as a row has.
        unsafe {
            let steps = &mut steps[row * STEPS..(row + 1) * STEPS];
            _mm256_storeu_si256(steps.as_mut_ptr().cast(), part.q);
        }
        rest[row] = part.scale.to_bits();
        let sum = |sum: i32| match OFFSET {
            0 => (sum as f32 * part.scale).to_bits(),
            // Far from an overflow: 32 times 127, and 128 times that.
            _ => (sum * OFFSET).cast_unsigned(),
        };
        if HALVES == 1 {
            rest[rows + row] = sum(part.sums[0] + part.sums[1]);
        } else {
            rest[rows + row] = sum(part.sums[0]);
            rest[2 * rows + row] = sum(part.sums[1]);
        }
    };
    for (parts, to) in fours.iter().zip(to.chunks_exact_mut(4 * words)) {
        for (part, to) in round(parts).iter().zip(to.chunks_exact_mut(words)) {
            put(part, to);
        }
    }
    let mut parts = [[0.0; LEN]; 4];
    parts[..rest.len()].copy_from_slice(rest);
    for (part, to) in round(&parts).iter().zip(last.chunks_exact_mut(words)).take(rest.len()) {
        put(part, to);
    }
}

/// 32 elements in eight bits: `q · scale`.
struct Rounded {
    q: __m256i,
    scale: f32,
    /// The sum of each half's q.
    sums: [i32; 2],
}

/// Four parts at a time: what is found across vectors is found for all of them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn round(parts: &[[f32; LEN]; 4]) -> [Rounded; 4] {
    // SAFETY: 32 elements.
    let halves = parts.each_ref().map(|x| unsafe {
        [_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x[LEN / 2..].as_ptr())]
    });
    // As integers, magnitudes are in order, and a NaN is the largest.
    let magnitude = |x| _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fff_ffff));
    let most = halves.map(|[a, b]| _mm512_max_epu32(magnitude(a), magnitude(b)));
    let twos = |a, b| _mm512_max_epu32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let [a, b] = [twos(most[0], most[1]), twos(most[2], most[3])];
    // In every lane, the largest of each part.
    let most = _mm512_max_epu32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    let (a, b) = (_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64::<1>(most));
    let most = _mm256_max_epu32(a, b);
    let (a, b) = (_mm256_castsi256_si128(most), _mm256_extracti128_si256::<1>(most));
    let scale = _mm_div_ps(_mm_castsi128_ps(_mm_max_epu32(a, b)), _mm_set1_ps(127.0));
    let some = _mm_cmp_ps_mask::<_CMP_NEQ_UQ>(scale, _mm_setzero_ps());
    let by = _mm_maskz_div_ps(some, _mm_set1_ps(1.0), scale);

    let (mut scales, mut inverses) = ([0.0; 4], [0.0; 4]);
    // SAFETY: four elements each.
    unsafe {
        _mm_storeu_ps(scales.as_mut_ptr(), scale);
        _mm_storeu_ps(inverses.as_mut_ptr(), by);
    }
    std::array::from_fn(|i| {
        let by = _mm512_set1_ps(inverses[i]);
        let q = halves[i].map(|x| _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x, by))));
        let q = _mm256_set_m128i(q[1], q[0]);
        // Sums of fours, of twos of them, and of those of each half.
        let sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), q);
        let sums = _mm256_add_epi32(sums, _mm256_shuffle_epi32::<0b01_00_11_10>(sums));
        let sums = _mm256_add_epi32(sums, _mm256_shuffle_epi32::<0b10_11_00_01>(sums));
        let upper = _mm256_extracti128_si256::<1>(sums);
        let sums = [_mm_cvtsi128_si32(_mm256_castsi256_si128(sums)), _mm_cvtsi128_si32(upper)];
        Rounded { q, scale: scales[i], sums }
    })
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
            if i % 2 == 0 { _mm512_unpacklo_epi32(a, b) } else { _mm512_unpackhi_epi32(a, b) }
        });
        // In every lane: a step of four columns; of step s and of step s + 4.
        let fours = |of: usize, step: usize| {
            let (a, b) = (twos[4 * of + step / 2], twos[4 * of + 2 + step / 2]);
            if step % 2 == 0 { _mm512_unpacklo_epi64(a, b) } else { _mm512_unpackhi_epi64(a, b) }
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

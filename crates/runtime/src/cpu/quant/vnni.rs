//! Rows of `Q4_1` times a vector, two blocks to an instruction and four rows side by side: the bits of the loop for any
//! format (`dot`), at three times its speed. That one fetches less than memory gives.

use super::dot::{DotFn, RoundedPart, dot};
use super::format::{Format, Q4_1};
use crate::cpu::simd::prefetch_near;
use std::arch::x86_64::*;

/// This loop, if the processor has AVX-512 VNNI.
pub(super) fn for_q4_1() -> Option<DotFn> {
    use crate::cpu::simd::{Level, level};
    use std::arch::is_x86_feature_detected as has;
    let fits = matches!(level(), Level::Avx512) && has!("avx512vnni") && has!("f16c");
    fits.then_some(pairs as DotFn)
}

/// Rows that are multiplied side by side.
const ROWS: usize = 4;
/// Bytes between what is read and what is asked for: some rows, of which processors foresee one at most.
const AHEAD_BYTES: usize = 4 << 10;
const LINE_BYTES: usize = 64;
const BYTES: usize = Q4_1::BLOCK_BYTES;

/// `y[i] = Σ row i · x`. Even blocks and odd ones have sums of their own, as in the loop for any format.
///
/// # Safety
/// The processor has the instructions.
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn pairs(rows: &[u8], x: &[RoundedPart], y: &mut [f32]) {
    let len = x.len() * BYTES;
    assert_eq!(rows.len(), y.len() * len, "metal-candle bug: rows of {len} bytes");
    let (pairs, []) = x.as_chunks::<2>() else {
        // SAFETY: this processor has what that was chosen for.
        return unsafe { dot::<Q4_1>()(rows, x, y) };
    };
    let (groups, last) = y.as_chunks_mut::<ROWS>();
    let (of_groups, of_last) = rows.split_at(groups.len() * ROWS * len);
    for (i, y) in groups.iter_mut().enumerate() {
        // SAFETY: the caller's promise; so many rows.
        unsafe { side_by_side(&of_groups[i * ROWS * len..(i + 1) * ROWS * len], pairs, y) };
    }
    for (i, y) in last.iter_mut().enumerate() {
        let y = std::array::from_mut(y);
        // SAFETY: as above.
        unsafe { side_by_side(&of_last[i * len..(i + 1) * len], pairs, y) };
    }
}

/// # Safety
/// As of [`pairs`]; there are `R` rows of as many blocks as x has.
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn side_by_side<const R: usize>(rows: &[u8], x: &[[RoundedPart; 2]], y: &mut [f32; R]) {
    let len = 2 * x.len() * BYTES;
    let nibble = _mm256_set1_epi8(15);
    // Scales go to the sums of their block: `[even, odd, even, odd]` of four each.
    let spread = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 0, 0, 0, 0, 2, 2, 2, 2);
    let (mut sums, mut shifts) = ([_mm512_setzero_ps(); R], [_mm_setzero_ps(); R]);
    for (i, [even, odd]) in x.iter().enumerate() {
        let later = rows.as_ptr().wrapping_add(AHEAD_BYTES + i * R * 2 * BYTES);
        (0..R * 2 * BYTES).step_by(LINE_BYTES).for_each(|at| prefetch_near(later.wrapping_add(at)));
        // SAFETY: a part has 32 elements, and its scale beside its sum.
        let (x, of_x) = unsafe {
            let x = _mm512_castsi256_si512(_mm256_loadu_si256(even.q.as_ptr().cast()));
            let x = _mm512_inserti64x4::<1>(x, _mm256_loadu_si256(odd.q.as_ptr().cast()));
            let of_x = _mm_loadh_pd(
                _mm_load_sd(even.scale_and_sum.as_ptr().cast()),
                odd.scale_and_sum.as_ptr().cast(),
            );
            (_mm512_shuffle_i64x2::<0b11_01_10_00>(x, x), _mm_castpd_ps(of_x))
        };
        for r in 0..R {
            // SAFETY: both blocks are within the row, as the caller promises.
            let (q, halves) = unsafe {
                let a = rows.as_ptr().add(r * len + 2 * i * BYTES);
                let b = a.add(BYTES);
                let q = _mm256_castsi128_si256(_mm_loadu_si128(a.add(4).cast()));
                let q = _mm256_inserti128_si256::<1>(q, _mm_loadu_si128(b.add(4).cast()));
                let halves = _mm_cvtsi32_si128(a.cast::<i32>().read_unaligned());
                (q, _mm_insert_epi32::<1>(halves, b.cast::<i32>().read_unaligned()))
            };
            let low = _mm256_and_si256(q, nibble);
            let high = _mm256_and_si256(_mm256_srli_epi16::<4>(q), nibble);
            let q = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high);
            let products = _mm512_dpbusd_epi32(_mm512_setzero_si512(), q, x);
            // `[scale, shift]` of each block, times `[scale, sum]` of what it is multiplied with.
            let scaled = _mm_mul_ps(_mm_cvtph_ps(halves), of_x);
            shifts[r] = _mm_add_ps(shifts[r], scaled);
            let scales = _mm512_permutexvar_ps(spread, _mm512_castps128_ps512(scaled));
            let products = _mm512_mul_ps(scales, _mm512_cvtepi32_ps(products));
            sums[r] = _mm512_add_ps(sums[r], products);
        }
    }
    for r in 0..R {
        y[r] = in_order(sums[r], shifts[r]);
    }
}

/// The sums of a row, added up as in the loop for any format.
#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn in_order(sums: __m512, shifts: __m128) -> f32 {
    let first = _mm512_castps512_ps256(sums);
    let second = _mm512_extractf32x8_ps::<1>(sums);
    // Even and odd.
    let both = |half| _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half));
    let sum = _mm_add_ps(both(first), both(second));
    let sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    let sum = _mm_add_ss(sum, _mm_movehdup_ps(sum));
    let shift = _mm_movehdup_ps(shifts);
    let shift = _mm_add_ss(shift, _mm_movehl_ps(shift, shift));
    _mm_cvtss_f32(_mm_add_ss(sum, shift))
}

#[cfg(test)]
mod tests {
    use super::super::dot::Rounded;
    use super::*;

    #[test]
    fn pairs_of_blocks_give_the_bits_of_single_ones() {
        let Some(pairs) = for_q4_1() else { return };
        let mut state = 7u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 16
        };
        for (blocks, rows) in (0..20).zip([1, 4, 7, 8].into_iter().cycle()) {
            let x: Vec<f32> = (0..blocks * 32).map(|_| random() as f32 / 1e4 - 3.0).collect();
            let mut bytes: Vec<u8> = (0..rows * blocks * 20).map(|_| random() as u8).collect();
            for block in bytes.chunks_exact_mut(20) {
                // Scales and shifts of about 1, of either sign, and no NaN.
                (block[1], block[3]) = (block[1] & 0x83 | 0x38, block[3] & 0x83 | 0x38);
            }
            Rounded::with(&x, blocks * 32, |rounded| {
                for x in rounded.rows() {
                    let (mut expected, mut got) = (vec![0.0f32; rows], vec![0.0f32; rows]);
                    // SAFETY: both were chosen for this processor.
                    unsafe {
                        dot::<Q4_1>()(&bytes, x, &mut expected);
                        pairs(&bytes, x, &mut got);
                    }
                    let bits = |y: Vec<f32>| y.into_iter().map(f32::to_bits).collect::<Vec<_>>();
                    assert_eq!(bits(got), bits(expected), "{rows} rows of {blocks} blocks");
                }
            });
        }
    }
}

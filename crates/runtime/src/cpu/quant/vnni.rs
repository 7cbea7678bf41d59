//! Rows of `Q4_1` times a vector, two blocks to an instruction: the bits of the loop for any format (`dot`), at twice its
//! speed. That one fetches less than memory gives.

use super::dot::{DotFn, RoundedPart, dot};
use super::format::{Format, Q4_1};
use std::arch::x86_64::*;

/// This loop, if the processor has AVX-512 VNNI.
pub(super) fn for_q4_1() -> Option<DotFn> {
    use crate::cpu::simd::{Level, level};
    use std::arch::is_x86_feature_detected as has;
    let fits = matches!(level(), Level::Avx512) && has!("avx512vnni") && has!("f16c");
    fits.then_some(pairs as DotFn)
}

/// `*y = Σ row · x`. Even blocks and odd ones have sums of their own, as in the loop for any format.
///
/// # Safety
/// The processor has the instructions.
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn pairs(row: &[u8], x: &[RoundedPart], y: &mut f32) {
    const BYTES: usize = Q4_1::BLOCK_BYTES;
    assert!(row.len() >= x.len() * BYTES, "metal-candle bug: a row of {} bytes", row.len());
    let (pairs, []) = x.as_chunks::<2>() else {
        // SAFETY: this processor has what that was chosen for.
        return unsafe { dot::<Q4_1>()(row, x, y) };
    };
    let nibble = _mm256_set1_epi8(15);
    // Scales go to the sums of their block: `[even, odd, even, odd]` of four each.
    let spread = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 0, 0, 0, 0, 2, 2, 2, 2);
    let (mut sums, mut shifts) = (_mm512_setzero_ps(), _mm_setzero_ps());
    for (i, [even, odd]) in pairs.iter().enumerate() {
        // SAFETY: both blocks are within the row, as was seen; a part has 32 elements, and its scale beside its sum.
        unsafe {
            let (a, b) = (row.as_ptr().add(2 * i * BYTES), row.as_ptr().add((2 * i + 1) * BYTES));
            let q = _mm256_castsi128_si256(_mm_loadu_si128(a.add(4).cast()));
            let q = _mm256_inserti128_si256::<1>(q, _mm_loadu_si128(b.add(4).cast()));
            let low = _mm256_and_si256(q, nibble);
            let high = _mm256_and_si256(_mm256_srli_epi16::<4>(q), nibble);
            let q = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high);
            let x = _mm512_castsi256_si512(_mm256_loadu_si256(even.q.as_ptr().cast()));
            let x = _mm512_inserti64x4::<1>(x, _mm256_loadu_si256(odd.q.as_ptr().cast()));
            let x = _mm512_shuffle_i64x2::<0b11_01_10_00>(x, x);
            let products = _mm512_dpbusd_epi32(_mm512_setzero_si512(), q, x);
            // `[scale, shift]` of each block, times `[scale, sum]` of what it is multiplied with.
            let halves = _mm_cvtsi32_si128(a.cast::<i32>().read_unaligned());
            let halves = _mm_insert_epi32::<1>(halves, b.cast::<i32>().read_unaligned());
            let of_x = _mm_castpd_ps(_mm_loadh_pd(
                _mm_load_sd(even.scale_and_sum.as_ptr().cast()),
                odd.scale_and_sum.as_ptr().cast(),
            ));
            let scaled = _mm_mul_ps(_mm_cvtph_ps(halves), of_x);
            shifts = _mm_add_ps(shifts, scaled);
            let scales = _mm512_permutexvar_ps(spread, _mm512_castps128_ps512(scaled));
            let products = _mm512_mul_ps(scales, _mm512_cvtepi32_ps(products));
            sums = _mm512_add_ps(sums, products);
        }
    }
    // SAFETY: vectors of f32.
    let sums = unsafe { std::mem::transmute::<__m512, [f32; 16]>(sums) };
    // SAFETY: as above.
    let shifts = unsafe { std::mem::transmute::<__m128, [f32; 4]>(shifts) };
    let mut of_both = [0.0; 8];
    for i in 0..4 {
        of_both[i] = sums[i] + sums[i + 4];
        of_both[i + 4] = sums[i + 8] + sums[i + 12];
    }
    for half in [4, 2, 1] {
        for i in 0..half {
            of_both[i] += of_both[i + half];
        }
    }
    *y = of_both[0] + (shifts[1] + shifts[3]);
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
        for blocks in 0..20 {
            let x: Vec<f32> = (0..blocks * 32).map(|_| random() as f32 / 1e4 - 3.0).collect();
            let mut row: Vec<u8> = (0..blocks * 20).map(|_| random() as u8).collect();
            for block in row.chunks_exact_mut(20) {
                // Scales and shifts of about 1, of either sign, and no NaN.
                (block[1], block[3]) = (block[1] & 0x83 | 0x38, block[3] & 0x83 | 0x38);
            }
            Rounded::with(&x, blocks * 32, |rounded| {
                for x in rounded.rows() {
                    let (mut expected, mut got) = (0.0f32, 0.0f32);
                    // SAFETY: both were chosen for this processor.
                    unsafe {
                        dot::<Q4_1>()(&row, x, &mut expected);
                        pairs(&row, x, &mut got);
                    }
                    assert_eq!(got.to_bits(), expected.to_bits(), "{blocks} blocks");
                }
            });
        }
    }
}

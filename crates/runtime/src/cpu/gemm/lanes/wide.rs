//! Vectors of f32 that are read from elements of half the size.

use super::{Plain, Summed};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Vectors of f32 whose lanes are read from elements of `E`, which widens them exactly.
///
/// # Safety
/// As [`Lanes`](super::Lanes).
pub(in crate::cpu) unsafe trait LoadWide<E>: Summed {
    unsafe fn load_wide(from: *const E) -> Self;
}

// SAFETY: as the vector's own.
unsafe impl<V: Summed> LoadWide<f32> for V {
    #[inline(always)]
    unsafe fn load_wide(from: *const f32) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load(from) }
    }
}

/// By whatever converts so many elements in memory.
macro_rules! by_memory {
    ($vector:ty: $($element:ty),*) => {$(
        // SAFETY: as the vector's own.
        unsafe impl LoadWide<$element> for $vector {
            #[inline(always)]
            unsafe fn load_wide(from: *const $element) -> $vector {
                let mut wide = [0.0; 4];
                // SAFETY: the caller's promise: there are elements for four lanes.
                unsafe {
                    std::slice::from_raw_parts(from, 4).convert_to_f32_slice(&mut wide);
                    <$vector as super::Lanes>::load(wide.as_ptr())
                }
            }
        }
    )*};
}
by_memory!(Plain<f32>: bf16, f16);
#[cfg(target_arch = "aarch64")]
by_memory!(super::neon::F32x4: f16);

/// By these intrinsics.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! by_instructions {
    ($vector:ident, $element:ty: |$from:ident| $load:expr) => {
        // SAFETY: the trait's callers promise the instruction set and the elements. bf16 is the upper half of f32.
        unsafe impl LoadWide<$element> for $vector {
            #[inline(always)]
            unsafe fn load_wide($from: *const $element) -> $vector {
                // SAFETY: as above.
                unsafe { $vector($load) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::x86::{F32x8, F32x16};
    use super::{LoadWide, bf16, f16};
    use std::arch::x86_64::*;

    by_instructions!(F32x16, bf16: |from| {
        let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
    });
    by_instructions!(F32x16, f16: |from| _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())));
    by_instructions!(F32x8, bf16: |from| {
        let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
    });
    by_instructions!(F32x8, f16: |from| _mm256_cvtph_ps(_mm_loadu_si128(from.cast())));
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use super::super::neon::F32x4;
    use super::{LoadWide, bf16};
    use std::arch::aarch64::*;

    by_instructions!(F32x4, bf16: |from| {
        vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from.cast())))
    });
}

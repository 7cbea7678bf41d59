//! What the block kernels ask of an instruction set. All give the same bits: the sums of integers are exact.

use super::format::LEN;

/// # Safety
/// The methods may be called where the processor has the instruction set, from a function compiled for it.
pub(super) unsafe trait Isa {
    /// The value of an f16.
    fn half(bits: u16) -> f32;
    /// `Σ q x` of every four consecutive elements.
    fn products(q: &[u8; LEN], x: &[i8; LEN]) -> [i32; LEN / 4];
}

/// Any processor.
pub(super) struct Portable;

// SAFETY: no instruction set is needed.
unsafe impl Isa for Portable {
    #[inline(always)]
    fn half(bits: u16) -> f32 {
        half::f16::from_bits(bits).to_f32_const()
    }
    #[inline(always)]
    fn products(q: &[u8; LEN], x: &[i8; LEN]) -> [i32; LEN / 4] {
        std::array::from_fn(|i| (4 * i..4 * i + 4).map(|j| i32::from(q[j]) * i32::from(x[j])).sum())
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use super::{Isa, LEN};
    use std::arch::x86_64::*;

    /// AVX2, and F16C, which came before it.
    pub(in crate::cpu::quant) struct Avx2;
    /// AVX-512 VNNI: four products and their sum in one instruction.
    pub(in crate::cpu::quant) struct Vnni;

    #[inline(always)]
    fn half(bits: u16) -> f32 {
        // SAFETY: the implementations below are used where the processor has F16C.
        unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits)))) }
    }

    // SAFETY: of AVX2 and F16C.
    unsafe impl Isa for Avx2 {
        #[inline(always)]
        fn half(bits: u16) -> f32 {
            half(bits)
        }
        #[inline(always)]
        fn products(q: &[u8; LEN], x: &[i8; LEN]) -> [i32; LEN / 4] {
            // SAFETY: 32 bytes each, and the processor has AVX2. Widened first: pairs of products of eight bits
            // overflow sixteen.
            unsafe {
                let (q, x): (__m256i, __m256i) =
                    (_mm256_loadu_si256(q.as_ptr().cast()), _mm256_loadu_si256(x.as_ptr().cast()));
                let low = _mm256_madd_epi16(
                    _mm256_cvtepu8_epi16(_mm256_castsi256_si128(q)),
                    _mm256_cvtepi8_epi16(_mm256_castsi256_si128(x)),
                );
                let high = _mm256_madd_epi16(
                    _mm256_cvtepu8_epi16(_mm256_extracti128_si256::<1>(q)),
                    _mm256_cvtepi8_epi16(_mm256_extracti128_si256::<1>(x)),
                );
                // Neighbours are added within halves of a vector, whose middle quarters then change places.
                let sums = _mm256_hadd_epi32(low, high);
                std::mem::transmute(_mm256_permute4x64_epi64::<0b11_01_10_00>(sums))
            }
        }
    }

    // SAFETY: of AVX-512 VNNI and VL, AVX2 and F16C.
    unsafe impl Isa for Vnni {
        #[inline(always)]
        fn half(bits: u16) -> f32 {
            half(bits)
        }
        #[inline(always)]
        fn products(q: &[u8; LEN], x: &[i8; LEN]) -> [i32; LEN / 4] {
            // SAFETY: 32 bytes each, and the processor has the instructions.
            unsafe {
                let (q, x) =
                    (_mm256_loadu_si256(q.as_ptr().cast()), _mm256_loadu_si256(x.as_ptr().cast()));
                std::mem::transmute(_mm256_dpbusd_epi32(_mm256_setzero_si256(), q, x))
            }
        }
    }
}

/// Gives a pointer to the version for this processor of `$body`, an unsafe function generic over a format and an
/// instruction set that is `#[inline(always)]`.
macro_rules! for_isa {
    ($format:ident, $body:ident($($arg:ident: $ty:ty),*)) => {{
        #[cfg(target_arch = "x86_64")]
        {
            use $crate::cpu::quant::isa::{Portable, x86::{Avx2, Vnni}};
            use std::arch::is_x86_feature_detected as has;
            #[target_feature(enable = "avx2,f16c")]
            unsafe fn avx2<F: Format>($($arg: $ty),*) {
                // SAFETY: the caller's promise is the body's.
                unsafe { $body::<F, Avx2>($($arg),*) }
            }
            #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
            unsafe fn vnni<F: Format>($($arg: $ty),*) {
                // SAFETY: the caller's promise is the body's.
                unsafe { $body::<F, Vnni>($($arg),*) }
            }
            let wide = matches!($crate::cpu::simd::level(), $crate::cpu::simd::Level::Avx512);
            if wide && has!("avx512vnni") && has!("f16c") {
                vnni::<$format> as unsafe fn($($ty),*)
            } else if has!("avx2") && has!("f16c") {
                avx2::<$format>
            } else {
                $body::<$format, Portable>
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            $body::<$format, $crate::cpu::quant::isa::Portable> as unsafe fn($($ty),*)
        }
    }};
}

pub(super) use for_isa;

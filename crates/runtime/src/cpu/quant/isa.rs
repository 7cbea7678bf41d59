//! What the block kernels ask of an instruction set. All give the same bits: the sums of integers are exact.

use super::format::LEN;

/// # Safety
/// The methods may be called where the processor has the instruction set, from a function compiled for it.
pub(super) unsafe trait Isa {
    /// Sums of f32, one for every four elements of a part. Spelled out, for compilers that see the arrays mix them with the
    /// scalars around them.
    type Sums: Copy;

    /// The value of an f16.
    fn half(bits: u16) -> f32;
    fn sums(from: [f32; LEN / 4]) -> Self::Sums;
    fn array(sums: Self::Sums) -> [f32; LEN / 4];
    /// `sums + scale · Σ q x` of every four consecutive elements, with a scale for each half. `WIDE` says that a q may be
    /// 128 or more.
    fn add<const WIDE: bool>(
        sums: Self::Sums,
        scale: [f32; 2],
        q: &[u8; LEN],
        x: &[i8; LEN],
    ) -> Self::Sums;
}

/// Any processor.
pub(super) struct Portable;

// SAFETY: no instruction set is needed.
unsafe impl Isa for Portable {
    type Sums = [f32; LEN / 4];

    #[inline(always)]
    fn half(bits: u16) -> f32 {
        half::f16::from_bits(bits).to_f32_const()
    }
    #[inline(always)]
    fn sums(from: [f32; LEN / 4]) -> Self::Sums {
        from
    }
    #[inline(always)]
    fn array(sums: Self::Sums) -> [f32; LEN / 4] {
        sums
    }
    #[inline(always)]
    fn add<const WIDE: bool>(
        sums: Self::Sums,
        scale: [f32; 2],
        q: &[u8; LEN],
        x: &[i8; LEN],
    ) -> Self::Sums {
        std::array::from_fn(|i| {
            let products = (4 * i..4 * i + 4).map(|j| i32::from(q[j]) * i32::from(x[j]));
            sums[i] + scale[i / 4] * products.sum::<i32>() as f32
        })
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

    /// `sums + scale · products`, rounded twice, as everywhere.
    ///
    /// # Safety
    /// The processor has AVX2.
    #[inline(always)]
    unsafe fn add_scaled(sums: __m256, scale: [f32; 2], products: __m256i) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe {
            let scale = if scale[0].to_bits() == scale[1].to_bits() {
                _mm256_set1_ps(scale[0])
            } else {
                _mm256_set_m128(_mm_set1_ps(scale[1]), _mm_set1_ps(scale[0]))
            };
            _mm256_add_ps(sums, _mm256_mul_ps(scale, _mm256_cvtepi32_ps(products)))
        }
    }

    macro_rules! sums {
        () => {
            type Sums = __m256;

            #[inline(always)]
            fn half(bits: u16) -> f32 {
                half(bits)
            }
            #[inline(always)]
            fn sums(from: [f32; LEN / 4]) -> __m256 {
                // SAFETY: both are eight f32.
                unsafe { std::mem::transmute(from) }
            }
            #[inline(always)]
            fn array(sums: __m256) -> [f32; LEN / 4] {
                // SAFETY: both are eight f32.
                unsafe { std::mem::transmute(sums) }
            }
        };
    }

    // SAFETY: of AVX2 and F16C.
    unsafe impl Isa for Avx2 {
        sums!();

        #[inline(always)]
        fn add<const WIDE: bool>(
            sums: __m256,
            scale: [f32; 2],
            q: &[u8; LEN],
            x: &[i8; LEN],
        ) -> __m256 {
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
                let products = _mm256_hadd_epi32(low, high);
                add_scaled(sums, scale, _mm256_permute4x64_epi64::<0b11_01_10_00>(products))
            }
        }
    }

    // SAFETY: of AVX-512 VNNI and VL, AVX2 and F16C.
    unsafe impl Isa for Vnni {
        sums!();

        #[inline(always)]
        fn add<const WIDE: bool>(
            sums: __m256,
            scale: [f32; 2],
            q: &[u8; LEN],
            x: &[i8; LEN],
        ) -> __m256 {
            // SAFETY: 32 bytes each, and the processor has the instructions.
            unsafe {
                let (q, x) =
                    (_mm256_loadu_si256(q.as_ptr().cast()), _mm256_loadu_si256(x.as_ptr().cast()));
                add_scaled(sums, scale, _mm256_dpbusd_epi32(_mm256_setzero_si256(), q, x))
            }
        }
    }
}

#[cfg(target_arch = "aarch64")]
pub(super) mod neon {
    use super::{Isa, LEN};
    use std::arch::aarch64::*;

    /// What every 64-bit ARM processor has: products of eight bits, added pairwise. Its dot products are no part of
    /// stable Rust yet.
    pub(in crate::cpu::quant) struct Neon;

    // SAFETY: of NEON.
    unsafe impl Isa for Neon {
        /// Of the first half, and of the second.
        type Sums = [float32x4_t; 2];

        #[inline(always)]
        fn half(bits: u16) -> f32 {
            if bits & 0x7c00 == 0x7c00 {
                return half::f16::from_bits(bits).to_f32_const();
            }
            // The exponent counts from 15 instead of 127; the product is exact, of subnormal numbers too.
            let magnitude = f32::from_bits(u32::from(bits & 0x7fff) << 13);
            (magnitude * f32::from_bits((127 + 112) << 23)).copysign(f32::from(bits.cast_signed()))
        }
        #[inline(always)]
        fn sums(from: [f32; LEN / 4]) -> Self::Sums {
            // SAFETY: both are eight f32.
            unsafe { std::mem::transmute(from) }
        }
        #[inline(always)]
        fn array(sums: Self::Sums) -> [f32; LEN / 4] {
            // SAFETY: both are eight f32.
            unsafe { std::mem::transmute(sums) }
        }
        #[inline(always)]
        fn add<const WIDE: bool>(
            sums: Self::Sums,
            scale: [f32; 2],
            q: &[u8; LEN],
            x: &[i8; LEN],
        ) -> Self::Sums {
            let mut added = sums;
            for (half, to) in added.iter_mut().enumerate() {
                // SAFETY: 16 bytes of each, and the processor has NEON.
                unsafe {
                    let q = vld1q_u8(q.as_ptr().add(half * LEN / 2));
                    let x = vld1q_s8(x.as_ptr().add(half * LEN / 2));
                    let products = vcvtq_f32_s32(products::<WIDE>(q, x));
                    *to = vaddq_f32(*to, vmulq_f32(vdupq_n_f32(scale[half]), products));
                }
            }
            added
        }
    }

    /// `Σ q x` of every four.
    ///
    /// # Safety
    /// The processor has NEON.
    #[inline(always)]
    unsafe fn products<const WIDE: bool>(q: uint8x16_t, x: int8x16_t) -> int32x4_t {
        // SAFETY: the caller's promise.
        unsafe {
            // `q x = (q - 128) x + 128 x`, where q has no sign to spare.
            let q = if WIDE { veorq_u8(q, vdupq_n_u8(0x80)) } else { q };
            let q = vreinterpretq_s8_u8(q);
            let low = vpaddlq_s16(vmull_s8(vget_low_s8(q), vget_low_s8(x)));
            let high = vpaddlq_s16(vmull_high_s8(q, x));
            let sums = vpaddq_s32(low, high);
            if WIDE { vaddq_s32(sums, vshlq_n_s32::<7>(vpaddlq_s16(vpaddlq_s8(x)))) } else { sums }
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
        #[cfg(target_arch = "aarch64")]
        {
            use $crate::cpu::quant::isa::{Portable, neon::Neon};
            #[target_feature(enable = "neon")]
            unsafe fn neon<F: Format>($($arg: $ty),*) {
                // SAFETY: the caller's promise is the body's.
                unsafe { $body::<F, Neon>($($arg),*) }
            }
            if std::arch::is_aarch64_feature_detected!("neon") {
                neon::<$format> as unsafe fn($($ty),*)
            } else {
                $body::<$format, Portable>
            }
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        {
            $body::<$format, $crate::cpu::quant::isa::Portable> as unsafe fn($($ty),*)
        }
    }};
}

pub(super) use for_isa;

//! Vectors of every instruction set, as the micro kernel asks for them.

mod wide;

pub(in crate::cpu) use wide::LoadWide;

/// A vector of sums, and what is multiplied into it.
///
/// # Safety
/// The methods may be called where the processor has the instruction set, from a function that is compiled for it.
pub(in crate::cpu) unsafe trait Lanes: Copy {
    /// What is packed: one factor, or as many of consecutive `k` as one instruction multiplies.
    type Packed: Copy;
    type Sum: Copy;
    const LANES: usize;
    /// Factors of a packed word.
    const STEPS: usize = 1;
    /// Vectors that the processor holds at a time.
    const REGISTERS: usize = 32;

    unsafe fn zero() -> Self;
    unsafe fn splat(from: *const Self::Packed) -> Self;
    unsafe fn load(from: *const Self::Packed) -> Self;
    unsafe fn load_sums(from: *const Self::Sum) -> Self;
    unsafe fn splat_sum(value: Self::Sum) -> Self;
    unsafe fn store(self, to: *mut Self::Sum);
    /// `self + a b`, of packed factors.
    unsafe fn multiply_add(self, a: Self, b: Self) -> Self;
    /// `self + a b`, of sums.
    unsafe fn multiply_add_sums(self, a: Self, b: Self) -> Self;
    /// `self · by`, of sums.
    unsafe fn scaled(self, by: Self) -> Self;
}

/// Vectors of sums that can be rounded to bf16, to nearest even.
///
/// # Safety
/// As [`Lanes`].
#[cfg(target_arch = "x86_64")]
pub(in crate::cpu) unsafe trait Rounds: Lanes {
    unsafe fn load_bf16(from: *const u16) -> Self;
    unsafe fn store_bf16(self, to: *mut u16);
}

/// Vectors of f32 whose lanes can be summed.
///
/// # Safety
/// As [`Lanes`].
pub(in crate::cpu) unsafe trait Summed:
    Lanes<Packed = f32, Sum = f32>
{
    /// The sum of the lanes of each.
    ///
    /// Closures are compiled apart, for no instruction set in particular: there are none.
    unsafe fn sums(of: [Self; 4]) -> [f32; 4];
}

/// The same few intrinsics under the names of another instruction set.
macro_rules! lanes {
    ($(#[$meta:meta])* $name:ident($vector:ty; $registers:literal): $sum:ty, $lanes:literal, $zero:ident, $splat:ident, $load:ident,
     $store:ident, $multiply:ident, |$acc:ident, $a:ident, $b:ident| $multiply_add:expr) => {
        $(#[$meta])*
        #[derive(Clone, Copy)]
        pub(in crate::cpu) struct $name(pub(super) $vector);

        // SAFETY: the trait's callers promise the instruction set; pointers are theirs.
        unsafe impl Lanes for $name {
            type Packed = $sum;
            type Sum = $sum;
            const LANES: usize = $lanes;
            const REGISTERS: usize = $registers;

            #[inline(always)]
            unsafe fn zero() -> Self {
                // SAFETY: as above.
                unsafe { $name($zero(0.0)) }
            }
            #[inline(always)]
            unsafe fn splat(from: *const $sum) -> Self {
                // SAFETY: as above.
                unsafe { $name($splat(*from)) }
            }
            #[inline(always)]
            unsafe fn load(from: *const $sum) -> Self {
                // SAFETY: as above.
                unsafe { $name($load(from)) }
            }
            #[inline(always)]
            unsafe fn load_sums(from: *const $sum) -> Self {
                // SAFETY: as above.
                unsafe { $name($load(from)) }
            }
            #[inline(always)]
            unsafe fn splat_sum(value: $sum) -> Self {
                // SAFETY: as above.
                unsafe { $name($splat(value)) }
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut $sum) {
                // SAFETY: as above.
                unsafe { $store(to, self.0) }
            }
            #[inline(always)]
            unsafe fn multiply_add(self, a: Self, b: Self) -> Self {
                let ($acc, $a, $b) = (self.0, a.0, b.0);
                // SAFETY: as above.
                unsafe { $name($multiply_add) }
            }
            #[inline(always)]
            unsafe fn multiply_add_sums(self, a: Self, b: Self) -> Self {
                // SAFETY: as above.
                unsafe { self.multiply_add(a, b) }
            }
            #[inline(always)]
            unsafe fn scaled(self, by: Self) -> Self {
                // SAFETY: as above.
                unsafe { $name($multiply(self.0, by.0)) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
pub(in crate::cpu) mod x86 {
    use super::{Lanes, Rounds, Summed};
    use std::arch::x86_64::*;

    lanes!(F32x16(__m512; 32): f32, 16, _mm512_set1_ps, _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_mul_ps,
        |acc, a, b| _mm512_fmadd_ps(a, b, acc));
    lanes!(F64x8(__m512d; 32): f64, 8, _mm512_set1_pd, _mm512_set1_pd, _mm512_loadu_pd, _mm512_storeu_pd, _mm512_mul_pd,
        |acc, a, b| _mm512_fmadd_pd(a, b, acc));
    lanes!(F32x8(__m256; 16): f32, 8, _mm256_set1_ps, _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_mul_ps,
        |acc, a, b| _mm256_fmadd_ps(a, b, acc));
    lanes!(F64x4(__m256d; 16): f64, 4, _mm256_set1_pd, _mm256_set1_pd, _mm256_loadu_pd, _mm256_storeu_pd, _mm256_mul_pd,
        |acc, a, b| _mm256_fmadd_pd(a, b, acc));

    // SAFETY: as `Lanes`.
    unsafe impl Summed for F32x16 {
        #[inline(always)]
        unsafe fn sums([a, b, c, d]: [Self; 4]) -> [f32; 4] {
            // SAFETY: as above.
            unsafe {
                let ab = _mm512_add_ps(_mm512_unpacklo_ps(a.0, b.0), _mm512_unpackhi_ps(a.0, b.0));
                let cd = _mm512_add_ps(_mm512_unpacklo_ps(c.0, d.0), _mm512_unpackhi_ps(c.0, d.0));
                let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
                // Every quarter holds a part of each of the four sums.
                let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
                let high = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
                let parts = _mm512_add_ps(low, high);
                let upper = _mm512_shuffle_f32x4::<0xee>(parts, parts);
                let half = _mm512_castps512_ps256(_mm512_add_ps(parts, upper));
                let sums =
                    _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half));
                std::mem::transmute::<__m128, [f32; 4]>(sums)
            }
        }
    }

    // SAFETY: as `Lanes`.
    unsafe impl Summed for F32x8 {
        #[inline(always)]
        unsafe fn sums([a, b, c, d]: [Self; 4]) -> [f32; 4] {
            // SAFETY: as above.
            unsafe {
                let half = _mm256_hadd_ps(_mm256_hadd_ps(a.0, b.0), _mm256_hadd_ps(c.0, d.0));
                let sums =
                    _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half));
                std::mem::transmute::<__m128, [f32; 4]>(sums)
            }
        }
    }

    /// Pairs of bf16, of two consecutive `k`, into sums of f32.
    #[derive(Clone, Copy)]
    pub(in crate::cpu) struct Bf16Pairs(__m512);

    // SAFETY: the trait's callers promise the instruction set; pointers are theirs.
    unsafe impl Lanes for Bf16Pairs {
        type Packed = u32;
        type Sum = f32;
        const LANES: usize = 16;
        const STEPS: usize = 2;

        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: as above.
            unsafe { Bf16Pairs(_mm512_setzero_ps()) }
        }
        #[inline(always)]
        unsafe fn splat(from: *const u32) -> Self {
            // SAFETY: as above.
            unsafe { Bf16Pairs(_mm512_castsi512_ps(_mm512_set1_epi32((*from).cast_signed()))) }
        }
        #[inline(always)]
        unsafe fn load(from: *const u32) -> Self {
            // SAFETY: as above.
            unsafe { Bf16Pairs(_mm512_loadu_ps(from.cast())) }
        }
        #[inline(always)]
        unsafe fn load_sums(from: *const f32) -> Self {
            // SAFETY: as above.
            unsafe { Bf16Pairs(_mm512_loadu_ps(from)) }
        }
        #[inline(always)]
        unsafe fn splat_sum(value: f32) -> Self {
            // SAFETY: as above.
            unsafe { Bf16Pairs(_mm512_set1_ps(value)) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: as above.
            unsafe { _mm512_storeu_ps(to, self.0) }
        }
        #[inline(always)]
        unsafe fn multiply_add(self, a: Self, b: Self) -> Self {
            // SAFETY: as above; both are 64 bytes, of which any are 32 bf16.
            unsafe {
                let pairs = |x: __m512| std::mem::transmute::<__m512, __m512bh>(x);
                Bf16Pairs(_mm512_dpbf16_ps(self.0, pairs(a.0), pairs(b.0)))
            }
        }
        #[inline(always)]
        unsafe fn multiply_add_sums(self, a: Self, b: Self) -> Self {
            // SAFETY: as above.
            unsafe { Bf16Pairs(_mm512_fmadd_ps(a.0, b.0, self.0)) }
        }
        #[inline(always)]
        unsafe fn scaled(self, by: Self) -> Self {
            // SAFETY: as above.
            unsafe { Bf16Pairs(_mm512_mul_ps(self.0, by.0)) }
        }
    }

    impl Bf16Pairs {
        /// The first `len` elements, at most 32, and zeros.
        ///
        /// # Safety
        /// As `Lanes`; the elements are there.
        #[inline(always)]
        pub(in crate::cpu) unsafe fn load_first(from: *const u16, len: usize) -> Self {
            let mask = if len >= 32 { u32::MAX } else { (1 << len) - 1 };
            // SAFETY: as above; what is masked out is not read.
            unsafe {
                let words = _mm512_maskz_loadu_epi16(mask, from.cast());
                Bf16Pairs(_mm512_castsi512_ps(words))
            }
        }

        /// The pairs of the elements of two rows that lie above each other: the first 16, and the last.
        ///
        /// # Safety
        /// As `Lanes`.
        #[inline(always)]
        pub(in crate::cpu) unsafe fn paired(above: Self, below: Self) -> [Self; 2] {
            // An element of `above`, and from 32 on, one of `below`.
            const FROM: [[u16; 32]; 2] = {
                let mut from = [[0; 32]; 2];
                let mut i = 0;
                while i < 32 {
                    from[i / 16][i % 16 * 2] = i as u16;
                    from[i / 16][i % 16 * 2 + 1] = 32 + i as u16;
                    i += 1;
                }
                from
            };
            // SAFETY: as above.
            unsafe {
                let (above, below) = (_mm512_castps_si512(above.0), _mm512_castps_si512(below.0));
                let [first, last] = &FROM;
                let first = _mm512_loadu_epi16(first.as_ptr().cast());
                let last = _mm512_loadu_epi16(last.as_ptr().cast());
                let first = _mm512_permutex2var_epi16(above, first, below);
                let last = _mm512_permutex2var_epi16(above, last, below);
                [Bf16Pairs(_mm512_castsi512_ps(first)), Bf16Pairs(_mm512_castsi512_ps(last))]
            }
        }

        /// The sum of the lanes of each.
        ///
        /// # Safety
        /// As `Lanes`.
        #[inline(always)]
        pub(in crate::cpu) unsafe fn sums(of: [Self; 4]) -> [f32; 4] {
            let [a, b, c, d] = of;
            // SAFETY: as above.
            unsafe { F32x16::sums([F32x16(a.0), F32x16(b.0), F32x16(c.0), F32x16(d.0)]) }
        }
    }

    // SAFETY: as `Lanes`.
    unsafe impl Rounds for Bf16Pairs {
        #[inline(always)]
        unsafe fn load_bf16(from: *const u16) -> Self {
            // SAFETY: as above; bf16 is the upper half of f32.
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                Bf16Pairs(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
            }
        }
        #[inline(always)]
        unsafe fn store_bf16(self, to: *mut u16) {
            // SAFETY: as above; both are 32 bytes.
            unsafe {
                let rounded = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(self.0));
                _mm256_storeu_si256(to.cast(), rounded);
            }
        }
    }
}

#[cfg(target_arch = "aarch64")]
pub(in crate::cpu) mod neon {
    use super::{Lanes, Summed};
    use std::arch::aarch64::*;

    lanes!(F32x4(float32x4_t; 32): f32, 4, vdupq_n_f32, vdupq_n_f32, vld1q_f32, vst1q_f32, vmulq_f32,
        |acc, a, b| vfmaq_f32(acc, a, b));
    lanes!(F64x2(float64x2_t; 32): f64, 2, vdupq_n_f64, vdupq_n_f64, vld1q_f64, vst1q_f64, vmulq_f64,
        |acc, a, b| vfmaq_f64(acc, a, b));

    // SAFETY: as `Lanes`.
    unsafe impl Summed for F32x4 {
        #[inline(always)]
        unsafe fn sums([a, b, c, d]: [Self; 4]) -> [f32; 4] {
            // SAFETY: as above.
            unsafe {
                let sums = vpaddq_f32(vpaddq_f32(a.0, b.0), vpaddq_f32(c.0, d.0));
                std::mem::transmute::<float32x4_t, [f32; 4]>(sums)
            }
        }
    }
}

/// What every processor has: arrays, which the compiler makes vectors of where it can. Multiplications and
/// additions round one after the other.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Plain<T>([T; 4]);

macro_rules! plain {
    ($sum:ty) => {
        // SAFETY: no instruction set is needed; pointers are the callers'.
        unsafe impl Lanes for Plain<$sum> {
            type Packed = $sum;
            type Sum = $sum;
            const LANES: usize = 4;

            #[inline(always)]
            unsafe fn zero() -> Self {
                Plain([0.0; 4])
            }
            #[inline(always)]
            unsafe fn splat(from: *const $sum) -> Self {
                // SAFETY: as above.
                Plain([unsafe { *from }; 4])
            }
            #[inline(always)]
            unsafe fn load(from: *const $sum) -> Self {
                // SAFETY: as above.
                Plain(unsafe { from.cast::<[$sum; 4]>().read() })
            }
            #[inline(always)]
            unsafe fn load_sums(from: *const $sum) -> Self {
                // SAFETY: as above.
                Plain(unsafe { from.cast::<[$sum; 4]>().read() })
            }
            #[inline(always)]
            unsafe fn splat_sum(value: $sum) -> Self {
                Plain([value; 4])
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut $sum) {
                // SAFETY: as above.
                unsafe { to.cast::<[$sum; 4]>().write(self.0) }
            }
            #[inline(always)]
            unsafe fn multiply_add(self, a: Self, b: Self) -> Self {
                Plain(std::array::from_fn(|i| self.0[i] + a.0[i] * b.0[i]))
            }
            #[inline(always)]
            unsafe fn multiply_add_sums(self, a: Self, b: Self) -> Self {
                // SAFETY: as above.
                unsafe { self.multiply_add(a, b) }
            }
            #[inline(always)]
            unsafe fn scaled(self, by: Self) -> Self {
                Plain(std::array::from_fn(|i| self.0[i] * by.0[i]))
            }
        }
    };
}
plain!(f32);
plain!(f64);

// SAFETY: as `Lanes`.
unsafe impl Summed for Plain<f32> {
    #[inline(always)]
    unsafe fn sums(of: [Self; 4]) -> [f32; 4] {
        of.map(|Plain([a, b, c, d])| (a + c) + (b + d))
    }
}

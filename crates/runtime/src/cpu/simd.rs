//! Functions compiled once for every instruction set that matters, and chosen at run time.
//!
//! A multiplication and an addition are rounded once where a formula says so by [`MulAdd`], and never elsewhere: every
//! instruction set gives the same bits.

/// `a * b + c`, rounded once.
pub(crate) trait MulAdd {
    fn mul_add(a: f32, b: f32, c: f32) -> f32;
}

/// By an instruction.
pub(crate) struct Fused;

impl MulAdd for Fused {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}

/// In f64, for processors without such an instruction, where the C library's function is slow.
#[cfg(any(test, not(target_arch = "aarch64")))]
pub(crate) struct Emulated;

#[cfg(any(test, not(target_arch = "aarch64")))]
impl MulAdd for Emulated {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        let (product, c) = (f64::from(a) * f64::from(b), f64::from(c));
        // The product is exact. The sum is rounded to odd (Boldo & Melquiond 2008), so that rounding it again, to
        // f32, gives what rounding once would have given.
        let sum = product + c;
        let part = sum - product;
        let error = (product - (sum - part)) + (c - part);
        let bits = sum.to_bits();
        let away = (error > 0.0) == (sum > 0.0);
        let neighbour = if away { bits.wrapping_add(1) } else { bits.wrapping_sub(1) };
        // False of what is not finite.
        let is_inexact = error.abs() > 0.0;
        let odd = if is_inexact && bits & 1 == 0 { neighbour } else { bits };
        f64::from_bits(odd) as f32
    }
}

/// What code has that is compiled for no instruction set in particular.
#[cfg(target_arch = "aarch64")]
pub(crate) type Portable = Fused;
#[cfg(not(target_arch = "aarch64"))]
pub(crate) type Portable = Emulated;

/// Declares a function whose body is compiled for AVX2 and AVX-512 too, and that picks the best when called. In the
/// body, `M` is the [`MulAdd`] of the instruction set.
macro_rules! multiversion {
    ($(
        $(#[$meta:meta])*
        $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block
    )*) => {$(
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn plain<M: $crate::cpu::simd::MulAdd>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    plain::<$crate::cpu::simd::Fused>($($arg),*)
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    plain::<$crate::cpu::simd::Fused>($($arg),*)
                }
                match $crate::cpu::simd::level() {
                    // SAFETY: the processor has AVX-512, as was detected.
                    $crate::cpu::simd::Level::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: the same of AVX2.
                    $crate::cpu::simd::Level::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::cpu::simd::Level::Baseline => {}
                }
            }
            plain::<$crate::cpu::simd::Portable>($($arg),*)
        }
    )*};
}

/// Gives a pointer to the widest version that this processor runs of an unsafe generic function, whose body
/// must be `#[inline(always)]`.
///
/// `widest!(body<A, B>(x: X, y: Y))` within a function that has the parameters `A` and `B`, with their bounds
/// repeated in the brackets: `widest!([A: Pod, B: Pod] body<A, B>(x: X, y: Y))`. With `body<A, B; M>`, the body has a last
/// parameter, the [`MulAdd`] of the instruction set.
macro_rules! widest {
    (@fused $m:ident) => { $crate::cpu::simd::Fused };
    (@portable $m:ident) => { $crate::cpu::simd::Portable };
    ([$($bounds:tt)*] $body:ident<$($g:ident),* $(; $m:ident)?>($($arg:ident: $ty:ty),*)) => {{
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx2,fma")]
            unsafe fn avx2<$($bounds)*>($($arg: $ty),*) {
                // SAFETY: the caller's promise is the body's.
                unsafe { $body::<$($g),* $(, $crate::cpu::simd::widest!(@fused $m))?>($($arg),*) }
            }
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            unsafe fn avx512<$($bounds)*>($($arg: $ty),*) {
                // SAFETY: the caller's promise is the body's.
                unsafe { $body::<$($g),* $(, $crate::cpu::simd::widest!(@fused $m))?>($($arg),*) }
            }
            match $crate::cpu::simd::level() {
                $crate::cpu::simd::Level::Avx512 => avx512::<$($g),*> as unsafe fn($($ty),*),
                $crate::cpu::simd::Level::Avx2 => avx2::<$($g),*>,
                $crate::cpu::simd::Level::Baseline => {
                    $body::<$($g),* $(, $crate::cpu::simd::widest!(@portable $m))?>
                }
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            $body::<$($g),* $(, $crate::cpu::simd::widest!(@portable $m))?> as unsafe fn($($ty),*)
        }
    }};
}

/// The instruction sets that [`widest`] tells apart.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) enum Level {
    Baseline,
    Avx2,
    Avx512,
}

/// The widest that this processor has. It is asked row by row, and so looked up once.
#[cfg(target_arch = "x86_64")]
pub(crate) fn level() -> Level {
    use std::arch::is_x86_feature_detected as has;
    static LEVEL: std::sync::LazyLock<Level> = std::sync::LazyLock::new(|| {
        let avx512 = has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl");
        match (avx512, has!("avx2") && has!("fma")) {
            (true, _) => Level::Avx512,
            (_, true) => Level::Avx2,
            _ => Level::Baseline,
        }
    });
    *LEVEL
}

/// Asks for a cache line that will be read soon, in the second-level cache; any address will do.
#[inline(always)]
pub(crate) fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// [`prefetch`], in the first-level cache.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn prefetch_near<T>(at: *const T) {
    // SAFETY: as above.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
}

pub(crate) use {multiversion, widest};

#[cfg(test)]
mod tests {
    use super::{Emulated, Fused, MulAdd};

    #[test]
    fn an_emulated_multiplication_and_addition_is_rounded_once() {
        const STEP: u64 = 6_364_136_223_846_793_005;
        let mut bits = 1u64;
        let mut next = || {
            bits = bits.wrapping_mul(STEP).wrapping_add(1_442_695_040_888_963_407);
            (bits >> 32) as u32
        };
        let same = |a: f32, b: f32, c: f32| {
            let (one, two) = (Fused::mul_add(a, b, c), Emulated::mul_add(a, b, c));
            let both_nan = one.is_nan() && two.is_nan();
            assert!(both_nan || one.to_bits() == two.to_bits(), "{a} * {b} + {c}: {one}, {two}");
        };
        let unit = |x: u32| 1.0 + (x >> 9) as f32 * f32::EPSILON;
        for _ in 0..200_000 {
            let [a, b, c] = [next(), next(), next()].map(f32::from_bits);
            same(a, b, c);
            // What nearly cancels, and what lies near the middle of two numbers.
            same(a, b, -a * b);
            let (a, b) = (unit(next()), unit(next()));
            let tiny = unit(next()) * f32::from_bits((127 - 24 - next() % 40) << 23);
            same(a, b, if next() % 2 == 0 { tiny } else { -tiny });
            same(a, tiny, b);
        }
        for a in [0.0, -0.0, 1.0, f32::INFINITY, f32::NAN, f32::MAX, f32::MIN_POSITIVE, 1e-45] {
            for b in [0.0, -1.0, f32::NEG_INFINITY, 0.5, 2.0] {
                for c in [0.0, -0.0, 1.0, f32::INFINITY, f32::MIN, -1e-45] {
                    same(a, b, c);
                }
            }
        }
    }
}

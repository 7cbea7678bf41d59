//! Functions compiled once for every instruction set that matters, and chosen at run time.
//!
//! No multiplication and addition are contracted: every instruction set gives the same bits.

/// Declares a function whose body is compiled for AVX2 and AVX-512 too, and that picks the best when called.
macro_rules! multiversion {
    ($(
        $(#[$meta:meta])*
        $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block
    )*) => {$(
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn plain($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    plain($($arg),*)
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    plain($($arg),*)
                }
                match $crate::cpu::simd::level() {
                    // SAFETY: the processor has AVX-512, as was detected.
                    $crate::cpu::simd::Level::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: the same of AVX2.
                    $crate::cpu::simd::Level::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::cpu::simd::Level::Baseline => {}
                }
            }
            plain($($arg),*)
        }
    )*};
}

/// Gives a pointer to the widest version that this processor runs of an unsafe generic function, whose body
/// must be `#[inline(always)]`.
///
/// `widest!(body<A, B>(x: X, y: Y))` within a function that has the parameters `A` and `B`, with their bounds
/// repeated in the brackets: `widest!([A: Pod, B: Pod] body<A, B>(x: X, y: Y))`.
macro_rules! widest {
    ([$($bounds:tt)*] $body:ident<$($g:ident),*>($($arg:ident: $ty:ty),*)) => {{
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx2")]
            unsafe fn avx2<$($bounds)*>($($arg: $ty),*) {
                // SAFETY: the caller's promise is the body's.
                unsafe { $body::<$($g),*>($($arg),*) }
            }
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            unsafe fn avx512<$($bounds)*>($($arg: $ty),*) {
                // SAFETY: the caller's promise is the body's.
                unsafe { $body::<$($g),*>($($arg),*) }
            }
            match $crate::cpu::simd::level() {
                $crate::cpu::simd::Level::Avx512 => avx512::<$($g),*> as unsafe fn($($ty),*),
                $crate::cpu::simd::Level::Avx2 => avx2::<$($g),*>,
                $crate::cpu::simd::Level::Baseline => $body::<$($g),*>,
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            $body::<$($g),*> as unsafe fn($($ty),*)
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

#[cfg(target_arch = "x86_64")]
pub(crate) fn level() -> Level {
    use std::arch::is_x86_feature_detected as has;
    let avx512 = has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl");
    match (avx512, has!("avx2")) {
        (true, _) => Level::Avx512,
        (_, true) => Level::Avx2,
        _ => Level::Baseline,
    }
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

pub(crate) use {multiversion, widest};

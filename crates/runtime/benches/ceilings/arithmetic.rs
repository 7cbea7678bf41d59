//! Multiplications and additions a second, from registers to registers.
//!
//! Each loop carries as many sums as hide the latency of its instruction, and reads no memory.

use super::{Ceiling, shortest};
use std::hint::black_box;

/// A loop over independent sums.
struct Loop {
    /// Operations of one round.
    operations: f64,
    by: &'static str,
    /// Runs so many rounds.
    run: fn(u32),
}

const ROUNDS: u32 = 50_000;

impl Loop {
    /// On every thread at once.
    fn measure(self) -> Ceiling {
        let time = shortest(|| drop(rayon::broadcast(|_| (self.run)(black_box(ROUNDS)))));
        let all = self.operations * f64::from(ROUNDS) * rayon::current_num_threads() as f64;
        Ceiling { per_second: all / time.as_secs_f64(), by: self.by }
    }
}

/// Of f32.
pub(crate) fn f32() -> Ceiling {
    machine::f32().unwrap_or(BASELINE).measure()
}

/// Of bf16, added in f32; `None` where a bf16 must be widened first.
pub(crate) fn bf16() -> Option<Ceiling> {
    machine::bf16().map(Loop::measure)
}

/// Of 8-bit integers, added in 32 bits.
pub(crate) fn int8() -> Option<Ceiling> {
    machine::int8().map(Loop::measure)
}

/// What the compiler makes of it without being told of any extension.
const BASELINE: Loop = Loop { operations: 2.0 * 32.0, by: "baseline", run: baseline };

fn baseline(rounds: u32) {
    let (a, b) = (black_box(0.5f32), black_box(1.0f32));
    let mut sums = [0f32; 32];
    for _ in 0..rounds {
        sums.iter_mut().for_each(|sum| *sum = *sum * a + b);
    }
    black_box(sums);
}

/// Twelve sums, spelt out so that the compiler keeps them in registers.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! rounds {
    ($rounds:ident, $zero:expr, |$sum:ident| $next:expr) => {{
        let [mut s0, mut s1, mut s2, mut s3, mut s4, mut s5] = [$zero; 6];
        let [mut s6, mut s7, mut s8, mut s9, mut s10, mut s11] = [$zero; 6];
        for _ in 0..$rounds {
            rounds!(@each $sum, $next, s0 s1 s2 s3 s4 s5 s6 s7 s8 s9 s10 s11);
        }
        black_box([s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11]);
    }};
    (@each $sum:ident, $next:expr, $($name:ident)*) => {
        $(let $sum = $name; $name = $next;)*
    };
}

#[cfg(target_arch = "x86_64")]
mod machine {
    use super::Loop;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    pub(super) fn f32() -> Option<Loop> {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has AVX-512F.
            let run = |rounds| unsafe { f32_avx512(rounds) };
            return Some(Loop { operations: 12.0 * 32.0, by: "avx512f", run });
        }
        let has = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        // SAFETY: the processor has AVX2 and FMA wherever this is called.
        let run = |rounds| unsafe { f32_avx2(rounds) };
        has.then_some(Loop { operations: 12.0 * 16.0, by: "avx2, fma", run })
    }

    pub(super) fn bf16() -> Option<Loop> {
        let has = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16");
        // SAFETY: the processor has AVX-512-BF16 wherever this is called.
        let run = |rounds| unsafe { bf16_avx512(rounds) };
        has.then_some(Loop { operations: 12.0 * 64.0, by: "avx512bf16", run })
    }

    pub(super) fn int8() -> Option<Loop> {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni") {
            // SAFETY: the processor has AVX-512-VNNI.
            let run = |rounds| unsafe { int8_avx512(rounds) };
            return Some(Loop { operations: 12.0 * 128.0, by: "avx512vnni", run });
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("avxvnni") {
            // SAFETY: the processor has AVX-VNNI.
            let run = |rounds| unsafe { int8_avxvnni(rounds) };
            return Some(Loop { operations: 12.0 * 64.0, by: "avxvnni", run });
        }
        // SAFETY: the processor has AVX2 wherever this is called.
        let run = |rounds| unsafe { int8_avx2(rounds) };
        let has = is_x86_feature_detected!("avx2");
        has.then_some(Loop { operations: 12.0 * 64.0, by: "avx2, three instructions", run })
    }

    #[target_feature(enable = "avx512f")]
    fn f32_avx512(rounds: u32) {
        let (a, b) = (_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(black_box(1.0)));
        rounds!(rounds, b, |sum| _mm512_fmadd_ps(sum, a, b));
    }

    #[target_feature(enable = "avx2,fma")]
    fn f32_avx2(rounds: u32) {
        let (a, b) = (_mm256_set1_ps(black_box(0.5)), _mm256_set1_ps(black_box(1.0)));
        rounds!(rounds, b, |sum| _mm256_fmadd_ps(sum, a, b));
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn bf16_avx512(rounds: u32) {
        let a = _mm512_set1_ps(black_box(0.5));
        let a = _mm512_cvtne2ps_pbh(a, a);
        rounds!(rounds, _mm512_setzero_ps(), |sum| _mm512_dpbf16_ps(sum, a, a));
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    fn int8_avx512(rounds: u32) {
        let a = _mm512_set1_epi8(black_box(1));
        rounds!(rounds, _mm512_setzero_si512(), |sum| _mm512_dpbusd_epi32(sum, a, a));
    }

    #[target_feature(enable = "avx2,avxvnni")]
    fn int8_avxvnni(rounds: u32) {
        let a = _mm256_set1_epi8(black_box(1));
        rounds!(rounds, _mm256_setzero_si256(), |sum| _mm256_dpbusd_avx_epi32(sum, a, a));
    }

    #[target_feature(enable = "avx2")]
    fn int8_avx2(rounds: u32) {
        let (a, ones) = (_mm256_set1_epi8(black_box(1)), _mm256_set1_epi16(black_box(1)));
        rounds!(rounds, _mm256_setzero_si256(), |sum| {
            // Of another operand each time, or the product would be computed once.
            let pairs = _mm256_maddubs_epi16(_mm256_xor_si256(a, sum), a);
            _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones))
        });
    }
}

#[cfg(target_arch = "aarch64")]
mod machine {
    use super::Loop;
    use std::arch::aarch64::*;
    use std::hint::black_box;

    /// NEON is part of every aarch64 processor that Rust knows by name.
    pub(super) fn f32() -> Option<Loop> {
        let run = |rounds| {
            // SAFETY: the processor has NEON.
            unsafe { f32_neon(rounds) }
        };
        let has = std::arch::is_aarch64_feature_detected!("neon");
        has.then_some(Loop { operations: 12.0 * 8.0, by: "neon", run })
    }

    /// Its instruction is not stable in Rust.
    pub(super) fn bf16() -> Option<Loop> {
        None
    }

    /// `vmlal` and `vpadal`: the dot product's own instruction is not stable in Rust.
    pub(super) fn int8() -> Option<Loop> {
        let run = |rounds| {
            // SAFETY: the processor has NEON.
            unsafe { int8_neon(rounds) }
        };
        let has = std::arch::is_aarch64_feature_detected!("neon");
        has.then_some(Loop { operations: 12.0 * 16.0, by: "neon, two instructions", run })
    }

    #[target_feature(enable = "neon")]
    fn f32_neon(rounds: u32) {
        let (a, b) = (vdupq_n_f32(black_box(0.5)), vdupq_n_f32(black_box(1.0)));
        rounds!(rounds, b, |sum| vfmaq_f32(b, sum, a));
    }

    #[target_feature(enable = "neon")]
    fn int8_neon(rounds: u32) {
        let a = vdup_n_s8(black_box(1));
        rounds!(rounds, vdupq_n_s32(0), |sum| {
            let x = veor_s8(a, vget_low_s8(vreinterpretq_s8_s32(sum)));
            vpadalq_s16(sum, vmull_s8(x, a))
        });
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod machine {
    use super::Loop;

    pub(super) fn f32() -> Option<Loop> {
        None
    }

    pub(super) fn bf16() -> Option<Loop> {
        None
    }

    pub(super) fn int8() -> Option<Loop> {
        None
    }
}

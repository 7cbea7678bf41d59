//! Loops over rows of floats, written so that compilers vectorise them.

use crate::cpu::halves::{bf16_to_f32, round_to_bf16};
use crate::cpu::simd::{MulAdd, multiversion};
use half::bf16;

/// Partial results are kept in this many lanes, on every machine: the order of a sum is part of its value.
const LANES: usize = 16;

macro_rules! rows {
    ($ty:ident, $exp:path, $max_of:ident, $exp_all:ident, $dot:ident, $axpy:ident, $scale_all:ident,
     $softmax_vjp:ident) => {
        multiversion! {
            pub(crate) fn $max_of(row: &[$ty]) -> $ty {
                let mut lanes = [$ty::NEG_INFINITY; LANES];
                let mut nan = [false; LANES];
                let chunks = row.chunks_exact(LANES);
                let rest = chunks.remainder();
                for chunk in chunks {
                    for i in 0..LANES {
                        lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
                        nan[i] |= chunk[i].is_nan();
                    }
                }
                if nan.contains(&true) || rest.iter().any(|x| x.is_nan()) {
                    return $ty::NAN;
                }
                lanes.iter().chain(rest).fold($ty::NEG_INFINITY, |a, b| a.max(*b))
            }

            pub(crate) fn $exp_all(row: &mut [$ty], shift: $ty) -> $ty {
                let mut lanes = [0.0; LANES];
                let mut chunks = row.chunks_exact_mut(LANES);
                for chunk in &mut chunks {
                    for i in 0..LANES {
                        chunk[i] = $exp(chunk[i] - shift);
                        lanes[i] += chunk[i];
                    }
                }
                for (x, lane) in chunks.into_remainder().iter_mut().zip(&mut lanes) {
                    *x = $exp(*x - shift);
                    *lane += *x;
                }
                lanes.iter().sum()
            }

            pub(crate) fn $dot(a: &[$ty], b: &[$ty]) -> $ty {
                let mut lanes = [0.0; LANES];
                let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
                let rest = a.remainder().iter().zip(b.remainder());
                for (a, b) in a.zip(b) {
                    for i in 0..LANES {
                        lanes[i] += a[i] * b[i];
                    }
                }
                for ((a, b), lane) in rest.zip(&mut lanes) {
                    *lane += a * b;
                }
                lanes.iter().sum()
            }

            pub(crate) fn $axpy(to: &mut [$ty], scale: $ty, from: &[$ty]) {
                for (to, from) in to.iter_mut().zip(from) {
                    *to += scale * from;
                }
            }

            pub(crate) fn $scale_all(row: &mut [$ty], by: $ty) {
                for x in row {
                    *x *= by;
                }
            }

            /// `ds = p (dp - delta)`, where `ds` holds dp.
            pub(crate) fn $softmax_vjp(p: &[$ty], ds: &mut [$ty], delta: $ty) {
                for (ds, p) in ds.iter_mut().zip(p) {
                    *ds = *p * (*ds - delta);
                }
            }
        }
    };
}
rows!(
    f32,
    exp_f32::<M>,
    max_of_f32,
    exp_all_f32,
    dot_f32,
    axpy_f32,
    scale_all_f32,
    softmax_vjp_f32
);
rows!(f64, f64::exp, max_of_f64, exp_all_f64, dot_f64, axpy_f64, scale_all_f64, softmax_vjp_f64);

multiversion! {
    /// bf16 is the upper half of f32.
    pub(crate) fn widen_all_bf16(from: &[bf16], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = bf16_to_f32(*from);
        }
    }

    pub(crate) fn narrow_all_bf16(from: &[f32], to: &mut [bf16]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = round_to_bf16(*from);
        }
    }
}

multiversion! {
    /// [`exp_f32`] of one number.
    pub(crate) fn exp_of_f32(x: f32) -> f32 {
        exp_f32::<M>(x)
    }
}

/// `p[0] x^n + p[1] x^(n-1) + .. + p[n]`, by Horner's rule.
#[inline(always)]
fn polynomial<M: MulAdd, const N: usize>(x: f32, p: [f32; N]) -> f32 {
    let mut y = p[0];
    for coefficient in &p[1..] {
        y = M::mul_add(y, x, *coefficient);
    }
    y
}

/// `exp(x)` within 1 ulp, branch-free: `2^n · exp(r)` with `|r| <= ln 2 / 2`, where `exp(r)` is the polynomial of the sixth
/// degree with the smallest relative error. Results below the smallest normal number are 0.
#[inline(always)]
pub(crate) fn exp_f32<M: MulAdd>(x: f32) -> f32 {
    // Adding and subtracting this rounds to an integer.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    const SMALLEST: f32 = -87.336_54;
    const LARGEST: f32 = 88.722_83;
    const EXP: [f32; 7] =
        [1.384_360_4e-3, 8.374_172e-3, 4.166_800_5e-2, 1.666_643_2e-1, 4.999_999_4e-1, 1.0, 1.0];
    let rounded = M::mul_add(x, std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = M::mul_add(n, -LN_2_LOW, M::mul_add(n, -LN_2_HIGH, x));
    let p = polynomial::<M, 7>(r, EXP);
    // The low bits of the sum are n, which is added to the exponent. That is never too large: where n is 128, p < 1.
    let y = f32::from_bits(p.to_bits().wrapping_add(rounded.to_bits() << 23));
    let y = if x < SMALLEST { 0.0 } else { y };
    // Infinity above, and NaN of NaN.
    if x <= LARGEST { y } else { x + f32::INFINITY }
}

/// `ln(x)` within 2 ulp, branch-free (Cephes, Moshier 1989): `e · ln 2 + ln(m)` with `m` in `[1/√2, √2)`.
#[inline(always)]
pub(crate) fn ln_f32<M: MulAdd>(x: f32) -> f32 {
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    const LN: [f32; 9] = [
        7.037_683_6e-2,
        -1.151_461e-1,
        1.167_699_9e-1,
        -1.242_014_1e-1,
        1.424_932_3e-1,
        -1.666_805_8e-1,
        2.000_071_5e-1,
        -2.499_999_4e-1,
        3.333_333e-1,
    ];
    // Subnormal numbers have no exponent of their own.
    let is_small = x < f32::MIN_POSITIVE;
    let scaled = if is_small { x * 8_388_608.0 } else { x };
    // The exponent of a mantissa in [1/√2, √2): counted from the bits of 1/√2.
    let bits = scaled.to_bits().wrapping_sub(0x3f35_04f3);
    let exponent = (bits as i32) >> 23;
    let mantissa = f32::from_bits((bits & 0x007f_ffff).wrapping_add(0x3f35_04f3));
    let e = (exponent - if is_small { 23 } else { 0 }) as f32;
    let f = mantissa - 1.0;
    let z = f * f;
    let p = polynomial::<M, 9>(f, LN);
    let tail = M::mul_add(p * f, z, M::mul_add(e, LN_2_LOW, -0.5 * z));
    let y = M::mul_add(e, LN_2_HIGH, f + tail);
    let y = if x == f32::INFINITY { x } else { y };
    let y = if x == 0.0 { f32::NEG_INFINITY } else { y };
    if x < 0.0 || x.is_nan() { f32::NAN } else { y }
}

/// `tanh(x)` within 3 ulp, branch-free: an odd polynomial near 0 (Cephes, Moshier 1989), else `1 - 2 / (exp(2x) + 1)`.
#[inline(always)]
pub(crate) fn tanh_f32<M: MulAdd>(x: f32) -> f32 {
    const NEAR: [f32; 5] =
        [-5.704_988_7e-3, 2.063_909e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328e-1];
    let a = x.abs();
    let s = x * x;
    let near = M::mul_add(polynomial::<M, 5>(s, NEAR) * s, x, x);
    let far = (1.0 - 2.0 / (exp_f32::<M>(2.0 * a) + 1.0)).copysign(x);
    // NaN takes the polynomial's way.
    if a >= 0.625 { far } else { near }
}

/// `erf(x)` within 4 ulp, branch-free: `x P(x²) / Q(x²)` with polynomials of the fifth degree, the quotient with the
/// smallest relative error up to 3.95, and 1 from where that exceeds 1.
#[inline(always)]
pub(crate) fn erf_f32<M: MulAdd>(x: f32) -> f32 {
    const END: f32 = 4.1;
    const P: [f32; 6] = [
        2.025_926_3e-6,
        2.846_873_8e-4,
        3.808_111e-3,
        5.287_528e-2,
        1.915_490_3e-1,
        std::f32::consts::FRAC_2_SQRT_PI,
    ];
    const Q: [f32; 6] =
        [3.783_198e-5, 1.170_715_2e-3, 1.505_498_3e-2, 1.145_591e-1, 5.030_886e-1, 1.0];
    // NaN passes both comparisons.
    let a = x.abs();
    let a = if a > END { END } else { a };
    let s = a * a;
    let y = a * polynomial::<M, 6>(s, P) / polynomial::<M, 6>(s, Q);
    (if y > 1.0 { 1.0 } else { y }).copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::{Emulated, Fused};

    /// A function with its name, whose bits are the same with either [`MulAdd`].
    macro_rules! same_bits {
        ($($name:ident)*) => {$(
            fn $name(x: f32) -> f32 {
                let (y, emulated) = (super::$name::<Fused>(x), super::$name::<Emulated>(x));
                assert!(y.to_bits() == emulated.to_bits() || y.is_nan() && emulated.is_nan());
                y
            }
        )*};
    }
    same_bits!(exp_f32 ln_f32 tanh_f32 erf_f32);

    #[test]
    fn exp_is_within_one_ulp() {
        let mut worst = 0.0f64;
        for i in -870_000..887_000 {
            let x = i as f32 * 1e-4;
            let expected = f64::from(x).exp();
            let ulp = f64::from(expected as f32).abs() * f64::from(f32::EPSILON);
            worst = worst.max((f64::from(exp_f32(x)) - expected).abs() / ulp);
        }
        assert!(worst <= 1.0, "worst error: {worst} ulp");
    }

    #[test]
    fn exp_of_the_extremes() {
        assert_eq!(exp_f32(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_f32(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp_f32(-1e9), 0.0);
        assert_eq!(exp_f32(0.0), 1.0);
        assert!(exp_f32(f32::NAN).is_nan());
        for payload in [1, 0xff, 0x1ff, 0x3f_ffff] {
            assert!(exp_f32(f32::from_bits(0x7fc0_0000 | payload)).is_nan());
        }
        // The last finite result, and what comes after it.
        assert!(exp_f32(88.722_83).is_finite());
        assert_eq!(exp_f32(88.722_84), f32::INFINITY);
        assert!((exp_f32(88.72) / 88.72f32.exp() - 1.0).abs() < 1e-6);
    }

    /// The worst error of `f` over `xs`, in ulp of the result.
    fn worst_ulp(f: fn(f32) -> f32, exact: fn(f64) -> f64, xs: impl Iterator<Item = f32>) -> f64 {
        xs.fold(0.0, |worst: f64, x| {
            let expected = exact(f64::from(x));
            let ulp = (expected.abs() * f64::from(f32::EPSILON)).max(f64::from(f32::MIN_POSITIVE));
            worst.max((f64::from(f(x)) - expected).abs() / ulp)
        })
    }

    #[test]
    fn ln_is_within_two_ulp() {
        let xs = (1..2_000_000).map(|i| f32::from_bits(i * 1060));
        let worst = worst_ulp(ln_f32, f64::ln, xs.filter(|x| x.is_finite()));
        assert!(worst <= 2.0, "worst error: {worst} ulp");
        let near_one = (-100_000..100_000).map(|i| 1.0 + i as f32 * 1e-6);
        assert!(worst_ulp(ln_f32, f64::ln, near_one.filter(|x| *x != 1.0)) <= 2.0);
        assert_eq!(ln_f32(0.0), f32::NEG_INFINITY);
        assert_eq!(ln_f32(f32::INFINITY), f32::INFINITY);
        assert_eq!(ln_f32(1.0), 0.0);
        assert!(ln_f32(-1.0).is_nan() && ln_f32(f32::NAN).is_nan());
    }

    #[test]
    fn tanh_is_within_three_ulp() {
        let xs = (-1_000_000..1_000_000).map(|i| i as f32 * 1.2e-5);
        let worst = worst_ulp(tanh_f32, f64::tanh, xs);
        assert!(worst <= 3.0, "worst error: {worst} ulp");
        assert_eq!(tanh_f32(1e9), 1.0);
        assert_eq!(tanh_f32(f32::NEG_INFINITY), -1.0);
        assert!(tanh_f32(f32::NAN).is_nan());
    }

    #[test]
    fn erf_is_within_four_ulp() {
        let xs = (-1_000_000..1_000_000).map(|i| i as f32 * 6e-6);
        let worst = worst_ulp(erf_f32, libm::erf, xs);
        assert!(worst <= 4.0, "worst error: {worst} ulp");
        assert_eq!(erf_f32(f32::INFINITY), 1.0);
        assert_eq!(erf_f32(-10.0), -1.0);
        assert!(erf_f32(f32::NAN).is_nan());
    }

    #[test]
    fn rows_of_any_length() {
        for len in [0, 1, 15, 16, 17, 100] {
            let row: Vec<f32> = (0..len).map(|i| ((i * 37) % 29) as f32 * 0.1 - 1.0).collect();
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(max_of_f32(&row), max);
            let dot: f64 = row.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
            assert!((f64::from(dot_f32(&row, &row)) - dot).abs() < 1e-4);
            let mut exps = row.clone();
            let sum = exp_all_f32(&mut exps, 0.5);
            let expected: f64 = row.iter().map(|x| (f64::from(*x) - 0.5).exp()).sum();
            assert!((f64::from(sum) - expected).abs() < 1e-4);
        }
        assert!(max_of_f32(&[f32::NEG_INFINITY, f32::NAN]).is_nan());
    }
}

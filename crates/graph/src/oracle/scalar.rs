//! Scalar functions in f64.

use crate::{BinaryOp, DType, UnaryOp};
use std::f64::consts::{FRAC_1_SQRT_2, PI};

pub(super) fn unary(f: UnaryOp, x: f64, dtype: DType) -> f64 {
    let y = match f {
        UnaryOp::Neg => -x,
        UnaryOp::Abs => x.abs(),
        UnaryOp::Sign if x == 0.0 => 0.0,
        UnaryOp::Sign => x.signum(),
        UnaryOp::Recip => 1.0 / x,
        UnaryOp::Sqr => x * x,
        UnaryOp::Sqrt => x.sqrt(),
        UnaryOp::Rsqrt => 1.0 / x.sqrt(),
        UnaryOp::Exp => x.exp(),
        UnaryOp::Log => x.ln(),
        UnaryOp::Log1p => x.ln_1p(),
        UnaryOp::Expm1 => x.exp_m1(),
        UnaryOp::Sin => x.sin(),
        UnaryOp::Cos => x.cos(),
        UnaryOp::Tanh => x.tanh(),
        UnaryOp::Erf => erf(x),
        UnaryOp::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        UnaryOp::Relu => maximum(x, 0.0),
        UnaryOp::Silu => x / (1.0 + (-x).exp()),
        UnaryOp::Gelu => x * (1.0 + erf(x * FRAC_1_SQRT_2)) / 2.0,
        UnaryOp::GeluTanh => {
            x * (1.0 + ((2.0 / PI).sqrt() * (x + 0.044_715 * x * x * x)).tanh()) / 2.0
        }
        UnaryOp::Floor => x.floor(),
        UnaryOp::Ceil => x.ceil(),
        UnaryOp::Round => x.round_ties_even(),
    };
    wrap(y, dtype)
}

pub(super) fn binary(f: BinaryOp, a: f64, b: f64, dtype: DType) -> f64 {
    let holds = |yes: bool| f64::from(u8::from(yes));
    let y = match f {
        BinaryOp::Add => a + b,
        BinaryOp::Sub => a - b,
        BinaryOp::Mul => a * b,
        BinaryOp::Div if dtype.is_float() => a / b,
        BinaryOp::Div if b == 0.0 => 0.0,
        BinaryOp::Div => (a / b).trunc(),
        BinaryOp::Pow if dtype.is_float() => a.powf(b),
        BinaryOp::Pow => return integer_power(a, b, dtype),
        BinaryOp::Maximum => maximum(a, b),
        BinaryOp::Minimum => -maximum(-a, -b),
        BinaryOp::Eq => return holds(a == b),
        BinaryOp::Ne => return holds(a != b),
        BinaryOp::Lt => return holds(a < b),
        BinaryOp::Le => return holds(a <= b),
        BinaryOp::Gt => return holds(a > b),
        BinaryOp::Ge => return holds(a >= b),
    };
    wrap(y, dtype)
}

fn integer_power(a: f64, b: f64, dtype: DType) -> f64 {
    match (a, b) {
        (_, b) if b >= 0.0 => {
            let power = (0..b as u64).fold(1i64, |y, _| y.wrapping_mul(a as i64));
            wrap(power as f64, dtype)
        }
        (1.0, _) => 1.0,
        (-1.0, b) => {
            if b % 2.0 == 0.0 {
                1.0
            } else {
                -1.0
            }
        }
        _ => 0.0,
    }
}

/// The larger one; NaN if either is.
pub(super) fn maximum(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

/// An integer result as its dtype holds it; a float as it is.
pub(super) fn wrap(x: f64, dtype: DType) -> f64 {
    match dtype {
        DType::U8 => f64::from(x as i64 as u8),
        DType::U32 => f64::from(x as i64 as u32),
        DType::I64 | DType::BF16 | DType::F16 | DType::F32 | DType::F64 => x,
    }
}

pub(super) fn cast(x: f64, from: DType, to: DType) -> f64 {
    match to {
        DType::U8 | DType::U32 if !from.is_float() => wrap(x, to),
        DType::U8 => f64::from(x as u8),
        DType::U32 => f64::from(x as u32),
        DType::I64 => x as i64 as f64,
        DType::BF16 => round_to(x, 8, -126),
        DType::F16 => round_to(x, 11, -14),
        DType::F32 => f64::from(x as f32),
        DType::F64 => x,
    }
}

/// `x` rounded to even to a float of `precision` bits (the hidden one included) and this lowest exponent.
fn round_to(x: f64, precision: i32, lowest: i32) -> f64 {
    if x == 0.0 || !x.is_finite() {
        return x;
    }
    // The hardware rounds f32 -> bf16 and f16; a value that comes from f64 goes through f32 there, and here.
    let x = f64::from(x as f32);
    let exponent = (x.abs().log2().floor() as i32).max(lowest);
    let ulp = 2f64.powi(exponent - (precision - 1));
    let rounded = (x / ulp).round_ties_even() * ulp;
    let largest = if precision == 11 { 65504.0 } else { f64::from(f32::MAX) };
    if rounded.abs() > largest { f64::INFINITY.copysign(x) } else { rounded }
}

/// The error function to about 1e-15: the Maclaurin series below 3, the continued fraction of erfc above
/// (Abramowitz & Stegun 7.1.5 and 7.1.14).
fn erf(x: f64) -> f64 {
    let a = x.abs();
    if a.is_nan() {
        return x;
    }
    let positive = if a < 3.0 {
        let (mut term, mut sum, mut n) = (a, a, 0.0);
        while term.abs() > 1e-18 * sum {
            n += 1.0;
            term *= -a * a / n;
            sum += term / (2.0 * n + 1.0);
        }
        2.0 / PI.sqrt() * sum
    } else {
        let fraction = (1..=60).rev().fold(a, |f, k| a + f64::from(k) / 2.0 / f);
        1.0 - (-a * a).exp() / (PI.sqrt() * fraction)
    };
    positive.copysign(x)
}

//! The derivatives of the scalar functions.

use crate::{
    BinaryOp::{self, *},
    ComputationGraph, DType, NodeId, Operation, Result,
    UnaryOp::{self, *},
};
use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI, PI};

/// The cotangent of `x`, where `y = f(x)`; `None` where the slope is 0 everywhere that it exists.
///
/// Slopes are written in whichever of `x` and `y` is the shorter, never in a third value of full
/// size.
pub(super) fn unary(
    g: &mut ComputationGraph,
    f: UnaryOp,
    x: NodeId,
    y: NodeId,
    dy: NodeId,
) -> Result<Option<NodeId>> {
    let slope = match f {
        Sign | Floor | Ceil | Round => return Ok(None),
        Neg => return g.unary(Neg, dy).map(Some),
        Relu => return relu(g, y, dy).map(Some),
        Abs => g.unary(Sign, x)?,
        Sqr => g.binary_scalar(Mul, x, 2.0)?,
        Exp => y,
        Expm1 => g.binary_scalar(Add, y, 1.0)?,
        Sin => g.unary(Cos, x)?,
        Cos => {
            let sin = g.unary(Sin, x)?;
            g.unary(Neg, sin)?
        }
        Log => g.unary(Recip, x)?,
        Log1p => {
            let x1 = g.binary_scalar(Add, x, 1.0)?;
            g.unary(Recip, x1)?
        }
        // -y²
        Recip => {
            let yy = g.unary(Sqr, y)?;
            g.unary(Neg, yy)?
        }
        // 1 / (2 y)
        Sqrt => {
            let r = g.unary(Recip, y)?;
            g.binary_scalar(Mul, r, 0.5)?
        }
        // -y³ / 2
        Rsqrt => {
            let yy = g.unary(Sqr, y)?;
            let yyy = g.binary(Mul, yy, y)?;
            g.binary_scalar(Mul, yyy, -0.5)?
        }
        // 1 - y²
        Tanh => {
            let yy = g.unary(Sqr, y)?;
            one_minus(g, yy)?
        }
        // 2 / sqrt π * exp(-x²)
        Erf => {
            let bell = bell(g, x, 1.0)?;
            g.binary_scalar(Mul, bell, FRAC_2_SQRT_PI)?
        }
        // y (1 - y)
        Sigmoid => {
            let rest = one_minus(g, y)?;
            g.binary(Mul, y, rest)?
        }
        Silu => silu_slope(g, x)?,
        Gelu => gelu_slope(g, x)?,
        GeluTanh => gelu_tanh_slope(g, x)?,
    };
    g.binary(Mul, dy, slope).map(Some)
}

/// Written so that NaN passes, as PyTorch's does.
fn relu(g: &mut ComputationGraph, y: NodeId, dy: NodeId) -> Result<NodeId> {
    let off = g.binary_scalar(Le, y, 0.0)?;
    let zero = g.scalar_like(dy, 0.0);
    g.select(off, zero, dy)
}

/// `s (1 + x (1 - s))` with `s = sigmoid(x)`
fn silu_slope(g: &mut ComputationGraph, x: NodeId) -> Result<NodeId> {
    let s = g.unary(Sigmoid, x)?;
    let rest = one_minus(g, s)?;
    let bend = g.binary(Mul, x, rest)?;
    let bend = g.binary_scalar(Add, bend, 1.0)?;
    g.binary(Mul, s, bend)
}

/// `Φ(x) + x φ(x)`: the normal distribution and its density.
fn gelu_slope(g: &mut ComputationGraph, x: NodeId) -> Result<NodeId> {
    let erf = g.binary_scalar(Mul, x, FRAC_1_SQRT_2)?;
    let erf = g.unary(Erf, erf)?;
    let cdf = g.binary_scalar(Add, erf, 1.0)?;
    let cdf = g.binary_scalar(Mul, cdf, 0.5)?;
    let bell = bell(g, x, 0.5)?;
    let xpdf = g.binary(Mul, x, bell)?;
    let xpdf = g.binary_scalar(Mul, xpdf, 1.0 / (2.0 * PI).sqrt())?;
    g.binary(Add, cdf, xpdf)
}

/// `(1 + t) / 2 + x (1 - t²) u' / 2` with `t = tanh(u)`, `u = sqrt(2 / π) (x + 0.044715 x³)`
fn gelu_tanh_slope(g: &mut ComputationGraph, x: NodeId) -> Result<NodeId> {
    const CUBIC: f64 = 0.044715;
    let scale = (2.0 / PI).sqrt();
    let xx = g.unary(Sqr, x)?;
    // u = x (scale + scale CUBIC x²), u' = scale + 3 scale CUBIC x²
    let u = g.binary_scalar(Mul, xx, scale * CUBIC)?;
    let u = g.binary_scalar(Add, u, scale)?;
    let u = g.binary(Mul, x, u)?;
    let du = g.binary_scalar(Mul, xx, 3.0 * scale * CUBIC)?;
    let du = g.binary_scalar(Add, du, scale)?;
    let t = g.unary(Tanh, u)?;
    let tt = g.unary(Sqr, t)?;
    let dt = one_minus(g, tt)?;
    let dt = g.binary(Mul, dt, du)?;
    let xdt = g.binary(Mul, x, dt)?;
    let t1 = g.binary_scalar(Add, t, 1.0)?;
    let twice = g.binary(Add, t1, xdt)?;
    g.binary_scalar(Mul, twice, 0.5)
}

fn one_minus(g: &mut ComputationGraph, x: NodeId) -> Result<NodeId> {
    let one = g.scalar_like(x, 1.0);
    g.binary(Sub, one, x)
}

/// `exp(-width x²)`
fn bell(g: &mut ComputationGraph, x: NodeId, width: f64) -> Result<NodeId> {
    let xx = g.unary(Sqr, x)?;
    let xx = g.binary_scalar(Mul, xx, -width)?;
    g.unary(Exp, xx)
}

/// The cotangent of `ab[side]`, where `y = f(a, b)`.
pub(super) fn binary(
    g: &mut ComputationGraph,
    f: BinaryOp,
    ab: [NodeId; 2],
    y: NodeId,
    dy: NodeId,
    side: usize,
) -> Result<Option<NodeId>> {
    let [a, b] = ab;
    let (own, other) = (ab[side], ab[1 - side]);
    let dx = match (f, side) {
        (Add, _) | (Sub, 0) => dy,
        (Sub, _) => g.unary(Neg, dy)?,
        (Mul, _) => g.binary(Mul, dy, other)?,
        (Div, 0) => quotient(g, dy, b)?,
        (Div, _) => {
            let da = quotient(g, dy, b)?;
            let db = g.binary(Mul, da, y)?;
            g.unary(Neg, db)?
        }
        (Pow, 0) => return pow_base(g, a, b, dy),
        (Pow, _) => pow_exponent(g, ab, y, dy)?,
        (Maximum, _) => winner(g, Lt, own, other, dy)?,
        (Minimum, _) => winner(g, Gt, own, other, dy)?,
        // Their value is an integer.
        (Eq | Ne | Lt | Le | Gt | Ge, _) => return Ok(None),
    };
    Ok(Some(dx))
}

/// `a / b`; by a row statistic it divides once a row, not once an element. Not where the reciprocal
/// may be rounded to bf16.
fn quotient(g: &mut ComputationGraph, a: NodeId, b: NodeId) -> Result<NodeId> {
    let Operation::Broadcast(_) = g[b].op else { return g.binary(Div, a, b) };
    if matches!(g.ty(b).dtype, DType::BF16 | DType::F16) {
        return g.binary(Div, a, b);
    }
    let row = g[b].inputs[0];
    let r = g.unary(Recip, row)?;
    g.binary(Mul, a, r)
}

/// `dy b a^(b - 1)`, and 0 where `b = 0`, even at `a = 0`.
fn pow_base(g: &mut ComputationGraph, a: NodeId, b: NodeId, dy: NodeId) -> Result<Option<NodeId>> {
    if let Some(exponent) = constant(g, b) {
        if exponent == 0.0 {
            return Ok(None);
        }
        let power = if exponent == 2.0 { a } else { g.binary_scalar(Pow, a, exponent - 1.0)? };
        let slope = g.binary_scalar(Mul, power, exponent)?;
        return g.binary(Mul, dy, slope).map(Some);
    }
    let less = g.binary_scalar(Sub, b, 1.0)?;
    let power = g.binary(Pow, a, less)?;
    let slope = g.binary(Mul, b, power)?;
    let dx = g.binary(Mul, dy, slope)?;
    let flat = g.binary_scalar(BinaryOp::Eq, b, 0.0)?;
    let zero = g.scalar_like(dy, 0.0);
    g.select(flat, zero, dx).map(Some)
}

/// `dy y log(a)`, and 0 where `a = 0` and `b >= 0`, as PyTorch's.
fn pow_exponent(
    g: &mut ComputationGraph,
    [a, b]: [NodeId; 2],
    y: NodeId,
    dy: NodeId,
) -> Result<NodeId> {
    let log = g.unary(Log, a)?;
    let slope = g.binary(Mul, y, log)?;
    let dx = g.binary(Mul, dy, slope)?;
    let at_zero = g.binary_scalar(BinaryOp::Eq, a, 0.0)?;
    let growing = g.binary_scalar(Ge, b, 0.0)?;
    let flat = g.binary(Mul, at_zero, growing)?;
    let zero = g.scalar_like(dy, 0.0);
    g.select(flat, zero, dx)
}

/// `dy` where `own` won, half of it where both did.
fn winner(
    g: &mut ComputationGraph,
    loses: BinaryOp,
    own: NodeId,
    other: NodeId,
    dy: NodeId,
) -> Result<NodeId> {
    let lost = g.binary(loses, own, other)?;
    let tied = g.binary(BinaryOp::Eq, own, other)?;
    let half = g.binary_scalar(Mul, dy, 0.5)?;
    let zero = g.scalar_like(dy, 0.0);
    let won = g.select(tied, half, dy)?;
    g.select(lost, zero, won)
}

/// The value of a constant that is repeated to some shape.
fn constant(g: &ComputationGraph, mut x: NodeId) -> Option<f64> {
    loop {
        match g[x].op {
            Operation::Const(c) => return Some(c.as_f64()),
            Operation::Broadcast(_) | Operation::Reshape(_) => x = g[x].inputs[0],
            _ => return None,
        }
    }
}

//! Softmax and its relatives along one dim.
//!
//! bf16 and f16 are computed in f32 and rounded once, at the end.

use super::{Composite, check_arity, widen};
use crate::infer::{check_dim, check_float};
use crate::{
    BinaryOp, ComputationGraph, Dims, NodeId, Operation, ReduceOp, Result, TensorType, UnaryOp,
};

pub(super) fn infer(
    composite: &Composite,
    dim: usize,
    inputs: &[TensorType],
) -> Result<TensorType> {
    let op = composite.as_str();
    let [x] = check_arity(op, inputs)?;
    check_float(op, &x)?;
    check_dim(op, dim, &x.shape)?;
    let keeps_extent = !matches!(composite, Composite::LogSumExp { .. });
    Ok(if keeps_extent { x } else { TensorType::new(x.dtype, x.shape.with(dim, 1)) })
}

/// `e / sum(e)` with `e = exp(x - max)`
pub(super) fn softmax(g: &mut ComputationGraph, dim: usize, x: NodeId) -> Result<NodeId> {
    let Some(shifted) = shift(g, dim, x)? else { return Ok(x) };
    let e = g.unary(UnaryOp::Exp, shifted)?;
    let sum = g.sum(e, Dims::new([dim]))?;
    let r = g.unary(UnaryOp::Recip, sum)?;
    let y = g.binary(BinaryOp::Mul, e, r)?;
    g.cast(y, g.ty(x).dtype)
}

/// `(x - max) - log(sum(exp(x - max)))`
pub(super) fn log_softmax(g: &mut ComputationGraph, dim: usize, x: NodeId) -> Result<NodeId> {
    let Some(shifted) = shift(g, dim, x)? else { return Ok(x) };
    let log = log_sum(g, dim, shifted)?;
    let y = g.binary(BinaryOp::Sub, shifted, log)?;
    g.cast(y, g.ty(x).dtype)
}

/// `max + log(sum(exp(x - max)))`
pub(super) fn logsumexp(g: &mut ComputationGraph, dim: usize, x: NodeId) -> Result<NodeId> {
    if g.shape(x)[dim] == 0 {
        // The logarithm of an empty sum.
        let log = g.scalar_like(x, f64::NEG_INFINITY);
        return g.broadcast_to(log, g.shape(x).with(dim, 1));
    }
    let dtype = g.ty(x).dtype;
    let x = widen(g, x)?;
    let max = g.reduce(ReduceOp::Max, x, Dims::new([dim]))?;
    // An infinite maximum is the result, which infinity minus infinity would hide.
    let size = g.unary(UnaryOp::Abs, max)?;
    let infinite = g.binary_scalar(BinaryOp::Eq, size, f64::INFINITY)?;
    let zero = g.scalar_like(max, 0.0);
    let max = g.select(infinite, zero, max)?;
    let shifted = g.binary(BinaryOp::Sub, x, max)?;
    let log = log_sum(g, dim, shifted)?;
    let y = g.binary(BinaryOp::Add, max, log)?;
    g.cast(y, dtype)
}

/// `x - max`, widened: no exponential of it overflows. `None` if there is nothing along `dim`.
fn shift(g: &mut ComputationGraph, dim: usize, x: NodeId) -> Result<Option<NodeId>> {
    if g.shape(x)[dim] == 0 {
        return Ok(None);
    }
    let x = widen(g, x)?;
    let max = g.reduce(ReduceOp::Max, x, Dims::new([dim]))?;
    g.binary(BinaryOp::Sub, x, max).map(Some)
}

fn log_sum(g: &mut ComputationGraph, dim: usize, shifted: NodeId) -> Result<NodeId> {
    let e = g.unary(UnaryOp::Exp, shifted)?;
    let sum = g.sum(e, Dims::new([dim]))?;
    g.unary(UnaryOp::Log, sum)
}

/// `dx = y (dy - sum(dy y))`
pub(super) fn softmax_vjp(
    g: &mut ComputationGraph,
    dim: usize,
    x: NodeId,
    y: NodeId,
    dy: NodeId,
) -> Result<Vec<Option<NodeId>>> {
    let dtype = g.ty(y).dtype;
    let y = unrounded(g, Composite::Softmax { dim }, x, y)?;
    let dy = widen(g, dy)?;
    let weighted = g.binary(BinaryOp::Mul, dy, y)?;
    let mean = g.sum(weighted, Dims::new([dim]))?;
    let centred = g.binary(BinaryOp::Sub, dy, mean)?;
    let dx = g.binary(BinaryOp::Mul, y, centred)?;
    Ok(vec![Some(g.cast(dx, dtype)?)])
}

/// `dx = dy - exp(y) sum(dy)`
pub(super) fn log_softmax_vjp(
    g: &mut ComputationGraph,
    dim: usize,
    x: NodeId,
    y: NodeId,
    dy: NodeId,
) -> Result<Vec<Option<NodeId>>> {
    let dtype = g.ty(y).dtype;
    let y = unrounded(g, Composite::LogSoftmax { dim }, x, y)?;
    let dy = widen(g, dy)?;
    let p = g.unary(UnaryOp::Exp, y)?;
    let total = g.sum(dy, Dims::new([dim]))?;
    let common = g.binary(BinaryOp::Mul, p, total)?;
    let dx = g.binary(BinaryOp::Sub, dy, common)?;
    Ok(vec![Some(g.cast(dx, dtype)?)])
}

/// `dx = dy exp(x - y)`
pub(super) fn logsumexp_vjp(
    g: &mut ComputationGraph,
    dim: usize,
    x: NodeId,
    y: NodeId,
    dy: NodeId,
) -> Result<Vec<Option<NodeId>>> {
    let dtype = g.ty(x).dtype;
    let y = unrounded(g, Composite::LogSumExp { dim }, x, y)?;
    let wide = widen(g, x)?;
    let p = probabilities(g, wide, y)?;
    let dy = widen(g, dy)?;
    let dx = g.binary(BinaryOp::Mul, dy, p)?;
    Ok(vec![Some(g.cast(dx, dtype)?)])
}

/// `y`, the value of `composite` at `x`, widened before it was rounded: in bf16 it has too few
/// digits for `exp(y)`, `x - y` and `dy - sum(dy y)`. The forward pass computes it anyway.
fn unrounded(
    g: &mut ComputationGraph,
    composite: Composite,
    x: NodeId,
    y: NodeId,
) -> Result<NodeId> {
    let wide = widen(g, x)?;
    if wide == x { Ok(y) } else { g.add(Operation::Composite(composite), &[wide]) }
}

pub(super) fn add_logsumexp(g: &mut ComputationGraph, dim: usize, x: NodeId) -> Result<NodeId> {
    g.add(Operation::Composite(Composite::LogSumExp { dim }), &[x])
}

/// The softmax of `x` from its `logsumexp`.
pub(super) fn probabilities(
    g: &mut ComputationGraph,
    x: NodeId,
    logsumexp: NodeId,
) -> Result<NodeId> {
    let log = g.binary(BinaryOp::Sub, x, logsumexp)?;
    g.unary(UnaryOp::Exp, log)
}

//! Normalisation over the last dim.
//!
//! bf16 and f16 are computed in f32 and rounded once, at the end. The backward pass names the same
//! row statistics as the forward pass, so that interning shares them, and nothing else is kept.

use super::{Composite, check_arity, widen};
use crate::infer::{check_dtype, check_float, check_shape, require};
use crate::{
    BinaryOp, ComputationGraph, Dims, Error, NodeId, Result, Scalar, Shape, TensorType, UnaryOp,
};

pub(super) fn infer(composite: &Composite, inputs: &[TensorType]) -> Result<TensorType> {
    let op = composite.as_str();
    let (eps, x, parameters) = match composite {
        Composite::RmsNorm { eps } => {
            let [x, weight] = check_arity(op, inputs)?;
            (eps, x, vec![weight])
        }
        Composite::LayerNorm { eps } => {
            let [x, weight, bias] = check_arity(op, inputs)?;
            (eps, x, vec![weight, bias])
        }
        other => unreachable!("metal-candle bug: {} is no norm", other.as_str()),
    };
    check_float(op, &x)?;
    require(eps.as_f64() >= 0.0, || Error::Attribute {
        op,
        what: "eps",
        expected: "0 or more",
        got: format!("{eps:?}"),
    })?;
    let n = x.shape.last().ok_or(Error::Rank { op, expected: "at least 1", got: 0 })?;
    for p in &parameters {
        check_dtype(op, &x, p)?;
        check_shape(op, Shape::new(&[n])?, p.shape)?;
    }
    Ok(x)
}

fn last_dim(g: &ComputationGraph, x: NodeId) -> Dims {
    Dims::new([g.shape(x).rank() - 1])
}

/// `rsqrt(mean(x²) + eps)` of every row.
fn inverse_rms(g: &mut ComputationGraph, eps: Scalar, x: NodeId) -> Result<NodeId> {
    let xx = g.unary(UnaryOp::Sqr, x)?;
    let mean = g.mean(xx, last_dim(g, x))?;
    let mean = g.binary_scalar(BinaryOp::Add, mean, eps.as_f64())?;
    g.unary(UnaryOp::Rsqrt, mean)
}

/// `x - mean(x)` of every row.
fn centre(g: &mut ComputationGraph, x: NodeId) -> Result<NodeId> {
    let mean = g.mean(x, last_dim(g, x))?;
    g.binary(BinaryOp::Sub, x, mean)
}

pub(super) fn rms_norm(g: &mut ComputationGraph, eps: Scalar, inputs: &[NodeId]) -> Result<NodeId> {
    let (x, weight) = (widen(g, inputs[0])?, widen(g, inputs[1])?);
    let r = inverse_rms(g, eps, x)?;
    let y = g.binary(BinaryOp::Mul, x, r)?;
    let y = g.binary(BinaryOp::Mul, y, weight)?;
    g.cast(y, g.ty(inputs[0]).dtype)
}

pub(super) fn layer_norm(
    g: &mut ComputationGraph,
    eps: Scalar,
    inputs: &[NodeId],
) -> Result<NodeId> {
    let (x, weight, bias) = (widen(g, inputs[0])?, widen(g, inputs[1])?, widen(g, inputs[2])?);
    let x = centre(g, x)?;
    let r = inverse_rms(g, eps, x)?;
    let y = g.binary(BinaryOp::Mul, x, r)?;
    let y = g.binary(BinaryOp::Mul, y, weight)?;
    let y = g.binary(BinaryOp::Add, y, bias)?;
    g.cast(y, g.ty(inputs[0]).dtype)
}

pub(super) fn rms_norm_vjp(
    g: &mut ComputationGraph,
    eps: Scalar,
    inputs: &[NodeId],
    dy: NodeId,
) -> Result<Vec<Option<NodeId>>> {
    let (x, weight, dy) = (widen(g, inputs[0])?, widen(g, inputs[1])?, widen(g, dy)?);
    let r = inverse_rms(g, eps, x)?;
    let dyw = g.binary(BinaryOp::Mul, dy, weight)?;
    let dx = scale_vjp(g, x, r, dyw, dyw)?;
    let dw = weight_vjp(g, x, r, dy, g.shape(weight))?;
    narrow(g, &[dx, dw], inputs)
}

pub(super) fn layer_norm_vjp(
    g: &mut ComputationGraph,
    eps: Scalar,
    inputs: &[NodeId],
    dy: NodeId,
) -> Result<Vec<Option<NodeId>>> {
    let (x, weight, dy) = (widen(g, inputs[0])?, widen(g, inputs[1])?, widen(g, dy)?);
    let x = centre(g, x)?;
    let r = inverse_rms(g, eps, x)?;
    let dyw = g.binary(BinaryOp::Mul, dy, weight)?;
    let centred = centre(g, dyw)?;
    let dx = scale_vjp(g, x, r, dyw, centred)?;
    let dw = weight_vjp(g, x, r, dy, g.shape(weight))?;
    let db = g.sum_to(dy, g.shape(weight))?;
    narrow(g, &[dx, dw, db], inputs)
}

/// `r direct - x (r³ mean(dyw x))`: through `x r`, where `r` is the inverse RMS of `x`.
fn scale_vjp(
    g: &mut ComputationGraph,
    x: NodeId,
    r: NodeId,
    dyw: NodeId,
    direct: NodeId,
) -> Result<NodeId> {
    let along = g.binary(BinaryOp::Mul, dyw, x)?;
    let along = g.mean(along, last_dim(g, x))?;
    let rr = g.unary(UnaryOp::Sqr, r)?;
    let rrr = g.binary(BinaryOp::Mul, rr, r)?;
    let along = g.binary(BinaryOp::Mul, rrr, along)?; // [.., 1]
    let direct = g.binary(BinaryOp::Mul, direct, r)?;
    let along = g.binary(BinaryOp::Mul, x, along)?;
    g.binary(BinaryOp::Sub, direct, along)
}

/// The sum of `dy x r` over the rows.
fn weight_vjp(
    g: &mut ComputationGraph,
    x: NodeId,
    r: NodeId,
    dy: NodeId,
    weight: Shape,
) -> Result<NodeId> {
    let dw = g.binary(BinaryOp::Mul, dy, x)?;
    let dw = g.binary(BinaryOp::Mul, dw, r)?;
    g.sum_to(dw, weight)
}

/// Every cotangent in the dtype of its input.
fn narrow(
    g: &mut ComputationGraph,
    cotangents: &[NodeId],
    inputs: &[NodeId],
) -> Result<Vec<Option<NodeId>>> {
    let pairs = cotangents.iter().zip(inputs);
    pairs.map(|(d, x)| g.cast(*d, g.ty(*x).dtype).map(Some)).collect()
}

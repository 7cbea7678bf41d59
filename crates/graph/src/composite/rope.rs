//! Rotary position embedding (Su et al. 2021).
//!
//! bf16 and f16 are computed in f32 and rounded once, at the end; cos and sin may be of any float
//! dtype.

use super::{Composite, check_arity, widen};
use crate::infer::{check_float, check_shape, require};
use crate::{
    BinaryOp, ComputationGraph, Error, NodeId, Operation, Result, Shape, TensorType, UnaryOp,
};

/// Which elements of the last dim form a rotated pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RopeLayout {
    /// `(x[i], x[i + d/2])`: GPT-NeoX, Hugging Face.
    Half,
    /// `(x[2i], x[2i + 1])`: the paper, GGUF's `llama`.
    Interleaved,
}

pub(super) fn infer(inputs: &[TensorType]) -> Result<TensorType> {
    let op = "rope";
    let [x, cos, sin] = check_arity(op, inputs)?;
    let d = x.shape.last().ok_or(Error::Rank { op, expected: "at least 1", got: 0 })?;
    require(d.is_multiple_of(2), || Error::Attribute {
        op,
        what: "the last extent",
        expected: "even",
        got: format!("{d} (shape {})", x.shape),
    })?;
    check_float(op, &x)?;
    for table in [&cos, &sin] {
        check_float(op, table)?;
        check_shape(op, x.shape.with(x.shape.rank() - 1, d / 2), table.shape)?;
    }
    Ok(x)
}

/// `(a cos - b sin, b cos + a sin)` of every pair `(a, b)`.
pub(super) fn rope(
    g: &mut ComputationGraph,
    layout: RopeLayout,
    inputs: &[NodeId],
) -> Result<NodeId> {
    let dtype = g.ty(inputs[0]).dtype;
    let x = widen(g, inputs[0])?;
    let (cos, sin) = (g.cast(inputs[1], g.ty(x).dtype)?, g.cast(inputs[2], g.ty(x).dtype)?);
    let [a, b] = split(g, layout, x)?;
    let (ac, bs) = (g.binary(BinaryOp::Mul, a, cos)?, g.binary(BinaryOp::Mul, b, sin)?);
    let (bc, as_) = (g.binary(BinaryOp::Mul, b, cos)?, g.binary(BinaryOp::Mul, a, sin)?);
    let turned = [g.binary(BinaryOp::Sub, ac, bs)?, g.binary(BinaryOp::Add, bc, as_)?];
    let y = join(g, layout, turned, g.shape(x))?;
    g.cast(y, dtype)
}

/// `[.., d]` into the first and the second of every pair, `[.., d/2]` each.
fn split(g: &mut ComputationGraph, layout: RopeLayout, x: NodeId) -> Result<[NodeId; 2]> {
    let shape = g.shape(x);
    let dim = shape.rank() - 1;
    let len = shape[dim] / 2;
    let (second, step) = match layout {
        RopeLayout::Half => (len, 1),
        RopeLayout::Interleaved => (1, 2),
    };
    // An empty row has no second element to start at.
    let mut part = |start: usize| {
        g.add(Operation::Slice { dim, start: start.min(shape[dim]), len, step }, &[x])
    };
    Ok([part(0)?, part(second)?])
}

fn join(
    g: &mut ComputationGraph,
    layout: RopeLayout,
    parts: [NodeId; 2],
    shape: Shape,
) -> Result<NodeId> {
    let last = shape.rank() - 1;
    match layout {
        RopeLayout::Half => g.concat(last, &parts),
        RopeLayout::Interleaved => {
            let rows = shape.dims()[..last].iter().product();
            let column = Shape::new(&[rows, shape[last] / 2, 1])?;
            let columns = [g.reshape(parts[0], column)?, g.reshape(parts[1], column)?];
            let pairs = g.concat(2, &columns)?; // [rows, d/2, 2]
            g.reshape(pairs, shape)
        }
    }
}

/// `-table`. Of a table that is repeated for batch and heads, only the table is computed and read.
fn negated(g: &mut ComputationGraph, table: NodeId) -> Result<NodeId> {
    let op = g[table].op;
    match op {
        Operation::Broadcast(_) => {
            let once = negated(g, g[table].inputs[0])?;
            g.add(op, &[once])
        }
        _ => g.unary(UnaryOp::Neg, table),
    }
}

/// The rotation back. cos and sin are tables of the positions and have no gradient.
pub(super) fn rope_vjp(
    g: &mut ComputationGraph,
    layout: RopeLayout,
    inputs: &[NodeId],
    dy: NodeId,
) -> Result<Vec<Option<NodeId>>> {
    let back = negated(g, inputs[2])?;
    let dx = g.add(Operation::Composite(Composite::Rope { layout }), &[dy, inputs[1], back])?;
    Ok(vec![Some(dx), None, None])
}

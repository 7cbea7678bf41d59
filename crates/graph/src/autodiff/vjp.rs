//! The rule of every operation: from the cotangent of its value to those of its inputs.

use super::scalar;
use crate::{
    BinaryOp, ComputationGraph, Dims, Node, NodeId, Operation, ReduceOp, Result, Scalar, Shape,
    UnaryOp, composite,
};
use smallvec::{SmallVec, smallvec};

/// One per input; `None` is zero.
pub(super) type Cotangents = SmallVec<[Option<NodeId>; 3]>;

/// The cotangents of those inputs of `y` that `wants` names, given the cotangent `dy` of `y`.
///
/// `wants` names no input of an integer dtype, nor any input of a node whose value is an integer.
pub(super) fn vjp(
    g: &mut ComputationGraph,
    y: NodeId,
    dy: NodeId,
    wants: &[bool],
) -> Result<Cotangents> {
    let node = g[y].clone();
    let Some(&x) = node.inputs.first() else { return Ok(smallvec![]) };
    let ty = g.ty(x);
    match node.op {
        // No float goes in, or none comes out.
        Operation::Input(_)
        | Operation::Const(_)
        | Operation::Iota { .. }
        | Operation::Random { .. }
        | Operation::ArgReduce { .. }
        | Operation::Dequantize { .. } => Ok(smallvec![None; wants.len()]),

        Operation::Unary(f) => Ok(smallvec![scalar::unary(g, f, x, y, dy)?]),
        Operation::Binary(f) => {
            let ab = [x, node.inputs[1]];
            each(wants, |side| scalar::binary(g, f, ab, y, dy, side))
        }
        Operation::Select => each(wants, |i| select(g, x, dy, i).map(Some)),
        Operation::Cast(_) => one(g.cast(dy, ty.dtype)),

        Operation::Reduce { op: ReduceOp::Sum, .. } => one(g.broadcast_to(dy, ty.shape)),
        Operation::Reduce { op: ReduceOp::Max | ReduceOp::Min, dims } => {
            one(extreme(g, dims, x, y, dy))
        }
        Operation::CumSum { dim, reverse } => {
            one(g.add(Operation::CumSum { dim, reverse: !reverse }, &[dy]))
        }

        Operation::Reshape(_) => one(g.reshape(dy, ty.shape)),
        Operation::Permute(p) => one(g.add(Operation::Permute(p.inverse()), &[dy])),
        Operation::Broadcast(_) => one(g.sum_to(dy, ty.shape)),
        Operation::Slice { dim, start, step, .. } => one(slice(g, ty.shape, dim, start, step, dy)),
        Operation::Flip { dim } => one(g.add(Operation::Flip { dim }, &[dy])),
        Operation::Pad { dim, before, .. } => one(g.slice(dy, dim, before, ty.shape[dim])),
        Operation::Concat { dim } => concat(g, &node, dim, dy, wants),

        Operation::Gather { .. }
        | Operation::IndexSelect { .. }
        | Operation::ScatterAdd { .. }
        | Operation::IndexAdd { .. }
        | Operation::SliceUpdate { .. }
        | Operation::DynamicSlice { .. } => each(wants, |i| indexing(g, &node, dy, i)),

        Operation::Dot => each(wants, |side| dot(g, &node, dy, side).map(Some)),
        Operation::QuantDot { format, rows, cols, transposed } => {
            let op = Operation::QuantDot { format, rows, cols, transposed: !transposed };
            let dx = g.add(op, &[dy, node.inputs[1]])?;
            Ok(smallvec![Some(dx), None])
        }

        // What is differentiated is the sum of all ranks' losses.
        Operation::AllReduce => one(g.add(Operation::AllReduce, &[dy])),

        Operation::Composite(c) => Ok(composite::vjp(g, &c, &node.inputs, y, dy)?.into()),
    }
}

fn one(dx: Result<NodeId>) -> Result<Cotangents> {
    Ok(smallvec![Some(dx?)])
}

fn each(
    wants: &[bool],
    mut rule: impl FnMut(usize) -> Result<Option<NodeId>>,
) -> Result<Cotangents> {
    (wants.iter().enumerate()).map(|(i, want)| if *want { rule(i) } else { Ok(None) }).collect()
}

fn select(g: &mut ComputationGraph, cond: NodeId, dy: NodeId, input: usize) -> Result<NodeId> {
    let zero = g.scalar_like(dy, 0.0);
    if input == 1 { g.select(cond, dy, zero) } else { g.select(cond, zero, dy) }
}

/// Shares `dy` evenly among the elements that tie for the extreme, as `torch.amax` does.
fn extreme(
    g: &mut ComputationGraph,
    dims: Dims,
    x: NodeId,
    y: NodeId,
    dy: NodeId,
) -> Result<NodeId> {
    let dtype = g.ty(x).dtype;
    let hit = g.binary(BinaryOp::Eq, x, y)?;
    // Counted where a count stays exact: bf16 has no 257.
    let ones = g.cast(hit, dtype)?;
    let ones = composite::widen(g, ones)?;
    let ties = g.sum(ones, dims)?;
    let ties = g.unary(UnaryOp::Recip, ties)?;
    let share = composite::widen(g, dy)?;
    let share = g.binary(BinaryOp::Mul, share, ties)?;
    let share = g.cast(share, dtype)?;
    let zero = g.scalar_like(dy, 0.0);
    g.select(hit, share, zero)
}

/// `dy` in the places it was read from, zeros elsewhere.
fn slice(
    g: &mut ComputationGraph,
    x: Shape,
    dim: usize,
    start: usize,
    step: usize,
    dy: NodeId,
) -> Result<NodeId> {
    let len = g.shape(dy)[dim];
    let dy = if step > 1 && len > 1 { spread(g, dim, step, dy)? } else { dy };
    let len = g.shape(dy)[dim];
    pad(g, dy, dim, start, x[dim] - start - len)
}

/// `step - 1` zeros between neighbours along `dim`.
fn spread(g: &mut ComputationGraph, dim: usize, step: usize, x: NodeId) -> Result<NodeId> {
    let shape = g.shape(x);
    let (outer, inner) = shape.dims().split_at(dim);
    let (outer, inner): (usize, usize) = (outer.iter().product(), inner[1..].iter().product());
    let x = g.reshape(x, Shape::new(&[outer, shape[dim], 1, inner])?)?;
    let x = pad(g, x, 2, 0, step - 1)?; // [outer, len, step, inner]
    let x = g.reshape(x, shape.with(dim, shape[dim] * step))?;
    g.slice(x, dim, 0, (shape[dim] - 1) * step + 1)
}

/// `x` with zeros around.
fn pad(
    g: &mut ComputationGraph,
    x: NodeId,
    dim: usize,
    before: usize,
    after: usize,
) -> Result<NodeId> {
    if before + after == 0 {
        return Ok(x);
    }
    let value = Scalar::from_f64(g.ty(x).dtype, 0.0);
    g.add(Operation::Pad { dim, before, after, value }, &[x])
}

fn concat(
    g: &mut ComputationGraph,
    node: &Node,
    dim: usize,
    dy: NodeId,
    wants: &[bool],
) -> Result<Cotangents> {
    let mut end = 0;
    let part = |(x, want): (&NodeId, &bool)| {
        let len = g.shape(*x)[dim];
        end += len;
        want.then(|| g.slice(dy, dim, end - len, len)).transpose()
    };
    node.inputs.iter().zip(wants).map(part).collect()
}

/// Reading is the transpose of adding, and the other way round.
fn indexing(
    g: &mut ComputationGraph,
    node: &Node,
    dy: NodeId,
    input: usize,
) -> Result<Option<NodeId>> {
    let (x, second) = (node.inputs[input], node.inputs[1]);
    let dx = match (node.op, input) {
        (Operation::Gather { dim }, 0) => {
            let zeros = g.full_like(x, 0.0)?;
            g.add(Operation::ScatterAdd { dim }, &[zeros, second, dy])?
        }
        (Operation::IndexSelect { dim }, 0) => {
            let zeros = g.full_like(x, 0.0)?;
            g.add(Operation::IndexAdd { dim }, &[zeros, second, dy])?
        }
        (Operation::ScatterAdd { .. } | Operation::IndexAdd { .. }, 0) => dy,
        (Operation::ScatterAdd { dim }, 2) => g.add(Operation::Gather { dim }, &[dy, second])?,
        (Operation::IndexAdd { dim }, 2) => g.add(Operation::IndexSelect { dim }, &[dy, second])?,
        (Operation::SliceUpdate { dim }, 0) => {
            let zeros = g.full_like(second, 0.0)?;
            g.add(Operation::SliceUpdate { dim }, &[dy, zeros, node.inputs[2]])?
        }
        (Operation::SliceUpdate { dim }, 1) => {
            let len = g.shape(x)[dim];
            g.add(Operation::DynamicSlice { dim, len }, &[dy, node.inputs[2]])?
        }
        (Operation::DynamicSlice { dim, .. }, 0) => {
            let zeros = g.full_like(x, 0.0)?;
            g.add(Operation::SliceUpdate { dim }, &[zeros, dy, second])?
        }
        (op, _) => unreachable!("metal-candle bug: {} has no float input {input}", op.name()),
    };
    Ok(Some(dx))
}

/// `dy bᵀ` and `aᵀ dy`
fn dot(g: &mut ComputationGraph, node: &Node, dy: NodeId, side: usize) -> Result<NodeId> {
    let other = g.transpose(node.inputs[1 - side])?;
    let operands = if side == 0 { [dy, other] } else { [other, dy] };
    g.add(Operation::Dot, &operands)
}

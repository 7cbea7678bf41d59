//! Long reductions in two steps, so that there are rows to share among threads and partial sums to round less.

use crate::{ComputationGraph, Dims, Node, NodeId, Operation, Result, Shape};

/// Splits every reduction over more than `limit` elements: first the innermost dims, then the others. A reduction
/// of one long dim is cut into rows, if its extent has a divisor near the root.
///
/// # Errors
/// Where a rewritten node is refused by inference, which would be a bug.
pub fn split_reductions(g: &ComputationGraph, limit: usize) -> Result<ComputationGraph> {
    let long = |g: &ComputationGraph, node: &Node| match node.op {
        Operation::Reduce { dims, .. } => {
            let shape = g.shape(node.inputs[0]);
            dims.iter().map(|d| shape[d]).product::<usize>() > limit
        }
        _ => false,
    };
    if !g.nodes().iter().any(|node| long(g, node)) {
        return Ok(g.clone());
    }
    g.rebuild(|out, node, inputs| match node.op {
        Operation::Reduce { op, dims } => {
            let shape = out.shape(inputs[0]);
            let extent: usize = dims.iter().map(|d| shape[d]).product();
            if extent <= limit {
                return Ok(out.copy(node, inputs));
            }
            match inner_dims(&shape, dims) {
                Some((inner, outer)) => {
                    let rows = out.add(Operation::Reduce { op, dims: inner }, inputs)?;
                    out.add(Operation::Reduce { op, dims: outer }, &[rows])
                }
                None => split_dim(out, node, inputs[0]),
            }
        }
        _ => Ok(out.copy(node, inputs)),
    })
}

/// The reduced dims that make rows of at least [`SHORTEST`] elements, from the inside, and the rest.
fn inner_dims(shape: &Shape, dims: Dims) -> Option<(Dims, Dims)> {
    const SHORTEST: usize = 64;
    let mut inner = Vec::new();
    let mut len = 1;
    for d in dims.iter().rev().filter(|d| shape[*d] > 1) {
        if len >= SHORTEST {
            break;
        }
        len *= shape[d];
        inner.push(d);
    }
    let outer = Dims::new(dims.iter().filter(|d| !inner.contains(d)));
    let splits = outer.iter().any(|d| shape[d] > 1);
    splits.then(|| (Dims::new(inner), outer))
}

/// Cuts the one long dim of a rank-1 tensor into rows.
fn split_dim(g: &mut ComputationGraph, node: &Node, x: NodeId) -> Result<NodeId> {
    let shape = g.shape(x);
    let divisor = (shape.rank() == 1).then(|| near_root(shape[0])).flatten();
    let (Some(cols), Operation::Reduce { op, .. }) = (divisor, node.op) else {
        return Ok(g.copy(node, &[x]));
    };
    let rows = g.reshape(x, Shape::new(&[shape[0] / cols, cols])?)?;
    let rows = g.add(Operation::Reduce { op, dims: Dims::new([1]) }, &[rows])?;
    let total = g.add(Operation::Reduce { op, dims: Dims::new([0]) }, &[rows])?;
    g.reshape(total, *node.shape())
}

/// A divisor of `n` within a factor of 16 of its root.
fn near_root(n: usize) -> Option<usize> {
    let root = n.isqrt();
    (root / 16 + 1..=root).rev().find(|d| n.is_multiple_of(*d)).map(|d| n / d)
}

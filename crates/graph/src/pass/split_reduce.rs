//! Long reductions in two steps, so that there are rows to share among threads and partial sums to round less.

use crate::{ComputationGraph, Dims, Node, NodeId, Operation, Result, Shape};

/// Splits every reduction over more than `limit` elements: first the innermost dims, then the others. A reduction
/// to one element is cut into rows, as many as they are long, if their number has a divisor near its root.
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
            if extent == shape.len()
                && let Some(cols) = near_root(extent)
            {
                return split_all(out, node, inputs[0], cols);
            }
            match inner_dims(&shape, dims) {
                Some((inner, outer)) => {
                    let rows = out.add(Operation::Reduce { op, dims: inner }, inputs)?;
                    out.add(Operation::Reduce { op, dims: outer }, &[rows])
                }
                None => Ok(out.copy(node, inputs)),
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

/// Cuts all elements into rows of `cols`.
fn split_all(g: &mut ComputationGraph, node: &Node, x: NodeId, cols: usize) -> Result<NodeId> {
    let Operation::Reduce { op, .. } = node.op else { return Ok(g.copy(node, &[x])) };
    let rows = g.reshape(x, Shape::new(&[g.shape(x).len() / cols, cols])?)?;
    let rows = g.add(Operation::Reduce { op, dims: Dims::new([1]) }, &[rows])?;
    let total = g.add(Operation::Reduce { op, dims: Dims::new([0]) }, &[rows])?;
    g.reshape(total, *node.shape())
}

/// A divisor of `n` within a factor of 16 of its root.
fn near_root(n: usize) -> Option<usize> {
    let root = n.isqrt();
    (root / 16 + 1..=root).rev().find(|d| n.is_multiple_of(*d)).map(|d| n / d)
}

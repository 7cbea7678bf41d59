//! Reverse-mode differentiation, graph to graph.
//!
//! Gradients are ordinary nodes of the graph they were asked of, so that fusing, planning and
//! recomputing see the forward and the backward pass together. A cotangent travels along an edge
//! only if both of its ends are floats, and only nodes between a trainable and the loss are
//! visited: what is frozen costs nothing.

mod scalar;
mod vjp;

use crate::{
    BinaryOp, Composite, ComputationGraph, Error, Node, NodeId, Operation, Result, infer::require,
};
use smallvec::SmallVec;

/// A value to differentiate with respect to, and what errors call it.
///
/// It may be any float of the graph. The gradient of one that is computed counts every use of that
/// value, and gradients pass through it to the trainables before it, as in `torch.autograd.grad`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trainable {
    /// The value.
    pub node: NodeId,
    /// What errors call it.
    pub name: String,
}

/// Appends the gradients of `loss` with respect to `wrt` to `g`: one node each, of the trainable's
/// type.
///
/// Linear in the size of the graph up to `loss`.
///
/// # Errors
/// [`Error::Loss`] if `loss` is no float of one element, [`Error::IntegerTrainable`],
/// [`Error::Unused`] if no path leads from a trainable to the loss, [`Error::NotDifferentiable`] if
/// every such path is blocked.
pub fn gradients(g: &mut ComputationGraph, loss: NodeId, wrt: &[Trainable]) -> Result<Vec<NodeId>> {
    let got = g.ty(loss);
    require(got.dtype.is_float() && got.shape.len() == 1, || Error::Loss { got })?;
    for t in wrt {
        let dtype = g.ty(t.node).dtype;
        require(dtype.is_float(), || Error::IntegerTrainable { name: t.name.clone(), dtype })?;
    }
    check_reach(g, loss, wrt)?;
    let seed = g.full_like(loss, 1.0)?;
    let nodes: Vec<NodeId> = wrt.iter().map(|t| t.node).collect();
    let found = cotangents(g, loss, seed, &nodes)?;
    // A trainable seen only through steps (`floor`, `sign`) has a rule, and the gradient 0.
    let dense = |(d, w): (Option<NodeId>, NodeId)| d.map_or_else(|| g.full_like(w, 0.0), Ok);
    found.into_iter().zip(nodes).map(dense).collect()
}

/// The cotangents of `inputs[i]`, for each `i` in `wrt`, through `meaning`, given the cotangent
/// `dy` of its value. `None` where it does not depend on that input.
///
/// `meaning` is written on placeholders in a graph of its own: an input that is passed twice, or
/// computed from another one, gets exactly its own share.
pub(crate) fn pullback(
    g: &mut ComputationGraph,
    inputs: &[NodeId],
    wrt: &[usize],
    dy: NodeId,
    meaning: impl FnOnce(&mut ComputationGraph, &[NodeId]) -> Result<NodeId>,
) -> Result<Vec<Option<NodeId>>> {
    let mut local = ComputationGraph::new();
    let actual: Vec<NodeId> = inputs.iter().copied().chain([dy]).collect();
    let formal: Vec<NodeId> = (0..).zip(&actual).map(|(i, x)| local.input(i, g.ty(*x))).collect();
    let y = meaning(&mut local, &formal[..inputs.len()])?;
    let wrt: Vec<NodeId> = wrt.iter().map(|i| formal[*i]).collect();
    let found = cotangents(&mut local, y, formal[inputs.len()], &wrt)?;
    local.outputs = found.iter().flatten().copied().collect();
    let map = splice(g, &local, &actual);
    Ok(found.into_iter().map(|d| d.map(|d| map[d.index()])).collect())
}

/// Copies what `local` computes into `g`, with `actual[i]` for its input `i`.
fn splice(g: &mut ComputationGraph, local: &ComputationGraph, actual: &[NodeId]) -> Vec<NodeId> {
    let live = local.live();
    let mut map = vec![NodeId(u32::MAX); local.len()];
    for id in local.ids().filter(|id| live[id.index()]) {
        let node = &local[id];
        map[id.index()] = if let Operation::Input(i) = node.op {
            actual[i as usize]
        } else {
            let inputs: SmallVec<[NodeId; 4]> =
                node.inputs.iter().map(|x| map[x.index()]).collect();
            g.copy(node, &inputs)
        };
    }
    map
}

/// Carries the cotangent `seed` of `root` back to every node of `wrt`; `None` where nothing
/// arrives.
fn cotangents(
    g: &mut ComputationGraph,
    root: NodeId,
    seed: NodeId,
    wrt: &[NodeId],
) -> Result<Vec<Option<NodeId>>> {
    let on_path = on_path(g, root, wrt);
    let mut found: Vec<Option<NodeId>> = vec![None; on_path.len()];
    found[root.index()] = Some(seed);
    // The rules append behind `root`, where this sweep never comes.
    for y in (0..=root.0).rev().map(NodeId) {
        let (Some(dy), true) = (found[y.index()], on_path[y.index()]) else { continue };
        let node = &g[y];
        let inputs = node.inputs.clone();
        let wants: SmallVec<[bool; 3]> = (inputs.iter().enumerate())
            .map(|(i, x)| on_path[x.index()] && carries(g, node, i))
            .collect();
        if !wants.contains(&true) {
            continue;
        }
        let dxs = vjp::vjp(g, y, dy, &wants)?;
        for ((x, dx), wanted) in inputs.into_iter().zip(dxs).zip(wants) {
            let (Some(dx), true) = (dx, wanted) else { continue };
            debug_assert_eq!(g.ty(dx), g.ty(x), "metal-candle bug: the rule of {}", g[y].op.name());
            let sum = &mut found[x.index()];
            *sum = Some(match *sum {
                Some(others) => g.binary(BinaryOp::Add, others, dx)?,
                None => dx,
            });
        }
    }
    Ok(wrt.iter().map(|w| found.get(w.index()).copied().flatten()).collect())
}

/// Which nodes up to `root` depend on `wrt` through edges that carry cotangents.
fn on_path(g: &ComputationGraph, root: NodeId, wrt: &[NodeId]) -> Vec<bool> {
    let mut on_path = vec![false; root.index() + 1];
    for w in wrt.iter().filter(|w| **w <= root) {
        on_path[w.index()] = true;
    }
    for (y, node) in g.nodes()[..=root.index()].iter().enumerate() {
        let mut edges = node.inputs.iter().enumerate();
        let reached = edges.any(|(i, x)| on_path[x.index()] && carries(g, node, i));
        on_path[y] |= reached;
    }
    on_path
}

/// Whether a cotangent of `node` goes on to its `input`-th input: both are floats (comparisons,
/// positions, indices, labels and conditions are not), and the input is no table.
fn carries(g: &ComputationGraph, node: &Node, input: usize) -> bool {
    let table = matches!(node.op, Operation::Composite(Composite::Rope { .. })) && input > 0;
    node.ty.dtype.is_float() && g.ty(node.inputs[input]).dtype.is_float() && !table
}

/// Every trainable must reach `loss` along edges that carry cotangents.
fn check_reach(g: &ComputationGraph, loss: NodeId, wrt: &[Trainable]) -> Result<()> {
    // For each node one user on the way to the loss, if any, and whether some way carries
    // cotangents. One reverse sweep serves all trainables, because inputs precede their users.
    let mut user: Vec<Option<NodeId>> = vec![None; loss.index() + 1];
    let mut open = vec![false; loss.index() + 1];
    open[loss.index()] = true;
    for y in (0..=loss.0).rev().map(NodeId) {
        if y != loss && user[y.index()].is_none() {
            continue;
        }
        for (i, x) in g[y].inputs.iter().enumerate() {
            user[x.index()].get_or_insert(y);
            open[x.index()] |= open[y.index()] && carries(g, &g[y], i);
        }
    }
    for t in wrt {
        let used = t.node == loss || user.get(t.node.index()).is_some_and(Option::is_some);
        require(used, || Error::Unused { name: t.name.clone() })?;
        require(open[t.node.index()], || blocked(g, t, &user))?;
    }
    Ok(())
}

/// The error of a trainable whose every path is blocked: follows one of them up to the op that
/// blocks it.
fn blocked(g: &ComputationGraph, t: &Trainable, user: &[Option<NodeId>]) -> Error {
    let mut names = vec![t.name.as_str()];
    let mut x = t.node;
    while let Some(y) = user[x.index()] {
        names.push(g[y].op.name());
        let mut edges = g[y].inputs.iter().enumerate().filter(|(_, input)| **input == x);
        if !edges.any(|(i, _)| carries(g, &g[y], i)) {
            break;
        }
        x = y;
    }
    let op = names[names.len() - 1].to_string();
    Error::NotDifferentiable { name: t.name.clone(), op, path: arrows(&names) }
}

/// `a -> b -> c`; of a long path the two ends.
fn arrows(names: &[&str]) -> String {
    const END: usize = 6;
    let Some(hidden) = names.len().checked_sub(2 * END).filter(|n| *n > 0) else {
        return names.join(" -> ");
    };
    let (head, tail) = (&names[..END], &names[names.len() - END..]);
    format!("{} -> ({hidden} more) -> {}", head.join(" -> "), tail.join(" -> "))
}

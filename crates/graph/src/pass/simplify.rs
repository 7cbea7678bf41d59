//! Algebra that costs nothing: constants are folded, views composed, identities dropped.
//!
//! Values are kept to the bit, with one exception: a product with two constants in turn becomes one with their
//! product. `x * 0` stays (x may be NaN), and sums are never reordered.

use crate::{
    BinaryOp, ComputationGraph, DType, Node, NodeId, Operation, Result, Scalar, Shape, UnaryOp,
};

/// Sweeps until nothing changes, but not for ever: each sweep is linear in the graph.
const SWEEPS: usize = 4;

/// Rewrites `g` by local rules.
///
/// # Errors
/// Where a rewritten node is refused by inference, which would be a bug of a rule.
pub fn simplify(g: &ComputationGraph) -> Result<ComputationGraph> {
    let mut changed = false;
    let mut out = g.rebuild(|out, node, inputs| sweep(out, node, inputs, &mut changed))?;
    for _ in 1..SWEEPS {
        if !std::mem::take(&mut changed) {
            break;
        }
        out = out.rebuild(|next, node, inputs| sweep(next, node, inputs, &mut changed))?;
    }
    Ok(out)
}

fn sweep(
    g: &mut ComputationGraph,
    node: &Node,
    inputs: &[NodeId],
    changed: &mut bool,
) -> Result<NodeId> {
    let simpler = match node.op {
        Operation::Unary(f) => unary(g, f, inputs[0], node)?,
        Operation::Binary(f) => binary(g, f, inputs, node)?,
        Operation::Select => select(g, inputs),
        Operation::Cast(dtype) => match constant(g, inputs[0]) {
            Some(c) => cast(c, dtype).map(|c| filled(g, c, node)).transpose()?,
            None => (g.ty(inputs[0]).dtype == dtype).then_some(inputs[0]),
        },
        Operation::Reduce { dims, .. } => {
            let shape = g.shape(inputs[0]);
            dims.iter().all(|d| shape[d] == 1).then_some(inputs[0])
        }
        Operation::Reshape(_)
        | Operation::Permute(_)
        | Operation::Broadcast(_)
        | Operation::Slice { .. }
        | Operation::Flip { .. } => view(g, node, inputs[0])?,
        Operation::Pad { before: 0, after: 0, .. } => Some(inputs[0]),
        Operation::Concat { dim } => concat(g, dim, inputs)?,
        _ => None,
    };
    *changed |= simpler.is_some();
    Ok(simpler.unwrap_or_else(|| g.copy(node, inputs)))
}

/// The value of a constant, repeated or not.
fn constant(g: &ComputationGraph, mut id: NodeId) -> Option<Scalar> {
    loop {
        match g[id].op {
            Operation::Const(c) => return Some(c),
            Operation::Broadcast(_) | Operation::Reshape(_) | Operation::Permute(_) => {
                id = g[id].inputs[0];
            }
            _ => return None,
        }
    }
}

fn filled(g: &mut ComputationGraph, value: Scalar, like: &Node) -> Result<NodeId> {
    let c = g.constant(value);
    g.broadcast_to(c, *like.shape())
}

/// `c` as `dtype`; `None` where that rounds to a half, for a [`Scalar`] holds those as f32.
fn cast(c: Scalar, dtype: DType) -> Option<Scalar> {
    let x = c.as_f64();
    let value = match dtype {
        _ if !c.dtype().is_float() => Scalar::from_i64(dtype, c.as_i64()),
        // Floats saturate.
        DType::U8 => Scalar::from_i64(dtype, i64::from(x as u8)),
        DType::U32 => Scalar::from_i64(dtype, i64::from(x as u32)),
        _ => Scalar::from_f64(dtype, x),
    };
    let low_bits = |n: u32| (value.as_f64() as f32).to_bits() << (32 - n);
    let exact = match dtype {
        DType::BF16 => low_bits(16) == 0,
        DType::F16 => x == 0.0 || low_bits(13) == 0 && (6.104e-5..=65504.0).contains(&x.abs()),
        _ => true,
    };
    exact.then_some(value)
}

fn unary(g: &mut ComputationGraph, f: UnaryOp, x: NodeId, node: &Node) -> Result<Option<NodeId>> {
    if f == UnaryOp::Neg && g[x].op == Operation::Unary(UnaryOp::Neg) {
        return Ok(Some(g[x].inputs[0]));
    }
    let folded =
        constant(g, x).filter(|c| c.dtype().is_float()).and_then(|c| fold_unary(f, c.as_f64()));
    folded.map(|v| filled(g, Scalar::from_f64(node.ty.dtype, v), node)).transpose()
}

/// Functions that are exact or correctly rounded, so that folding gives what the kernel would.
fn fold_unary(f: UnaryOp, x: f64) -> Option<f64> {
    Some(match f {
        UnaryOp::Neg => -x,
        UnaryOp::Abs => x.abs(),
        UnaryOp::Recip => 1.0 / x,
        UnaryOp::Sqr => x * x,
        UnaryOp::Sqrt => x.sqrt(),
        UnaryOp::Relu => x.max(0.0),
        UnaryOp::Floor => x.floor(),
        UnaryOp::Ceil => x.ceil(),
        UnaryOp::Round => x.round_ties_even(),
        _ => return None,
    })
}

fn binary(
    g: &mut ComputationGraph,
    f: BinaryOp,
    inputs: &[NodeId],
    node: &Node,
) -> Result<Option<NodeId>> {
    let (a, b) = (inputs[0], inputs[1]);
    let (ca, cb) = (constant(g, a), constant(g, b));
    if let (Some(x), Some(y)) = (ca, cb)
        && x.dtype().is_float()
        && let Some(v) = fold_binary(f, x.as_f64(), y.as_f64())
    {
        return filled(g, Scalar::from_f64(node.ty.dtype, v), node).map(Some);
    }
    let is = |c: Option<Scalar>, v: f64| c.is_some_and(|c| c.as_f64() == v);
    Ok(match f {
        // x + 0 would turn -0 into 0; x + (-0) and x - 0 keep every x.
        BinaryOp::Sub if is(cb, 0.0) && !negative_zero(cb) => Some(a),
        BinaryOp::Add if negative_zero(cb) => Some(a),
        BinaryOp::Add if negative_zero(ca) => Some(b),
        BinaryOp::Mul | BinaryOp::Div if is(cb, 1.0) => Some(a),
        BinaryOp::Mul if is(ca, 1.0) => Some(b),
        BinaryOp::Mul => merge_scales(g, inputs, ca, cb, node)?,
        BinaryOp::Pow if node.ty.dtype.is_float() => power(g, a, cb, node)?,
        _ => None,
    })
}

fn negative_zero(c: Option<Scalar>) -> bool {
    c.is_some_and(|c| c.dtype().is_float() && c.as_f64() == 0.0 && c.as_f64().is_sign_negative())
}

fn fold_binary(f: BinaryOp, x: f64, y: f64) -> Option<f64> {
    Some(match f {
        BinaryOp::Add => x + y,
        BinaryOp::Sub => x - y,
        BinaryOp::Mul => x * y,
        BinaryOp::Div => x / y,
        _ => return None,
    })
}

/// `(x * c) * d` is `x * (c d)`.
fn merge_scales(
    g: &mut ComputationGraph,
    inputs: &[NodeId],
    ca: Option<Scalar>,
    cb: Option<Scalar>,
    node: &Node,
) -> Result<Option<NodeId>> {
    let (x, outer) = match (ca, cb) {
        (None, Some(c)) => (inputs[0], c),
        (Some(c), None) => (inputs[1], c),
        _ => return Ok(None),
    };
    if g[x].op != Operation::Binary(BinaryOp::Mul) || !outer.dtype().is_float() {
        return Ok(None);
    }
    let (l, r) = (g[x].inputs[0], g[x].inputs[1]);
    let (inner, rest) = match (constant(g, l), constant(g, r)) {
        (None, Some(c)) => (c, l),
        (Some(c), None) => (c, r),
        _ => return Ok(None),
    };
    let scale = Scalar::from_f64(node.ty.dtype, inner.as_f64() * outer.as_f64());
    let scale = filled(g, scale, node)?;
    g.add(Operation::Binary(BinaryOp::Mul), &[rest, scale]).map(Some)
}

/// Powers that are simpler functions, where these are as exact.
fn power(
    g: &mut ComputationGraph,
    x: NodeId,
    exponent: Option<Scalar>,
    node: &Node,
) -> Result<Option<NodeId>> {
    let Some(c) = exponent else { return Ok(None) };
    Ok(match c.as_f64() {
        0.0 => Some(filled(g, Scalar::from_f64(node.ty.dtype, 1.0), node)?),
        1.0 => Some(x),
        2.0 => Some(g.unary(UnaryOp::Sqr, x)?),
        -1.0 => Some(g.unary(UnaryOp::Recip, x)?),
        _ => None,
    })
}

fn select(g: &ComputationGraph, inputs: &[NodeId]) -> Option<NodeId> {
    if inputs[1] == inputs[2] {
        return Some(inputs[1]);
    }
    constant(g, inputs[0]).map(|c| inputs[if c.as_i64() != 0 { 1 } else { 2 }])
}

/// A view that shows all as it is, or one of a like view.
fn view(g: &mut ComputationGraph, node: &Node, x: NodeId) -> Result<Option<NodeId>> {
    let from = g.shape(x);
    let same = from == *node.shape();
    let inner = g[x].inputs.first().copied();
    Ok(match (node.op, g[x].op) {
        (Operation::Reshape(_) | Operation::Broadcast(_) | Operation::Slice { .. }, _) if same => {
            Some(x)
        }
        (Operation::Permute(p), _) if p.is_identity() => Some(x),
        (Operation::Flip { dim }, _) if from[dim] <= 1 => Some(x),
        (Operation::Reshape(to), Operation::Reshape(_)) => {
            inner.map(|inner| g.reshape(inner, to)).transpose()?
        }
        (Operation::Broadcast(to), Operation::Broadcast(_)) => {
            inner.map(|inner| g.broadcast_to(inner, to)).transpose()?
        }
        (Operation::Permute(p), Operation::Permute(first)) => {
            let dims: Vec<usize> = first.then(&p).iter().collect();
            inner.map(|inner| g.permute(inner, &dims)).transpose()?
        }
        (Operation::Flip { dim }, Operation::Flip { dim: first }) if dim == first => inner,
        (
            Operation::Slice { dim, start, len, step },
            Operation::Slice { dim: first, start: s, step: t, .. },
        ) if dim == first => {
            // A slice of nothing may start at the end of x, and `t` times that lies beyond; where nothing is
            // stepped over, a step may be anything.
            let start = if len == 0 { 0 } else { s + start * t };
            let step = if len <= 1 { 1 } else { step * t };
            let merged = Operation::Slice { dim, start, len, step };
            inner.map(|inner| g.add(merged, &[inner])).transpose()?
        }
        _ => None,
    })
}

/// Parts without elements add nothing; one part alone is the whole.
fn concat(g: &mut ComputationGraph, dim: usize, parts: &[NodeId]) -> Result<Option<NodeId>> {
    let empty = |shape: Shape| shape[dim] == 0;
    let kept: Vec<NodeId> = parts.iter().copied().filter(|p| !empty(g.shape(*p))).collect();
    Ok(match kept.as_slice() {
        [] => Some(parts[0]),
        kept if kept.len() == parts.len() && kept.len() > 1 => None,
        kept => Some(g.concat(dim, kept)?),
    })
}

//! Scaled dot-product attention (Vaswani et al. 2017), grouped-query, masked by position and by
//! document.
//!
//! Scores, softmax and the weighted sum of bf16 and f16 are computed in f32 and rounded once, at
//! the end.

use super::{Composite, accumulator, widen};
use crate::infer::{
    check_dtype, check_float, check_index, check_rank, check_scalar_i64, check_shape, require,
};
use crate::{
    BinaryOp, ComputationGraph, DType, Dims, Error, NodeId, Operation, ReduceOp, Result, Scalar,
    Shape, TensorType, autodiff,
};

/// What an attention sees. Query `i` stands at position `i + offset`, key `j` at position `j`;
/// without a run-time offset it is `tk - tq`, so that the last query sees the last key. A query
/// that sees nothing gives 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttentionAttrs {
    /// Multiplies `q kᵀ`; an f64 scalar.
    pub scale: Scalar,
    /// Key positions after the query's are hidden.
    pub causal: bool,
    /// Only the last `window` positions up to the query's own are seen (needs `causal`).
    pub window: Option<u32>,
    /// An additive mask `[b, hq, tq, tk]` (a float, -inf hides) is among the inputs.
    pub mask: bool,
    /// Segment ids `[b, tq]` and `[b, tk]` (integers) are among the inputs: a query sees its own
    /// segment only.
    pub segments: bool,
    /// A run-time `i64[]` offset is among the inputs.
    pub offset: bool,
}

/// The differentiable inputs of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AttentionInput {
    Query,
    Key,
    Value,
    Mask,
}

impl AttentionInput {
    /// Where it stands among the inputs of [`Composite::Attention`].
    const fn position(self) -> usize {
        match self {
            AttentionInput::Query => 0,
            AttentionInput::Key => 1,
            AttentionInput::Value => 2,
            AttentionInput::Mask => 3,
        }
    }
}

/// How many inputs attention has.
fn count(attrs: &AttentionAttrs) -> usize {
    3 + usize::from(attrs.mask) + 2 * usize::from(attrs.segments) + usize::from(attrs.offset)
}

/// The inputs by name, whether types or nodes.
struct Inputs<T> {
    q: T,
    k: T,
    v: T,
    mask: Option<T>,
    segments: Option<[T; 2]>,
    offset: Option<T>,
}

impl<T: Copy> Inputs<T> {
    fn new(op: &'static str, attrs: &AttentionAttrs, inputs: &[T]) -> Result<Inputs<T>> {
        let AttentionAttrs { mask, segments, offset, .. } = *attrs;
        let expected = count(attrs);
        require(inputs.len() == expected, || Error::Arity { op, expected, got: inputs.len() })?;
        let mut rest = inputs[3..].iter().copied();
        let mut next = || rest.next().expect("metal-candle bug: attention's inputs were counted");
        Ok(Inputs {
            q: inputs[0],
            k: inputs[1],
            v: inputs[2],
            mask: mask.then(&mut next),
            segments: segments.then(|| [next(), next()]),
            offset: offset.then(&mut next),
        })
    }
}

pub(super) fn infer(attrs: &AttentionAttrs, inputs: &[TensorType]) -> Result<TensorType> {
    infer_as("attention", attrs, inputs)
}

/// Of a number for each row of the scores.
pub(super) fn infer_rows(attrs: &AttentionAttrs, inputs: &[TensorType]) -> Result<TensorType> {
    rows(&infer_as("attention_logsumexp", attrs, inputs)?)
}

/// The rows of the result `y`: `[b, tq, hq]`, in the dtype in which its sums are kept.
fn rows(y: &TensorType) -> Result<TensorType> {
    Ok(TensorType::new(accumulator(y.dtype), Shape::new(&y.shape.dims()[..3])?))
}

pub(super) fn infer_grad(
    attrs: &AttentionAttrs,
    wrt: AttentionInput,
    inputs: &[TensorType],
) -> Result<TensorType> {
    let op = "attention_grad";
    let [dy, lse, delta, inputs @ ..] = inputs else {
        return Err(Error::Arity { op, expected: 3 + count(attrs), got: inputs.len() });
    };
    let y = infer_as(op, attrs, inputs)?;
    check_shape(op, y.shape, dy.shape)?;
    check_dtype(op, &y, dy)?;
    let row = rows(&y)?;
    for x in [lse, delta] {
        check_shape(op, row.shape, x.shape)?;
        check_dtype(op, &row, x)?;
    }
    require(attrs.mask || wrt != AttentionInput::Mask, || Error::Attribute {
        op,
        what: "wrt",
        expected: "an input of the attention",
        got: "Mask, without a mask".to_string(),
    })?;
    Ok(inputs[wrt.position()])
}

fn infer_as(op: &'static str, attrs: &AttentionAttrs, inputs: &[TensorType]) -> Result<TensorType> {
    let Inputs { q, k, v, mask, segments, offset } = Inputs::new(op, attrs, inputs)?;
    check_window(op, attrs)?;
    check_float(op, &q)?;
    for x in [&q, &k, &v] {
        check_rank(op, "4 (batch, time, heads, features)", 4, &x.shape)?;
        check_dtype(op, &q, x)?;
    }
    let [b, tq, hq, d] = extents(&q.shape);
    let [_, tk, hk, _] = extents(&k.shape);
    require(hk != 0 && hq.is_multiple_of(hk), || Error::Attribute {
        op,
        what: "the number of query heads",
        expected: "a multiple of the number of key heads",
        got: format!("{hq} for {hk} key heads"),
    })?;
    check_shape(op, Shape::new(&[b, tk, hk, d])?, k.shape)?;
    check_shape(op, k.shape.with(3, v.shape[3]), v.shape)?;
    if let Some(mask) = mask {
        check_float(op, &mask)?;
        check_rank(op, "4 (batch, heads, queries, keys) for the mask", 4, &mask.shape)?;
        check_shape(op, Shape::new(&[b, hq, tq, tk])?, mask.shape)?;
    }
    if let Some([of_q, of_k]) = segments {
        check_index(op, &of_q)?;
        check_dtype(op, &of_q, &of_k)?;
        check_shape(op, Shape::new(&[b, tq])?, of_q.shape)?;
        check_shape(op, Shape::new(&[b, tk])?, of_k.shape)?;
    }
    if let Some(offset) = offset {
        check_scalar_i64(op, &offset)?;
    }
    Ok(TensorType::new(q.dtype, Shape::new(q.shape.with(3, v.shape[3]).dims())?))
}

fn check_window(op: &'static str, attrs: &AttentionAttrs) -> Result<()> {
    let Some(window) = attrs.window else { return Ok(()) };
    require(attrs.causal && window > 0, || Error::Attribute {
        op,
        what: "window",
        expected: "at least 1, with causal",
        got: format!("{window} (causal: {})", attrs.causal),
    })
}

fn extents(shape: &Shape) -> [usize; 4] {
    [shape[0], shape[1], shape[2], shape[3]]
}

/// `softmax(scale q kᵀ + mask, hidden keys left out) v`
pub(super) fn attention(
    g: &mut ComputationGraph,
    attrs: &AttentionAttrs,
    inputs: &[NodeId],
) -> Result<NodeId> {
    let inputs = Inputs::new("attention", attrs, inputs)?;
    let [b, tq, hq, _] = extents(&g.shape(inputs.q));
    let [_, tk, hk, dv] = extents(&g.shape(inputs.v));
    let dtype = g.ty(inputs.q).dtype;
    if tk == 0 {
        let zero = g.scalar_like(inputs.q, 0.0);
        return g.broadcast_to(zero, Shape::new(&[b, tq, hq, dv])?);
    }
    let Scores { scores, sees } = scores(g, attrs, &inputs)?;
    let mut p = g.add(Operation::Composite(Composite::Softmax { dim: 3 }), &[scores])?;
    if let Some(sees) = sees {
        // A row that sees nothing gives nothing.
        let zero = g.scalar_like(p, 0.0);
        p = g.select(sees, p, zero)?;
    }
    let p = g.reshape(p, Shape::new(&[b, hk, hq / hk * tq, tk])?)?;
    let v = heads_first(g, inputs.v)?;
    let y = g.add(Operation::Dot, &[p, v])?;
    let y = g.reshape(y, Shape::new(&[b, hq, tq, dv])?)?;
    let y = g.permute(y, &[0, 2, 1, 3])?;
    g.cast(y, dtype)
}

/// `log(sum(exp(scale q kᵀ + mask)))` over what a row sees; `inf` if that is nothing, so that
/// `exp(score - this)` is always the weight.
pub(super) fn log_sum_exp(
    g: &mut ComputationGraph,
    attrs: &AttentionAttrs,
    inputs: &[NodeId],
) -> Result<NodeId> {
    let inputs = Inputs::new("attention_logsumexp", attrs, inputs)?;
    let [b, tq, hq, _] = extents(&g.shape(inputs.q));
    if g.shape(inputs.k)[1] == 0 {
        let dtype = accumulator(g.ty(inputs.q).dtype);
        let none = g.constant(Scalar::from_f64(dtype, f64::INFINITY));
        return g.broadcast_to(none, Shape::new(&[b, tq, hq])?);
    }
    let Scores { scores, sees } = scores(g, attrs, &inputs)?;
    let mut lse = g.add(Operation::Composite(Composite::LogSumExp { dim: 3 }), &[scores])?;
    if let Some(sees) = sees {
        let none = g.scalar_like(lse, f64::INFINITY);
        lse = g.select(sees, lse, none)?;
    }
    let lse = g.reshape(lse, Shape::new(&[b, hq, tq])?)?;
    g.permute(lse, &[0, 2, 1])
}

/// `[b, t, h, d]` as `[b, h, t, d]`, widened.
fn heads_first(g: &mut ComputationGraph, x: NodeId) -> Result<NodeId> {
    let x = widen(g, x)?;
    g.permute(x, &[0, 2, 1, 3])
}

/// What the softmax is taken of.
struct Scores {
    /// `[b, hq, tq, tk]`, widened; -inf where a key is hidden, and 0 all along a row that sees
    /// nothing: -inf alone has no softmax, and no NaN shall enter the backward pass.
    scores: NodeId,
    /// Which rows see anything, `u8 [b, hq, tq, 1]`; `None` for all.
    sees: Option<NodeId>,
}

fn scores(
    g: &mut ComputationGraph,
    attrs: &AttentionAttrs,
    inputs: &Inputs<NodeId>,
) -> Result<Scores> {
    let [b, tq, hq, d] = extents(&g.shape(inputs.q));
    let [_, tk, hk, _] = extents(&g.shape(inputs.k));
    // The query heads that share a key head are more rows of one product: nothing is repeated.
    let q = heads_first(g, inputs.q)?;
    let q = g.reshape(q, Shape::new(&[b, hk, hq / hk * tq, d])?)?;
    let k = heads_first(g, inputs.k)?;
    let k = g.transpose(k)?;
    let s = g.add(Operation::Dot, &[q, k])?;
    let s = g.reshape(s, Shape::new(&[b, hq, tq, tk])?)?;
    let mut s = g.binary_scalar(BinaryOp::Mul, s, attrs.scale.as_f64())?;
    if let Some(mask) = inputs.mask {
        let mask = g.cast(mask, g.ty(s).dtype)?;
        s = g.binary(BinaryOp::Add, s, mask)?;
    }
    if let Some(visible) = visible(g, attrs, inputs)? {
        let hidden = g.scalar_like(s, f64::NEG_INFINITY);
        s = g.select(visible, s, hidden)?;
    }
    let every_row_sees = inputs.mask.is_none()
        && inputs.segments.is_none()
        && (!attrs.causal || (inputs.offset.is_none() && tq <= tk));
    if every_row_sees {
        return Ok(Scores { scores: s, sees: None });
    }
    let max = g.reduce(ReduceOp::Max, s, Dims::new([3]))?;
    let sees = g.binary_scalar(BinaryOp::Ne, max, f64::NEG_INFINITY)?;
    let zero = g.scalar_like(s, 0.0);
    Ok(Scores { scores: g.select(sees, s, zero)?, sees: Some(sees) })
}

/// Which keys a query sees: u8, broadcast to `[b, hq, tq, tk]`; `None` for all.
fn visible(
    g: &mut ComputationGraph,
    attrs: &AttentionAttrs,
    inputs: &Inputs<NodeId>,
) -> Result<Option<NodeId>> {
    let mut rules = Vec::new();
    if attrs.causal {
        let (q, k) = positions(g, inputs)?;
        rules.push(g.binary(BinaryOp::Le, k, q)?);
        if let Some(window) = attrs.window {
            let window = g.constant(Scalar::from_i64(DType::I64, i64::from(window)));
            let out = g.binary(BinaryOp::Sub, q, window)?;
            rules.push(g.binary(BinaryOp::Gt, k, out)?);
        }
    }
    if let Some([q, k]) = inputs.segments {
        let (b, tq, tk) = (g.shape(q)[0], g.shape(q)[1], g.shape(k)[1]);
        let q = g.reshape(q, Shape::new(&[b, 1, tq, 1])?)?;
        let k = g.reshape(k, Shape::new(&[b, 1, 1, tk])?)?;
        rules.push(g.binary(BinaryOp::Eq, q, k)?);
    }
    let mut all: Option<NodeId> = None;
    for rule in rules {
        all = Some(match all {
            Some(others) => g.binary(BinaryOp::Mul, others, rule)?,
            None => rule,
        });
    }
    Ok(all)
}

/// The positions of the queries, `i64 [tq, 1]`, and of the keys, `i64 [tk]`.
fn positions(g: &mut ComputationGraph, inputs: &Inputs<NodeId>) -> Result<(NodeId, NodeId)> {
    let (tq, tk) = (g.shape(inputs.q)[1], g.shape(inputs.k)[1]);
    let offset = match inputs.offset {
        Some(offset) => offset,
        None => g.constant(Scalar::from_i64(DType::I64, tk as i64 - tq as i64)),
    };
    let q = g.add(Operation::Iota { len: tq, dtype: DType::I64 }, &[])?;
    let q = g.binary(BinaryOp::Add, q, offset)?;
    let q = g.reshape(q, Shape::new(&[tq, 1])?)?;
    let k = g.add(Operation::Iota { len: tk, dtype: DType::I64 }, &[])?;
    Ok((q, k))
}

/// `inputs = [dy, lse, delta, ..attention's inputs]`. What lse and delta say follows from the others.
pub(super) fn attention_grad(
    g: &mut ComputationGraph,
    attrs: &AttentionAttrs,
    wrt: AttentionInput,
    inputs: &[NodeId],
) -> Result<NodeId> {
    let (dy, inputs) = (inputs[0], &inputs[3..]);
    let meaning = |g: &mut _, inputs: &[_]| attention(g, attrs, inputs);
    let found = autodiff::pullback(g, inputs, &[wrt.position()], dy, meaning)?;
    // Attention to no keys depends on nothing.
    found[0].map_or_else(|| g.full_like(inputs[wrt.position()], 0.0), Ok)
}

/// One [`Composite::AttentionGrad`] per float input, so that a target may have kernels for them.
pub(super) fn attention_vjp(
    g: &mut ComputationGraph,
    attrs: &AttentionAttrs,
    inputs: &[NodeId],
    y: NodeId,
    dy: NodeId,
) -> Result<Vec<Option<NodeId>>> {
    use AttentionInput::*;
    let lse = g.add(Operation::Composite(Composite::AttentionLogSumExp(*attrs)), inputs)?;
    let delta = delta(g, y, dy)?;
    let with_rows: Vec<NodeId> = [dy, lse, delta].iter().chain(inputs).copied().collect();
    let mut found = vec![None; inputs.len()];
    let floats = [Query, Key, Value].into_iter().chain(attrs.mask.then_some(Mask));
    for wrt in floats {
        let grad = Composite::AttentionGrad { attrs: *attrs, wrt };
        found[wrt.position()] = Some(g.add(Operation::Composite(grad), &with_rows)?);
    }
    Ok(found)
}

/// `sum(dy y)` over the features: the mean of the cotangents of a row's weights, which it weighs
/// (Dao et al. 2022, "FlashAttention", appendix B).
fn delta(g: &mut ComputationGraph, y: NodeId, dy: NodeId) -> Result<NodeId> {
    let shape = rows(&g.ty(y))?.shape;
    let (y, dy) = (widen(g, y)?, widen(g, dy)?);
    let products = g.binary(BinaryOp::Mul, dy, y)?;
    let sum = g.sum(products, Dims::new([3]))?;
    g.reshape(sum, shape)
}

//! Cross-entropy of class labels, per row, with and without the linear layer before it.
//!
//! Everything is computed, and every loss given, in f32 (f64 for F64). A label outside the classes
//! picks none; whoever runs the graph reports it.

use super::softmax::{add_logsumexp, probabilities};
use super::{Composite, accumulator, check_arity, widen};
use crate::infer::{check_dtype, check_float, check_index, check_rank, check_shape, require};
use crate::{
    BinaryOp, BlockFormat, ComputationGraph, DType, Dims, Error, NodeId, Operation, Result, Scalar,
    Shape, TensorType,
};

/// How rows are weighed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CrossEntropyAttrs {
    /// Rows with this label have loss 0 and gradient 0.
    pub ignore_index: Option<i64>,
    /// `ε` of `(1 - ε) nll + ε mean over classes` (Szegedy et al. 2016); an f64 scalar in `[0, 1]`.
    pub label_smoothing: Scalar,
    /// How the weight before the loss is stored, where it is in blocks: `u8[bytes]`, class after class, each a whole
    /// number of blocks. Such a weight is frozen. `None` without a weight.
    pub blocks: Option<BlockFormat>,
}

impl CrossEntropyAttrs {
    /// The number of classes of a weight for so many features.
    pub fn classes(&self, features: usize, weight: &Shape) -> usize {
        let Some(format) = self.blocks else { return weight[0] };
        format.bytes_for(features).map_or(0, |bytes| weight[0] / bytes.max(1))
    }
}

pub(super) fn infer(attrs: &CrossEntropyAttrs, inputs: &[TensorType]) -> Result<TensorType> {
    let op = "cross_entropy";
    let [logits, labels] = check_arity(op, inputs)?;
    check_attrs(op, attrs)?;
    check_float(op, &logits)?;
    require(attrs.blocks.is_none(), || Error::Attribute {
        op,
        what: "blocks",
        expected: "none, for there is no weight",
        got: format!("{:?}", attrs.blocks),
    })?;
    check_rank(op, "2 (rows, classes)", 2, &logits.shape)?;
    check_labels(op, logits.shape[0], &labels)?;
    Ok(TensorType::new(accumulator(logits.dtype), labels.shape))
}

pub(super) fn infer_linear(composite: &Composite, inputs: &[TensorType]) -> Result<TensorType> {
    let op = composite.as_str();
    match composite {
        Composite::LinearCrossEntropy(attrs) => {
            let [x, weight, labels] = check_arity(op, inputs)?;
            check_linear(op, attrs, &x, &weight, &labels)?;
            Ok(TensorType::new(accumulator(x.dtype), labels.shape))
        }
        Composite::LinearCrossEntropyGradX(attrs) => {
            let [x, weight, labels] = check_arity(op, inputs)?;
            check_linear(op, attrs, &x, &weight, &labels)?;
            Ok(TensorType::new(accumulator(x.dtype), x.shape))
        }
        Composite::LinearCrossEntropyGradWeight(attrs) => {
            let [dy, x, weight, labels] = check_arity(op, inputs)?;
            check_linear(op, attrs, &x, &weight, &labels)?;
            check_float(op, &weight)?;
            check_shape(op, labels.shape, dy.shape)?;
            check_dtype(op, &TensorType::new(accumulator(x.dtype), dy.shape), &dy)?;
            Ok(weight)
        }
        other => unreachable!("metal-candle bug: {} is no linear loss", other.as_str()),
    }
}

fn check_linear(
    op: &'static str,
    attrs: &CrossEntropyAttrs,
    x: &TensorType,
    weight: &TensorType,
    labels: &TensorType,
) -> Result<()> {
    check_attrs(op, attrs)?;
    check_float(op, x)?;
    check_rank(op, "2 (rows, features)", 2, &x.shape)?;
    if let Some(format) = attrs.blocks {
        check_blocks(op, format, x.shape[1], weight)?;
    } else {
        check_dtype(op, x, weight)?;
        check_rank(op, "2 for the weight (classes, features)", 2, &weight.shape)?;
        check_shape(op, Shape::new(&[weight.shape[0], x.shape[1]])?, weight.shape)?;
    }
    check_labels(op, x.shape[0], labels)
}

/// Whether these are the blocks of whole classes of `features` weights.
fn check_blocks(
    op: &'static str,
    format: BlockFormat,
    features: usize,
    weight: &TensorType,
) -> Result<()> {
    check_dtype(op, &TensorType::new(DType::U8, weight.shape), weight)?;
    check_rank(op, "1 for the blocks of the weight", 1, &weight.shape)?;
    let row_bytes = format.bytes_for(features).filter(|bytes| *bytes != 0);
    let whole = row_bytes.is_some_and(|bytes| weight.shape[0].is_multiple_of(bytes));
    require(whole, || Error::Attribute {
        op,
        what: "blocks",
        expected: "whole classes of blocks, each of as many weights as x has features",
        got: format!("{} bytes of {format:?} for {features} features", weight.shape[0]),
    })
}

fn check_attrs(op: &'static str, attrs: &CrossEntropyAttrs) -> Result<()> {
    let epsilon = attrs.label_smoothing.as_f64();
    require((0.0..=1.0).contains(&epsilon), || Error::Attribute {
        op,
        what: "label_smoothing",
        expected: "within 0 and 1",
        got: epsilon.to_string(),
    })
}

fn check_labels(op: &'static str, rows: usize, labels: &TensorType) -> Result<()> {
    check_index(op, labels)?;
    check_shape(op, Shape::new(&[rows])?, labels.shape)
}

pub(super) fn cross_entropy(
    g: &mut ComputationGraph,
    attrs: &CrossEntropyAttrs,
    inputs: &[NodeId],
) -> Result<NodeId> {
    let logits = widen(g, inputs[0])?;
    let rows = Rows::new(g, attrs, logits, inputs[1])?;
    rows.loss(g)
}

pub(super) fn vjp(
    g: &mut ComputationGraph,
    attrs: &CrossEntropyAttrs,
    inputs: &[NodeId],
    dy: NodeId,
) -> Result<Vec<Option<NodeId>>> {
    let logits = widen(g, inputs[0])?;
    let rows = Rows::new(g, attrs, logits, inputs[1])?;
    let dlogits = rows.dlogits(g, Some(dy))?;
    Ok(vec![Some(g.cast(dlogits, g.ty(inputs[0]).dtype)?), None])
}

/// `inputs = [x: [n, d], weight: [v, d], labels: [n]]`
pub(super) fn linear(
    g: &mut ComputationGraph,
    attrs: &CrossEntropyAttrs,
    inputs: &[NodeId],
) -> Result<NodeId> {
    let rows = linear_rows(g, attrs, inputs)?;
    rows.loss(g)
}

/// `dlogits weight`, for a cotangent of 1.
pub(super) fn linear_grad_x(
    g: &mut ComputationGraph,
    attrs: &CrossEntropyAttrs,
    inputs: &[NodeId],
) -> Result<NodeId> {
    let rows = linear_rows(g, attrs, inputs)?;
    let dlogits = rows.dlogits(g, None)?;
    let weight = wide_weight(g, attrs, inputs)?;
    g.add(Operation::Dot, &[dlogits, weight])
}

/// `dlogitsᵀ x`. `inputs = [dy: [n], x, weight, labels]`
pub(super) fn linear_grad_weight(
    g: &mut ComputationGraph,
    attrs: &CrossEntropyAttrs,
    inputs: &[NodeId],
) -> Result<NodeId> {
    let rows = linear_rows(g, attrs, &inputs[1..])?;
    let dlogits = rows.dlogits(g, Some(inputs[0]))?;
    let (dlogits, x) = (g.transpose(dlogits)?, widen(g, inputs[1])?);
    let dw = g.add(Operation::Dot, &[dlogits, x])?;
    g.cast(dw, g.ty(inputs[2]).dtype)
}

pub(super) fn linear_vjp(
    g: &mut ComputationGraph,
    attrs: &CrossEntropyAttrs,
    inputs: &[NodeId],
    dy: NodeId,
) -> Result<Vec<Option<NodeId>>> {
    let [x, weight, labels] = inputs else {
        unreachable!("metal-candle bug: linear_cross_entropy has three inputs")
    };
    let rows = Composite::LinearCrossEntropyGradX(*attrs);
    let rows = g.add(Operation::Composite(rows), inputs)?;
    let dy_column = column(g, dy)?;
    let dx = g.binary(BinaryOp::Mul, rows, dy_column)?;
    let dx = g.cast(dx, g.ty(*x).dtype)?;
    if attrs.blocks.is_some() {
        return Ok(vec![Some(dx), None, None]);
    }
    let dw = Composite::LinearCrossEntropyGradWeight(*attrs);
    let dw = g.add(Operation::Composite(dw), &[dy, *x, *weight, *labels])?;
    Ok(vec![Some(dx), Some(dw), None])
}

/// The logits in the dtype of the loss, where rounding them to bf16 would cost the loss its digits.
fn linear_rows<'a>(
    g: &mut ComputationGraph,
    attrs: &'a CrossEntropyAttrs,
    inputs: &[NodeId],
) -> Result<Rows<'a>> {
    let (x, weight) = (widen(g, inputs[0])?, wide_weight(g, attrs, inputs)?);
    let weight = g.transpose(weight)?;
    let logits = g.add(Operation::Dot, &[x, weight])?;
    Rows::new(g, attrs, logits, inputs[2])
}

/// The weight in the dtype of the loss, `[classes, features]`.
fn wide_weight(
    g: &mut ComputationGraph,
    attrs: &CrossEntropyAttrs,
    inputs: &[NodeId],
) -> Result<NodeId> {
    let Some(format) = attrs.blocks else { return widen(g, inputs[1]) };
    let x = g.ty(inputs[0]);
    let cols = x.shape[1];
    let rows = attrs.classes(cols, &g.shape(inputs[1]));
    let weight = g.add(Operation::Dequantize { format, rows, cols }, &inputs[1..2])?;
    g.cast(weight, accumulator(x.dtype))
}

/// What the loss and its gradient share.
struct Rows<'a> {
    attrs: &'a CrossEntropyAttrs,
    /// `[n, v]`, widened
    logits: NodeId,
    /// `[n, 1]`
    logsumexp: NodeId,
    /// `u8 [n, v]`: 1 at the label. Compared instead of gathered, so that it fuses with its row.
    hit: NodeId,
    /// `u8 [n, 1]`: 1 where the row does not count.
    ignored: Option<NodeId>,
}

impl<'a> Rows<'a> {
    fn new(
        g: &mut ComputationGraph,
        attrs: &'a CrossEntropyAttrs,
        logits: NodeId,
        labels: NodeId,
    ) -> Result<Self> {
        let len = g.shape(logits)[1];
        let logsumexp = add_logsumexp(g, 1, logits)?;
        // In i64 no class wraps around, and no u32 label equals a negative ignore_index.
        let labels = g.cast(labels, DType::I64)?;
        let labels = column(g, labels)?;
        let classes = g.add(Operation::Iota { len, dtype: DType::I64 }, &[])?;
        let hit = g.binary(BinaryOp::Eq, labels, classes)?;
        let ignored = match attrs.ignore_index {
            Some(index) => {
                let index = g.constant(Scalar::from_i64(DType::I64, index));
                Some(g.binary(BinaryOp::Eq, labels, index)?)
            }
            None => None,
        };
        Ok(Rows { attrs, logits, logsumexp, hit, ignored })
    }

    /// `logsumexp - (1 - ε) logits[label] - ε mean(logits)`, `[n]`
    fn loss(&self, g: &mut ComputationGraph) -> Result<NodeId> {
        let epsilon = self.attrs.label_smoothing.as_f64();
        let classes = Dims::new([1]);
        let zero = g.scalar_like(self.logits, 0.0);
        let picked = g.select(self.hit, self.logits, zero)?;
        let mut target = g.sum(picked, classes)?;
        // Left out at 0, where an infinite logit would make it NaN.
        if epsilon != 0.0 {
            let picked = g.binary_scalar(BinaryOp::Mul, target, 1.0 - epsilon)?;
            let mean = g.mean(self.logits, classes)?;
            let mean = g.binary_scalar(BinaryOp::Mul, mean, epsilon)?;
            target = g.binary(BinaryOp::Add, picked, mean)?;
        }
        let loss = g.binary(BinaryOp::Sub, self.logsumexp, target)?;
        let loss = self.without_ignored(g, loss)?;
        let n = g.shape(loss)[0];
        g.reshape(loss, Shape::new(&[n])?)
    }

    /// `(softmax(logits) - target) dy`, `[n, v]`
    fn dlogits(&self, g: &mut ComputationGraph, dy: Option<NodeId>) -> Result<NodeId> {
        let epsilon = self.attrs.label_smoothing.as_f64();
        let miss = epsilon / g.shape(self.logits)[1] as f64;
        let p = probabilities(g, self.logits, self.logsumexp)?;
        let (hit, miss) = (g.scalar_like(p, 1.0 - epsilon + miss), g.scalar_like(p, miss));
        let target = g.select(self.hit, hit, miss)?;
        let mut d = g.binary(BinaryOp::Sub, p, target)?;
        if let Some(dy) = dy {
            let dy = column(g, dy)?;
            d = g.binary(BinaryOp::Mul, d, dy)?;
        }
        self.without_ignored(g, d)
    }

    fn without_ignored(&self, g: &mut ComputationGraph, x: NodeId) -> Result<NodeId> {
        let Some(ignored) = self.ignored else { return Ok(x) };
        let zero = g.scalar_like(x, 0.0);
        g.select(ignored, zero, x)
    }
}

/// `[n]` as `[n, 1]`
fn column(g: &mut ComputationGraph, x: NodeId) -> Result<NodeId> {
    let n = g.shape(x).len();
    g.reshape(x, Shape::new(&[n, 1])?)
}

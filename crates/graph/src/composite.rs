//! Operations whose meaning is their decomposition into other operations.
//!
//! They are kept in the graph so that nobody has to recognise them; a target that has no kernel for
//! one expands it ([`crate::pass::expand`]).

mod attention;
mod cross_entropy;
mod norm;
mod rope;
mod softmax;

use crate::{Class, ComputationGraph, DType, Error, NodeId, Result, Scalar, TensorType};

pub use attention::{AttentionAttrs, AttentionInput};
pub use cross_entropy::CrossEntropyAttrs;
pub use rope::RopeLayout;

/// The composites. `inputs` below is what the node holds, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Composite {
    /// `exp(x - max) / sum(exp(x - max))` along `dim`. `inputs = [x]`
    Softmax { dim: usize },
    /// `x - max - log(sum(exp(x - max)))` along `dim`. `inputs = [x]`
    LogSoftmax { dim: usize },
    /// `max + log(sum(exp(x - max)))` along `dim`, keeping it with extent 1. `inputs = [x]`
    LogSumExp { dim: usize },
    /// `x / sqrt(mean(x²) + eps) * weight` over the last dim (Zhang & Sennrich 2019).
    /// `inputs = [x, weight: [n]]`
    RmsNorm { eps: Scalar },
    /// `(x - mean) / sqrt(var + eps) * weight + bias` over the last dim (Ba et al. 2016).
    /// `inputs = [x, weight: [n], bias: [n]]`
    LayerNorm { eps: Scalar },
    /// Rotary embedding of the last dim (Su et al. 2021).
    /// `inputs = [x: [.., d], cos: [.., d/2], sin: [.., d/2]]`, cos and sin of x's leading extents
    Rope { layout: RopeLayout },
    /// Scaled dot-product attention. `inputs = [q: [b, tq, hq, d], k: [b, tk, hk, d], v: [b, tk,
    /// hk, dv], (mask: [b, hq, tq, tk]), (q_segment: [b, tq], k_segment: [b, tk]), (offset:
    /// i64[])]`, the optional ones as [`AttentionAttrs`] says; gives `[b, tq, hq, dv]`
    Attention(AttentionAttrs),
    /// Of every row of [`Composite::Attention`]: `log(sum(exp(score)))` over the keys that it sees,
    /// `inf` if there are none. Same inputs; gives `[b, tq, hq]` in f32 (f64 for F64)
    AttentionLogSumExp(AttentionAttrs),
    /// The cotangent of one input of [`Composite::Attention`]. `inputs = [dy, lse, delta,
    /// ..attention's inputs]`: lse is [`Composite::AttentionLogSumExp`], and delta is the sum of
    /// `dy y` over the features, y being the attention; both `[b, tq, hq]`. They follow from the
    /// other inputs, and save a kernel a pass over the scores.
    AttentionGrad { attrs: AttentionAttrs, wrt: AttentionInput },
    /// Per-row loss: `inputs = [logits: [n, v], labels: integer [n]]`; gives `[n]` in f32 (f64 for
    /// F64), 0 where ignored
    CrossEntropy(CrossEntropyAttrs),
    /// [`Composite::CrossEntropy`] of `x weightᵀ` without ever holding the logits.
    /// `inputs = [x: [n, d], weight: [v, d], labels: [n]]`; gives `[n]` in f32 (f64 for F64)
    LinearCrossEntropy(CrossEntropyAttrs),
    /// The gradient of every row's loss with respect to its own row of x (not yet times the row's
    /// cotangent). Same inputs as [`Composite::LinearCrossEntropy`]; gives `[n, d]` in f32 (f64 for
    /// F64)
    LinearCrossEntropyGradX(CrossEntropyAttrs),
    /// The cotangent of the weight. `inputs = [dy: [n], x, weight, labels]`; gives `[v, d]` in its
    /// dtype
    LinearCrossEntropyGradWeight(CrossEntropyAttrs),
}

impl Composite {
    /// What errors and prints call it.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Composite::Softmax { .. } => "softmax",
            Composite::LogSoftmax { .. } => "log_softmax",
            Composite::LogSumExp { .. } => "logsumexp",
            Composite::RmsNorm { .. } => "rms_norm",
            Composite::LayerNorm { .. } => "layer_norm",
            Composite::Rope { .. } => "rope",
            Composite::Attention(_) => "attention",
            Composite::AttentionLogSumExp(_) => "attention_logsumexp",
            Composite::AttentionGrad { .. } => "attention_grad",
            Composite::CrossEntropy(_) => "cross_entropy",
            Composite::LinearCrossEntropy(_) => "linear_cross_entropy",
            Composite::LinearCrossEntropyGradX(_) => "linear_cross_entropy_grad_x",
            Composite::LinearCrossEntropyGradWeight(_) => "linear_cross_entropy_grad_weight",
        }
    }
}

/// The output type of `composite`, or what is wrong with its inputs.
pub(crate) fn infer(composite: &Composite, inputs: &[TensorType]) -> Result<TensorType> {
    match composite {
        Composite::Softmax { dim }
        | Composite::LogSoftmax { dim }
        | Composite::LogSumExp { dim } => softmax::infer(composite, *dim, inputs),
        Composite::RmsNorm { .. } | Composite::LayerNorm { .. } => norm::infer(composite, inputs),
        Composite::Rope { .. } => rope::infer(inputs),
        Composite::Attention(attrs) => attention::infer(attrs, inputs),
        Composite::AttentionLogSumExp(attrs) => attention::infer_rows(attrs, inputs),
        Composite::AttentionGrad { attrs, wrt } => attention::infer_grad(attrs, *wrt, inputs),
        Composite::CrossEntropy(attrs) => cross_entropy::infer(attrs, inputs),
        Composite::LinearCrossEntropy(_)
        | Composite::LinearCrossEntropyGradX(_)
        | Composite::LinearCrossEntropyGradWeight(_) => {
            cross_entropy::infer_linear(composite, inputs)
        }
    }
}

/// Appends what `composite` means, in primitives and simpler composites, and returns its value.
///
/// # Errors
/// As [`infer`](fn@crate::infer), where the inputs do not fit.
pub fn decompose(
    g: &mut ComputationGraph,
    composite: &Composite,
    inputs: &[NodeId],
) -> Result<NodeId> {
    match composite {
        Composite::Softmax { dim } => softmax::softmax(g, *dim, inputs[0]),
        Composite::LogSoftmax { dim } => softmax::log_softmax(g, *dim, inputs[0]),
        Composite::LogSumExp { dim } => softmax::logsumexp(g, *dim, inputs[0]),
        Composite::RmsNorm { eps } => norm::rms_norm(g, *eps, inputs),
        Composite::LayerNorm { eps } => norm::layer_norm(g, *eps, inputs),
        Composite::Rope { layout } => rope::rope(g, *layout, inputs),
        Composite::Attention(attrs) => attention::attention(g, attrs, inputs),
        Composite::AttentionLogSumExp(attrs) => attention::log_sum_exp(g, attrs, inputs),
        Composite::AttentionGrad { attrs, wrt } => {
            attention::attention_grad(g, attrs, *wrt, inputs)
        }
        Composite::CrossEntropy(attrs) => cross_entropy::cross_entropy(g, attrs, inputs),
        Composite::LinearCrossEntropy(attrs) => cross_entropy::linear(g, attrs, inputs),
        Composite::LinearCrossEntropyGradX(attrs) => cross_entropy::linear_grad_x(g, attrs, inputs),
        Composite::LinearCrossEntropyGradWeight(attrs) => {
            cross_entropy::linear_grad_weight(g, attrs, inputs)
        }
    }
}

/// The cotangents of a composite's inputs, given its output `y` and the cotangent `dy`.
///
/// Written in closed form on the primals, so that the backward pass shares the forward pass's row
/// statistics and stores nothing of full size that it does not need. `None` marks an input that is
/// not differentiable.
pub(crate) fn vjp(
    g: &mut ComputationGraph,
    composite: &Composite,
    inputs: &[NodeId],
    y: NodeId,
    dy: NodeId,
) -> Result<Vec<Option<NodeId>>> {
    match composite {
        Composite::Softmax { dim } => softmax::softmax_vjp(g, *dim, inputs[0], y, dy),
        Composite::LogSoftmax { dim } => softmax::log_softmax_vjp(g, *dim, inputs[0], y, dy),
        Composite::LogSumExp { dim } => softmax::logsumexp_vjp(g, *dim, inputs[0], y, dy),
        Composite::RmsNorm { eps } => norm::rms_norm_vjp(g, *eps, inputs, dy),
        Composite::LayerNorm { eps } => norm::layer_norm_vjp(g, *eps, inputs, dy),
        Composite::Rope { layout } => rope::rope_vjp(g, *layout, inputs, dy),
        Composite::Attention(attrs) => attention::attention_vjp(g, attrs, inputs, y, dy),
        Composite::CrossEntropy(attrs) => cross_entropy::vjp(g, attrs, inputs, dy),
        Composite::LinearCrossEntropy(attrs) => cross_entropy::linear_vjp(g, attrs, inputs, dy),
        // Second derivatives go through the meaning.
        Composite::AttentionLogSumExp(_)
        | Composite::AttentionGrad { .. }
        | Composite::LinearCrossEntropyGradX(_)
        | Composite::LinearCrossEntropyGradWeight(_) => {
            let wrt: Vec<usize> = (0..inputs.len()).collect();
            let meaning = |g: &mut _, inputs: &[_]| decompose(g, composite, inputs);
            crate::autodiff::pullback(g, inputs, &wrt, dy, meaning)
        }
    }
}

/// The dtype in which sums over `dtype` are kept.
const fn accumulator(dtype: DType) -> DType {
    match dtype.class() {
        Class::F32 => DType::F32,
        Class::F64 => DType::F64,
        Class::I64 => DType::I64,
    }
}

/// `x` in the dtype in which its sums are kept: f32 for bf16 and f16.
pub(crate) fn widen(g: &mut ComputationGraph, x: NodeId) -> Result<NodeId> {
    g.cast(x, accumulator(g.ty(x).dtype))
}

fn check_arity<const N: usize>(op: &'static str, inputs: &[TensorType]) -> Result<[TensorType; N]> {
    inputs.try_into().map_err(|_| Error::Arity { op, expected: N, got: inputs.len() })
}

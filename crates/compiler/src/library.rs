//! Library calls: opaque steps with full descriptors. Shapes and strides are in the step's operands.

use metal_candle_graph::composite::{
    AttentionAttrs, AttentionInput, CrossEntropyAttrs, RopeLayout,
};
use metal_candle_graph::{ArgReduceOp, BlockFormat};

/// A step that no fused kernel expresses. Operands are strided ([`crate::Layout`]) unless said otherwise;
/// outputs are dense except where a step writes a part of a larger buffer.
#[derive(Clone, Debug, PartialEq)]
pub enum LibraryCall {
    /// `out = alpha · a b`, or `out += alpha · a b` if `accumulate`. `args = [a: [.., m, k], b: [.., k, n]]`,
    /// equal leading dims, and, where every row gets a bias, `[n]`; accumulates in f32 (f64 for F64).
    Gemm { alpha: f64, accumulate: bool },
    /// `out = Σ alphas[i] · a_i b_i`, or added to what is there if `accumulate`: a product with its LoRA branch, or the gradient
    /// of what several products read. `args = [a_0, b_0, a_1, b_1, ..]`, each pair as [`LibraryCall::Gemm`] takes it. A
    /// backend may round a result of 16 bits after any of the products.
    GemmSum { alphas: Vec<f64>, accumulate: bool },
    /// `low = low_scale · x a; out += scale · low b`: a LoRA branch, in place on the output, which holds the base.
    /// `args = [x: [.., m, k], a: [.., k, r], b: [.., r, n]]`, one a and one b, repeated over leading dims; a second output
    /// is low, where anything else reads it.
    LowRank { low_scale: f64, scale: f64 },
    /// See `Operation::QuantDot`. `args = [x, w: u8[bytes]]`. A backend may round x to eight bits, relative to the
    /// largest of every 32 elements, or both factors to bf16; F64 it may not round.
    QuantGemm { format: BlockFormat, rows: usize, cols: usize, transposed: bool },
    /// `args = [w: u8[bytes]]`
    Dequantize { format: BlockFormat, rows: usize, cols: usize },
    /// `args` as `Composite::Attention`; outputs: y if `y`, then `Composite::AttentionLogSumExp` if `lse`.
    Attention { attrs: AttentionAttrs, y: bool, lse: bool },
    /// One output for each of `wrt`; `args = [dy, lse, delta, ..attention's]`
    AttentionGrad { attrs: AttentionAttrs, wrt: Vec<AttentionInput> },
    /// `args = [x, cos, sin]`
    Rope { layout: RopeLayout },
    /// `args = [x, weight, labels]`; outputs: the losses if `losses`, then the gradient rows if `grad_x`.
    LinearCrossEntropy { attrs: CrossEntropyAttrs, losses: bool, grad_x: bool },
    /// `args = [dy, x, weight, labels]`
    LinearCrossEntropyGradWeight(CrossEntropyAttrs),
    /// `args = [x, index]`
    Gather { dim: usize },
    /// `args = [x, index: [n]]`
    IndexSelect { dim: usize },
    /// In place on the output, which holds the base. `args = [index, src]`
    ScatterAdd { dim: usize },
    /// In place on the output, which holds the base. `args = [index: [n], src]`
    IndexAdd { dim: usize },
    /// In place on the output, which holds the base. `args = [update, start: i64[]]`
    SliceUpdate { dim: usize },
    /// The same with a rotary embedding for the update. `args = [x, cos, sin, start: i64[]]`
    RopeUpdate { layout: RopeLayout, dim: usize },
    /// `args = [x, start: i64[]]`
    DynamicSlice { dim: usize },
    /// `args = [x]`
    CumSum { dim: usize, reverse: bool },
    /// `args = [x]`; the output keeps `dim` with extent 1, u32
    ArgReduce { op: ArgReduceOp, dim: usize },
    /// In place on the output, which holds this rank's part of the sum; nothing where a plan runs alone. `args = []`
    AllReduce,
}

impl LibraryCall {
    /// What plans and errors call it.
    pub const fn name(&self) -> &'static str {
        match self {
            LibraryCall::Gemm { .. } => "gemm",
            LibraryCall::GemmSum { .. } => "gemm_sum",
            LibraryCall::LowRank { .. } => "low_rank",
            LibraryCall::QuantGemm { .. } => "quant_gemm",
            LibraryCall::Dequantize { .. } => "dequantize",
            LibraryCall::Attention { .. } => "attention",
            LibraryCall::AttentionGrad { .. } => "attention_grad",
            LibraryCall::Rope { .. } => "rope",
            LibraryCall::LinearCrossEntropy { .. } => "linear_cross_entropy",
            LibraryCall::LinearCrossEntropyGradWeight(_) => "linear_cross_entropy_grad_weight",
            LibraryCall::Gather { .. } => "gather",
            LibraryCall::IndexSelect { .. } => "index_select",
            LibraryCall::ScatterAdd { .. } => "scatter_add",
            LibraryCall::IndexAdd { .. } => "index_add",
            LibraryCall::SliceUpdate { .. } => "slice_update",
            LibraryCall::RopeUpdate { .. } => "rope_update",
            LibraryCall::DynamicSlice { .. } => "dynamic_slice",
            LibraryCall::CumSum { .. } => "cumsum",
            LibraryCall::ArgReduce { .. } => "arg_reduce",
            LibraryCall::AllReduce => "all_reduce",
        }
    }
}

//! What a device can do, as plain data.

use metal_candle_graph::Composite;

/// The capabilities and limits that lowering may rely on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// What plans and errors call it.
    pub name: &'static str,
    /// The longest tape of one kernel, in instructions.
    pub max_tape: usize,
    /// Every buffer of the arena starts at a multiple of this many bytes.
    pub align_bytes: usize,
    /// Sums over more elements than this are made in two steps, for parallelism and rounding.
    pub max_reduce: usize,
    /// Fused kernels read and write at most so many buffers.
    pub max_operands: usize,
    /// So many products whose results are added up are one call at most,
    /// [`LibraryCall::GemmSum`](crate::LibraryCall::GemmSum); 1 where there is none.
    pub max_products: usize,
    /// Whether a product adds a vector to every row of its result in the same call.
    pub adds_bias: bool,
    /// A LoRA branch of at most this rank is one call, [`LibraryCall::LowRank`](crate::LibraryCall::LowRank); 0 for none.
    pub max_low_rank: usize,
    /// A result of at least so many bytes has left the caches when the next step reads it.
    pub cache_bytes: usize,
    /// Buffers of up to so many bytes do not share memory with neighbours in time, so that steps which need not wait for each
    /// other's values need not wait for each other's memory either.
    pub apart_bytes: usize,
}

/// What few values are: the activations of some tokens, a LoRA factor.
const FEW_VALUES: usize = 64 << 10;

impl Target {
    /// Any CPU: the interpreter and the plain library calls.
    pub const CPU: Target = Target {
        name: "cpu",
        max_tape: 96,
        align_bytes: 64,
        max_reduce: 1 << 14,
        max_operands: usize::MAX,
        max_products: 8,
        adds_bias: false,
        max_low_rank: 0,
        cache_bytes: usize::MAX,
        apart_bytes: 0,
    };

    /// Any NVIDIA GPU. Parameters take 4 KiB at most: 512 addresses.
    pub const CUDA: Target = Target {
        name: "cuda",
        max_tape: 96,
        align_bytes: 256,
        max_reduce: 1 << 14,
        max_operands: 512,
        max_products: 1,
        adds_bias: true,
        max_low_rank: 0,
        cache_bytes: 32 << 20,
        apart_bytes: FEW_VALUES,
    };

    /// Any GPU of Apple's. A buffer argument table has 31 entries.
    pub const METAL: Target = Target {
        name: "metal",
        max_tape: 96,
        align_bytes: 256,
        max_reduce: 1 << 14,
        max_operands: 31,
        max_products: 1,
        adds_bias: false,
        max_low_rank: 64,
        cache_bytes: usize::MAX,
        apart_bytes: FEW_VALUES,
    };

    /// Whether this target has a library call for `composite`; otherwise it is expanded and fused.
    pub fn keeps(&self, composite: &Composite) -> bool {
        match composite {
            Composite::Rope { .. }
            | Composite::Attention(_)
            | Composite::AttentionLogSumExp(_)
            | Composite::AttentionGrad { .. }
            | Composite::LinearCrossEntropy(_)
            | Composite::LinearCrossEntropyGradX(_)
            | Composite::LinearCrossEntropyGradWeight(_) => true,
            Composite::Softmax { .. }
            | Composite::LogSoftmax { .. }
            | Composite::LogSumExp { .. }
            | Composite::RmsNorm { .. }
            | Composite::LayerNorm { .. }
            | Composite::CrossEntropy(_) => false,
        }
    }
}

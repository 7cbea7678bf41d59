//! A library call as what a GPU does for it: kernels and products, in order.
//!
//! ```text
//! gemm, small, thin, low_rank, index, along, rope, quant, cross_entropy
//!        which template of a header, with which extents and places
//! attention, attention_few
//!        tiles of scores; attention_shape ── what they are specialised by; kernel ── the text around them
//! factor ── matrices as products want them
//! walk ── elements in order, and where each operand has them
//! draft ── the text around the template
//! ```

mod along;
mod attention;
mod attention_few;
mod attention_shape;
mod cross_entropy;
mod draft;
mod factor;
mod gemm;
mod index;
mod kernel;
mod low_rank;
mod quant;
mod rope;
mod small;
mod thin;
mod walk;

use super::{Binding, Dialect, Limits, RenderError, Source};
use crate::{Layout, LibraryCall, Operand};
use draft::Gpu;
use metal_candle_graph::DType;

/// What a GPU does for a library call: the parts run one after the other.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    pub parts: Vec<Part>,
    /// Memory that the parts share while they run; its start is aligned to 256 bytes.
    pub workspace_bytes: usize,
}

/// One launch, or one product of the backend's own library.
#[expect(clippy::large_enum_variant, reason = "a call has a handful of parts")]
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    Kernel(Source),
    Product(Product),
}

/// As [`LibraryCall::Gemm`].
#[derive(Clone, Debug, PartialEq)]
pub struct Product {
    pub alpha: f64,
    pub accumulate: bool,
    pub a: Place,
    pub b: Place,
    /// `[n]`, dense, of the result's dtype.
    pub bias: Option<Place>,
    pub out: Place,
}

impl Product {
    /// What it reads, then what it writes.
    pub fn places(&self) -> impl Iterator<Item = &Place> {
        [&self.a, &self.b].into_iter().chain(&self.bias).chain([&self.out])
    }
}

/// An operand of a product.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    pub binding: Binding,
    pub dtype: DType,
    pub layout: Layout,
}

/// What a run reports: zeroed before its first step, read after its last. The first index out of range wins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Status {
    /// 0 while all is well; else the number of the [operation](Status::operation) that met a bad index.
    pub failed: u32,
    pub reserved: u32,
    /// The index, the extent that it must be below, and where it stood among the indices.
    pub index: i64,
    pub extent: i64,
    pub position: i64,
}

impl Status {
    /// From memory that the kernels wrote, in the machine's order.
    ///
    /// # Panics
    /// Where there are fewer bytes than it has.
    pub fn from_bytes(bytes: &[u8]) -> Status {
        let eight = |at: usize| *bytes[at..].first_chunk::<8>().expect("a status of 32 bytes");
        let four = |at: usize| *bytes[at..].first_chunk::<4>().expect("a status of 32 bytes");
        Status {
            failed: u32::from_ne_bytes(four(0)),
            reserved: u32::from_ne_bytes(four(4)),
            index: i64::from_ne_bytes(eight(8)),
            extent: i64::from_ne_bytes(eight(16)),
            position: i64::from_ne_bytes(eight(24)),
        }
    }

    /// Sees whether a kernel met a bad index.
    ///
    /// # Errors
    /// [`metal_candle_graph::Error::IndexOutOfRange`]
    pub fn check(&self) -> metal_candle_graph::Result<()> {
        if self.failed == 0 {
            return Ok(());
        }
        Err(metal_candle_graph::Error::IndexOutOfRange {
            op: self.operation().unwrap_or("index"),
            index: self.index,
            extent: self.extent as usize,
            position: self.position as usize,
        })
    }

    /// What can meet a bad index; the first one has number 1.
    const OPERATIONS: [&str; 8] = [
        "gather",
        "index_select",
        "scatter_add",
        "index_add",
        "slice_update",
        "dynamic_slice",
        "linear_cross_entropy",
        "linear_cross_entropy_grad_weight",
    ];

    /// The name of the operation that failed, as errors print it.
    pub fn operation(&self) -> Option<&'static str> {
        let at = (self.failed as usize).checked_sub(1)?;
        Status::OPERATIONS.get(at).copied()
    }

    fn number(call: &str) -> u32 {
        let at = Status::OPERATIONS.iter().position(|name| *name == call);
        1 + at.expect("metal-candle bug: a call that reports nothing") as u32
    }
}

/// The parts of `call` on operands `args` and `outs`. A kernel's text, its name included, depends on dtypes, shapes and
/// layouts only: equal calls have equal kernels.
///
/// # Errors
/// [`RenderError::DType`] for f64 in a language without.
pub fn call(
    call: &LibraryCall,
    args: &[Operand],
    outs: &[Operand],
    dialect: &Dialect,
    limits: &Limits,
) -> Result<Call, RenderError> {
    let missing = |o: &&Operand| o.dtype == DType::F64 && !dialect.has_f64;
    if let Some(Operand { dtype, .. }) = args.iter().chain(outs).find(missing) {
        return Err(RenderError::DType { language: dialect.language, dtype: *dtype });
    }
    let gpu = Gpu { dialect, limits };
    Ok(match *call {
        LibraryCall::Gemm { alpha, accumulate } => {
            gemm::gemm(gpu, args, &outs[0], alpha, accumulate)
        }
        LibraryCall::GemmSum { ref alphas, accumulate } => {
            gemm::sum(args, &outs[0], alphas, accumulate)
        }
        LibraryCall::LowRank { low_scale, scale } => {
            low_rank::low_rank(gpu, args, outs, [low_scale, scale])
        }
        LibraryCall::Rope { layout } => rope::rope(gpu, args, &outs[0], layout),
        LibraryCall::RopeUpdate { layout, dim } => {
            rope::rope_update(gpu, args, &outs[0], layout, dim)
        }
        LibraryCall::Gather { dim } => index::gather(gpu, args, outs, dim),
        LibraryCall::IndexSelect { dim } => index::index_select(gpu, args, outs, dim),
        LibraryCall::ScatterAdd { dim } => index::scatter_add(gpu, args, outs, dim),
        LibraryCall::IndexAdd { dim } => index::index_add(gpu, args, outs, dim),
        LibraryCall::SliceUpdate { dim } => index::slice_update(gpu, args, outs, dim),
        LibraryCall::DynamicSlice { dim } => index::dynamic_slice(gpu, args, outs, dim),
        LibraryCall::CumSum { dim, reverse } => {
            along::cumsum(gpu, &args[0], &outs[0], dim, reverse)
        }
        LibraryCall::ArgReduce { op, dim } => along::arg_reduce(gpu, &args[0], &outs[0], dim, op),
        LibraryCall::QuantGemm { format, rows, cols, transposed } => {
            quant::gemm(gpu, args, &outs[0], format, [rows, cols], transposed)
        }
        LibraryCall::Dequantize { format, rows, cols } => {
            quant::dequantize(gpu, args, outs, format, [rows, cols])
        }
        LibraryCall::LinearCrossEntropy { attrs, losses, grad_x } => {
            cross_entropy::loss(gpu, args, outs, attrs, [losses, grad_x])
        }
        LibraryCall::LinearCrossEntropyGradWeight(attrs) => {
            cross_entropy::grad_weight(gpu, args, &outs[0], attrs)
        }
        // A backend with ranks asks for their sum itself.
        LibraryCall::AllReduce => Call { parts: Vec::new(), workspace_bytes: 0 },
        LibraryCall::Attention { attrs, y, lse } => {
            attention::attention(gpu, &attrs, args, outs, [y, lse])
        }
        LibraryCall::AttentionGrad { attrs, ref wrt } => {
            attention::attention_grad(gpu, &attrs, wrt, args, outs)
        }
    })
}

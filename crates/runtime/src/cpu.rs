//! The CPU: fused kernels are interpreted in tiles, library calls are plain Rust, products our own.
//!
//! ```text
//! executable ─ the walk over a plan's steps
//! results ─ what comes out of it, and the memory for it
//! prepacked ─ weights that are packed once for all runs
//! kernel ─ the tile interpreter
//! view ─── operands as strided views      matrix ─ the same for the GEMM
//! number ─ element types and accumulators math ─── loops over rows
//! cell ─── elements in loops over vectors  halves ─ conversions of 16-bit floats
//! one file for each library call
//! ```

mod arg_reduce;
mod attention;
mod attention_grad;
mod cell;
mod cross_entropy;
mod executable;
mod gemm;
mod halves;
mod index;
mod kernel;
mod low_rank;
mod math;
mod matrix;
mod number;
mod parallel;
mod prepacked;
mod quant;
mod results;
mod rope;
mod scan;
mod scratch;
mod simd;
mod view;

pub(crate) use executable::CpuExecutable;
pub(crate) use prepacked::workspace as prepacked_workspace;
pub(crate) use scratch::workspaces;
pub(crate) use simd::prefetch;

use metal_candle_compiler::LibraryCall;
use metal_candle_graph::Result;
use view::{Arg, Out};

/// Runs a library call, with the team behind this thread if `parallel`.
///
/// # Errors
/// [`metal_candle_graph::Error::IndexOutOfRange`], before anything is written at that index.
fn call(call: &LibraryCall, args: &[Arg], outs: &mut [Out], parallel: bool) -> Result<()> {
    match *call {
        LibraryCall::Gemm { alpha, accumulate } => {
            gemm::call(args, outs, alpha, accumulate, parallel);
        }
        LibraryCall::GemmSum { ref alphas, accumulate } => {
            gemm::sum::call(args, outs, alphas, accumulate, parallel);
        }
        LibraryCall::LowRank { low_scale, scale } => {
            low_rank::call(args, outs, [low_scale, scale], parallel);
        }
        LibraryCall::QuantGemm { format, rows, cols, transposed } => {
            quant::call_gemm(args, outs, format, [rows, cols], transposed, parallel);
        }
        LibraryCall::Dequantize { format, rows, cols } => {
            quant::call_dequantize(args, outs, format, [rows, cols], parallel);
        }
        LibraryCall::Attention { ref attrs, y, lse } => {
            attention::call(args, outs, attrs, [y, lse], parallel);
        }
        LibraryCall::AttentionGrad { ref attrs, ref wrt } => {
            attention_grad::call(args, outs, attrs, wrt, parallel);
        }
        LibraryCall::Rope { layout } => rope::call(args, outs, layout, parallel),
        LibraryCall::LinearCrossEntropy { ref attrs, losses, grad_x } => {
            cross_entropy::call(args, outs, attrs, [losses, grad_x], parallel)?;
        }
        LibraryCall::LinearCrossEntropyGradWeight(ref attrs) => {
            cross_entropy::call_grad_weight(args, outs, attrs, parallel)?;
        }
        LibraryCall::Gather { dim } => index::call_gather(args, outs, dim, parallel)?,
        LibraryCall::IndexSelect { dim } => index::call_index_select(args, outs, dim, parallel)?,
        LibraryCall::ScatterAdd { dim } => index::call_scatter_add(args, outs, dim, parallel)?,
        LibraryCall::IndexAdd { dim } => index::call_index_add(args, outs, dim, parallel)?,
        LibraryCall::RopeUpdate { layout, dim } => {
            rope::call_update(args, outs, layout, dim, parallel)?;
        }
        LibraryCall::SliceUpdate { dim } => index::call_slice_update(args, outs, dim)?,
        LibraryCall::DynamicSlice { dim } => index::call_dynamic_slice(args, outs, dim, parallel)?,
        LibraryCall::CumSum { dim, reverse } => scan::call(args, outs, dim, reverse, parallel),
        LibraryCall::ArgReduce { op, dim } => arg_reduce::call(args, outs, op, dim, parallel),
        // Alone: its own part is the sum.
        LibraryCall::AllReduce => {}
    }
    Ok(())
}

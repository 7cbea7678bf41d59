//! What a step costs: arithmetic and memory traffic, from its shapes alone.

use crate::kernel::{Kernel, KernelOp, Level};
use crate::{LibraryCall, Operand, Work};

/// `(flops, bytes)`: a transcendental counts as one flop; every distinct element of an operand is moved once.
pub(crate) fn of(work: &Work, args: &[Operand], outs: &[Operand]) -> (u64, u64) {
    let flops = match work {
        Work::Kernel(kernel) => kernel_flops(kernel),
        Work::Call(call) => call_flops(call, args, outs),
    };
    (flops, args.iter().chain(outs).map(operand_bytes).sum())
}

/// The bytes that an operand's layout reaches: a repeated dim is read once.
fn operand_bytes(operand: &Operand) -> u64 {
    let layout = &operand.layout;
    let reached =
        |(extent, stride): (&usize, &isize)| if *stride == 0 { 1 } else { *extent as u64 };
    let elements: u64 = match layout.shape.is_empty() {
        true => 0,
        false => layout.shape.dims().iter().zip(layout.strides()).map(reached).product(),
    };
    elements * operand.dtype.size_bytes() as u64
}

fn kernel_flops(kernel: &Kernel) -> u64 {
    let (rows, cols) = (kernel.rows() as u64, kernel.cols() as u64);
    let per = |inst: &crate::kernel::Inst| match (&inst.op, inst.level) {
        (KernelOp::Load(_) | KernelOp::Const(_) | KernelOp::Index(_) | KernelOp::Cast(_), _) => 0,
        (KernelOp::Reduce(..), _) | (_, Level::Col) => rows * cols,
        (_, Level::Row) => rows,
    };
    kernel.tape.iter().map(per).sum()
}

fn call_flops(call: &LibraryCall, args: &[Operand], outs: &[Operand]) -> u64 {
    let len = |o: &Operand| o.layout.shape.len() as u64;
    let dim = |o: &Operand, d: usize| o.layout.shape[d] as u64;
    let out = outs.first().map_or(0, len);
    match call {
        LibraryCall::Gemm { .. } => 2 * out * args[0].layout.shape.last().unwrap_or(0) as u64,
        LibraryCall::GemmSum { .. } => {
            let depths = args.iter().step_by(2).map(|a| a.layout.shape.last().unwrap_or(0) as u64);
            2 * out * depths.sum::<u64>()
        }
        LibraryCall::LowRank { .. } => {
            let rank = args[1].layout.shape.last().unwrap_or(0) as u64;
            2 * rank * (len(&args[0]) + out)
        }
        LibraryCall::QuantGemm { .. } => 2 * out * args[0].layout.shape.last().unwrap_or(0) as u64,
        LibraryCall::Attention { y, .. } => {
            // q kᵀ and p v, every pair counted.
            let of_values = if *y { 2 * out * dim(&args[1], 1) } else { 0 };
            2 * len(&args[0]) * dim(&args[1], 1) + of_values
        }
        LibraryCall::AttentionGrad { .. } => 10 * len(&args[3]) * dim(&args[4], 1),
        LibraryCall::LinearCrossEntropy { attrs, grad_x, .. } => {
            let features = args[0].layout.shape[1];
            let classes = attrs.classes(features, &args[1].layout.shape) as u64;
            2 * len(&args[0]) * classes * (1 + u64::from(*grad_x))
        }
        LibraryCall::LinearCrossEntropyGradWeight(_) => 4 * len(&args[1]) * dim(&args[2], 0),
        LibraryCall::Rope { .. } | LibraryCall::RopeUpdate { .. } => 3 * len(&args[0]),
        LibraryCall::Dequantize { .. } => 2 * out,
        LibraryCall::CumSum { .. } | LibraryCall::ArgReduce { .. } => len(&args[0]),
        LibraryCall::ScatterAdd { .. } | LibraryCall::IndexAdd { .. } => len(&args[1]),
        LibraryCall::AllReduce => out,
        LibraryCall::Gather { .. }
        | LibraryCall::IndexSelect { .. }
        | LibraryCall::SliceUpdate { .. }
        | LibraryCall::DynamicSlice { .. } => 0,
    }
}

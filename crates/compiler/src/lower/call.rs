//! The library call of an operation that is no kernel.

use crate::analysis::Analysis;
use crate::library::LibraryCall;
use metal_candle_graph::{Composite, NodeId, Operation};

/// Of one operation, or of several that share a pass over their inputs.
pub(super) fn library_call(a: &Analysis, ids: &[NodeId]) -> LibraryCall {
    let op = a.node(ids[0]).op;
    match op {
        Operation::ScatterAdd { dim } => LibraryCall::ScatterAdd { dim },
        Operation::IndexAdd { dim } => LibraryCall::IndexAdd { dim },
        Operation::SliceUpdate { dim } => LibraryCall::SliceUpdate { dim },
        Operation::DynamicSlice { dim, .. } => LibraryCall::DynamicSlice { dim },
        Operation::Gather { dim } => LibraryCall::Gather { dim },
        Operation::IndexSelect { dim } => LibraryCall::IndexSelect { dim },
        Operation::CumSum { dim, reverse } => LibraryCall::CumSum { dim, reverse },
        Operation::ArgReduce { op, dim } => LibraryCall::ArgReduce { op, dim },
        Operation::QuantDot { format, rows, cols, transposed } => {
            LibraryCall::QuantGemm { format, rows, cols, transposed }
        }
        Operation::Dequantize { format, rows, cols } => {
            LibraryCall::Dequantize { format, rows, cols }
        }
        Operation::AllReduce => LibraryCall::AllReduce,
        Operation::Composite(c) => composite_call(a, c, ids),
        op => panic!("metal-candle bug: {} is no library call", op.name()),
    }
}

fn composite_call(a: &Analysis, composite: Composite, ids: &[NodeId]) -> LibraryCall {
    let composites = ids.iter().filter_map(|id| match a.node(*id).op {
        Operation::Composite(composite) => Some(composite),
        _ => None,
    });
    let has = |which: fn(&Composite) -> bool| composites.clone().any(|c| which(&c));
    match composite {
        Composite::Rope { layout } => LibraryCall::Rope { layout },
        Composite::Attention(attrs) | Composite::AttentionLogSumExp(attrs) => {
            LibraryCall::Attention {
                attrs,
                y: has(|c| matches!(c, Composite::Attention(_))),
                lse: has(|c| matches!(c, Composite::AttentionLogSumExp(_))),
            }
        }
        Composite::AttentionGrad { attrs, .. } => {
            let wrt = composites.filter_map(|c| match c {
                Composite::AttentionGrad { wrt, .. } => Some(wrt),
                _ => None,
            });
            LibraryCall::AttentionGrad { attrs, wrt: wrt.collect() }
        }
        Composite::LinearCrossEntropy(attrs) | Composite::LinearCrossEntropyGradX(attrs) => {
            LibraryCall::LinearCrossEntropy {
                attrs,
                losses: has(|c| matches!(c, Composite::LinearCrossEntropy(_))),
                grad_x: has(|c| matches!(c, Composite::LinearCrossEntropyGradX(_))),
            }
        }
        Composite::LinearCrossEntropyGradWeight(attrs) => {
            LibraryCall::LinearCrossEntropyGradWeight(attrs)
        }
        c => panic!("metal-candle bug: {} should have been expanded", c.as_str()),
    }
}

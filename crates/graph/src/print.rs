//! A graph, to be read.

use crate::{Composite, ComputationGraph, Operation};
use std::fmt;

impl fmt::Display for ComputationGraph {
    /// `%2 = matmul(%0, %1) : f32[64, 512]`, a line a node, and the outputs last.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for id in self.ids() {
            let node = &self[id];
            let inputs: Vec<String> = node.inputs.iter().map(|i| format!("{i:?}")).collect();
            writeln!(f, "{id:?} = {}({}) : {}", node.op, inputs.join(", "), node.ty)?;
        }
        let outputs: Vec<String> = self.outputs.iter().map(|o| format!("{o:?}")).collect();
        writeln!(f, "outputs: {}", outputs.join(", "))
    }
}

impl fmt::Debug for ComputationGraph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Operation {
    /// The name, and the attributes in braces: `slice{dim=1, 0..4}`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match self {
            Operation::Input(i) => write!(f, "{{{i}}}"),
            Operation::Const(c) => write!(f, "{{{c:?}}}"),
            Operation::Iota { len, .. } => write!(f, "{{{len}}}"),
            Operation::Random { distribution, stream, .. } => {
                write!(f, "{{{distribution}, stream={stream}}}")
            }
            Operation::Cast(dtype) => write!(f, "{{{dtype}}}"),
            Operation::Reduce { dims, .. } => write!(f, "{{dims={dims:?}}}"),
            Operation::ArgReduce { dim, .. }
            | Operation::Flip { dim }
            | Operation::Concat { dim }
            | Operation::Gather { dim }
            | Operation::IndexSelect { dim }
            | Operation::ScatterAdd { dim }
            | Operation::IndexAdd { dim }
            | Operation::SliceUpdate { dim } => write!(f, "{{dim={dim}}}"),
            Operation::CumSum { dim, reverse } => write!(f, "{{dim={dim}, reverse={reverse}}}"),
            Operation::Permute(p) => write!(f, "{{{p:?}}}"),
            Operation::Slice { dim, start, len, step } => {
                write!(f, "{{dim={dim}, {start}..{}", start + len.saturating_sub(1) * step + 1)?;
                if *step != 1 {
                    write!(f, " by {step}")?;
                }
                f.write_str("}")
            }
            Operation::Pad { dim, before, after, value } => {
                write!(f, "{{dim={dim}, {before} before, {after} after, {value:?}}}")
            }
            Operation::DynamicSlice { dim, len } => write!(f, "{{dim={dim}, len={len}}}"),
            Operation::QuantDot { format, rows, cols, transposed } => {
                write!(f, "{{{format:?} {rows}x{cols}, transposed={transposed}}}")
            }
            Operation::Dequantize { format, rows, cols } => {
                write!(f, "{{{format:?} {rows}x{cols}}}")
            }
            Operation::Composite(c) => composite(c, f),
            Operation::Unary(_)
            | Operation::Binary(_)
            | Operation::Select
            | Operation::Reshape(_)
            | Operation::Broadcast(_)
            | Operation::AllReduce
            | Operation::Dot => Ok(()),
        }
    }
}

fn composite(c: &Composite, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    match c {
        Composite::Softmax { dim }
        | Composite::LogSoftmax { dim }
        | Composite::LogSumExp { dim } => {
            write!(f, "{{dim={dim}}}")
        }
        Composite::RmsNorm { eps } | Composite::LayerNorm { eps } => write!(f, "{{eps={eps:?}}}"),
        Composite::Rope { layout } => write!(f, "{{{layout:?}}}"),
        Composite::Attention(a) | Composite::AttentionLogSumExp(a) => {
            write!(f, "{{scale={:?}, causal={}}}", a.scale, a.causal)
        }
        Composite::AttentionGrad { wrt, .. } => write!(f, "{{{wrt:?}}}"),
        Composite::CrossEntropy(a)
        | Composite::LinearCrossEntropy(a)
        | Composite::LinearCrossEntropyGradX(a)
        | Composite::LinearCrossEntropyGradWeight(a) => match (a.ignore_index, a.blocks) {
            (Some(index), Some(format)) => write!(f, "{{ignore={index}, {format:?}}}"),
            (Some(index), None) => write!(f, "{{ignore={index}}}"),
            (None, Some(format)) => write!(f, "{{{format:?}}}"),
            (None, None) => Ok(()),
        },
    }
}

//! Every operation of the vocabulary has vectors, and gradients if it has any.

use crate::manifest;
use metal_candle::graph::composite::{
    AttentionAttrs, AttentionInput, CrossEntropyAttrs, RopeLayout,
};
use metal_candle::graph::{
    ArgReduceOp, BinaryOp, BlockFormat, Composite, DType, Dims, Distribution, Operation,
    Permutation, ReduceOp, Scalar, Shape, UnaryOp,
};

/// What PyTorch has no vectors for, and what holds it to its meaning instead.
const ELSEWHERE: &[(&str, &str)] = &[
    ("input", "every case has inputs"),
    ("const", "every case of clamp, pad and affine has constants"),
    ("iota", "the positions of attention, the classes of cross_entropy"),
    ("random", "the known answers of Philox 4x32-10, in src/lazy/ops/tests.rs"),
    ("quant_matmul", "Candle's own blocks, in quantised.rs"),
    ("dequantize", "Candle's own blocks, in quantised.rs"),
    ("all_reduce", "two processes and one, in ranks.rs"),
    ("attention_logsumexp", "the gradients of attention, which read it"),
    ("attention_grad", "the gradients of attention"),
    ("linear_cross_entropy_grad_x", "the gradients of linear_cross_entropy"),
    ("linear_cross_entropy_grad_weight", "the gradients of linear_cross_entropy"),
];

/// What has no gradient, because a value or an input of it is an integer.
const WITHOUT_GRADIENT: &[&str] = &["eq", "ne", "lt", "le", "gt", "ge", "argmax", "argmin"];

/// One of each operation. A new variant stops the build in [`is_listed`].
fn vocabulary() -> Vec<Operation> {
    let (dim, zero, shape) = (0, Scalar::from_f64(DType::F64, 0.0), Shape::SCALAR);
    let (dtype, len) = (DType::F32, 1);
    let permutation = Permutation::new(&[]).unwrap();
    let (format, rows, cols) = (BlockFormat::Q8_0, 1, 32);
    let random = Distribution::Uniform;
    let mut all = vec![
        Operation::Input(0),
        Operation::Const(zero),
        Operation::Iota { len, dtype },
        Operation::Random { distribution: random, stream: 0, dtype, shape },
        Operation::Select,
        Operation::Cast(dtype),
        Operation::CumSum { dim, reverse: false },
        Operation::Reshape(shape),
        Operation::Permute(permutation),
        Operation::Broadcast(shape),
        Operation::Slice { dim, start: 0, len, step: 1 },
        Operation::Flip { dim },
        Operation::Pad { dim, before: 0, after: 0, value: zero },
        Operation::Concat { dim },
        Operation::Gather { dim },
        Operation::IndexSelect { dim },
        Operation::ScatterAdd { dim },
        Operation::IndexAdd { dim },
        Operation::SliceUpdate { dim },
        Operation::DynamicSlice { dim, len },
        Operation::Dot,
        Operation::QuantDot { format, rows, cols, transposed: false },
        Operation::Dequantize { format, rows, cols },
        Operation::AllReduce,
    ];
    all.extend(UnaryOp::ALL.iter().map(|op| Operation::Unary(*op)));
    all.extend(BinaryOp::ALL.iter().map(|op| Operation::Binary(*op)));
    let dims = Dims::new([0]);
    all.extend(ReduceOp::ALL.iter().map(|op| Operation::Reduce { op: *op, dims }));
    all.extend(ArgReduceOp::ALL.iter().map(|op| Operation::ArgReduce { op: *op, dim }));
    all.extend(composites().map(Operation::Composite));
    all
}

fn composites() -> [Composite; 14] {
    let (dim, number) = (0, Scalar::from_f64(DType::F64, 0.0));
    let attrs = AttentionAttrs {
        scale: number,
        causal: false,
        window: None,
        mask: false,
        segments: false,
        offset: false,
    };
    let loss = CrossEntropyAttrs { ignore_index: None, label_smoothing: number, blocks: None };
    [
        Composite::Softmax { dim },
        Composite::LogSoftmax { dim },
        Composite::LogSumExp { dim },
        Composite::RmsNorm { eps: number },
        Composite::LayerNorm { eps: number },
        Composite::Rope { layout: RopeLayout::Half },
        Composite::Rope { layout: RopeLayout::Interleaved },
        Composite::Attention(attrs),
        Composite::AttentionLogSumExp(attrs),
        Composite::AttentionGrad { attrs, wrt: AttentionInput::Query },
        Composite::CrossEntropy(loss),
        Composite::LinearCrossEntropy(loss),
        Composite::LinearCrossEntropyGradX(loss),
        Composite::LinearCrossEntropyGradWeight(loss),
    ]
}

/// Written without `_`, so that whoever adds an operation comes by and adds it to the vocabulary.
fn is_listed(op: &Operation) -> bool {
    match op {
        Operation::Input(_)
        | Operation::Const(_)
        | Operation::Iota { .. }
        | Operation::Random { .. }
        | Operation::Unary(_)
        | Operation::Binary(_)
        | Operation::Select
        | Operation::Cast(_)
        | Operation::Reduce { .. }
        | Operation::ArgReduce { .. }
        | Operation::CumSum { .. }
        | Operation::Reshape(_)
        | Operation::Permute(_)
        | Operation::Broadcast(_)
        | Operation::Slice { .. }
        | Operation::Flip { .. }
        | Operation::Pad { .. }
        | Operation::Concat { .. }
        | Operation::Gather { .. }
        | Operation::IndexSelect { .. }
        | Operation::ScatterAdd { .. }
        | Operation::IndexAdd { .. }
        | Operation::SliceUpdate { .. }
        | Operation::DynamicSlice { .. }
        | Operation::Dot
        | Operation::QuantDot { .. }
        | Operation::Dequantize { .. }
        | Operation::AllReduce
        | Operation::Composite(
            Composite::Softmax { .. }
            | Composite::LogSoftmax { .. }
            | Composite::LogSumExp { .. }
            | Composite::RmsNorm { .. }
            | Composite::LayerNorm { .. }
            | Composite::Rope { .. }
            | Composite::Attention(_)
            | Composite::AttentionLogSumExp(_)
            | Composite::AttentionGrad { .. }
            | Composite::CrossEntropy(_)
            | Composite::LinearCrossEntropy(_)
            | Composite::LinearCrossEntropyGradX(_)
            | Composite::LinearCrossEntropyGradWeight(_),
        ) => true,
    }
}

#[test]
fn every_operation_has_vectors_and_gradients() {
    let cases = manifest();
    let elsewhere = |name: &str| ELSEWHERE.iter().any(|(op, _)| *op == name);
    let mut missing = Vec::new();
    for op in vocabulary() {
        assert!(is_listed(&op));
        let name = op.name();
        let mut of_op = cases.iter().filter(|case| case.op == name).peekable();
        match (of_op.peek().is_some(), elsewhere(name)) {
            (false, false) => missing.push(format!("{name} has no case")),
            (true, true) => missing.push(format!("{name} has cases: it is not tested elsewhere")),
            (true, false) => {
                let differentiated = of_op.any(|case| !case.grads.is_empty());
                if differentiated == WITHOUT_GRADIENT.contains(&name) {
                    missing.push(format!("{name} has gradients: {differentiated}"));
                }
            }
            (false, true) => {}
        }
    }
    assert!(missing.is_empty(), "{}", missing.join("\n"));
}

#[test]
fn every_layout_of_rope_has_vectors() {
    let cases = manifest();
    for layout in ["half", "interleaved"] {
        assert!(cases.iter().any(|c| c.op == "rope" && c.attrs["layout"] == layout), "{layout}");
    }
}

//! Graphs of real work, to be planned.
#![allow(dead_code, reason = "each test file uses some of them")]

use metal_candle_graph::autodiff::{self, Trainable};
use metal_candle_graph::composite::CrossEntropyAttrs;
use metal_candle_graph::*;

pub(crate) fn f32(dims: &[usize]) -> TensorType {
    TensorType::new(DType::F32, Shape::new(dims).unwrap())
}

pub(crate) fn composite(g: &mut ComputationGraph, c: Composite, inputs: &[NodeId]) -> NodeId {
    g.add(Operation::Composite(c), inputs).unwrap()
}

pub(crate) fn eps() -> Scalar {
    Scalar::from_f64(DType::F64, 1e-6)
}

/// The sum of everything, rank 0.
pub(crate) fn total(g: &mut ComputationGraph, x: NodeId) -> NodeId {
    let rank = g.shape(x).rank();
    let sum = g.sum(x, Dims::new(0..rank)).unwrap();
    g.reshape(sum, Shape::SCALAR).unwrap()
}

pub(crate) fn gradients(g: &mut ComputationGraph, loss: NodeId, wrt: &[NodeId]) -> Vec<NodeId> {
    let trainable = |node: &NodeId| Trainable { node: *node, name: format!("{node:?}") };
    let wrt: Vec<Trainable> = wrt.iter().map(trainable).collect();
    autodiff::gradients(g, loss, &wrt).unwrap()
}

pub(crate) fn softmax() -> ComputationGraph {
    let mut g = ComputationGraph::new();
    let x = g.input(0, f32(&[64, 512]));
    let y = composite(&mut g, Composite::Softmax { dim: 1 }, &[x]);
    g.outputs = vec![y];
    g
}

/// The norm of x, and the gradients of x and the weight under a given cotangent.
pub(crate) fn rms_norm_with_gradients() -> ComputationGraph {
    let mut g = ComputationGraph::new();
    let (x, w, c) =
        (g.input(0, f32(&[64, 512])), g.input(1, f32(&[512])), g.input(2, f32(&[64, 512])));
    let y = composite(&mut g, Composite::RmsNorm { eps: eps() }, &[x, w]);
    let weighted = g.binary(BinaryOp::Mul, y, c).unwrap();
    let loss = total(&mut g, weighted);
    let grads = gradients(&mut g, loss, &[x, w]);
    g.outputs = [vec![y], grads].concat();
    g
}

pub(crate) fn lora(g: &mut ComputationGraph, x: NodeId) -> [NodeId; 3] {
    let (w, a, b) =
        (g.input(1, f32(&[512, 512])), g.input(2, f32(&[512, 8])), g.input(3, f32(&[8, 512])));
    let base = g.add(Operation::Dot, &[x, w]).unwrap();
    let low = g.add(Operation::Dot, &[x, a]).unwrap();
    let branch = g.add(Operation::Dot, &[low, b]).unwrap();
    let scaled = g.binary_scalar(BinaryOp::Mul, branch, 2.0).unwrap();
    [g.binary(BinaryOp::Add, base, scaled).unwrap(), a, b]
}

pub(crate) fn lora_forward() -> ComputationGraph {
    let mut g = ComputationGraph::new();
    let x = g.input(0, f32(&[64, 512]));
    let [y, ..] = lora(&mut g, x);
    g.outputs = vec![y];
    g
}

/// The same on a base in blocks.
pub(crate) fn quantised_lora_forward() -> ComputationGraph {
    let mut g = ComputationGraph::new();
    let (format, rows, cols) = (BlockFormat::Q4_1, 512, 512);
    let bytes = Shape::new(&[rows * format.bytes_for(cols).unwrap()]).unwrap();
    let (x, w) = (g.input(0, f32(&[64, 512])), g.input(1, TensorType::new(DType::U8, bytes)));
    let (a, b) = (g.input(2, f32(&[512, 8])), g.input(3, f32(&[8, 512])));
    let op = Operation::QuantDot { format, rows, cols, transposed: false };
    let base = g.add(op, &[x, w]).unwrap();
    let low = g.add(Operation::Dot, &[x, a]).unwrap();
    let branch = g.add(Operation::Dot, &[low, b]).unwrap();
    let scaled = g.binary_scalar(BinaryOp::Mul, branch, 2.0).unwrap();
    g.outputs = vec![g.binary(BinaryOp::Add, base, scaled).unwrap()];
    g
}

/// LoRA forward and backward, and AdamW on B with its moments (inputs 3, 4, 5: to be donated).
pub(crate) fn lora_step() -> ComputationGraph {
    use BinaryOp::*;
    let mut g = ComputationGraph::new();
    let x = g.input(0, f32(&[64, 512]));
    let [y, a, b] = lora(&mut g, x);
    let z = g.unary(UnaryOp::Silu, y).unwrap();
    let loss = total(&mut g, z);
    let grads = gradients(&mut g, loss, &[x, a, b]);
    let (m, v) = (g.input(4, f32(&[8, 512])), g.input(5, f32(&[8, 512])));
    let decay = |g: &mut ComputationGraph, old, new, beta: f64| {
        let old = g.binary_scalar(Mul, old, beta).unwrap();
        let new = g.binary_scalar(Mul, new, 1.0 - beta).unwrap();
        g.binary(Add, old, new).unwrap()
    };
    let mean = decay(&mut g, m, grads[2], 0.9);
    let squared = g.unary(UnaryOp::Sqr, grads[2]).unwrap();
    let square = decay(&mut g, v, squared, 0.99);
    let root = g.unary(UnaryOp::Sqrt, square).unwrap();
    let root = g.binary_scalar(Add, root, 1e-8).unwrap();
    let step = g.binary(Div, mean, root).unwrap();
    let step = g.binary_scalar(Mul, step, 1e-3).unwrap();
    let b = g.binary(Sub, b, step).unwrap();
    g.outputs = vec![loss, grads[0], grads[1], b, mean, square];
    g
}

/// SwiGLU and cross-entropy, forward and backward to x.
pub(crate) fn swiglu_with_loss() -> ComputationGraph {
    let mut g = ComputationGraph::new();
    let x = g.input(0, f32(&[64, 512]));
    let (gate, up) = (g.input(1, f32(&[512, 1024])), g.input(2, f32(&[512, 1024])));
    let down = g.input(3, f32(&[1024, 300]));
    let labels = g.input(4, TensorType::new(DType::I64, Shape::new(&[64]).unwrap()));
    let gate = g.add(Operation::Dot, &[x, gate]).unwrap();
    let up = g.add(Operation::Dot, &[x, up]).unwrap();
    let act = g.unary(UnaryOp::Silu, gate).unwrap();
    let inner = g.binary(BinaryOp::Mul, act, up).unwrap();
    let logits = g.add(Operation::Dot, &[inner, down]).unwrap();
    let attrs = CrossEntropyAttrs {
        ignore_index: Some(-100),
        label_smoothing: Scalar::from_f64(DType::F64, 0.0),
        blocks: None,
    };
    let losses = composite(&mut g, Composite::CrossEntropy(attrs), &[logits, labels]);
    let loss = total(&mut g, losses);
    let grads = gradients(&mut g, loss, &[x]);
    g.outputs = [vec![loss], grads].concat();
    g
}

/// SwiGLU with a LoRA branch on the way down, forward and backward to x, A and B.
pub(crate) fn swiglu_lora_step() -> ComputationGraph {
    let mut g = ComputationGraph::new();
    let x = g.input(0, f32(&[64, 512]));
    let (gate, up) = (g.input(1, f32(&[512, 1024])), g.input(2, f32(&[512, 1024])));
    let down = g.input(3, f32(&[1024, 512]));
    let (a, b) = (g.input(4, f32(&[1024, 8])), g.input(5, f32(&[8, 512])));
    let gate = g.add(Operation::Dot, &[x, gate]).unwrap();
    let up = g.add(Operation::Dot, &[x, up]).unwrap();
    let act = g.unary(UnaryOp::Silu, gate).unwrap();
    let inner = g.binary(BinaryOp::Mul, act, up).unwrap();
    let base = g.add(Operation::Dot, &[inner, down]).unwrap();
    let low = g.add(Operation::Dot, &[inner, a]).unwrap();
    let branch = g.add(Operation::Dot, &[low, b]).unwrap();
    let y = g.binary(BinaryOp::Add, base, branch).unwrap();
    let y = g.unary(UnaryOp::Tanh, y).unwrap();
    let loss = total(&mut g, y);
    let grads = gradients(&mut g, loss, &[x, a, b]);
    g.outputs = [vec![loss], grads].concat();
    g
}

/// A cache updated in place, then read.
pub(crate) fn cache_update() -> ComputationGraph {
    let mut g = ComputationGraph::new();
    let cache = g.input(0, f32(&[2, 16, 4]));
    let new = g.input(1, f32(&[2, 1, 4]));
    let at = g.input(2, TensorType::new(DType::I64, Shape::SCALAR));
    let cache = g.add(Operation::SliceUpdate { dim: 1 }, &[cache, new, at]).unwrap();
    let sum = g.sum(cache, Dims::new([1])).unwrap();
    g.outputs = vec![sum, cache];
    g
}

/// `n` additions of one vector, one after the other.
pub(crate) fn chain(n: usize) -> ComputationGraph {
    let mut g = ComputationGraph::new();
    let (mut x, c) = (g.input(0, f32(&[8])), g.input(1, f32(&[8])));
    for _ in 0..n {
        x = g.binary(BinaryOp::Add, x, c).unwrap();
    }
    g.outputs = vec![x];
    g
}

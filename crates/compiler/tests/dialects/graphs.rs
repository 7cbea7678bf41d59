//! Graphs of real work, in the shapes that a renderer treats each in its own way.

use crate::support::{self, composite, eps, gradients, total};
use metal_candle_graph::composite::CrossEntropyAttrs;
use metal_candle_graph::*;

type Named = (&'static str, ComputationGraph, Vec<bool>);

pub(crate) fn all() -> Vec<Named> {
    let plain = |name, graph| (name, graph, Vec::new());
    vec![
        plain("softmax", support::softmax()),
        plain("rms_norm and its gradients", support::rms_norm_with_gradients()),
        plain("a LoRA step", support::lora_step()),
        ("a LoRA step in place", support::lora_step(), vec![false, false, false, true, true, true]),
        plain("swiglu and cross-entropy", support::swiglu_with_loss()),
        ("a cache", support::cache_update(), vec![true]),
        plain("a cache that is copied", support::cache_update()),
        plain("a chain", support::chain(40)),
        plain("softmax of ragged rows", softmax_of(DType::F16, &[7, 301])),
        plain("softmax of long rows", softmax_of(DType::F32, &[3, 5000])),
        plain("softmax of long ragged rows", softmax_of(DType::BF16, &[2, 3001])),
        plain("softmax of a vocabulary", softmax_of(DType::F32, &[2, 49_152])),
        plain("softmax in f64", softmax_of(DType::F64, &[5, 2048])),
        plain("layer_norm in bf16", layer_norm(DType::BF16, &[12, 640])),
        plain("layer_norm in f32", layer_norm(DType::F32, &[5, 2048])),
        plain("cross-entropy with smoothing", cross_entropy(&[20, 1000])),
        plain("cross-entropy of a vocabulary", cross_entropy(&[2, 20_000])),
        ("AdamW in f32", adamw(DType::F32, &[64, 96]), vec![true, true, true]),
        ("AdamW in bf16", adamw(DType::BF16, &[33, 24]), vec![true, true, true]),
        plain("sums over columns", column_sums()),
        plain("transposed and flipped", moved()),
        plain("dropout", dropout()),
        plain("whole numbers", integers()),
        plain("a number", number()),
    ]
}

fn ty(dtype: DType, dims: &[usize]) -> TensorType {
    TensorType::new(dtype, Shape::new(dims).unwrap())
}

pub(crate) fn softmax_of(dtype: DType, dims: &[usize]) -> ComputationGraph {
    let mut g = ComputationGraph::new();
    let x = g.input(0, ty(dtype, dims));
    g.outputs = vec![
        composite(&mut g, Composite::Softmax { dim: 1 }, &[x]),
        composite(&mut g, Composite::LogSoftmax { dim: 1 }, &[x]),
    ];
    g
}

fn layer_norm(dtype: DType, dims: &[usize]) -> ComputationGraph {
    let mut g = ComputationGraph::new();
    let (x, c) = (g.input(0, ty(dtype, dims)), g.input(3, ty(dtype, dims)));
    let (w, b) = (g.input(1, ty(dtype, &dims[1..])), g.input(2, ty(dtype, &dims[1..])));
    let y = composite(&mut g, Composite::LayerNorm { eps: eps() }, &[x, w, b]);
    let weighted = g.binary(BinaryOp::Mul, y, c).unwrap();
    let loss = total(&mut g, weighted);
    let grads = gradients(&mut g, loss, &[x, w, b]);
    g.outputs = [vec![y], grads].concat();
    g
}

fn cross_entropy(dims: &[usize]) -> ComputationGraph {
    let mut g = ComputationGraph::new();
    let logits = g.input(0, ty(DType::F32, dims));
    let labels = g.input(1, ty(DType::I64, &dims[..1]));
    let attrs = CrossEntropyAttrs {
        ignore_index: Some(2),
        label_smoothing: Scalar::from_f64(DType::F64, 0.1),
        blocks: None,
    };
    let losses = composite(&mut g, Composite::CrossEntropy(attrs), &[logits, labels]);
    let loss = total(&mut g, losses);
    let grads = gradients(&mut g, loss, &[logits]);
    g.outputs = [vec![loss], grads].concat();
    g
}

/// As the trainer's: a rate and two corrections per step, and nothing changed where `apply` is 0. The parameter (0) and its
/// moments (1, 2) come first.
fn adamw(dtype: DType, dims: &[usize]) -> ComputationGraph {
    use BinaryOp::*;
    let mut g = ComputationGraph::new();
    let stored = g.input(0, ty(dtype, dims));
    let [old_mean, old_square, gradient] = [1, 2, 3].map(|i| g.input(i, ty(DType::F32, dims)));
    let [rate, correction1, correction2] = [4, 5, 6].map(|i| g.input(i, ty(DType::F32, &[])));
    let apply = g.input(7, ty(DType::U8, &[]));
    let full = |g: &mut ComputationGraph, x| g.broadcast_to(x, Shape::new(dims).unwrap()).unwrap();
    let [rate, correction1, correction2, apply] =
        [rate, correction1, correction2, apply].map(|x| full(&mut g, x));
    let decay = |g: &mut ComputationGraph, old, new, beta: f64| {
        let old = g.binary_scalar(Mul, old, beta).unwrap();
        let new = g.binary_scalar(Mul, new, 1.0 - beta).unwrap();
        g.binary(Add, old, new).unwrap()
    };
    let parameter = g.cast(stored, DType::F32).unwrap();
    let mean = decay(&mut g, old_mean, gradient, 0.9);
    let squared = g.unary(UnaryOp::Sqr, gradient).unwrap();
    let positive = g.unary(UnaryOp::Abs, old_square).unwrap();
    let square = decay(&mut g, positive, squared, 0.999);
    let corrected = g.unary(UnaryOp::Abs, correction2).unwrap();
    let corrected = g.binary(Mul, square, corrected).unwrap();
    let root = g.unary(UnaryOp::Sqrt, corrected).unwrap();
    let root = g.binary_scalar(Add, root, 1e-2).unwrap();
    let corrected = g.binary(Mul, mean, correction1).unwrap();
    let direction = g.binary(Div, corrected, root).unwrap();
    let decayed = g.binary_scalar(Mul, parameter, 0.01).unwrap();
    let direction = g.binary(Add, direction, decayed).unwrap();
    let step = g.binary(Mul, direction, rate).unwrap();
    let updated = g.binary(Sub, parameter, step).unwrap();
    let updated = g.cast(updated, dtype).unwrap();
    let chosen = [(updated, stored), (mean, old_mean), (square, old_square)]
        .map(|(new, old)| g.add(Operation::Select, &[apply, new, old]).unwrap());
    g.outputs = chosen.to_vec();
    g
}

/// Reductions over an outer dim, with and without several threads a row.
fn column_sums() -> ComputationGraph {
    let mut g = ComputationGraph::new();
    let mut outputs = Vec::new();
    for (i, dims) in [[300, 70], [6, 500], [40, 33], [5000, 17]].iter().enumerate() {
        let x = g.input(i as u32, ty(DType::F32, dims));
        for op in ReduceOp::ALL {
            outputs.push(g.reduce(*op, x, Dims::new([0])).unwrap());
        }
        // Two passes, and a column store.
        outputs.push(composite(&mut g, Composite::Softmax { dim: 0 }, &[x]));
    }
    g.outputs = outputs;
    g
}

fn moved() -> ComputationGraph {
    let mut g = ComputationGraph::new();
    let x = g.input(0, ty(DType::F32, &[12, 40, 8]));
    let y = g.permute(x, &[2, 0, 1]).unwrap();
    let z = g.add(Operation::Flip { dim: 1 }, &[y]).unwrap();
    let s = g.add(Operation::Slice { dim: 2, start: 3, len: 30, step: 1 }, &[z]).unwrap();
    let t = g.unary(UnaryOp::Tanh, z).unwrap();
    let u = g.unary(UnaryOp::Exp, s).unwrap();
    let row = g.sum(z, Dims::new([0, 2])).unwrap();
    g.outputs = vec![y, z, s, t, u, row];
    g
}

fn dropout() -> ComputationGraph {
    let mut g = ComputationGraph::new();
    let shape = Shape::new(&[17, 64]).unwrap();
    let (x, seed) = (g.input(0, ty(DType::F32, &[17, 64])), g.input(1, ty(DType::I64, &[])));
    let mut draw = |distribution, stream, dtype| {
        g.add(Operation::Random { distribution, stream, dtype, shape }, &[seed]).unwrap()
    };
    let uniform = draw(Distribution::Uniform, 5, DType::F32);
    let normals =
        [DType::F32, DType::BF16, DType::F64].map(|dtype| draw(Distribution::Normal, 6, dtype));
    let kept = g.binary_scalar(BinaryOp::Ge, uniform, 0.1).unwrap();
    let none = g.scalar_like(x, 0.0);
    let none = g.broadcast_to(none, shape).unwrap();
    let dropped = g.add(Operation::Select, &[kept, x, none]).unwrap();
    g.outputs = [vec![uniform, dropped], normals.to_vec()].concat();
    g
}

fn integers() -> ComputationGraph {
    let mut g = ComputationGraph::new();
    let mut outputs = Vec::new();
    for (i, dtype) in (0..).zip([DType::U8, DType::U32, DType::I64]) {
        let x = g.input(i, ty(dtype, &[9, 48]));
        let positions = g.add(Operation::Iota { len: 48, dtype }, &[]).unwrap();
        let positions = g.broadcast_to(positions, g.shape(x)).unwrap();
        let y = g.binary_scalar(BinaryOp::Sub, x, 3.0).unwrap();
        let y = g.binary(BinaryOp::Mul, y, positions).unwrap();
        let z = g.binary_scalar(BinaryOp::Div, y, 3.0).unwrap();
        let power = g.binary(BinaryOp::Pow, x, x).unwrap();
        let least = g.reduce(ReduceOp::Min, y, Dims::new([1])).unwrap();
        let sum = g.sum(y, Dims::new([0])).unwrap();
        let float = g.cast(z, DType::F32).unwrap();
        let negative = g.unary(UnaryOp::Neg, float).unwrap();
        let back = g.cast(negative, dtype).unwrap();
        outputs.extend([z, power, least, sum, float, back]);
    }
    g.outputs = outputs;
    g
}

fn number() -> ComputationGraph {
    let mut g = ComputationGraph::new();
    let x = g.input(0, ty(DType::F32, &[]));
    let y = g.unary(UnaryOp::Exp, x).unwrap();
    let infinity = g.scalar_like(x, f64::NEG_INFINITY);
    let z = g.binary(BinaryOp::Maximum, y, infinity).unwrap();
    g.outputs = vec![z];
    g
}

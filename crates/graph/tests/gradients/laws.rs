//! What is visited, what is refused, and what is shared.

use crate::check::{self, check, float};
use metal_candle_graph::autodiff::{Trainable, gradients};
use metal_candle_graph::composite::{AttentionAttrs, CrossEntropyAttrs, RopeLayout};
use metal_candle_graph::oracle::{self, Value};
use metal_candle_graph::{
    ArgReduceOp, BinaryOp, Composite, ComputationGraph, DType, Dims, Error, NodeId, Operation,
    ReduceOp, Result, Scalar, Shape, TensorType, UnaryOp, pass,
};

fn ty(dtype: DType, dims: &[usize]) -> TensorType {
    TensorType::new(dtype, Shape::new(dims).unwrap())
}

fn trainable(node: NodeId, name: &str) -> Trainable {
    Trainable { node, name: name.to_string() }
}

fn sum_all(g: &mut ComputationGraph, x: NodeId) -> NodeId {
    let rank = g.shape(x).rank();
    g.sum(x, Dims::new(0..rank)).unwrap()
}

/// The loss of `depth` square layers and the weights of them, first to last.
fn layers(g: &mut ComputationGraph, depth: u32) -> (NodeId, Vec<NodeId>) {
    let mut x = g.input(0, ty(DType::F32, &[2, 8]));
    let weights: Vec<NodeId> = (1..=depth).map(|i| g.input(i, ty(DType::F32, &[8, 8]))).collect();
    for w in &weights {
        x = g.add(Operation::Dot, &[x, *w]).unwrap();
        x = g.unary(UnaryOp::Tanh, x).unwrap();
    }
    (sum_all(g, x), weights)
}

fn nodes_added(depth: u32, wrt: impl Fn(&[NodeId]) -> NodeId) -> usize {
    let mut g = ComputationGraph::new();
    let (loss, weights) = layers(&mut g, depth);
    let before = g.len();
    gradients(&mut g, loss, &[trainable(wrt(&weights), "w")]).unwrap();
    g.len() - before
}

#[test]
fn frozen_inputs_cost_nothing() {
    // The last layer alone costs the same, however many frozen ones stand before it.
    let last = |w: &[NodeId]| w[w.len() - 1];
    assert_eq!(nodes_added(1, last), nodes_added(50, last));
    // Of a layer on the path only the activation is differentiated: two products for the first
    // weight of three, and one for each later activation.
    let mut g = ComputationGraph::new();
    let (loss, weights) = layers(&mut g, 3);
    let before = g.len();
    gradients(&mut g, loss, &[trainable(weights[0], "w")]).unwrap();
    let products = g.nodes()[before..].iter().filter(|n| n.op == Operation::Dot).count();
    assert_eq!(products, 3);
}

#[test]
fn a_blocked_trainable_is_an_error_that_names_the_op_and_the_path() {
    let mut g = ComputationGraph::new();
    let x = g.input(0, ty(DType::F32, &[2, 3]));
    let w = g.input(1, ty(DType::F32, &[3, 4]));
    let y = g.add(Operation::Dot, &[x, w]).unwrap();
    let at = g.add(Operation::ArgReduce { op: ArgReduceOp::ArgMax, dim: 1 }, &[y]).unwrap();
    let at = g.cast(at, DType::F32).unwrap();
    let loss = sum_all(&mut g, at);
    let error = gradients(&mut g, loss, &[trainable(w, "w")]).unwrap_err();
    let want = Error::NotDifferentiable {
        name: "w".to_string(),
        op: "argmax".to_string(),
        path: "w -> matmul -> argmax".to_string(),
    };
    assert_eq!(error, want);
    // One open path is enough.
    let open = sum_all(&mut g, y);
    let both = g.binary(BinaryOp::Add, loss, open).unwrap();
    gradients(&mut g, both, &[trainable(w, "w")]).unwrap();
}

#[test]
fn every_op_without_a_gradient_is_named() {
    type Build = fn(&mut ComputationGraph, NodeId) -> Result<NodeId>;
    let cases: [(&str, Build); 5] = [
        ("gt", |g, x| g.binary_scalar(BinaryOp::Gt, x, 0.0)),
        ("argmin", |g, x| g.add(Operation::ArgReduce { op: ArgReduceOp::ArgMin, dim: 0 }, &[x])),
        ("to_dtype", |g, x| g.cast(x, DType::I64)),
        ("rope", |g, x| {
            let y = g.constant(Scalar::from_f64(DType::F32, 1.0));
            let y = g.broadcast_to(y, Shape::new(&[4])?)?;
            let rope = Composite::Rope { layout: RopeLayout::Half };
            let half = g.slice(x, 0, 0, 2)?;
            g.add(Operation::Composite(rope), &[y, half, half])
        }),
        ("eq", |g, x| {
            let hit = g.binary_scalar(BinaryOp::Eq, x, 0.0)?;
            let one = g.constant(Scalar::from_f64(DType::F32, 1.0));
            let zero = g.constant(Scalar::from_f64(DType::F32, 0.0));
            g.select(hit, one, zero)
        }),
    ];
    for (name, build) in cases {
        let mut g = ComputationGraph::new();
        let x = g.input(0, ty(DType::F32, &[4]));
        let y = build(&mut g, x).unwrap();
        let y = g.cast(y, DType::F32).unwrap();
        let loss = sum_all(&mut g, y);
        match gradients(&mut g, loss, &[trainable(x, "x")]) {
            Err(Error::NotDifferentiable { op, .. }) => assert_eq!(op, name),
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn a_long_blocked_path_is_printed_by_its_ends() {
    let mut g = ComputationGraph::new();
    let x = g.input(0, ty(DType::F32, &[1]));
    let mut y = x;
    for _ in 0..1000 {
        y = g.unary(UnaryOp::Sin, y).unwrap();
    }
    let y = g.cast(y, DType::I64).unwrap();
    let loss = g.cast(y, DType::F32).unwrap();
    let error = gradients(&mut g, loss, &[trainable(x, "x")]).unwrap_err();
    let Error::NotDifferentiable { path, .. } = error else { panic!("{error}") };
    let ends = "x -> sin -> sin -> sin -> sin -> sin -> (990 more) -> \
                sin -> sin -> sin -> sin -> sin -> to_dtype";
    assert_eq!(path, ends);
}

#[test]
fn an_unused_trainable_is_an_error() {
    let mut g = ComputationGraph::new();
    let x = g.input(0, ty(DType::F32, &[2]));
    let w = g.input(1, ty(DType::F32, &[2]));
    let loss = sum_all(&mut g, x);
    // What comes after the loss does not reach it either.
    let late = g.unary(UnaryOp::Neg, loss).unwrap();
    for node in [w, late] {
        let error = gradients(&mut g, loss, &[trainable(x, "x"), trainable(node, "w")]);
        assert_eq!(error, Err(Error::Unused { name: "w".to_string() }));
    }
}

#[test]
fn an_integer_trainable_is_an_error() {
    let mut g = ComputationGraph::new();
    let i = g.input(0, ty(DType::U32, &[]));
    let loss = g.cast(i, DType::F32).unwrap();
    let error = gradients(&mut g, loss, &[trainable(i, "i")]);
    let want = Error::IntegerTrainable { name: "i".to_string(), dtype: DType::U32 };
    assert_eq!(error, Err(want));
}

#[test]
fn a_loss_is_one_float() {
    let mut g = ComputationGraph::new();
    for bad in [ty(DType::F32, &[2]), ty(DType::F32, &[0]), ty(DType::I64, &[])] {
        let x = g.input(0, bad);
        assert_eq!(gradients(&mut g, x, &[]), Err(Error::Loss { got: bad }));
    }
    // A loss is its own trainable.
    let x = g.input(1, ty(DType::F64, &[1, 1]));
    g.outputs = gradients(&mut g, x, &[trainable(x, "x")]).unwrap();
    let out = oracle::evaluate(&g, &[one(), one()]).unwrap();
    assert_eq!((out[0].ty, out[0].data[0]), (ty(DType::F64, &[1, 1]), 1.0));
}

fn one() -> Value {
    Value { ty: ty(DType::F64, &[1, 1]), data: vec![5.0] }
}

/// Both see everything behind them: d(x² · 3)/d(x²) = 3, d(x² · 3)/dx = 6x.
#[test]
fn gradients_pass_through_trainables() {
    let mut g = ComputationGraph::new();
    let x = g.input(0, ty(DType::F64, &[1, 1]));
    let square = g.unary(UnaryOp::Sqr, x).unwrap();
    let loss = g.binary_scalar(BinaryOp::Mul, square, 3.0).unwrap();
    let wrt = [trainable(square, "square"), trainable(x, "x"), trainable(x, "x again")];
    g.outputs = gradients(&mut g, loss, &wrt).unwrap();
    let got: Vec<f64> = oracle::evaluate(&g, &[one()]).unwrap().iter().map(|v| v.data[0]).collect();
    assert_eq!(got, [3.0, 30.0, 30.0]);
}

#[test]
fn a_step_function_has_the_gradient_zero() {
    check("floor", &[float(&[3])], |g, x| g.unary(UnaryOp::Floor, x[0]));
    // And takes part in a sum with what has one.
    check("floor and sin", &[float(&[3])], |g, x| {
        let (steps, wave) = (g.unary(UnaryOp::Round, x[0])?, g.unary(UnaryOp::Sin, x[0])?);
        g.binary(BinaryOp::Add, steps, wave)
    });
}

#[test]
fn a_graph_of_a_million_nodes_has_a_gradient() {
    const LEN: usize = 500_000;
    let mut g = ComputationGraph::new();
    let x = g.input(0, ty(DType::F32, &[]));
    let mut y = x;
    for _ in 0..LEN {
        y = g.unary(UnaryOp::Neg, y).unwrap();
    }
    let before = g.len();
    gradients(&mut g, y, &[trainable(x, "x")]).unwrap();
    // The seed, and the negation of a cotangent per node.
    assert_eq!(g.len() - before, LEN + 1);
}

/// How many of `op` the joint graph of `composite` and its gradients holds, expanded.
fn reductions(composite: Composite, types: &[TensorType], trained: usize, op: ReduceOp) -> usize {
    let mut g = ComputationGraph::new();
    let x: Vec<NodeId> = (0..).zip(types).map(|(i, t)| g.input(i, *t)).collect();
    let y = g.add(Operation::Composite(composite), &x).unwrap();
    let loss = check::weigh(&mut g, y).unwrap();
    let wrt: Vec<Trainable> = x[..trained].iter().map(|x| trainable(*x, "x")).collect();
    let dx = gradients(&mut g, loss, &wrt).unwrap();
    g.outputs = [vec![y], dx].concat();
    let g = pass::expand(&g, |_| false).unwrap();
    let live = g.live();
    let is = |n: &Operation| matches!(n, Operation::Reduce { op: o, .. } if *o == op);
    g.ids().filter(|id| live[id.index()] && is(&g[*id].op)).count()
}

/// The backward pass computes no row statistic that the forward pass has computed.
#[test]
fn row_statistics_are_shared() {
    let eps = Scalar::from_f64(DType::F64, 1e-5);
    let losses = CrossEntropyAttrs {
        ignore_index: None,
        label_smoothing: Scalar::from_f64(DType::F64, 0.0),
        blocks: None,
    };
    for dtype in [DType::F32, DType::BF16] {
        let (x, w) = (ty(dtype, &[3, 4]), ty(dtype, &[4]));
        let labels = ty(DType::U32, &[3]);
        let rms = Composite::RmsNorm { eps };
        // mean x²; mean dy w x and the weight's sum
        assert_eq!(reductions(rms, &[x, w], 2, ReduceOp::Sum), 1 + 2);
        let layer = Composite::LayerNorm { eps };
        // mean x, var x; mean dy w, mean dy w x, and the sums of weight and bias
        assert_eq!(reductions(layer, &[x, w, w], 3, ReduceOp::Sum), 2 + 4);
        let softmax = Composite::Softmax { dim: 1 };
        assert_eq!(reductions(softmax, &[x], 1, ReduceOp::Max), 1);
        assert_eq!(reductions(softmax, &[x], 1, ReduceOp::Sum), 1 + 1);
        let loss = Composite::CrossEntropy(losses);
        assert_eq!(reductions(loss, &[x, labels], 1, ReduceOp::Max), 1);
        // the sum of exponentials and the picked logit; nothing more
        assert_eq!(reductions(loss, &[x, labels], 1, ReduceOp::Sum), 2);
    }
}

/// bf16 in, bf16 gradients out, whatever is computed in between; losses are f32.
#[test]
fn gradients_have_the_dtype_of_their_trainable() {
    for dtype in [DType::BF16, DType::F16, DType::F32, DType::F64] {
        for (composite, types) in composites(dtype) {
            let mut g = ComputationGraph::new();
            let x: Vec<NodeId> = (0..).zip(&types).map(|(i, t)| g.input(i, *t)).collect();
            let y = g.add(Operation::Composite(composite), &x).unwrap();
            let loss = check::weigh(&mut g, y).unwrap();
            let is_table = |i| i > 0 && matches!(composite, Composite::Rope { .. });
            let trained = (0..x.len()).filter(|i| types[*i].dtype.is_float() && !is_table(*i));
            let wrt: Vec<Trainable> = trained.map(|i| trainable(x[i], "x")).collect();
            let dx = gradients(&mut g, loss, &wrt).unwrap();
            for (d, t) in dx.iter().zip(&wrt) {
                assert_eq!(g.ty(*d), g.ty(t.node), "{composite:?}");
            }
            // Expanding checks that every decomposition has the type that was inferred.
            g.outputs = [vec![y], dx].concat();
            let expanded = pass::expand(&g, |_| false).unwrap();
            for (before, after) in g.outputs.iter().zip(&expanded.outputs) {
                assert_eq!(g.ty(*before), expanded.ty(*after), "{composite:?}");
            }
        }
    }
}

/// bf16 is read and written, and nothing is computed in it: neither forward nor backward.
#[test]
fn narrow_composites_compute_in_f32() {
    for (composite, types) in composites(DType::BF16) {
        let mut g = ComputationGraph::new();
        let x: Vec<NodeId> = (0..).zip(&types).map(|(i, t)| g.input(i, *t)).collect();
        let y = g.add(Operation::Composite(composite), &x).unwrap();
        let wide = g.cast(y, DType::F32).unwrap();
        let loss = check::weigh(&mut g, wide).unwrap();
        let dx = gradients(&mut g, loss, &[trainable(x[0], "x")]).unwrap();
        g.outputs = [vec![y], dx].concat();
        let g = pass::expand(&g, |_| false).unwrap();
        let live = g.live();
        for node in g.ids().filter(|id| live[id.index()]).map(|id| &g[id]) {
            let computes = match node.op {
                // A sign costs no digits.
                Operation::Unary(f) => f != UnaryOp::Neg,
                Operation::Binary(_) | Operation::Reduce { .. } | Operation::Dot => true,
                _ => false,
            };
            assert!(node.ty.dtype != DType::BF16 || !computes, "{composite:?}: {node:?}");
        }
    }
}

/// What is left of a difference from a statistic that was rounded to bf16 is noise.
#[test]
fn a_narrow_logsumexp_is_not_read_back() {
    let mut g = ComputationGraph::new();
    let x = g.input(0, ty(DType::BF16, &[3, 4]));
    let y = g.add(Operation::Composite(Composite::LogSumExp { dim: 1 }), &[x]).unwrap();
    let loss = check::weigh(&mut g, y).unwrap();
    g.outputs = gradients(&mut g, loss, &[trainable(x, "x")]).unwrap();
    assert!(!g.live()[y.index()]);
}

/// One of each, with its inputs of `dtype`.
fn composites(dtype: DType) -> Vec<(Composite, Vec<TensorType>)> {
    let x = |dims: &[usize]| ty(dtype, dims);
    let labels = ty(DType::I64, &[3]);
    let half = Scalar::from_f64(DType::F64, 0.5);
    let loss = CrossEntropyAttrs { ignore_index: Some(-1), label_smoothing: half, blocks: None };
    let attention = AttentionAttrs {
        scale: half,
        causal: true,
        window: Some(2),
        mask: true,
        segments: false,
        offset: true,
    };
    let qkv = [x(&[1, 2, 4, 3]), x(&[1, 5, 2, 3]), x(&[1, 5, 2, 6]), x(&[1, 4, 2, 5])];
    let layout = RopeLayout::Interleaved;
    vec![
        (Composite::Softmax { dim: 0 }, vec![x(&[3, 4])]),
        (Composite::LogSoftmax { dim: 1 }, vec![x(&[3, 4])]),
        (Composite::LogSumExp { dim: 1 }, vec![x(&[3, 4])]),
        (Composite::RmsNorm { eps: half }, vec![x(&[3, 4]), x(&[4])]),
        (Composite::LayerNorm { eps: half }, vec![x(&[3, 4]), x(&[4]), x(&[4])]),
        (Composite::Rope { layout }, vec![x(&[3, 4]), ty(DType::F32, &[3, 2]), x(&[3, 2])]),
        (Composite::Attention(attention), [&qkv[..], &[ty(DType::I64, &[])]].concat()),
        (Composite::CrossEntropy(loss), vec![x(&[3, 7]), labels]),
        (Composite::LinearCrossEntropy(loss), vec![x(&[3, 4]), x(&[7, 4]), labels]),
    ]
}

#[test]
fn a_table_repeated_for_heads_is_turned_back_as_the_table_itself() {
    let mut g = ComputationGraph::new();
    let x = g.input(0, ty(DType::F32, &[2, 5, 3, 4]));
    let [cos, sin] = [1, 2].map(|i| g.input(i, ty(DType::F32, &[5, 1, 2])));
    let of_all = Shape::new(&[2, 5, 3, 2]).unwrap();
    let [cos, sin] = [cos, sin].map(|table| g.broadcast_to(table, of_all).unwrap());
    let rope = Composite::Rope { layout: RopeLayout::Half };
    let y = g.add(Operation::Composite(rope), &[x, cos, sin]).unwrap();
    let y = g.unary(UnaryOp::Sqr, y).unwrap();
    let loss = sum_all(&mut g, y);
    let before = g.len();
    gradients(&mut g, loss, &[trainable(x, "x")]).unwrap();
    let negated =
        g.nodes()[before..].iter().filter(|node| node.op == Operation::Unary(UnaryOp::Neg));
    let shapes: Vec<Vec<usize>> = negated.map(|node| node.shape().dims().to_vec()).collect();
    assert_eq!(shapes, [[1, 5, 1, 2]]);
}

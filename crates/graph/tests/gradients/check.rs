//! Finite differences in f64 on the oracle.

use metal_candle_graph::autodiff::{Trainable, gradients};
use metal_candle_graph::oracle::{self, Value};
use metal_candle_graph::{
    BinaryOp, ComputationGraph, DType, Dims, Distribution, NodeId, Operation, Result, Shape,
    TensorType, UnaryOp, random_f64,
};

/// One argument of the function under test.
#[derive(Clone, Debug)]
pub(crate) enum Arg {
    /// f64, drawn uniformly from an interval and differentiated.
    Float { dims: Vec<usize>, low: f64, high: f64 },
    /// f64 of these values, differentiated.
    Given { dims: Vec<usize>, data: Vec<f64> },
    /// f64, drawn uniformly from (0.5, 1.5) and not differentiated.
    Frozen { dims: Vec<usize> },
    /// Integers, or bytes.
    Integers { dtype: DType, dims: Vec<usize>, data: Vec<i64> },
}

/// Drawn from (-1, 1).
pub(crate) fn float(dims: &[usize]) -> Arg {
    within(dims, -1.0, 1.0)
}

pub(crate) fn within(dims: &[usize], low: f64, high: f64) -> Arg {
    Arg::Float { dims: dims.to_vec(), low, high }
}

pub(crate) fn given(dims: &[usize], data: &[f64]) -> Arg {
    Arg::Given { dims: dims.to_vec(), data: data.to_vec() }
}

pub(crate) fn frozen(dims: &[usize]) -> Arg {
    Arg::Frozen { dims: dims.to_vec() }
}

pub(crate) fn integers(dtype: DType, dims: &[usize], data: &[i64]) -> Arg {
    Arg::Integers { dtype, dims: dims.to_vec(), data: data.to_vec() }
}

impl Arg {
    pub(crate) fn is_differentiated(&self) -> bool {
        matches!(self, Arg::Float { .. } | Arg::Given { .. })
    }

    pub(crate) fn ty(&self) -> TensorType {
        let (dtype, dims) = match self {
            Arg::Float { dims, .. } | Arg::Given { dims, .. } | Arg::Frozen { dims } => {
                (DType::F64, dims)
            }
            Arg::Integers { dtype, dims, .. } => (*dtype, dims),
        };
        TensorType::new(dtype, Shape::new(dims).unwrap())
    }

    /// The value; `stream` tells the arguments of one function apart.
    pub(crate) fn value(&self, stream: u32) -> Value {
        let len = self.ty().shape.len();
        let draw = |low: f64, high: f64| {
            let unit = |i| random_f64(Distribution::Uniform, 1, stream, i);
            (0..len as u64).map(|i| low + (high - low) * unit(i)).collect()
        };
        let data = match self {
            Arg::Float { low, high, .. } => draw(*low, *high),
            Arg::Given { data, .. } => data.clone(),
            Arg::Frozen { .. } => draw(0.5, 1.5),
            Arg::Integers { data, .. } => data.iter().map(|x| *x as f64).collect(),
        };
        assert_eq!(data.len(), len, "{self:?}");
        Value { ty: self.ty(), data }
    }
}

pub(crate) fn add_inputs(g: &mut ComputationGraph, args: &[Arg]) -> Vec<NodeId> {
    (0..).zip(args).map(|(i, arg)| g.input(i, arg.ty())).collect()
}

pub(crate) fn values(args: &[Arg]) -> Vec<Value> {
    (0..).zip(args).map(|(i, arg)| arg.value(i)).collect()
}

/// The differentiated ones of `nodes`.
pub(crate) fn trainables(args: &[Arg], nodes: &[NodeId]) -> Vec<Trainable> {
    let floats = args.iter().zip(nodes).filter(|(arg, _)| arg.is_differentiated());
    floats.map(|(_, node)| Trainable { node: *node, name: format!("{node:?}") }).collect()
}

/// A scalar in which every element of `y` has a weight of its own.
pub(crate) fn weigh(g: &mut ComputationGraph, y: NodeId) -> Result<NodeId> {
    let (shape, dtype) = (g.shape(y), g.ty(y).dtype);
    let i = g.add(Operation::Iota { len: shape.len(), dtype }, &[])?;
    let i = g.binary_scalar(BinaryOp::Add, i, 1.0)?;
    let weights = g.unary(UnaryOp::Sin, i)?;
    let weights = g.reshape(weights, shape)?;
    let weighted = g.binary(BinaryOp::Mul, y, weights)?;
    let sum = g.sum(weighted, Dims::new(0..shape.rank()))?;
    g.reshape(sum, Shape::SCALAR)
}

/// The gradient of a weighed `y` with respect to `x`, to be differentiated once more.
pub(crate) fn slope(g: &mut ComputationGraph, y: NodeId, x: NodeId) -> Result<NodeId> {
    let loss = weigh(g, y)?;
    let wrt = [Trainable { node: x, name: "x".to_string() }];
    Ok(gradients(g, loss, &wrt)?[0])
}

/// `y + 0 x` for every float x: what a slope or a decomposition does not depend on has the gradient
/// 0, not an error.
pub(crate) fn mention(g: &mut ComputationGraph, mut y: NodeId, x: &[NodeId]) -> Result<NodeId> {
    for x in x {
        if g.ty(*x).dtype.is_float() {
            let sum = weigh(g, *x)?;
            let nothing = g.binary_scalar(BinaryOp::Mul, sum, 0.0)?;
            y = g.binary(BinaryOp::Add, y, nothing)?;
        }
    }
    Ok(y)
}

/// The gradients of the weighed value of `f`, evaluated.
pub(crate) fn differentiate(
    name: &str,
    args: &[Arg],
    f: impl Fn(&mut ComputationGraph, &[NodeId]) -> Result<NodeId>,
) -> Vec<Value> {
    let mut g = ComputationGraph::new();
    let x = add_inputs(&mut g, args);
    let wrt = trainables(args, &x);
    let y = f(&mut g, &x).unwrap_or_else(|e| panic!("{name}: {e}"));
    let loss = weigh(&mut g, y).unwrap();
    g.outputs = gradients(&mut g, loss, &wrt).unwrap_or_else(|e| panic!("{name}: {e}"));
    for (d, t) in g.outputs.iter().zip(&wrt) {
        assert_eq!(g.ty(*d), g.ty(t.node), "{name}: the gradient has another type");
    }
    oracle::evaluate(&g, &values(args)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// Compares the gradients of `f` with central differences, element by element.
pub(crate) fn check(
    name: &str,
    args: &[Arg],
    f: impl Fn(&mut ComputationGraph, &[NodeId]) -> Result<NodeId>,
) {
    const STEP: f64 = 1e-5;
    let gradients = differentiate(name, args, &f);
    let mut g = ComputationGraph::new();
    let x = add_inputs(&mut g, args);
    let y = f(&mut g, &x).unwrap();
    g.outputs = vec![weigh(&mut g, y).unwrap()];
    let mut inputs = values(args);
    let mut loss_at = |arg: usize, element: usize, x: f64| {
        let old = std::mem::replace(&mut inputs[arg].data[element], x);
        let loss = oracle::evaluate(&g, &inputs).unwrap()[0].data[0];
        inputs[arg].data[element] = old;
        loss
    };
    let floats = (0..args.len()).filter(|i| args[*i].is_differentiated());
    for (arg, gradient) in floats.zip(&gradients) {
        for (element, x) in args[arg].value(arg as u32).data.into_iter().enumerate() {
            let (above, below) = (x + STEP, x - STEP);
            let rise = loss_at(arg, element, above) - loss_at(arg, element, below);
            // An argument of -inf (a mask) cannot move.
            let want = if x.is_finite() { rise / (above - below) } else { 0.0 };
            let got = gradient.data[element];
            assert!(
                (got - want).abs() <= 2e-8 * (1.0 + want.abs()),
                "{name}: argument {arg}, element {element}: got {got}, finite difference {want}"
            );
        }
    }
}

/// Compares two lists of values of the same types.
pub(crate) fn assert_close(name: &str, got: &[Value], want: &[Value]) {
    assert_eq!(got.len(), want.len(), "{name}");
    for (got, want) in got.iter().zip(want) {
        assert_eq!(got.ty, want.ty, "{name}");
        for (i, (a, b)) in got.data.iter().zip(&want.data).enumerate() {
            assert!(
                (a - b).abs() <= 1e-12 * (1.0 + b.abs()),
                "{name}: element {i}: {a} is not {b}"
            );
        }
    }
}

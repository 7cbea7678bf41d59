//! What every operation means, in f64 and index by index: slow, plain, and sharing no code with any kernel.
//!
//! Floats of every dtype are computed in f64 and rounded in a [`Cast`](Operation::Cast) only, so that the oracle's
//! error is far below that of what it judges. Integers are held in f64 too, exact up to 2⁵³, and wrap to
//! their dtype.

mod blocks;
mod moves;
mod scalar;

use crate::pass::expand;
use crate::{
    ArgReduceOp, ComputationGraph, DType, Error, Node, Operation, ReduceOp, Result, Shape,
    TensorType, random_f64,
};

/// A value: row-major elements, integers as whole numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    /// The dtype that the elements are rounded to, and the shape.
    pub ty: TensorType,
    /// The elements.
    pub data: Vec<f64>,
}

impl Value {
    /// `data` in row-major order, each number one that `dtype` holds.
    ///
    /// # Errors
    /// [`Error::Reshape`] where `data` has not the elements of `dims`.
    pub fn new(dtype: DType, dims: &[usize], data: Vec<f64>) -> Result<Value> {
        let shape = Shape::new(dims)?;
        if data.len() != shape.len() {
            let from = Shape::new(&[data.len()])?;
            return Err(Error::Reshape { op: "value", from, to: shape });
        }
        Ok(Value { ty: TensorType::new(dtype, shape), data })
    }

    fn at(&self, index: &[usize]) -> f64 {
        self.data[flat(&self.ty.shape, index)]
    }
}

/// Computes the outputs of `g`.
///
/// # Errors
/// [`Error::IndexOutOfRange`] where an index names no element.
///
/// # Panics
/// Where `inputs` are not of the types that the graph says.
pub fn evaluate(g: &ComputationGraph, inputs: &[Value]) -> Result<Vec<Value>> {
    let g = expand(g, |_| false)?;
    let live = g.live();
    let mut last_use = vec![0; g.len()];
    for id in g.ids().filter(|id| live[id.index()]) {
        for input in &g[id].inputs {
            last_use[input.index()] = id.index();
        }
    }
    for output in &g.outputs {
        last_use[output.index()] = usize::MAX;
    }
    let mut values: Vec<Option<Value>> = vec![None; g.len()];
    for id in g.ids().filter(|id| live[id.index()]) {
        let node = &g[id];
        let operands: Vec<&Value> = node
            .inputs
            .iter()
            .map(|i| values[i.index()].as_ref().expect("operands come first"))
            .collect();
        let value = apply(node, &operands, inputs)?;
        assert_eq!(value.len(), node.shape().len(), "{} gives another shape", node.op);
        values[id.index()] = Some(Value { ty: node.ty, data: value });
        for input in node.inputs.iter().filter(|i| last_use[i.index()] == id.index()) {
            values[input.index()] = None;
        }
    }
    let output = |id: &crate::NodeId| values[id.index()].clone().expect("outputs are live");
    Ok(g.outputs.iter().map(output).collect())
}

fn apply(node: &Node, x: &[&Value], inputs: &[Value]) -> Result<Vec<f64>> {
    let shape = *node.shape();
    let elements = |f: &dyn Fn(usize) -> f64| (0..shape.len()).map(f).collect::<Vec<f64>>();
    Ok(match node.op {
        Operation::Input(index) => {
            let value = &inputs[index as usize];
            assert_eq!(value.ty, node.ty, "input {index}");
            value.data.clone()
        }
        Operation::Const(c) => vec![c.as_f64()],
        Operation::Iota { .. } => elements(&|i| i as f64),
        Operation::Random { distribution, stream, .. } => {
            let seed = x[0].data[0] as i64;
            elements(&|i| random_f64(distribution, seed, stream, i as u64))
        }
        Operation::Unary(f) => elements(&|i| scalar::unary(f, x[0].data[i], node.ty.dtype)),
        Operation::Binary(f) => {
            let dtype = x[0].ty.dtype;
            elements(&|i| scalar::binary(f, x[0].data[i], x[1].data[i], dtype))
        }
        Operation::Select => {
            elements(&|i| if x[0].data[i] != 0.0 { x[1].data[i] } else { x[2].data[i] })
        }
        Operation::Cast(dtype) => elements(&|i| scalar::cast(x[0].data[i], x[0].ty.dtype, dtype)),
        Operation::Reduce { op, dims } => reduce(op, x[0], &shape, |d| dims.contains(d)),
        Operation::ArgReduce { op, dim } => arg_reduce(op, x[0], &shape, dim),
        Operation::CumSum { dim, reverse } => cumsum(x[0], dim, reverse),
        Operation::Dot => dot(x[0], x[1], &shape),
        Operation::QuantDot { .. } | Operation::Dequantize { .. } => blocks::apply(node, x),
        // A world of one.
        Operation::AllReduce => x[0].data.clone(),
        Operation::Composite(c) => panic!("metal-candle bug: {} was not expanded", c.as_str()),
        Operation::Reshape(_)
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
        | Operation::DynamicSlice { .. } => moves::apply(node, x)?,
    })
}

/// The index of element number `i`.
fn unflat(shape: &Shape, mut i: usize) -> Vec<usize> {
    let mut index = vec![0; shape.rank()];
    for d in (0..shape.rank()).rev() {
        index[d] = i % shape[d];
        i /= shape[d];
    }
    index
}

fn flat(shape: &Shape, index: &[usize]) -> usize {
    index.iter().zip(shape.dims()).fold(0, |at, (i, extent)| at * extent + i)
}

fn reduce(op: ReduceOp, x: &Value, shape: &Shape, reduced: impl Fn(usize) -> bool) -> Vec<f64> {
    let start = match op {
        ReduceOp::Sum => 0.0,
        ReduceOp::Max => f64::NEG_INFINITY,
        ReduceOp::Min => f64::INFINITY,
    };
    let mut out = vec![start; shape.len()];
    for (i, value) in x.data.iter().enumerate() {
        let mut index = unflat(&x.ty.shape, i);
        (0..index.len()).filter(|d| reduced(*d)).for_each(|d| index[d] = 0);
        let acc = &mut out[flat(shape, &index)];
        *acc = match op {
            ReduceOp::Sum => scalar::wrap(*acc + value, x.ty.dtype),
            ReduceOp::Max => scalar::maximum(*acc, *value),
            ReduceOp::Min => -scalar::maximum(-*acc, -*value),
        };
    }
    out
}

fn arg_reduce(op: ArgReduceOp, x: &Value, shape: &Shape, dim: usize) -> Vec<f64> {
    let sign = match op {
        ArgReduceOp::ArgMax => 1.0,
        ArgReduceOp::ArgMin => -1.0,
    };
    let position = |i: usize| {
        let mut index = unflat(shape, i);
        let mut value = |k: usize| {
            index[dim] = k;
            sign * x.at(&index)
        };
        let beats = |new: f64, old: f64| new > old || new.is_nan() && !old.is_nan();
        let mut best = 0;
        for k in 1..x.ty.shape[dim] {
            if beats(value(k), value(best)) {
                best = k;
            }
        }
        best as f64
    };
    (0..shape.len()).map(position).collect()
}

fn cumsum(x: &Value, dim: usize, reverse: bool) -> Vec<f64> {
    let shape = x.ty.shape;
    let sum = |i: usize| {
        let mut index = unflat(&shape, i);
        let here = index[dim];
        let range = if reverse { here..shape[dim] } else { 0..here + 1 };
        let total = range.map(|k| {
            index[dim] = k;
            x.at(&index)
        });
        scalar::wrap(total.sum(), x.ty.dtype)
    };
    (0..shape.len()).map(sum).collect()
}

fn dot(a: &Value, b: &Value, shape: &Shape) -> Vec<f64> {
    let rank = shape.rank();
    let k = a.ty.shape[rank - 1];
    let element = |i: usize| {
        let (mut l, mut r) = (unflat(shape, i), unflat(shape, i));
        let product = |p: usize| {
            (l[rank - 1], r[rank - 2]) = (p, p);
            a.at(&l) * b.at(&r)
        };
        (0..k).map(product).sum()
    };
    (0..shape.len()).map(element).collect()
}

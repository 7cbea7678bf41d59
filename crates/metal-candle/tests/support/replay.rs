//! A graph recorded again, node by node, through the methods of `LazyTensor`.

use crate::testbed::device;
use metal_candle::graph::composite::{AttentionAttrs, CrossEntropyAttrs, RopeLayout};
use metal_candle::graph::{
    ArgReduceOp, BinaryOp, Composite, Node, NodeId, ReduceOp, Scalar, UnaryOp,
};
use metal_candle::{Attention, ComputationGraph, CrossEntropy, LazyTensor, Operation, Result};

/// Records what `wanted` need. By node; `None` where nothing needs it.
pub(crate) fn replay(
    g: &ComputationGraph,
    wanted: &[NodeId],
    inputs: &[LazyTensor],
) -> Result<Vec<Option<LazyTensor>>> {
    let mut live = vec![false; g.len()];
    wanted.iter().for_each(|id| live[id.index()] = true);
    for id in g.ids().rev().filter(|id| live[id.index()]).collect::<Vec<_>>() {
        mark(g, id, &mut live);
    }
    let mut made: Vec<Option<LazyTensor>> = vec![None; g.len()];
    for id in g.ids().filter(|id| live[id.index()]) {
        let node = &g[id];
        let x: Vec<&LazyTensor> =
            node.inputs.iter().map(|i| made[i.index()].as_ref().unwrap()).collect();
        let y = match node.op {
            Operation::Input(i) => inputs[i as usize].clone(),
            _ => record(node, &x)?,
        };
        assert_eq!((y.dtype(), y.dims()), (node.ty.dtype, node.shape().dims()), "{}", node.op);
        made[id.index()] = Some(y);
    }
    Ok(made)
}

fn mark(g: &ComputationGraph, id: NodeId, live: &mut [bool]) {
    let mut stack = vec![id];
    while let Some(id) = stack.pop() {
        for input in &g[id].inputs {
            if !std::mem::replace(&mut live[input.index()], true) {
                stack.push(*input);
            }
        }
    }
}

fn record(node: &Node, x: &[&LazyTensor]) -> Result<LazyTensor> {
    match node.op {
        Operation::Const(c) => constant(c),
        Operation::Iota { len, dtype } => LazyTensor::arange(0, len as i64, dtype, device()),
        Operation::Unary(f) => unary(f, x[0]),
        Operation::Binary(f) => binary(f, x[0], x[1]),
        Operation::Select => x[0].where_cond(x[1], x[2]),
        Operation::Cast(dtype) => x[0].to_dtype(dtype),
        Operation::Reduce { op: ReduceOp::Sum, dims } => x[0].sum_keepdim(dims.iter()),
        Operation::Reduce { op: ReduceOp::Max, dims } => x[0].max_keepdim(dims.iter()),
        Operation::Reduce { op: ReduceOp::Min, dims } => x[0].min_keepdim(dims.iter()),
        Operation::ArgReduce { op: ArgReduceOp::ArgMax, dim } => x[0].argmax_keepdim(dim),
        Operation::ArgReduce { op: ArgReduceOp::ArgMin, dim } => x[0].argmin_keepdim(dim),
        Operation::CumSum { dim, reverse: false } => x[0].cumsum(dim),
        Operation::CumSum { dim, reverse: true } => x[0].flip(dim)?.cumsum(dim)?.flip(dim),
        Operation::Reshape(shape) => x[0].reshape(shape.dims()),
        Operation::Permute(p) => x[0].permute(p.iter()),
        Operation::Broadcast(shape) => x[0].broadcast_as(shape.dims()),
        Operation::Slice { dim, start, len, step } => x[0].slice(dim, start, len, step),
        Operation::Flip { dim } => x[0].flip(dim),
        Operation::Pad { dim, before, after, value } => {
            x[0].pad(dim, before, after, value.as_f64())
        }
        Operation::Concat { dim } => LazyTensor::cat(x, dim),
        Operation::Gather { dim } => x[0].gather(x[1], dim),
        Operation::IndexSelect { dim } => x[0].index_select(x[1], dim),
        Operation::ScatterAdd { dim } => x[0].scatter_add(x[1], x[2], dim),
        Operation::IndexAdd { dim } => x[0].index_add(x[1], x[2], dim),
        Operation::SliceUpdate { dim } => x[0].slice_update(dim, x[1], x[2]),
        Operation::DynamicSlice { dim, len } => x[0].dynamic_slice(dim, x[1], len),
        Operation::Dot => x[0].matmul(x[1]),
        Operation::QuantDot { format, rows, cols, transposed: false } => {
            x[0].quant_matmul(x[1], format, rows, cols)
        }
        Operation::Dequantize { format, rows, cols } => x[0].dequantize(format, rows, cols),
        Operation::Composite(c) => composite(c, x),
        Operation::Input(_) | Operation::Random { .. } | Operation::QuantDot { .. } => {
            panic!("{} has no method", node.op)
        }
    }
}

fn constant(c: Scalar) -> Result<LazyTensor> {
    let value = if c.dtype().is_float() { c.as_f64() } else { c.as_i64() as f64 };
    LazyTensor::full(value, &[], c.dtype(), device())
}

fn unary(f: UnaryOp, x: &LazyTensor) -> Result<LazyTensor> {
    match f {
        UnaryOp::Neg => x.neg(),
        UnaryOp::Abs => x.abs(),
        UnaryOp::Sign => x.sign(),
        UnaryOp::Recip => x.recip(),
        UnaryOp::Sqr => x.sqr(),
        UnaryOp::Sqrt => x.sqrt(),
        UnaryOp::Rsqrt => x.rsqrt(),
        UnaryOp::Exp => x.exp(),
        UnaryOp::Log => x.log(),
        UnaryOp::Log1p => x.log1p(),
        UnaryOp::Expm1 => x.expm1(),
        UnaryOp::Sin => x.sin(),
        UnaryOp::Cos => x.cos(),
        UnaryOp::Tanh => x.tanh(),
        UnaryOp::Erf => x.erf(),
        UnaryOp::Sigmoid => x.sigmoid(),
        UnaryOp::Relu => x.relu(),
        UnaryOp::Silu => x.silu(),
        UnaryOp::Gelu => x.gelu(),
        UnaryOp::GeluTanh => x.gelu_tanh(),
        UnaryOp::Floor => x.floor(),
        UnaryOp::Ceil => x.ceil(),
        UnaryOp::Round => x.round(),
    }
}

fn binary(f: BinaryOp, a: &LazyTensor, b: &LazyTensor) -> Result<LazyTensor> {
    match f {
        BinaryOp::Add => a.add(b),
        BinaryOp::Sub => a.sub(b),
        BinaryOp::Mul => a.mul(b),
        BinaryOp::Div => a.div(b),
        BinaryOp::Pow => a.pow(b),
        BinaryOp::Maximum => a.maximum(b),
        BinaryOp::Minimum => a.minimum(b),
        BinaryOp::Eq => a.eq(b),
        BinaryOp::Ne => a.ne(b),
        BinaryOp::Lt => a.lt(b),
        BinaryOp::Le => a.le(b),
        BinaryOp::Gt => a.gt(b),
        BinaryOp::Ge => a.ge(b),
    }
}

fn composite(c: Composite, x: &[&LazyTensor]) -> Result<LazyTensor> {
    match c {
        Composite::Softmax { dim } => x[0].softmax(dim),
        Composite::LogSoftmax { dim } => x[0].log_softmax(dim),
        Composite::LogSumExp { dim } => x[0].logsumexp_keepdim(dim),
        Composite::RmsNorm { eps } => x[0].rms_norm(x[1], eps.as_f64()),
        Composite::LayerNorm { eps } => x[0].layer_norm(x[1], x[2], eps.as_f64()),
        Composite::Rope { layout: RopeLayout::Half } => x[0].rope(x[1], x[2]),
        Composite::Rope { layout: RopeLayout::Interleaved } => x[0].rope_interleaved(x[1], x[2]),
        Composite::Attention(attrs) => attention(&attrs, x),
        Composite::CrossEntropy(attrs) => x[0].cross_entropy(x[1], options(&attrs)),
        Composite::LinearCrossEntropy(attrs) => {
            x[0].linear_cross_entropy(x[1], x[2], options(&attrs))
        }
        c => panic!("{} has no method", c.as_str()),
    }
}

fn attention(attrs: &AttentionAttrs, x: &[&LazyTensor]) -> Result<LazyTensor> {
    let mut rest = x[3..].iter().copied();
    let mut a = Attention::new().scale(attrs.scale.as_f64());
    if attrs.causal {
        a = a.causal();
    }
    if let Some(window) = attrs.window {
        a = a.window(window as usize);
    }
    if attrs.mask {
        a = a.mask(rest.next().unwrap());
    }
    if attrs.segments {
        a = a.segments(rest.next().unwrap(), rest.next().unwrap());
    }
    if attrs.offset {
        a = a.offset(rest.next().unwrap());
    }
    a.forward(x[0], x[1], x[2])
}

fn options(attrs: &CrossEntropyAttrs) -> CrossEntropy {
    CrossEntropy::new()
        .per_row()
        .ignore_index(attrs.ignore_index)
        .label_smoothing(attrs.label_smoothing.as_f64())
}

//! Every library call in every dtype, on operands laid out in every way, and on the sizes that its kernels treat
//! differently.

mod bad;
mod moves;
mod products;

use crate::machine::DIALECTS;
use crate::plans::{Task, check};
use crate::random::Rng;
use crate::refused;
use metal_candle_compiler::render::{Dialect, Limits};
use metal_candle_graph::composite::CrossEntropyAttrs;
use metal_candle_graph::oracle::{self, Value};
use metal_candle_graph::{
    BlockFormat, Composite, ComputationGraph, DType, NodeId, Operation, Scalar, Shape, TensorType,
};

const FLOATS: [DType; 4] = [DType::BF16, DType::F16, DType::F32, DType::F64];

/// So little room that rows, classes and weights come in several parts.
fn dialects() -> impl Iterator<Item = (&'static Dialect, Limits)> {
    DIALECTS
        .map(|(_, dialect, limits)| (dialect, Limits { workspace_bytes: 4 << 10, ..limits }))
        .into_iter()
}

/// A graph, and values for its inputs.
struct Build {
    g: ComputationGraph,
    inputs: Vec<Value>,
    rng: Rng,
}

impl Build {
    fn new() -> Build {
        Build { g: ComputationGraph::new(), inputs: Vec::new(), rng: Rng(5) }
    }

    fn given(&mut self, dtype: DType, dims: &[usize], data: Vec<f64>) -> NodeId {
        let ty = TensorType::new(dtype, Shape::new(dims).unwrap());
        assert_eq!(data.len(), ty.shape.len());
        self.inputs.push(Value { ty, data });
        self.g.input(self.inputs.len() as u32 - 1, ty)
    }

    /// Eighths, or small whole numbers.
    fn input(&mut self, dtype: DType, dims: &[usize]) -> NodeId {
        let len = dims.iter().product();
        let rng = &mut self.rng;
        let draw = |_| match dtype.is_float() {
            true => (rng.below(33) as f64 - 16.0) / 8.0,
            false => rng.below(6) as f64,
        };
        let data = (0..len).map(draw).collect();
        self.given(dtype, dims, data)
    }

    /// The same, so much smaller that a product with weights of large scales is no large number.
    fn small(&mut self, dtype: DType, dims: &[usize], format: BlockFormat) -> NodeId {
        let id = self.input(dtype, dims);
        if format.block_len() == 256 {
            let value = self.inputs.last_mut().unwrap();
            value.data.iter_mut().for_each(|x| *x /= 64.0);
        }
        id
    }

    fn index(&mut self, dtype: DType, dims: &[usize], below: usize) -> NodeId {
        let data = (0..dims.iter().product()).map(|_| self.rng.below(below) as f64).collect();
        self.given(dtype, dims, data)
    }

    fn start(&mut self, at: usize) -> NodeId {
        self.given(DType::I64, &[], vec![at as f64])
    }

    fn op(&mut self, op: Operation, inputs: &[NodeId]) -> NodeId {
        self.g.add(op, inputs).unwrap()
    }

    fn composite(&mut self, composite: Composite, inputs: &[NodeId]) -> NodeId {
        self.op(Operation::Composite(composite), inputs)
    }

    fn task(mut self, name: String, outputs: Vec<NodeId>, tolerance: f64) -> Task {
        self.g.outputs = outputs;
        let want = oracle::evaluate(&self.g, &self.inputs).unwrap();
        self.expecting(name, want, tolerance)
    }

    fn expecting(self, name: String, want: Vec<Value>, tolerance: f64) -> Task {
        let tolerances = vec![tolerance; want.len()];
        let donated = vec![false; self.inputs.len()];
        Task { name, graph: self.g, inputs: self.inputs, donated, want, tolerances }
    }
}

/// A few roundings.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 1.6e-2,
        DType::F16 => 2e-3,
        DType::F32 => 2e-5,
        _ => 1e-12,
    }
}

#[track_caller]
fn check_all(name: &str, tasks: &[Task]) {
    for (dialect, limits) in dialects() {
        check(name, dialect, limits, tasks, refused);
    }
}

fn attrs(ignore_index: Option<i64>, smoothing: f64) -> CrossEntropyAttrs {
    let label_smoothing = Scalar::from_f64(DType::F64, smoothing);
    CrossEntropyAttrs { ignore_index, label_smoothing, blocks: None }
}

/// All that is run here, to be compiled elsewhere.
pub(crate) fn every() -> Vec<Task> {
    [moves::all(), products::all()].concat()
}

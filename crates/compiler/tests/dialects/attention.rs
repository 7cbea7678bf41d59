//! Attention's kernels against the graph's meaning in f64: every attribute, dtype and layout, in both dialects.

use crate::machine::{CUDA, DIALECTS, METAL};
use crate::plans::{self, Task};
use crate::random::Rng;
use crate::walk;
use metal_candle_compiler::render::{Dialect, Limits};
use metal_candle_graph::autodiff::{Trainable, gradients};
use metal_candle_graph::composite::{AttentionAttrs, AttentionInput};
use metal_candle_graph::oracle::{self, Value};
use metal_candle_graph::{
    BinaryOp, Composite, ComputationGraph, DType, Dims, NodeId, Operation, Scalar, Shape,
};

/// An attention: extents, attributes, and how its operands lie.
#[derive(Clone, Copy, Debug)]
struct Draw {
    dtype: DType,
    b: usize,
    tq: usize,
    tk: usize,
    heads: (usize, usize),
    d: usize,
    dv: usize,
    causal: bool,
    window: Option<u32>,
    mask: Option<DType>,
    segments: Option<DType>,
    offset: Option<i64>,
    lies: Lies,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Lies {
    /// Row-major.
    Dense,
    /// Heads before positions.
    HeadsFirst,
    /// Features before everything.
    FeaturesFirst,
}

const PLAIN: Draw = Draw {
    dtype: DType::F32,
    b: 1,
    tq: 5,
    tk: 5,
    heads: (1, 1),
    d: 8,
    dv: 8,
    causal: false,
    window: None,
    mask: None,
    segments: None,
    offset: None,
    lies: Lies::Dense,
};

const CAUSAL: Draw = Draw { causal: true, ..PLAIN };

impl Draw {
    fn attrs(&self) -> AttentionAttrs {
        AttentionAttrs {
            scale: Scalar::from_f64(DType::F64, 0.7 / (self.d as f64).sqrt()),
            causal: self.causal,
            window: self.window,
            mask: self.mask.is_some(),
            segments: self.segments.is_some(),
            offset: self.offset.is_some(),
        }
    }

    /// The cotangent, then attention's inputs.
    fn inputs(&self) -> Vec<Value> {
        let mut rng = Rng(5);
        let Draw { b, tq, tk, heads: (hq, hk), d, dv, .. } = *self;
        let mut float = |dtype: DType, dims: &[usize]| {
            let n: usize = dims.iter().product();
            let data: Vec<f64> = (0..n).map(|_| rng.below(4001) as f64 / 1000.0 - 2.0).collect();
            let data = walk::decode(dtype, &walk::encode(dtype, &data));
            Value::new(dtype, dims, data).unwrap()
        };
        let mut all = vec![
            float(self.dtype, &[b, tq, hq, dv]),
            float(self.dtype, &[b, tq, hq, d]),
            float(self.dtype, &[b, tk, hk, d]),
            float(self.dtype, &[b, tk, hk, dv]),
        ];
        if let Some(dtype) = self.mask {
            let mut mask = float(dtype, &[b, hq, tq, tk]);
            // A third is hidden, and so is all of a row.
            for (i, x) in mask.data.iter_mut().enumerate() {
                *x = if i % 3 == 1 || i / tk == 2 { f64::NEG_INFINITY } else { *x };
            }
            all.push(mask);
        }
        if let Some(dtype) = self.segments {
            // Documents of 10 to 20 positions, the last of which is of a query alone.
            let ids = |t: usize, last: f64| -> Vec<f64> {
                let id = |i: usize| if i == 4 { last } else { ((i + t % 7) / 15) as f64 };
                (0..b).flat_map(|_| (0..t).map(id)).collect()
            };
            all.push(Value::new(dtype, &[b, tq], ids(tq, 99.0)).unwrap());
            all.push(Value::new(dtype, &[b, tk], ids(tk, 98.0)).unwrap());
        }
        if let Some(offset) = self.offset {
            all.push(Value::new(DType::I64, &[], vec![offset as f64]).unwrap());
        }
        all
    }

    fn wrt(&self) -> Vec<AttentionInput> {
        use AttentionInput::{Key, Mask, Query, Value};
        [Query, Key, Value].into_iter().chain(self.mask.map(|_| Mask)).collect()
    }

    /// Attention and its cotangents.
    fn task(&self, wrt: &[AttentionInput]) -> Task {
        let attrs = self.attrs();
        let inputs = self.inputs();
        let mut g = ComputationGraph::new();
        let mut ids = Vec::new();
        let mut given = Vec::new();
        for (i, x) in inputs.into_iter().enumerate() {
            let (x, id) = self.lies.input(&mut g, i as u32, x);
            given.push(x);
            ids.push(id);
        }
        let add = |g: &mut ComputationGraph, composite, inputs: &[_]| {
            g.add(Operation::Composite(composite), inputs).unwrap()
        };
        // A decoded token, for which no statistics are asked, has no cotangents.
        let y = add(&mut g, Composite::Attention(attrs), &ids[1..]);
        let mut outputs = vec![y];
        if !wrt.is_empty() {
            outputs.push(add(&mut g, Composite::AttentionLogSumExp(attrs), &ids[1..]));
            let wrt: Vec<NodeId> = wrt.iter().map(|input| ids[1 + *input as usize]).collect();
            outputs.extend(cotangents(&mut g, y, ids[0], &wrt));
        }
        let tolerances =
            outputs.iter().map(|out| tolerance(g.ty(*out).dtype, self.dtype)).collect();
        g.outputs = outputs;
        let want = oracle::evaluate(&g, &given).unwrap();
        let (name, donated) = (format!("{self:?}"), Vec::new());
        Task { name, graph: g, donated, inputs: given, want, tolerances }
    }
}

/// Those of `wrt`, given y's: the gradients of `sum(dy y)`.
fn cotangents(g: &mut ComputationGraph, y: NodeId, dy: NodeId, wrt: &[NodeId]) -> Vec<NodeId> {
    let products = g.binary(BinaryOp::Mul, y, dy).unwrap();
    let sum = g.sum(products, Dims::new(0..4)).unwrap();
    let loss = g.reshape(sum, Shape::SCALAR).unwrap();
    let wrt = wrt.iter().map(|node| Trainable { node: *node, name: format!("{node:?}") });
    gradients(g, loss, &wrt.collect::<Vec<_>>()).unwrap()
}

/// In units of `1 + |expected|`, of what is computed from `from`.
fn tolerance(dtype: DType, from: DType) -> f64 {
    let of = |dtype: DType| match dtype {
        DType::BF16 => 2e-2,
        DType::F16 => 3e-3,
        DType::F32 => 2e-5,
        _ => 1e-11,
    };
    f64::max(of(dtype), of(from))
}

impl Lies {
    /// The order of the dims in memory.
    fn order(self) -> [usize; 4] {
        match self {
            Lies::Dense => [0, 1, 2, 3],
            Lies::HeadsFirst => [0, 2, 1, 3],
            Lies::FeaturesFirst => [3, 0, 1, 2],
        }
    }

    /// An input whose elements lie so, and its view in the usual order.
    fn input(self, g: &mut ComputationGraph, number: u32, x: Value) -> (Value, NodeId) {
        let dims = x.ty.shape;
        if dims.rank() != 4 || self == Lies::Dense {
            let id = g.input(number, x.ty);
            return (x, id);
        }
        let order = self.order();
        let moved: Vec<usize> = order.iter().map(|d| dims[*d]).collect();
        let mut data = vec![0.0; x.data.len()];
        for (i, x) in x.data.iter().enumerate() {
            let mut index = [0; 4];
            let mut rest = i;
            for d in (0..4).rev() {
                index[d] = rest % dims[d];
                rest /= dims[d];
            }
            let at = order.iter().fold(0, |at, d| at * dims[*d] + index[*d]);
            data[at] = *x;
        }
        let value = Value::new(x.ty.dtype, &moved, data).unwrap();
        let id = g.input(number, value.ty);
        let back = [0, 1, 2, 3].map(|d| order.iter().position(|o| *o == d).unwrap());
        (value, g.permute(id, &back).unwrap())
    }
}

/// SIMD groups that multiply by themselves, and four together.
const TENSOR_CORES: [(&str, Limits); 2] =
    [("flash", CUDA.of_capability(8, 0)), ("flash-wgmma", CUDA.of_capability(9, 0))];

fn check(name: &str, (dialect, limits): (&'static Dialect, Limits), tasks: &[Task]) {
    plans::check(name, dialect, limits, tasks, |_| false);
}

fn all_of(draws: &[Draw]) -> Vec<Task> {
    draws.iter().map(|draw| draw.task(&draw.wrt())).collect()
}

#[test]
fn attention_sees_what_its_attributes_say() {
    let tasks = all_of(&[
        Draw { tq: 70, tk: 70, d: 33, dv: 40, heads: (3, 1), ..CAUSAL },
        Draw { b: 2, tq: 3, tk: 90, heads: (4, 2), window: Some(7), offset: Some(60), ..CAUSAL },
        Draw { tq: 20, tk: 7, heads: (2, 1), offset: Some(-4), ..CAUSAL },
        Draw { tq: 40, tk: 90, heads: (2, 2), mask: Some(DType::F16), ..CAUSAL },
        Draw { b: 2, tq: 80, tk: 80, heads: (2, 1), segments: Some(DType::U32), ..CAUSAL },
    ]);
    check("attention", (Dialect::METAL, METAL), &tasks);
}

#[test]
fn attention_takes_every_float_and_layout() {
    use DType::{BF16, F16, F64, I64};
    let mut tasks = all_of(&[
        Draw { dtype: F64, tq: 20, tk: 40, heads: (2, 1), d: 40, mask: Some(F64), ..CAUSAL },
        Draw { dtype: BF16, tq: 9, tk: 150, heads: (4, 2), lies: Lies::HeadsFirst, ..CAUSAL },
        Draw { dtype: F16, tq: 10, tk: 12, dv: 3, lies: Lies::FeaturesFirst, ..PLAIN },
        Draw { tq: 1, tk: 40, segments: Some(I64), ..CAUSAL },
        Draw { tq: 3, tk: 0, ..PLAIN },
    ]);
    let masked = Draw { tq: 6, tk: 5, mask: Some(BF16), ..PLAIN };
    tasks.push(masked.task(&[AttentionInput::Mask]));
    check("attention-types", (Dialect::CUDA, CUDA), &tasks);
}

#[test]
fn attention_of_few_queries_equals_its_meaning() {
    use DType::{BF16, F16, U32};
    let cache = Draw { tq: 1, tk: 300, offset: Some(200), d: 40, dv: 24, ..CAUSAL };
    let draws = [
        Draw { dtype: BF16, b: 2, heads: (6, 2), ..cache },
        Draw { tq: 3, heads: (5, 1), d: 33, dv: 7, window: Some(90), ..cache },
        Draw { dtype: F16, heads: (2, 2), mask: Some(F16), lies: Lies::HeadsFirst, ..cache },
        Draw { tq: 2, tk: 130, segments: Some(U32), offset: None, ..cache },
        Draw { tk: 90, offset: Some(-3), ..cache },
        // So many keys are split.
        Draw { dtype: BF16, tk: 1100, heads: (6, 2), offset: Some(1050), d: 64, dv: 64, ..cache },
        Draw { tq: 3, tk: 1100, heads: (2, 1), segments: Some(U32), offset: None, ..cache },
    ];
    let tasks: Vec<Task> = draws.iter().map(|draw| draw.task(&[])).collect();
    for (_, dialect, limits) in DIALECTS {
        check("attention-few", (dialect, Limits { resident_threads: 4096, ..limits }), &tasks);
    }
}

/// Both sizes of heads that tensor cores are for, and all attributes.
pub(crate) fn on_tensor_cores() -> [Vec<Task>; 2] {
    let of_64 = Draw { dtype: DType::BF16, d: 64, dv: 64, ..CAUSAL };
    let of_128 = Draw { d: 128, dv: 128, ..of_64 };
    let everything = Draw { causal: false, lies: Lies::HeadsFirst, ..of_64 };
    let half = Draw { dtype: DType::F16, heads: (2, 1), ..of_64 };
    [
        all_of(&[
            Draw { tq: 70, tk: 70, heads: (3, 1), ..of_64 },
            Draw { b: 2, tq: 20, tk: 90, heads: (2, 2), ..everything },
            Draw { tq: 60, tk: 130, heads: (4, 2), ..of_128 },
        ]),
        all_of(&[
            Draw { tq: 100, tk: 150, window: Some(20), offset: Some(30), ..half },
            Draw { b: 2, tq: 90, tk: 150, window: Some(50), ..half },
            Draw { tq: 80, tk: 80, segments: Some(DType::U32), ..half },
            Draw { tq: 40, tk: 7, offset: Some(-4), ..half },
        ]),
    ]
}

#[test]
fn attention_on_tensor_cores_equals_its_meaning() {
    for (name, limits) in TENSOR_CORES {
        check(name, (Dialect::CUDA, limits), &on_tensor_cores()[0]);
    }
}

#[test]
fn attention_on_tensor_cores_sees_what_its_attributes_say() {
    for (name, limits) in TENSOR_CORES {
        check(&format!("{name}-attributes"), (Dialect::CUDA, limits), &on_tensor_cores()[1]);
    }
}

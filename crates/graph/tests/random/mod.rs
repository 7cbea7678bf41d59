//! Random well-typed graphs, with inputs to run them on. Shared by the tests of several crates.
//!
//! Every float that an operation can read lies within about ±4 and every integer within ±9: what
//! grows is squashed (by `tanh`, a factor, a minimum), so that rounding stays rounding. An *exact*
//! value is the same number in every dtype and under every rewrite; discontinuous operations see
//! exact values only.
#![allow(dead_code, reason = "every test uses its own part")]

mod composites;
mod moves;
mod scalars;

use metal_candle_graph::autodiff::{Trainable, gradients};
use metal_candle_graph::oracle::Value;
use metal_candle_graph::{
    BinaryOp, ComputationGraph, DType, Dims, NodeId, Operation, Scalar, Shape, TensorType, UnaryOp,
};

/// A graph, values for its inputs, and how far each output may be from the oracle's, in units of
/// `1 + |expected|`.
pub(crate) struct Case {
    pub(crate) graph: ComputationGraph,
    pub(crate) inputs: Vec<Value>,
    pub(crate) tolerances: Vec<f64>,
    /// The last outputs are the gradients of this loss with respect to these inputs.
    pub(crate) gradients: Option<(NodeId, Vec<NodeId>)>,
}

/// What graphs are drawn from.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    /// Operations drawn; each is a few nodes.
    pub(crate) ops: usize,
    pub(crate) extents: &'static [usize],
    pub(crate) max_rank: usize,
    /// Elements of a value.
    pub(crate) max_len: usize,
    pub(crate) floats: &'static [DType],
    /// Library calls (products, indexing, scans, attention), beside what becomes kernels.
    pub(crate) calls: bool,
    /// Only what the methods of `LazyTensor` say.
    pub(crate) public: bool,
}

pub(crate) const SMALL: Limits = Limits {
    ops: 20,
    extents: &[1, 1, 2, 2, 3, 4, 5],
    max_rank: 4,
    max_len: 80,
    floats: &[DType::F64, DType::F32, DType::F32, DType::BF16, DType::F16],
    calls: true,
    public: false,
};

/// `0..n`, or so many times as many as the environment asks for: a search for rarer bugs than CI
/// has time for.
pub(crate) fn seeds(n: u64) -> std::ops::Range<u64> {
    let times = std::env::var("METAL_CANDLE_GRAPHS").ok();
    0..n * times.map_or(1, |times| times.parse().expect("METAL_CANDLE_GRAPHS is a number"))
}

/// splitmix64
#[derive(Clone)]
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// In `0..n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() >> 11) as usize % n
    }
    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// A value of the graph, and what is known of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Var {
    pub(crate) id: NodeId,
    exact: bool,
    /// No kink was applied to an inexact value on the way here: its gradient is continuous.
    smooth: bool,
    /// The coarsest float on the way here.
    coarsest: DType,
}

/// The mean of a value's sine, and pairs of an input and its gradient.
struct Gradients {
    of: Var,
    loss: NodeId,
    found: Vec<[NodeId; 2]>,
}

pub(crate) struct Gen {
    pub(crate) rng: Rng,
    limits: Limits,
    pub(crate) g: ComputationGraph,
    inputs: Vec<Value>,
    pool: Vec<Var>,
}

/// Graph number `seed`.
pub(crate) fn case(seed: u64, limits: &Limits) -> Case {
    let g = ComputationGraph::new();
    let rng = Rng(seed.wrapping_mul(0x2545_f491_4f6c_dd1d));
    let mut gen_ = Gen { rng, limits: *limits, g, inputs: Vec::new(), pool: Vec::new() };
    gen_.leaf();
    for _ in 0..limits.ops / 4 + gen_.rng.below(limits.ops) {
        gen_.step();
    }
    gen_.finish()
}

impl Gen {
    fn step(&mut self) {
        match self.rng.below(16) {
            0 => self.leaf(),
            1 | 2 => self.unary(),
            3..=5 => self.binary(),
            6 => self.select_or_cast(),
            7 => self.reduce(),
            8 | 9 => self.view(),
            10 => self.join(),
            11 | 12 if self.limits.calls => self.index(),
            13 if self.limits.calls => self.product(),
            11..=13 => self.view(),
            _ => self.composite(),
        }
    }

    /// The outputs: the last value, a few others, sometimes the gradients of one of them.
    fn finish(mut self) -> Case {
        let mut outputs = vec![self.pool[self.pool.len() - 1]];
        for _ in 0..self.rng.below(4) {
            let all = self.pool.clone();
            outputs.push(self.rng.pick(&all));
        }
        let mut tolerances: Vec<f64> = outputs.iter().map(|v| tolerance(v.coarsest)).collect();
        let mut ids: Vec<NodeId> = outputs.iter().map(|v| v.id).collect();
        let gradients = self.gradients().map(|Gradients { of, loss, found }| {
            ids.extend(found.iter().map(|[_, gradient]| *gradient));
            tolerances.resize(ids.len(), 10.0 * tolerance(of.coarsest));
            (loss, found.iter().map(|[input, _]| *input).collect())
        });
        self.g.outputs = ids;
        Case { graph: self.g, inputs: self.inputs, tolerances, gradients }
    }

    /// The gradients of a value with respect to one or two inputs that reach it.
    fn gradients(&mut self) -> Option<Gradients> {
        let smooth = |s: &Gen, v: Var| v.smooth && s.is_float(v.id) && !s.shape(v).is_empty();
        let of = self.any_where(smooth)?;
        if self.rng.one_in(2) {
            return None;
        }
        let x = self.g.unary(UnaryOp::Sin, of.id).unwrap();
        let mean = self.g.mean(x, Dims::new(0..self.shape(of).rank())).unwrap();
        let loss = self.g.reshape(mean, Shape::SCALAR).unwrap();
        let mut found = Vec::new();
        for id in self.g.ids() {
            let leaf = matches!(self.g[id].op, Operation::Input(_)) && self.is_float(id);
            let trainable = [Trainable { node: id, name: format!("{id:?}") }];
            if leaf
                && found.len() < 2
                && let Ok(gradient) = gradients(&mut self.g, loss, &trainable)
            {
                found.push([id, gradient[0]]);
            }
        }
        (!found.is_empty()).then_some(Gradients { of, loss, found })
    }

    // ---- drawing ----

    pub(crate) fn any(&mut self) -> Var {
        self.any_where(|_, _| true).expect("a leaf was drawn first")
    }

    /// One of the last few as often as any other: graphs get deep.
    pub(crate) fn any_where(&mut self, ok: impl Fn(&Gen, Var) -> bool) -> Option<Var> {
        let fit: Vec<Var> = self.pool.iter().copied().filter(|v| ok(self, *v)).collect();
        let recent = if self.rng.one_in(3) { fit.len() } else { fit.len().min(3) };
        (!fit.is_empty()).then(|| self.rng.pick(&fit[fit.len() - recent..]))
    }

    pub(crate) fn is_float(&self, id: NodeId) -> bool {
        self.dtype(id).is_float()
    }

    pub(crate) fn dtype(&self, id: NodeId) -> DType {
        self.g.ty(id).dtype
    }

    pub(crate) fn shape(&self, v: Var) -> Shape {
        self.g.shape(v.id)
    }

    /// A float value, made if there is none.
    pub(crate) fn float(&mut self) -> Var {
        let float = self.any_where(|s, v| s.is_float(v.id));
        float.unwrap_or_else(|| {
            let dtype = self.rng.pick(self.limits.floats);
            let shape = self.random_shape();
            self.input(dtype, shape)
        })
    }

    pub(crate) fn extent(&mut self) -> usize {
        if self.rng.one_in(60) { 0 } else { self.rng.pick(self.limits.extents) }
    }

    pub(crate) fn fits(&self, shape: &Shape) -> bool {
        shape.len() <= self.limits.max_len
    }

    fn random_shape(&mut self) -> Shape {
        let rank = self.rng.below(self.limits.max_rank + 1);
        let mut dims: Vec<usize> = (0..rank).map(|_| self.extent()).collect();
        while dims.iter().product::<usize>() > self.limits.max_len {
            let at = self.rng.below(dims.len());
            dims[at] = 1;
        }
        Shape::new(&dims).unwrap()
    }

    fn leaf(&mut self) {
        let shape = self.random_shape();
        match self.rng.below(12) {
            0 => {
                let len = self.extent().max(1);
                let dtype = self.rng.pick(&DType::ALL);
                let iota = self.g.add(Operation::Iota { len, dtype }, &[]).unwrap();
                let v = self.exact(iota, dtype);
                let v = self.bounded(v);
                self.pool.push(v);
            }
            1 if !self.limits.public => self.random_numbers(shape),
            2 => {
                let dtype = self.rng.pick(&DType::ALL);
                let c = self.constant(dtype);
                let full = self.g.broadcast_to(c.id, shape).unwrap();
                self.pool.push(Var { id: full, ..c });
            }
            3 | 4 => {
                let dtype = self.rng.pick(&[DType::U8, DType::U32, DType::I64]);
                self.input(dtype, shape);
            }
            _ => {
                let dtype = self.rng.pick(self.limits.floats);
                self.input(dtype, shape);
            }
        }
    }

    fn random_numbers(&mut self, shape: Shape) {
        use metal_candle_graph::Distribution::{Normal, Uniform};
        let seed = self.scalar_i64(self.rng.clone().below(1000) as i64);
        let dtype = self.rng.pick(self.limits.floats);
        let op = Operation::Random {
            distribution: self.rng.pick(&[Uniform, Normal]),
            stream: self.rng.below(3) as u32,
            dtype,
            shape,
        };
        let id = self.g.add(op, &[seed.id]).unwrap();
        self.keep(id, &[seed]);
    }

    /// A constant of rank 0 that rules of algebra look for, or any other.
    pub(crate) fn constant(&mut self, dtype: DType) -> Var {
        let value = if dtype.is_float() {
            self.rng.pick(&[0.0, -0.0, 1.0, 2.0, -1.0, 0.5, 1.5, -0.25])
        } else {
            self.rng.pick(&[0.0, 1.0, 2.0, 5.0])
        };
        let id = self.g.constant(Scalar::from_f64(dtype, value));
        self.exact(id, dtype)
    }

    /// A new input: eighths in [-2, 2], or integers in 0..=5 (i64: -5..=5).
    pub(crate) fn input(&mut self, dtype: DType, shape: Shape) -> Var {
        let rng = &mut self.rng;
        let draw = |_| match dtype {
            DType::U8 | DType::U32 => rng.below(6) as f64,
            DType::I64 => rng.below(11) as f64 - 5.0,
            _ => (rng.below(33) as f64 - 16.0) / 8.0,
        };
        let data = (0..shape.len()).map(draw).collect();
        self.input_of(dtype, shape, data)
    }

    pub(crate) fn input_of(&mut self, dtype: DType, shape: Shape, data: Vec<f64>) -> Var {
        let ty = TensorType::new(dtype, shape);
        let id = self.g.input(self.inputs.len() as u32, ty);
        self.inputs.push(Value { ty, data });
        let v = self.exact(id, dtype);
        self.pool.push(v);
        v
    }

    /// A run-time `i64[]`, not to be computed with.
    pub(crate) fn scalar_i64(&mut self, value: i64) -> Var {
        let v = self.input_of(DType::I64, Shape::SCALAR, vec![value as f64]);
        self.pool.pop();
        v
    }

    /// Whole numbers below `extent`, for an index or labels.
    pub(crate) fn indices(&mut self, shape: Shape, extent: usize) -> Var {
        let dtype = self.rng.pick(&[DType::U8, DType::U32, DType::I64]);
        let data = (0..shape.len()).map(|_| self.rng.below(extent) as f64).collect();
        let v = self.input_of(dtype, shape, data);
        self.pool.pop();
        v
    }

    // ---- keeping ----

    fn exact(&self, id: NodeId, dtype: DType) -> Var {
        let coarsest = if dtype.is_float() { dtype } else { DType::F64 };
        Var { id, exact: true, smooth: true, coarsest }
    }

    /// What is known of `id`, computed from `from`.
    pub(crate) fn derived(&self, id: NodeId, from: &[Var], exact: bool) -> Var {
        let own = self.dtype(id);
        let own = if own.is_float() { own } else { DType::F64 };
        let dtypes = from.iter().map(|v| v.coarsest).chain([own]);
        Var {
            id,
            exact: exact && from.iter().all(|v| v.exact),
            smooth: from.iter().all(|v| v.smooth),
            coarsest: dtypes.min_by(|a, b| tolerance(*b).total_cmp(&tolerance(*a))).unwrap(),
        }
    }

    /// Adds to the pool a value whose elements are elements of `from`, or equally exact and small.
    pub(crate) fn keep_exact(&mut self, id: NodeId, from: &[Var]) -> Var {
        let v = self.derived(id, from, true);
        self.pool.push(v);
        v
    }

    /// Adds to the pool a value that is rounded, and may be large.
    pub(crate) fn keep(&mut self, id: NodeId, from: &[Var]) -> Var {
        let v = self.derived(id, from, !self.is_float(id));
        let v = self.bounded(v);
        self.pool.push(v);
        v
    }

    pub(crate) fn bounded(&mut self, v: Var) -> Var {
        let g = &mut self.g;
        let id = match g.ty(v.id).dtype {
            DType::U8 | DType::U32 => g.binary_scalar(BinaryOp::Minimum, v.id, 9.0).unwrap(),
            DType::I64 => {
                let low = g.binary_scalar(BinaryOp::Maximum, v.id, -9.0).unwrap();
                g.binary_scalar(BinaryOp::Minimum, low, 9.0).unwrap()
            }
            _ => {
                let squash = self.rng.pick(&[UnaryOp::Tanh, UnaryOp::Tanh, UnaryOp::Sin]);
                self.g.unary(squash, v.id).unwrap()
            }
        };
        let float = self.is_float(id);
        Var { id, exact: v.exact && !float, ..v }
    }

    /// Marks a kink: a gradient through it is not compared, unless the kink is at an exact place.
    pub(crate) fn kinked(&mut self, v: Var) {
        let last = self.pool.last_mut().expect("something was kept");
        last.smooth &= v.exact;
    }
}

/// In units of `1 + |x|`, after a graph of this many steps.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 1e-1,
        DType::F16 => 1.5e-2,
        DType::F32 => 1e-4,
        DType::F64 | DType::U8 | DType::U32 | DType::I64 => 1e-9,
    }
}

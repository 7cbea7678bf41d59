//! A LoRA branch as one kernel, and the same of its gradient.

use crate::cases;
use crate::machine::DIALECTS;
use crate::plans::{Renderer, Task, check_by};
use crate::support::{self, gradients, total};
use metal_candle_compiler::{LibraryCall, Target, Work};
use metal_candle_graph::{
    BinaryOp, BlockFormat, ComputationGraph, DType, Distribution, NodeId, Operation, Shape,
    TensorType, UnaryOp, oracle,
};

/// Leading dims and rows, what is summed over, columns, rank.
#[derive(Clone, Copy)]
struct Sizes {
    rows: &'static [usize],
    depth: usize,
    cols: usize,
    rank: usize,
}

/// One row, as when decoding; less and more than a block's; ranks from 1 to the largest that is one kernel.
const SIZES: [Sizes; 7] = [
    Sizes { rows: &[1], depth: 300, cols: 290, rank: 8 },
    Sizes { rows: &[5], depth: 7, cols: 9, rank: 1 },
    Sizes { rows: &[16], depth: 32, cols: 256, rank: 16 },
    Sizes { rows: &[2, 3, 17], depth: 33, cols: 70, rank: 3 },
    Sizes { rows: &[3, 40], depth: 64, cols: 48, rank: 64 },
    Sizes { rows: &[70], depth: 65, cols: 300, rank: 20 },
    Sizes { rows: &[150], depth: 24, cols: 40, rank: 8 },
];

/// What the branch is part of.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Forward,
    /// With the gradients of x, a and b.
    Training,
    /// The same, and some of what the branch sees of x is dropped.
    Dropout,
}

fn ty(dtype: DType, dims: &[usize]) -> TensorType {
    TensorType::new(dtype, Shape::new(dims).unwrap())
}

/// `x w`, with one w for all leading dims.
fn dot(g: &mut ComputationGraph, x: NodeId, w: NodeId) -> NodeId {
    let (x_dims, w_dims) = (g.shape(x), g.shape(w));
    let leading = &x_dims.dims()[..x_dims.rank() - 2];
    let all = Shape::new(&[leading, w_dims.dims()].concat()).unwrap();
    let w = g.broadcast_to(w, all).unwrap();
    g.add(Operation::Dot, &[x, w]).unwrap()
}

fn dropped(g: &mut ComputationGraph, x: NodeId, seed: u32) -> NodeId {
    let (seed, shape) = (g.input(seed, ty(DType::I64, &[])), g.shape(x));
    let (distribution, dtype) = (Distribution::Uniform, DType::F32);
    let drawn = g.add(Operation::Random { distribution, stream: 3, dtype, shape }, &[seed]);
    let kept = g.binary_scalar(BinaryOp::Ge, drawn.unwrap(), 0.25).unwrap();
    let zero = g.scalar_like(x, 0.0);
    let zero = g.broadcast_to(zero, shape).unwrap();
    g.add(Operation::Select, &[kept, x, zero]).unwrap()
}

/// `base + (x aᵀ) bᵀ / 2`, a and b as they are in files.
fn branch(g: &mut ComputationGraph, base: NodeId, x: NodeId, [a, b]: [NodeId; 2]) -> NodeId {
    let [down, up] = [a, b].map(|m| g.transpose(m).unwrap());
    let low = dot(g, x, down);
    let high = dot(g, low, up);
    let scaled = g.binary_scalar(BinaryOp::Mul, high, 0.5).unwrap();
    g.binary(BinaryOp::Add, base, scaled).unwrap()
}

fn finish(name: String, graph: ComputationGraph, tolerance: f64) -> Task {
    let inputs = cases::inputs(&graph);
    let want = oracle::evaluate(&graph, &inputs).unwrap();
    let tolerances = vec![tolerance; graph.outputs.len()];
    Task { name, graph, inputs, donated: Vec::new(), want, tolerances }
}

fn task(sizes: Sizes, dtype: DType, kind: Kind) -> Task {
    let Sizes { rows, depth, cols, rank } = sizes;
    let mut g = ComputationGraph::new();
    let given = g.input(0, ty(dtype, &[rows, &[depth]].concat()));
    let w = g.input(1, ty(dtype, &[depth, cols]));
    let [a, b] = [g.input(2, ty(dtype, &[rank, depth])), g.input(3, ty(dtype, &[cols, rank]))];
    let x = if rows.len() == 1 { given } else { g.unary(UnaryOp::Tanh, given).unwrap() };
    let base = dot(&mut g, x, w);
    let seen = if kind == Kind::Dropout { dropped(&mut g, x, 4) } else { x };
    let y = branch(&mut g, base, seen, [a, b]);
    g.outputs = vec![y];
    if kind != Kind::Forward {
        let z = g.unary(UnaryOp::Tanh, y).unwrap();
        let loss = total(&mut g, z);
        let grads = gradients(&mut g, loss, &[given, a, b]);
        g.outputs.extend(grads);
    }
    let tolerance = if dtype == DType::F32 { 2e-4 } else { 0.2 };
    finish(format!("{rows:?} of {depth} by {cols}, rank {rank}, {dtype}, {kind:?}"), g, tolerance)
}

fn tasks() -> Vec<Task> {
    use DType::{BF16, F16, F32};
    let of = |sizes| [task(sizes, F32, Kind::Training), task(sizes, BF16, Kind::Forward)];
    let mut all: Vec<Task> = SIZES.into_iter().flat_map(of).collect();
    all.extend([task(SIZES[2], F32, Kind::Forward), task(SIZES[2], BF16, Kind::Training)]);
    all.extend([task(SIZES[5], F32, Kind::Dropout), task(SIZES[4], F16, Kind::Training)]);
    all
}

/// What one x is multiplied with, as for queries, keys and values: their gradients come together in that of x. The last
/// base is in blocks.
fn three_of_one_x() -> Task {
    const N: usize = 64;
    let mut g = ComputationGraph::new();
    let x = g.input(0, ty(DType::F32, &[20, N]));
    let mut outputs = Vec::new();
    let mut wrt = vec![x];
    for i in 0..3 {
        let at = 1 + 3 * i;
        let base = if i < 2 {
            let w = g.input(at, ty(DType::F32, &[N, N]));
            dot(&mut g, x, w)
        } else {
            let (format, rows, cols) = (BlockFormat::Q8_0, N, N);
            let w = g.input(at, ty(DType::U8, &[rows * format.bytes_for(cols).unwrap()]));
            g.add(Operation::QuantDot { format, rows, cols, transposed: false }, &[x, w]).unwrap()
        };
        let ab =
            [g.input(at + 1, ty(DType::F32, &[6, N])), g.input(at + 2, ty(DType::F32, &[N, 6]))];
        let y = branch(&mut g, base, x, ab);
        outputs.push(g.unary(UnaryOp::Tanh, y).unwrap());
        wrt.extend(ab);
    }
    let sum = g.binary(BinaryOp::Mul, outputs[0], outputs[1]).unwrap();
    let sum = g.binary(BinaryOp::Add, sum, outputs[2]).unwrap();
    let loss = total(&mut g, sum);
    let grads = gradients(&mut g, loss, &wrt);
    g.outputs = [outputs, grads].concat();
    // Blocks of small whole numbers are weights of next to nothing.
    finish("three of one x".into(), g, 2e-3)
}

fn renderers() -> impl Iterator<Item = Renderer> {
    // What Metal's plans alone ask for can be said in CUDA C, too.
    let max_low_rank = Target::METAL.max_low_rank;
    DIALECTS.into_iter().map(move |(_, dialect, limits)| {
        let mut renderer = Renderer::new(dialect, limits);
        renderer.target.max_low_rank = max_low_rank;
        renderer
    })
}

/// How many results each branch of the plan has.
fn branches(task: &Task) -> Vec<usize> {
    let plan = metal_candle_compiler::plan(&task.graph, &Target::METAL, &task.donated).unwrap();
    let is = |work: &Work| matches!(work, Work::Call(LibraryCall::LowRank { .. }));
    plan.steps.iter().filter(|step| is(&step.work)).map(|step| step.outs.len()).collect()
}

#[test]
fn a_lora_branch_and_its_gradient_are_one_step_each() {
    for task in tasks() {
        // In training the thin product is kept for the gradients of a and b. What was dropped stands between the
        // gradient of x by the branch and the one by the base.
        let want = match task.graph.outputs.len() {
            1 => vec![1],
            _ if task.name.contains("Dropout") => vec![2],
            _ => vec![2, 2],
        };
        assert_eq!(branches(&task), want, "{}", task.name);
    }
    assert_eq!(branches(&three_of_one_x()), [2; 6]);
}

#[test]
fn lora_branches_and_their_gradients_equal_the_oracle() {
    let all = [tasks(), vec![three_of_one_x()]].concat();
    renderers().for_each(|renderer| check_by(renderer, "lora", &all, |_| false));
}

/// Forward, backward, and AdamW on a parameter and its moments, which it updates in place.
#[test]
fn steps_of_one_layer_equal_the_oracle() {
    let in_place = vec![false, false, false, true, true, true];
    let steps = [
        ("a LoRA step", support::lora_step(), Vec::new()),
        ("a LoRA step in place", support::lora_step(), in_place),
        ("rms_norm", support::rms_norm_with_gradients(), Vec::new()),
        ("swiglu and cross-entropy", support::swiglu_with_loss(), Vec::new()),
    ];
    // Sums over 512 numbers of up to 2, and over all elements of those.
    let task = |(name, graph, donated): (&str, ComputationGraph, Vec<bool>)| Task {
        donated,
        ..finish(name.to_owned(), graph, 2e-3)
    };
    let tasks: Vec<Task> = steps.map(task).into();
    renderers().for_each(|renderer| check_by(renderer, "steps", &tasks, |_| false));
}

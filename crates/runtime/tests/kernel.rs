//! The tile interpreter against a scalar walk of the kernel IR, through the plans of random graphs
//! of maps, reductions and rows of several stages, on broadcast, strided, flipped, sliced and
//! permuted operands.

#[path = "../../graph/tests/random/mod.rs"]
mod random;
mod support;
#[path = "support/walk.rs"]
mod walk;

use metal_candle_compiler::{OutputSource, Plan, Slot};
use metal_candle_graph::oracle::Value;
use metal_candle_graph::{
    BinaryOp, Composite, ComputationGraph, DType, Dims, NodeId, Operation, ReduceOp, UnaryOp,
};
use metal_candle_runtime::{AsyncGraphExecutor, Buffer};
use random::{Case, Limits, Rng, SMALL, case, seeds};
use std::sync::LazyLock;

static EXECUTORS: LazyLock<[AsyncGraphExecutor; 2]> =
    LazyLock::new(|| [1, 2].map(AsyncGraphExecutor::with_threads));

/// Around the ends of lanes, tiles and tasks.
const EDGES: &[usize] = &[1, 2, 3, 15, 16, 17, 64, 255, 256, 257, 1023, 1024, 1025, 2049, 5000];

const KERNELS: Limits = Limits { calls: false, ..SMALL };

/// [`KERNELS`] of the floats that the device computes in.
fn kernels() -> Limits {
    match support::computes(KERNELS.floats) {
        true => KERNELS,
        false => Limits { floats: &[DType::F32, DType::BF16, DType::F16], ..KERNELS },
    }
}

fn planned(g: &ComputationGraph, donated: &[bool]) -> Plan {
    metal_candle_compiler::plan(g, support::device().target(), donated).unwrap()
}

fn buffers(case: &Case, plan: &Plan) -> Vec<Buffer> {
    let used = case.inputs.iter().zip(&plan.inputs);
    let buffer = |value: &metal_candle_graph::oracle::Value, donated: bool| {
        let buffer = support::buffer(value.ty.dtype, &value.data);
        let buffer = buffer.to_device(support::device()).unwrap();
        if donated { buffer.into_owned().unwrap() } else { buffer }
    };
    used.map(|(value, input)| buffer(value, input.donated)).collect()
}

/// A random graph of these limits.
fn check(seed: u64, limits: &Limits) -> Plan {
    let mut case = case(seed, limits);
    let mut rng = Rng(seed);
    let donated: Vec<bool> = case.inputs.iter().map(|_| rng.one_in(3)).collect();
    // Both round at the same places: a twentieth of what a graph may lose is far more than they
    // differ by.
    case.tolerances.iter_mut().for_each(|t| *t /= 20.0);
    compare(&format!("graph {seed}"), &case, &donated)
}

/// Runs the plan with one thread, with two, and once more on the used arena: the same bits; near
/// the walk's values.
fn compare(name: &str, case: &Case, donated: &[bool]) -> Plan {
    let plan = planned(&case.graph, donated);
    let executable = support::executable(plan.clone())
        .unwrap_or_else(|e| panic!("{name}: {e}\n{}\n{plan}", case.graph));
    assert_eq!(executable.allocated_arena_bytes(), plan.arena_bytes);
    let run = |executor: &AsyncGraphExecutor| -> Vec<Vec<f64>> {
        let results = executor.run(&executable, buffers(case, &plan));
        let results = results.unwrap_or_else(|e| panic!("{name}: {e}\n{}", case.graph));
        results.iter().map(support::values).collect()
    };
    let [one, two] = EXECUTORS.each_ref().map(run);
    let again = run(&EXECUTORS[0]);
    let bits =
        |run: &[Vec<f64>]| -> Vec<u64> { run.concat().iter().map(|x| x.to_bits()).collect() };
    assert_eq!(bits(&one), bits(&two), "{name}: the number of threads shows\n{plan}");
    assert_eq!(bits(&one), bits(&again), "{name}: an earlier run shows\n{plan}");
    let want = walk::run(&plan, &case.inputs);
    for (i, (got, want)) in one.iter().zip(&want).enumerate() {
        let what = format!("{name}, output {i}\n{}\n{plan}\n{:#?}", case.graph, plan.steps);
        let dtype = plan.outputs[i].ty.dtype;
        support::close_on_device(got, want, dtype, case.tolerances[i], &what);
    }
    plan
}

#[test]
fn kernels_equal_the_walk_of_their_ir() {
    let limits = kernels();
    seeds(3_000).for_each(|seed| drop(check(seed, &limits)));
}

#[test]
fn kernels_of_one_dtype_equal_the_walk_of_their_ir() {
    const EACH: [&[DType]; 4] = [&[DType::F64], &[DType::F32], &[DType::BF16], &[DType::F16]];
    for floats in EACH.into_iter().filter(|floats| support::computes(floats)) {
        let limits = Limits { floats, ops: 12, ..KERNELS };
        seeds(300).for_each(|seed| drop(check(seed, &limits)));
    }
}

#[test]
fn kernels_at_the_edges_of_tiles_equal_the_walk_of_their_ir() {
    let limits = Limits { extents: EDGES, max_len: 12_000, ops: 12, ..kernels() };
    seeds(1_500).for_each(|seed| drop(check(seed, &limits)));
    let rows = Limits { max_rank: 1, ..limits };
    seeds(600).for_each(|seed| drop(check(seed, &rows)));
}

/// Large enough for several tasks, in every way to cut one.
#[test]
fn large_kernels_equal_the_walk_of_their_ir_on_any_number_of_threads() {
    let limits = Limits { extents: EDGES, max_len: 200_000, ops: 8, ..kernels() };
    seeds(100).for_each(|seed| drop(check(1 << 32 | seed, &limits)));
}

#[test]
fn kernels_of_nothing_equal_the_walk_of_their_ir() {
    let limits = Limits { extents: &[0, 0, 1, 2, 17], ops: 10, ..kernels() };
    seeds(400).for_each(|seed| drop(check(seed, &limits)));
}

/// The cases above do update memory in place, donated and scratch alike.
#[test]
fn random_plans_update_in_place() {
    let limits = kernels();
    let plans: Vec<Plan> = (0..300).map(|seed| check(seed, &limits)).collect();
    let donated =
        |o: &metal_candle_compiler::PlanOutput| matches!(o.source, OutputSource::Donated(_));
    assert!(plans.iter().filter(|p| p.outputs.iter().any(donated)).count() > 20);
    let in_place = |p: &&Plan| {
        p.steps.iter().any(|s| {
            let arena = |o: &&metal_candle_compiler::Operand| matches!(o.slot, Slot::Arena { .. });
            s.outs.iter().filter(arena).any(|o| s.args.iter().any(|a| a.slot == o.slot))
        })
    };
    assert!(plans.iter().filter(in_place).count() > 10);
    assert!(plans.iter().map(|p| p.steps.len()).max() > Some(8));
}

/// A graph of `build(inputs)` on these vectors.
fn compare_on(
    name: &str,
    dtype: DType,
    data: &[&[f64]],
    build: impl Fn(&mut ComputationGraph, &[NodeId]) -> Vec<NodeId>,
) {
    let value = |x: &&[f64]| Value::new(dtype, &[x.len()], x.to_vec()).unwrap();
    let inputs: Vec<Value> = data.iter().map(value).collect();
    let mut graph = ComputationGraph::new();
    let ids: Vec<NodeId> = (0..).zip(&inputs).map(|(i, v)| graph.input(i, v.ty)).collect();
    graph.outputs = build(&mut graph, &ids);
    let tolerances = vec![support::tolerance(dtype); graph.outputs.len()];
    compare(
        &format!("{name} of {dtype}"),
        &Case { graph, inputs, tolerances, gradients: None },
        &[],
    );
}

/// Loops that ask for the next row or tile while they compute, and stores that wait until an argument has been read or need not.
#[test]
fn dear_rows_and_maps_equal_the_walk_in_place_and_elsewhere() {
    type Build = fn(&mut ComputationGraph, NodeId) -> NodeId;
    let softmax: Build =
        |g, x| g.add(Operation::Composite(Composite::Softmax { dim: 1 }), &[x]).unwrap();
    let gated: Build = |g, x| {
        let y = g.binary_scalar(BinaryOp::Mul, x, 2.0).unwrap();
        let gelu = g.unary(UnaryOp::Gelu, y).unwrap();
        let y = g.binary(BinaryOp::Mul, gelu, x).unwrap();
        let y = g.binary(BinaryOp::Add, y, x).unwrap();
        g.unary(UnaryOp::Relu, y).unwrap()
    };
    for (name, build) in [("softmax", softmax), ("gated", gated)] {
        for (dtype, dims) in [
            (DType::F32, [1, 5]),
            (DType::F32, [3, 4_096]),
            (DType::F32, [70, 2_065]),
            (DType::BF16, [5, 2_065]),
        ] {
            let len = dims[0] * dims[1];
            let data = (0..len).map(|i| (i * 7_919 % 1_000) as f64 / 128.0 - 4.0).collect();
            let inputs = vec![Value::new(dtype, &dims, data).unwrap()];
            let mut graph = ComputationGraph::new();
            let x = graph.input(0, inputs[0].ty);
            graph.outputs = vec![build(&mut graph, x)];
            let tolerances = vec![support::tolerance(dtype)];
            let case = Case { graph, inputs, tolerances, gradients: None };
            let plans = [false, true].map(|donated| compare(name, &case, &[donated]));
            let is_in_place = |p: &Plan| matches!(p.outputs[0].source, OutputSource::Donated(0));
            assert_eq!(plans.each_ref().map(is_in_place), [false, true], "{name}");
        }
    }
}

const NOT_FINITE: [f64; 3] = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];

/// Zeros of both signs, what is no number, what is nearly none, and halves to be rounded; more than
/// a vector of them.
fn special_floats() -> Vec<f64> {
    let finite = [0.0, -0.0, 0.5, -0.5, 1.5, 2.5, -2.5, 1.0, -1.0, 1e-30, -1e-30, 1e4, -1e4, 87.0];
    [&NOT_FINITE[..], &finite].concat().repeat(3)
}

#[test]
fn scalar_functions_of_special_values_equal_the_walk() {
    let x = special_floats();
    for dtype in support::FLOATS.into_iter().filter(|dtype| support::computes(&[*dtype])) {
        for f in UnaryOp::ALL {
            compare_on(f.as_str(), dtype, &[&x], |g, x| vec![g.unary(*f, x[0]).unwrap()]);
        }
        // Every pair.
        let (a, b): (Vec<f64>, Vec<f64>) =
            x[..17].iter().flat_map(|a| x[..17].iter().map(|b| (*a, *b))).unzip();
        for f in BinaryOp::ALL {
            let build =
                |g: &mut ComputationGraph, x: &[NodeId]| vec![g.binary(*f, x[0], x[1]).unwrap()];
            compare_on(f.as_str(), dtype, &[&a, &b], build);
        }
    }
}

#[test]
fn reductions_of_special_values_equal_the_walk() {
    let all = |g: &mut ComputationGraph, x: &[NodeId]| {
        let reduce = |op: &ReduceOp| g.reduce(*op, x[0], Dims::new([0])).unwrap();
        ReduceOp::ALL.iter().map(reduce).collect::<Vec<_>>()
    };
    for dtype in support::FLOATS.into_iter().filter(|dtype| support::computes(&[*dtype])) {
        for n in [1, 15, 16, 17, 33, 500] {
            for special in [&NOT_FINITE[..], &[-0.0]].concat() {
                for at in [0, n / 2, n - 1] {
                    let mut x: Vec<f64> = (0..n).map(|i| (i % 7) as f64 - 3.0).collect();
                    x[at] = special;
                    compare_on("reduce", dtype, &[&x], all);
                }
            }
        }
    }
}

#[test]
fn integers_wrap_after_every_instruction() {
    for (dtype, x) in [
        (DType::U8, vec![0.0, 1.0, 2.0, 127.0, 128.0, 254.0, 255.0]),
        (DType::U32, vec![0.0, 1.0, 65_536.0, 2_147_483_648.0, 4_294_967_295.0]),
        (DType::I64, vec![0.0, 1.0, -1.0, 7.0, 9e18, i64::MIN as f64]),
    ] {
        for f in UnaryOp::ALL.iter().filter(|f| f.takes_integers()) {
            compare_on(f.as_str(), dtype, &[&x], |g, x| {
                let y = g.unary(*f, x[0]).unwrap();
                vec![g.binary_scalar(BinaryOp::Div, y, 2.0).unwrap()]
            });
        }
        let (a, b): (Vec<f64>, Vec<f64>) =
            x.iter().flat_map(|a| x.iter().map(|b| (*a, *b))).unzip();
        for f in BinaryOp::ALL.iter().filter(|f| **f != BinaryOp::Pow) {
            compare_on(f.as_str(), dtype, &[&a, &b], |g, x| {
                let y = g.binary(*f, x[0], x[1]).unwrap();
                vec![g.binary_scalar(BinaryOp::Div, y, 2.0).unwrap()]
            });
        }
        compare_on("pow", dtype, &[&x], |g, x| {
            let three = g.scalar_like(x[0], 3.0);
            let y = g.binary(BinaryOp::Pow, x[0], three).unwrap();
            vec![g.binary_scalar(BinaryOp::Div, y, 2.0).unwrap()]
        });
    }
}

/// The sum of a row is read in the kernel that makes it, where it has no memory to wrap in.
#[test]
fn sums_of_integers_wrap_before_they_are_read() {
    for (dtype, value) in [(DType::U8, 200.0), (DType::U32, 4e9)] {
        for n in [3, 100, 3_000] {
            compare_on("sum", dtype, &[&vec![value; n]], |g, x| {
                let sum = g.sum(x[0], Dims::new([0])).unwrap();
                let half = g.binary_scalar(BinaryOp::Div, sum, 2.0).unwrap();
                vec![g.binary(BinaryOp::Minimum, x[0], half).unwrap(), half]
            });
        }
    }
}

//! The tile interpreter against a scalar walk of the kernel IR, through the plans of random graphs of maps, reductions
//! and rows of several stages, on broadcast, strided, flipped, sliced and permuted operands.

#[path = "../../graph/tests/random/mod.rs"]
mod random;
mod support;
#[path = "support/walk.rs"]
mod walk;

use metal_candle_compiler::{OutputSource, Plan, Slot, Target};
use metal_candle_graph::{ComputationGraph, DType};
use metal_candle_runtime::{AsyncGraphExecutor, Buffer, Executable};
use random::{Case, Limits, Rng, SMALL, case};
use std::sync::LazyLock;

static EXECUTORS: LazyLock<[AsyncGraphExecutor; 2]> =
    LazyLock::new(|| [1, 2].map(AsyncGraphExecutor::with_threads));

/// Around the ends of lanes, tiles and tasks.
const EDGES: &[usize] = &[1, 2, 3, 15, 16, 17, 64, 255, 256, 257, 1023, 1024, 1025, 2049, 5000];

const KERNELS: Limits = Limits { calls: false, ..SMALL };

fn planned(g: &ComputationGraph, donated: &[bool]) -> Plan {
    metal_candle_compiler::plan(g, &Target::CPU, donated).unwrap()
}

fn buffers(case: &Case, plan: &Plan) -> Vec<Buffer> {
    let used = case.inputs.iter().zip(&plan.inputs);
    let buffer = |value: &metal_candle_graph::oracle::Value, donated: bool| {
        let buffer = support::buffer(value.ty.dtype, &value.data);
        if donated { buffer.into_owned().unwrap() } else { buffer }
    };
    used.map(|(value, input)| buffer(value, input.donated)).collect()
}

/// Runs the plan with one thread, with two, and once more on the used arena: the same bits; near the walk's values.
fn check(seed: u64, limits: &Limits) -> Plan {
    let case = case(seed, limits);
    let mut rng = Rng(seed);
    let donated: Vec<bool> = case.inputs.iter().map(|_| rng.one_in(3)).collect();
    let plan = planned(&case.graph, &donated);
    let executable = Executable::new(plan.clone())
        .unwrap_or_else(|e| panic!("graph {seed}: {e}\n{}\n{plan}", case.graph));
    assert_eq!(executable.allocated_arena_bytes(), plan.arena_bytes);
    let run = |executor: &AsyncGraphExecutor| -> Vec<Vec<f64>> {
        let results = executor.run(&executable, buffers(&case, &plan));
        let results = results.unwrap_or_else(|e| panic!("graph {seed}: {e}\n{}", case.graph));
        results.iter().map(support::values).collect()
    };
    let [one, two] = EXECUTORS.each_ref().map(run);
    let again = run(&EXECUTORS[0]);
    let bits =
        |run: &[Vec<f64>]| -> Vec<u64> { run.concat().iter().map(|x| x.to_bits()).collect() };
    assert_eq!(bits(&one), bits(&two), "graph {seed}: the number of threads shows\n{plan}");
    assert_eq!(bits(&one), bits(&again), "graph {seed}: an earlier run shows\n{plan}");
    let want = walk::run(&plan, &case.inputs);
    for (i, (got, want)) in one.iter().zip(&want).enumerate() {
        let what = format!("graph {seed}, output {i}\n{}\n{plan}\n{:#?}", case.graph, plan.steps);
        support::close(got, want, case.tolerances[i], &what);
    }
    plan
}

#[test]
fn kernels_equal_the_walk_of_their_ir() {
    (0..3_000).for_each(|seed| drop(check(seed, &KERNELS)));
}

#[test]
fn kernels_of_one_dtype_equal_the_walk_of_their_ir() {
    const EACH: [&[DType]; 4] = [&[DType::F64], &[DType::F32], &[DType::BF16], &[DType::F16]];
    for floats in EACH {
        let limits = Limits { floats, ops: 12, ..KERNELS };
        (0..300).for_each(|seed| drop(check(seed, &limits)));
    }
}

#[test]
fn kernels_at_the_edges_of_tiles_equal_the_walk_of_their_ir() {
    let limits = Limits { extents: EDGES, max_len: 12_000, ops: 12, ..KERNELS };
    (0..500).for_each(|seed| drop(check(seed, &limits)));
    let rows = Limits { max_rank: 1, ..limits };
    (0..200).for_each(|seed| drop(check(seed, &rows)));
}

/// Large enough for several tasks, in every way to cut one.
#[test]
fn large_kernels_equal_the_walk_of_their_ir_on_any_number_of_threads() {
    let limits = Limits { extents: EDGES, max_len: 120_000, ops: 8, ..KERNELS };
    (0..60).for_each(|seed| drop(check(1 << 32 | seed, &limits)));
}

#[test]
fn kernels_of_nothing_equal_the_walk_of_their_ir() {
    let limits = Limits { extents: &[0, 0, 1, 2, 17], ops: 10, ..KERNELS };
    (0..400).for_each(|seed| drop(check(seed, &limits)));
}

/// The cases above do update memory in place, donated and scratch alike.
#[test]
fn random_plans_update_in_place() {
    let plans: Vec<Plan> = (0..300).map(|seed| check(seed, &KERNELS)).collect();
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

//! Random graphs recorded through `LazyTensor`: the planned run gives what the oracle says,
//! gradients included, by `eval_all`, by `compile`, and with donated arguments.

#[path = "../../graph/tests/random/mod.rs"]
mod random;
#[path = "support/replay.rs"]
mod replay;
#[path = "support/testbed.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod testbed;
#[path = "support/values.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod values;

use metal_candle::graph::NodeId;
use metal_candle::graph::oracle::{self, Value};
use metal_candle::{DType, LazyTensor, Result, compile, grad};
use random::{Case, Limits, Rng, SMALL, case, seeds};
use std::sync::Arc;

const PUBLIC: Limits = Limits { public: true, ..SMALL };

/// The outputs of the case on these inputs, gradients by `grad`.
fn outputs(case: &Case, inputs: &[LazyTensor]) -> Result<Vec<LazyTensor>> {
    let (loss, wrt) = case.gradients.clone().unzip();
    let wrt = wrt.unwrap_or_default();
    let plain = &case.graph.outputs[..case.graph.outputs.len() - wrt.len()];
    let wanted: Vec<NodeId> = plain.iter().copied().chain(loss).chain(wrt.clone()).collect();
    let made = replay::replay(&case.graph, &wanted, inputs)?;
    let of = |id: &NodeId| made[id.index()].clone().unwrap();
    let mut outputs: Vec<LazyTensor> = plain.iter().map(of).collect();
    if let Some(loss) = loss {
        let wrt: Vec<LazyTensor> = wrt.iter().map(of).collect();
        outputs.extend(grad(&of(&loss), &wrt.iter().collect::<Vec<_>>())?);
    }
    Ok(outputs)
}

#[track_caller]
fn assert_near(seed: u64, case: &Case, got: &[LazyTensor], want: &[Value]) {
    assert_eq!(got.len(), want.len(), "graph {seed}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(got.dims(), want.ty.shape.dims(), "graph {seed}, output {i}");
        let slack = testbed::slack_of(got.dtype(), want.data.iter().copied());
        let got = values::values(got).unwrap();
        for (at, (got, want)) in got.iter().zip(&want.data).enumerate() {
            let near = (got - want).abs() <= case.tolerances[i] * (1.0 + want.abs()) + slack;
            assert!(
                near,
                "graph {seed}, output {i}, element {at}: expected {want}, got {got}\n{}",
                case.graph
            );
        }
    }
}

fn check_eval(seed: u64, limits: &Limits) {
    let case = case(seed, limits);
    let want = oracle::evaluate(&case.graph, &case.inputs).unwrap();
    let inputs: Vec<LazyTensor> = case.inputs.iter().map(values::tensor).collect();
    let got =
        outputs(&case, &inputs).unwrap_or_else(|e| panic!("graph {seed}: {e}\n{}", case.graph));
    let roots: Vec<&LazyTensor> = got.iter().filter(|x| !x.is_evaluated()).collect();
    if !roots.is_empty() {
        let executable = LazyTensor::cached_plan(&roots).unwrap();
        let planned = executable.plan().arena_bytes;
        assert_eq!(executable.allocated_arena_bytes(), planned, "graph {seed}");
        LazyTensor::eval_all(&roots)
            .unwrap_or_else(|e| panic!("graph {seed}: {e}\n{}", case.graph));
        assert_eq!(executable.allocated_arena_bytes(), planned, "graph {seed}, after a run");
    }
    assert_near(seed, &case, &got, &want);
}

/// The same as a compiled function of its inputs, some of them donated.
fn check_compiled(seed: u64, limits: &Limits) {
    let case = Arc::new(case(seed, limits));
    let want = oracle::evaluate(&case.graph, &case.inputs).unwrap();
    let mut rng = Rng(seed);
    let donated: Vec<usize> = (0..case.inputs.len()).filter(|_| rng.one_in(3)).collect();
    let traced = Arc::clone(&case);
    let f = compile(move |args: &[LazyTensor]| outputs(&traced, args)).donate(donated);
    for _ in 0..2 {
        let args = case.inputs.iter().map(values::tensor).collect();
        let got = f.call(args).unwrap_or_else(|e| panic!("graph {seed}: {e}\n{}", case.graph));
        assert_near(seed, &case, &got, &want);
    }
}

/// Without the floats that the device does not compute in; `None` where none is left.
fn on_device(limits: Limits) -> Option<Limits> {
    if limits.floats.iter().all(|dtype| testbed::computes(*dtype)) {
        return Some(limits);
    }
    let floats = limits.floats.iter().copied().filter(|dtype| testbed::computes(*dtype));
    let floats: &'static [DType] = floats.collect::<Vec<_>>().leak();
    (!floats.is_empty()).then_some(Limits { floats, ..limits })
}

/// Checks so many graphs.
fn check_each(n: u64, limits: Limits, check: fn(u64, &Limits)) {
    if let Some(limits) = on_device(limits) {
        seeds(n).for_each(|seed| check(seed, &limits));
    }
}

#[test]
fn evaluated_graphs_equal_the_oracle() {
    check_each(2_500, PUBLIC, check_eval);
}

#[test]
fn evaluated_graphs_of_one_dtype_equal_the_oracle() {
    const EACH: [&[DType]; 4] = [&[DType::F64], &[DType::F32], &[DType::BF16], &[DType::F16]];
    // Other graphs than those of the test above: a plan that two threads run has two arenas.
    let check = |seed, limits: &Limits| check_eval(seed + 1_000_000, limits);
    for floats in EACH {
        check_each(250, Limits { floats, ..PUBLIC }, check);
    }
}

#[test]
fn deep_graphs_equal_the_oracle() {
    let limits = Limits { ops: 80, floats: &[DType::F64, DType::F32], ..PUBLIC };
    check_each(250, limits, check_eval);
}

#[test]
fn compiled_graphs_equal_the_oracle() {
    check_each(1_000, PUBLIC, check_compiled);
}

//! Runs that are asked for before those that they go on from are over do what they do one by one.

mod support;

use metal_candle_compiler::{OutputSource, plan};
use metal_candle_graph::{BinaryOp, ComputationGraph, DType, Dims, Operation, TensorType};
use metal_candle_runtime::{AsyncGraphExecutor, Buffer, Device, Error, Executable, InFlight};
use std::sync::Arc;
use support::{device, shape, values};

/// More than travels by way of the host.
const N: usize = 20_000;

/// `state + x`, in place, and the sum over it.
fn adding() -> Arc<Executable> {
    let mut g = ComputationGraph::new();
    let state = g.input(0, TensorType::new(DType::F32, shape(&[N])));
    let x = g.input(1, TensorType::new(DType::F32, shape(&[])));
    let added = g.broadcast_to(x, shape(&[N])).unwrap();
    let next = g.binary(BinaryOp::Add, state, added).unwrap();
    let sum = g.sum(next, Dims::new([0])).unwrap();
    g.outputs = vec![next, sum];
    let plan = plan(&g, device().target(), &[true, false]).unwrap();
    assert_eq!(plan.outputs[0].source, OutputSource::Donated(0), "{plan}");
    Arc::new(Executable::new(plan, device()).unwrap())
}

/// On the device.
fn buffer(dtype: DType, values: &[f64]) -> Buffer {
    support::buffer(dtype, values).to_device(device()).unwrap()
}

fn start(executable: &Arc<Executable>, inputs: Vec<Buffer>) -> Result<InFlight, Error> {
    AsyncGraphExecutor::global().start(executable, inputs)
}

#[test]
fn runs_that_go_on_from_runs_in_flight_see_what_those_made() {
    let executable = adding();
    let mut state = buffer(DType::F32, &vec![0.0; N]);
    let mut flights = Vec::new();
    for i in 0..10 {
        let mut run = start(&executable, vec![state, buffer(DType::F32, &[f64::from(i)])]).unwrap();
        assert_eq!(run.is_over(), !matches!(device(), Device::Cuda(_)));
        state = run.take(0).unwrap();
        flights.push(run);
    }
    // Reading waits by itself.
    assert_eq!(values(&state), vec![45.0; N]);
    for (i, run) in flights.into_iter().enumerate().rev() {
        let mut results = run.wait().unwrap();
        assert!(results[0].is_none());
        let state = (0..=i).sum::<usize>() as f64;
        assert_eq!(values(&results.remove(1).unwrap()), [state * N as f64], "run {i}");
    }
}

#[test]
fn a_run_that_nobody_waits_for_leaves_its_memory_in_order() {
    let executable = adding();
    let held = executable.allocated_arena_bytes();
    for _ in 0..20 {
        let state = buffer(DType::F32, &vec![1.0; N]);
        drop(start(&executable, vec![state, buffer(DType::F32, &[2.0])]).unwrap());
    }
    assert_eq!(executable.allocated_arena_bytes(), held);
    let state = buffer(DType::F32, &vec![1.0; N]);
    let inputs = vec![state, buffer(DType::F32, &[2.0])];
    let results = start(&executable, inputs).unwrap().wait().unwrap();
    assert_eq!(values(results[0].as_ref().unwrap()), vec![3.0; N]);
    assert_eq!(values(results[1].as_ref().unwrap()), [3.0 * N as f64]);
}

#[test]
fn what_only_the_run_can_show_is_the_error_of_its_end() {
    let mut g = ComputationGraph::new();
    let x = g.input(0, TensorType::new(DType::F32, shape(&[9])));
    let index = g.input(1, TensorType::new(DType::U32, shape(&[3])));
    g.outputs = vec![g.add(Operation::Gather { dim: 0 }, &[x, index]).unwrap()];
    let plan = plan(&g, device().target(), &[false, false]).unwrap();
    let executable = Arc::new(Executable::new(plan, device()).unwrap());
    let run = |index: &[f64]| {
        let inputs = vec![buffer(DType::F32, &[0.5; 9]), buffer(DType::U32, index)];
        start(&executable, inputs).and_then(InFlight::wait)
    };
    let error = run(&[1.0, 9.0, 3.0]).unwrap_err();
    assert!(matches!(error, Error::Graph(_)), "{error:?}");
    let results = run(&[1.0, 8.0, 3.0]).unwrap();
    assert_eq!(values(results[0].as_ref().unwrap()), [0.5; 3]);
}

#[test]
fn what_is_listed_for_a_plan_is_what_its_executable_holds() {
    let executable = adding();
    assert_eq!(executable.workspaces(), device().workspaces(executable.plan()).unwrap());
}

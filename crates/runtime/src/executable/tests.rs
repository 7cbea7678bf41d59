use super::*;
use crate::{AsyncGraphExecutor, Error};
use metal_candle_graph::{BinaryOp, ComputationGraph, DType, Shape, TensorType};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

const WORK: Duration = Duration::from_millis(100);

/// The CPU as a device beside it: it takes commands at once, works a while, and then says that it is through.
struct Beside(Arc<CpuExecutable>);

impl Beside {
    fn start(&self, plan: &Plan, inputs: Vec<Buffer>, done: Done) {
        let (cpu, plan) = (Arc::clone(&self.0), plan.clone());
        thread::spawn(move || {
            thread::sleep(WORK);
            done(cpu.run(&plan, inputs, None, None));
        });
    }
}

impl Backend for Beside {
    fn run(
        &self,
        plan: &Plan,
        inputs: Vec<Buffer>,
        _: Option<&Team>,
        _: Option<&mut Clock>,
    ) -> Result<Vec<Buffer>> {
        wait(|done| {
            self.start(plan, inputs, done);
            Ok(())
        })
    }

    fn submit(
        &self,
        plan: &Plan,
        inputs: Vec<Buffer>,
        _: Option<&Team>,
        done: Done,
    ) -> Option<Result<Vec<Buffer>>> {
        self.start(plan, inputs, done);
        None
    }

    fn workspaces(&self) -> Vec<Workspace> {
        self.0.workspaces()
    }

    fn allocated_arena_bytes(&self) -> usize {
        self.0.allocated_arena_bytes()
    }
}

/// `x + x` of three numbers, on such a device.
fn doubling() -> Executable {
    let mut g = ComputationGraph::new();
    let x = g.input(0, TensorType::new(DType::F32, Shape::new(&[3]).unwrap()));
    g.outputs = vec![g.binary(BinaryOp::Add, x, x).unwrap()];
    let plan = metal_candle_compiler::plan(&g, Device::Cpu.target(), &[]).unwrap();
    let inputs = Arc::new(Inputs::new(&plan, &Device::Cpu, Vec::new()).unwrap());
    let cpu = Arc::new(CpuExecutable::new(&plan, None, Arc::clone(&inputs)).unwrap());
    Executable { plan, device: Device::Cpu, inputs, backend: Box::new(Beside(cpu)) }
}

fn inputs() -> Vec<Buffer> {
    vec![Buffer::from_vec(vec![1.0f32, 2.0, 3.0])]
}

/// The benches of metal-candle 1.x took the time until the device had its commands.
#[test]
fn a_run_is_over_when_its_work_is_and_not_when_it_is_enqueued() {
    let started = Instant::now();
    let results = AsyncGraphExecutor::with_threads(1).run(&doubling(), inputs()).unwrap();
    assert!(started.elapsed() >= WORK, "{:?}", started.elapsed());
    assert_eq!(results[0].to_vec::<f32>().unwrap(), [2.0, 4.0, 6.0]);
}

#[test]
fn a_worker_goes_on_while_a_device_works() {
    let executor = AsyncGraphExecutor::with_threads(1);
    let executable = Arc::new(doubling());
    let started = Instant::now();
    let pending: Vec<_> =
        (0..8).map(|_| executor.submit(Arc::clone(&executable), inputs())).collect();
    assert!(!pending[0].is_ready());
    for pending in pending {
        assert_eq!(pending.wait().unwrap()[0].to_vec::<f32>().unwrap(), [2.0, 4.0, 6.0]);
    }
    assert!((WORK..8 * WORK).contains(&started.elapsed()), "{:?}", started.elapsed());
}

#[test]
fn a_run_that_is_given_up_is_an_error_and_no_wait_forever() {
    let outcome = wait(|done| {
        drop(done);
        Ok(())
    });
    assert!(matches!(outcome, Err(Error::Lost)), "{outcome:?}");
}

/// `a - b` of three numbers.
fn difference(held: Vec<Option<Buffer>>, donated: &[bool]) -> Result<Executable> {
    let mut g = ComputationGraph::new();
    let [a, b] = [0, 1].map(|i| g.input(i, TensorType::new(DType::F32, Shape::new(&[3]).unwrap())));
    g.outputs = vec![g.binary(BinaryOp::Sub, a, b).unwrap()];
    let plan = metal_candle_compiler::plan(&g, Device::Cpu.target(), donated).unwrap();
    Executable::holding(plan, &Device::Cpu, None, held)
}

fn numbers(values: [f32; 3]) -> Buffer {
    Buffer::from_vec(values.to_vec())
}

fn values_of(executable: &Executable, given: Vec<Buffer>) -> Vec<f32> {
    let results = AsyncGraphExecutor::with_threads(1).run(executable, given).unwrap();
    results[0].to_vec().unwrap()
}

#[test]
fn a_run_is_given_what_is_not_held() {
    let (one, two) = (numbers([1.0; 3]), numbers([2.0, 3.0, 4.0]));
    let first = difference(vec![Some(one.clone()), None], &[]).unwrap();
    let second = difference(vec![None, Some(one.clone())], &[]).unwrap();
    let both = difference(vec![Some(two.clone()), Some(one.clone())], &[]).unwrap();
    for _ in 0..2 {
        assert_eq!(values_of(&first, vec![two.clone()]), [-1.0, -2.0, -3.0]);
        assert_eq!(values_of(&second, vec![two.clone()]), [1.0, 2.0, 3.0]);
        assert_eq!(values_of(&first, vec![one.clone()]), [0.0; 3]);
        assert_eq!(values_of(&both, Vec::new()), [1.0, 2.0, 3.0]);
    }
    let more = AsyncGraphExecutor::with_threads(1).run(&first, vec![one.clone(), two.clone()]);
    assert!(matches!(more, Err(Error::InputCount { expected: 1, got: 2 })), "{more:?}");
    let short =
        AsyncGraphExecutor::with_threads(1).run(&second, vec![Buffer::from_vec(vec![1f32])]);
    assert!(matches!(short, Err(Error::InputType { index: 0, len: 1, .. })), "{short:?}");
}

#[test]
fn what_is_held_is_checked_and_stays_as_it_is() {
    let one = numbers([1.0; 3]);
    let hold = |held, donated| difference(held, donated).unwrap_err();
    let error = hold(vec![Some(one.clone())], &[]);
    assert!(matches!(error, Error::InputCount { expected: 2, got: 1 }), "{error:?}");
    let error = hold(vec![None, Some(Buffer::from_vec(vec![1i64, 2, 3]))], &[]);
    assert!(matches!(error, Error::InputType { index: 1, got: DType::I64, .. }), "{error:?}");
    let error = hold(vec![Some(one), None], &[true, false]);
    assert!(matches!(error, Error::DonatedShared { input: 0 }), "{error:?}");

    // The holder has the other handle: nobody can have it overwritten.
    let two = numbers([2.0; 3]);
    let holder = difference(vec![None, Some(two.clone())], &[]).unwrap();
    let donated = difference(Vec::new(), &[true, false]).unwrap();
    let run = AsyncGraphExecutor::with_threads(1).run(&donated, vec![two, numbers([1.0; 3])]);
    assert!(matches!(run, Err(Error::DonatedShared { input: 0 })), "{run:?}");
    assert_eq!(values_of(&holder, vec![numbers([2.0; 3])]), [0.0; 3]);
}

/// Candle may change a tensor in place, or give its storage other memory: what is held of it is what it is now.
#[test]
fn a_tensor_that_is_held_is_read_anew_in_every_run() {
    let new = |values: &[f32]| candle_core::Tensor::new(values, &candle_core::Device::Cpu).unwrap();
    let tensor = new(&[1.0, 2.0, 3.0]);
    let held = Buffer::from_candle(&tensor).unwrap();
    let executable = difference(vec![None, Some(held)], &[]).unwrap();
    assert_eq!(values_of(&executable, vec![numbers([4.0; 3])]), [3.0, 2.0, 1.0]);
    tensor.slice_set(&new(&[0.0, 8.0]), 0, 1).unwrap();
    assert_eq!(values_of(&executable, vec![numbers([4.0; 3])]), [3.0, 4.0, -4.0]);
}

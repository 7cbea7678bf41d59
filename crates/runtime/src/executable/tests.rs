use super::*;
use crate::AsyncGraphExecutor;
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
        _: Option<&ThreadPool>,
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
        _: Option<&ThreadPool>,
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
    let cpu = Arc::new(CpuExecutable::new(&plan, None).unwrap());
    let used = used_inputs(&plan);
    Executable { plan, device: Device::Cpu, used, backend: Box::new(Beside(cpu)) }
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

//! Awaiting gives what blocking gives, and blocks no thread.

#[path = "support/held.rs"]
mod held;
#[path = "support/testbed.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod testbed;

use crate::held::Held;
use crate::testbed::device;
use candle_core::{Device as CandleDevice, Tensor};
use metal_candle::{AsyncGraphExecutor, DType, LazyTensor, Result, compile, grad};
use metal_candle_compiler::{
    Layout, LibraryCall, Operand, OutputSource, Plan, PlanInput, PlanOutput, Slot, Step, Work,
};
use metal_candle_graph::{Shape, TensorType};
use metal_candle_runtime::{Buffer, Error as RuntimeError, Executable};
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

fn randn(dims: &[usize], seed: u64) -> LazyTensor {
    LazyTensor::randn(dims, DType::F32, seed, device()).unwrap().to_owned_copy().unwrap()
}

fn vec(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
fn assert_near(got: &Tensor, want: &Tensor) {
    assert_eq!(got.dims(), want.dims());
    let want = vec(want);
    let slack = testbed::slack_of(DType::F32, want.iter().copied().map(f64::from)) as f32;
    for (got, want) in vec(got).into_iter().zip(want) {
        let near = (got - want).abs() <= 1e-4 * (1.0 + want.abs()) + slack;
        assert!(near, "{got} is not {want}");
    }
}

/// Awaits `build()`, waits for another `build()`: the same bits.
async fn same_both_ways(build: impl Fn() -> Result<LazyTensor>) -> Tensor {
    let awaited = build().unwrap();
    let got = awaited.eval_async().await.unwrap();
    assert!(awaited.is_evaluated());
    assert_eq!(vec(&got), vec(&build().unwrap().eval().unwrap()));
    got
}

#[tokio::test]
async fn test_async_eval_basic() {
    let x = LazyTensor::from_slice(&[1f32, 2.0, 3.0], &[3], device()).unwrap();
    let y = &x + &x;
    assert!(!y.is_evaluated());
    assert_eq!(vec(&y.eval_async().await.unwrap()), [2.0, 4.0, 6.0]);
    // What is there already is there at once; an input too.
    assert!(y.is_evaluated() && vec(&y.eval_async().await.unwrap()) == [2.0, 4.0, 6.0]);
    assert_eq!(vec(&x.eval_async().await.unwrap()), [1.0, 2.0, 3.0]);
}

#[tokio::test]
async fn test_async_vs_sync_correctness() {
    let x = randn(&[33, 65], 0);
    let got = same_both_ways(|| (&x * 2.0 + 1.0).gelu()?.mul(&x)?.sum_keepdim([1])).await;
    let x = x.eval().unwrap();
    let want = (x.affine(2.0, 1.0).unwrap().gelu_erf().unwrap() * &x).unwrap();
    assert_near(&got, &want.sum_keepdim(1).unwrap());
}

#[tokio::test]
async fn test_async_matmul() {
    let (a, b) = (randn(&[3, 70, 40], 0), randn(&[3, 40, 50], 1));
    let got = same_both_ways(|| a.matmul(&b)).await;
    assert_near(&got, &a.eval().unwrap().matmul(&b.eval().unwrap()).unwrap());
}

#[tokio::test]
async fn test_async_lora_chain() {
    let (x, w) = (randn(&[4, 16, 64], 0), randn(&[64, 64], 1));
    let (a, b) = (randn(&[64, 8], 2), randn(&[8, 64], 3));
    let got = same_both_ways(|| x.lora(&x.matmul(&w)?, &a, &b, 0.5)).await;
    let [x, w, a, b] = [&x, &w, &a, &b].map(|t| t.eval().unwrap());
    let branch = x.broadcast_matmul(&a).unwrap().broadcast_matmul(&b).unwrap();
    let want = (x.broadcast_matmul(&w).unwrap() + branch.affine(0.5, 0.0).unwrap()).unwrap();
    assert_near(&got, &want);
}

/// Where Candle has all of its operations.
fn on_cpu(x: &LazyTensor) -> Tensor {
    x.eval().unwrap().to_device(&CandleDevice::Cpu).unwrap()
}

#[tokio::test]
async fn test_async_softmax() {
    let x = randn(&[17, 300], 0);
    let got = same_both_ways(|| x.softmax(-1)).await;
    assert_near(&got, &candle_nn::ops::softmax_last_dim(&on_cpu(&x)).unwrap());
}

#[tokio::test]
async fn test_async_rms_norm() {
    let (x, w) = (randn(&[17, 300], 0), randn(&[300], 1));
    let got = same_both_ways(|| x.rms_norm(&w, 1e-5)).await;
    assert_near(&got, &candle_nn::ops::rms_norm(&on_cpu(&x), &on_cpu(&w), 1e-5).unwrap());
}

/// Forward and backward of a small network, every root awaited together.
#[tokio::test]
async fn test_async_complex_graph() {
    let x = randn(&[32, 48], 0);
    let parameters = [randn(&[48, 64], 1), randn(&[64], 2), randn(&[64, 10], 3)];
    let build = || -> Result<Vec<LazyTensor>> {
        let [w, norm, out] = &parameters;
        let hidden = x.matmul(w)?.rms_norm(norm, 1e-5)?.silu()?;
        let loss = hidden.matmul(out)?.log_softmax(-1)?.mean_all()?.neg()?;
        let gradients = grad(&loss, &[w, norm, out])?;
        Ok([vec![loss], gradients].concat())
    };
    let (awaited, waited) = (build().unwrap(), build().unwrap());
    let awaited = LazyTensor::eval_all_async(&awaited.iter().collect::<Vec<_>>()).await.unwrap();
    let waited = LazyTensor::eval_all(&waited.iter().collect::<Vec<_>>()).unwrap();
    assert_eq!(awaited.len(), 4);
    for (a, b) in awaited.iter().zip(&waited) {
        assert_eq!(vec(a), vec(b));
    }
    assert!(vec(&awaited[0])[0] > 0.0 && vec(&awaited[1]).iter().any(|g| *g != 0.0));
}

#[tokio::test]
async fn several_evaluations_are_in_flight_at_once() {
    let x = randn(&[64, 64], 0);
    let build = |i: usize| x.affine(1.0 + (i % 4) as f64, 0.0)?.tanh();
    let roots: Vec<LazyTensor> = (0..16).map(|i| build(i).unwrap()).collect();
    let mut tasks: Vec<_> = roots.iter().map(|root| Box::pin(root.eval_async())).collect();
    // All are started before the first is awaited, and the last is awaited first.
    let nobody = &mut Context::from_waker(Waker::noop());
    let started: Vec<bool> = tasks.iter_mut().map(|t| t.as_mut().poll(nobody).is_ready()).collect();
    for (i, ready) in started.into_iter().enumerate().rev() {
        if !ready {
            tasks[i].as_mut().await.unwrap();
        }
        let want = build(i).unwrap().to_vec::<f32>().unwrap();
        assert_eq!(roots[i].to_vec::<f32>().unwrap(), want);
    }
}

#[tokio::test]
async fn a_compiled_function_can_be_awaited() {
    let f = compile(|x: &[LazyTensor]| Ok(vec![x[0].add(&x[1])?])).donate([0]);
    let one = || LazyTensor::from_vec(vec![1f32; 100], &[100], device()).unwrap();
    let mut sum = one();
    for _ in 0..5 {
        sum = f.call_async(vec![sum, one()]).await.unwrap().remove(0);
    }
    assert_eq!(sum.to_vec1::<f32>().unwrap(), [6.0; 100]);
}

/// Dropped before it was polled, after, and while it runs: nothing hangs, nothing is lost.
#[tokio::test]
async fn dropping_what_is_in_flight_is_safe() {
    let x = randn(&[256, 256], 0);
    for polls in 0..3 {
        let y = x.matmul(&x).unwrap().matmul(&x).unwrap().tanh().unwrap();
        let mut task = Box::pin(y.eval_async());
        for _ in 0..polls {
            if task.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready() {
                break;
            }
        }
        drop(task);
        let want = x.matmul(&x).unwrap().matmul(&x).unwrap().tanh().unwrap().eval().unwrap();
        assert_eq!(vec(&y.eval_async().await.unwrap()), vec(&want));
    }
}

#[test]
fn a_dropped_pending_frees_its_inputs_and_the_executor_goes_on() {
    let executor = AsyncGraphExecutor::with_threads(1);
    let x = randn(&[128, 128], 0);
    let executable = LazyTensor::cached_plan(&[&x.matmul(&x).unwrap()]).unwrap();
    let input = Buffer::from_vec(x.to_vec::<f32>().unwrap()).to_device(device()).unwrap();
    for _ in 0..20 {
        drop(executor.submit(Arc::clone(&executable), vec![input.clone()]));
    }
    let last = executor.submit(executable, vec![input.clone()]).wait().unwrap();
    let want = x.matmul(&x).unwrap().to_vec::<f32>().unwrap();
    assert_eq!(last[0].to_vec::<f32>().unwrap(), want);
    assert!(input.is_unique(), "a run that nobody awaits still holds its input");
}

#[test]
fn results_arrive_after_the_last_handle_of_the_executor_is_gone() {
    let executor = AsyncGraphExecutor::with_threads(2);
    let x = randn(&[128, 128], 0);
    let executable = LazyTensor::cached_plan(&[&x.matmul(&x).unwrap()]).unwrap();
    let input = Buffer::from_vec(x.to_vec::<f32>().unwrap()).to_device(device()).unwrap();
    let pending: Vec<_> =
        (0..8).map(|_| executor.submit(Arc::clone(&executable), vec![input.clone()])).collect();
    drop(executor);
    assert!(pending.into_iter().all(|p| p.wait().is_ok()));
}

/// A gather whose index does not have the shape of its result: the kernel's own check panics.
fn broken_plan() -> Plan {
    let operand = |slot, dtype, n| Operand {
        slot,
        dtype,
        layout: Layout::contiguous(Shape::new(&[n]).unwrap()),
    };
    let ty = |dtype, n| TensorType::new(dtype, Shape::new(&[n]).unwrap());
    Plan {
        target: "cpu",
        steps: vec![Step {
            work: Work::Call(LibraryCall::Gather { dim: 0 }),
            args: vec![
                operand(Slot::Input(0), DType::F32, 4),
                operand(Slot::Input(1), DType::U32, 2),
            ],
            outs: vec![operand(Slot::Output(0), DType::F32, 3)],
            label: "broken gather".into(),
            flops: 0,
            bytes: 0,
        }],
        inputs: vec![
            PlanInput { ty: ty(DType::F32, 4), donated: false },
            PlanInput { ty: ty(DType::U32, 2), donated: false },
        ],
        outputs: vec![PlanOutput { ty: ty(DType::F32, 3), source: OutputSource::Written }],
        arena_bytes: 0,
        unshared_bytes: 0,
        splits: Vec::new(),
    }
}

#[tokio::test]
async fn a_panic_in_a_kernel_is_an_error_at_the_waiter() {
    let executable = Arc::new(Executable::new(broken_plan(), &metal_candle::Device::Cpu).unwrap());
    let inputs = || vec![Buffer::from_vec(vec![0f32; 4]), Buffer::from_vec(vec![0u32; 2])];
    for threads in [1, 2] {
        let executor = AsyncGraphExecutor::with_threads(threads);
        let submit = || executor.submit(Arc::clone(&executable), inputs());
        for result in [submit().wait(), submit().await, executor.run(&executable, inputs())] {
            let Err(RuntimeError::KernelPanic { step, label, message }) = result else {
                panic!("expected the panic, got {result:?}")
            };
            assert_eq!((step, label.as_str()), (0, "broken gather"));
            assert!(message.contains("metal-candle bug"), "{message}");
        }
        // The threads are still there.
        let x = randn(&[64, 64], 0);
        let good = LazyTensor::cached_plan(&[&x.matmul(&x).unwrap()]).unwrap();
        let input = Buffer::from_vec(x.to_vec::<f32>().unwrap()).to_device(device()).unwrap();
        assert!(executor.submit(good, vec![input]).await.is_ok());
    }
}

#[tokio::test]
async fn an_error_of_the_run_reaches_whoever_awaits_it() {
    let table = randn(&[4, 2], 0);
    let ids = LazyTensor::from_slice(&[1u32, 9], &[2], device()).unwrap();
    let y = table.embedding(&ids).unwrap();
    let error = y.eval_async().await.unwrap_err().to_string();
    assert!(error.contains("index 9 is out of range for extent 4"), "{error}");
    assert!(error.contains("async_laws.rs"), "{error}");
}

#[tokio::test(flavor = "current_thread")]
async fn no_thread_of_the_async_runtime_is_blocked() {
    let y = randn(&[8], 0).exp().unwrap();
    let held = Held::back();
    let mut run = pin!(y.eval_async());
    let polled = run.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    assert!(polled.is_pending(), "the thread was kept until the run was over");
    // It has the same thread, and the run cannot end before it.
    let other = tokio::spawn(async move {
        for _ in 0..5 {
            tokio::task::yield_now().await;
        }
        drop(held);
    });
    assert_eq!(run.await.unwrap().dims(), [8]);
    other.await.unwrap();
}

/// A plain executor of one's own is enough: no runtime is named anywhere.
#[test]
fn awaiting_needs_no_runtime() {
    let y = randn(&[8], 0).exp().unwrap();
    let mut future = pin!(y.eval_async());
    let (thread, deadline) = (std::thread::current(), Instant::now() + Duration::from_secs(20));
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread)));
    loop {
        if let Poll::Ready(result) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return assert_eq!(result.unwrap().dims(), [8]);
        }
        assert!(Instant::now() < deadline, "nobody woke the waiter");
        std::thread::park_timeout(Duration::from_secs(5));
    }
}

#[test]
fn candle_sees_the_results_without_a_copy() {
    if !testbed::is_on_cpu("candle_sees_the_results_without_a_copy", "it looks at addresses") {
        return;
    }
    let x = Tensor::arange(0f32, 6.0, &CandleDevice::Cpu).unwrap();
    let lazy = LazyTensor::from_tensor(&x).unwrap();
    let same = |a: &Tensor, b: &Tensor| {
        let address = |t: &Tensor| {
            let (storage, _) = t.storage_and_layout();
            let candle_core::Storage::Cpu(storage) = &*storage else { panic!("not on the cpu") };
            storage.as_slice::<f32>().unwrap().as_ptr()
        };
        address(a) == address(b)
    };
    assert!(same(&x, &lazy.eval().unwrap()));
    let y = (&lazy * 2.0).exp().unwrap();
    assert!(same(&y.eval().unwrap(), &y.eval().unwrap()));
}

//! Laws of the whole: no recursion, no leak, no bit that depends on the number of threads.

#[path = "support/testbed.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod testbed;

use crate::testbed::device;
use metal_candle::{
    AsyncGraphExecutor, Attention, CrossEntropy, DType, LazyTensor, Result, compile, grad,
};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Memory is the process's: no two of these tests run at once.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn tensor(values: Vec<f64>) -> LazyTensor {
    let dims = [values.len()];
    LazyTensor::from_vec(values, &dims, device()).unwrap()
}

/// Runs `f` where recursion over a long chain would not end well.
fn on_a_small_stack(f: impl FnOnce() + Send + 'static) {
    let thread = std::thread::Builder::new().stack_size(512 << 10);
    thread.spawn(f).unwrap().join().unwrap();
}

fn chain(x: &LazyTensor, step: &LazyTensor, n: usize) -> LazyTensor {
    (0..n).fold(x.clone(), |x, _| x.add(step).unwrap())
}

#[test]
fn a_chain_of_a_million_operations_is_built_evaluated_and_dropped() {
    let _alone = alone();
    on_a_small_stack(|| {
        let (x, one) = (tensor(vec![0.0, 0.5]), tensor(vec![1.0, 2.0]));
        let y = chain(&x, &one, 1_000_000);
        assert_eq!(y.to_vec::<f64>().unwrap(), [1e6, 2e6 + 0.5]);
        drop(y);
        // Another one is dropped before anything was computed.
        drop(chain(&x, &one, 1_000_000));
    });
}

#[test]
fn a_long_chain_is_differentiated_and_compiled() {
    let _alone = alone();
    on_a_small_stack(|| {
        let n = 20_000;
        let f = compile(move |x: &[LazyTensor]| {
            let y = (0..n).try_fold(x[0].clone(), |y, _| y.mul(&x[1]))?;
            let loss = y.sum_all()?;
            Ok([vec![loss.clone()], grad(&loss, &[&x[0], &x[1]])?].concat())
        });
        let results = f.call(vec![tensor(vec![3.0]), tensor(vec![1.0])]).unwrap();
        let values: Vec<f64> = results.iter().map(|r| r.to_vec::<f64>().unwrap()[0]).collect();
        assert_eq!(values, [3.0, 1.0, 3.0 * f64::from(n)]);
    });
}

#[test]
fn a_compiled_function_forgets_the_shape_that_was_asked_for_longest_ago() {
    let _alone = alone();
    let traces = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&traces);
    let f = compile(move |x: &[LazyTensor]| {
        counted.fetch_add(1, Ordering::Relaxed);
        Ok(vec![x[0].sqr()?])
    });
    let traces_of = |lens: &[usize]| {
        let before = traces.load(Ordering::Relaxed);
        for len in lens {
            f.call(vec![tensor(vec![1.0; *len])]).unwrap();
        }
        traces.load(Ordering::Relaxed) - before
    };
    // 32 are kept.
    let first: Vec<usize> = (1..=32).collect();
    assert_eq!(traces_of(&first), 32);
    assert_eq!(traces_of(&[1, 33]), 1, "1 is kept, 33 is new and takes the place of 2");
    let kept: Vec<usize> = (3..=33).chain([1]).collect();
    assert_eq!(traces_of(&kept), 0);
    assert_eq!(traces_of(&[2]), 1);
}

/// Wide as well as deep: many handles of one node.
#[test]
fn a_ladder_of_shared_nodes_is_linear_work() {
    let _alone = alone();
    on_a_small_stack(|| {
        let x = tensor(vec![1.0]);
        // 2^5000 paths, 5000 nodes.
        let y = (0..5_000).fold(x, |x, _| (&x + &x) * 0.5);
        assert_eq!(y.to_vec::<f64>().unwrap(), [1.0]);
    });
}

/// Bytes of memory that the process has resident.
#[cfg(target_os = "linux")]
fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// The same plan over and over, more plans than the cache holds, and a compiled step with donated
/// state.
#[cfg(target_os = "linux")]
#[test]
fn ten_thousand_evaluations_leave_memory_where_it_was() {
    let _alone = alone();
    let x = LazyTensor::from_vec(vec![0.5f32; 4096], &[64, 64], device()).unwrap();
    let step = compile(|x: &[LazyTensor]| {
        let loss = x[0].matmul(&x[1])?.sqr()?.mean_all()?;
        let g = grad(&loss, &[&x[1]])?;
        Ok(vec![loss, x[1].sub(&g[0].affine(1e-3, 0.0)?)?])
    })
    .donate([1]);
    let mut w = LazyTensor::from_vec(vec![0.1f32; 4096], &[64, 64], device()).unwrap();
    let mut run = |n: usize| {
        for i in 0..n {
            x.softmax(-1).unwrap().matmul(&x).unwrap().eval().unwrap();
            // 100 shapes, of which the cache keeps 64.
            let rows = x.narrow(0, 0, 1 + i % 50).unwrap().narrow(1, 0, 8 + i % 2).unwrap();
            rows.exp().unwrap().sum([1]).unwrap().eval().unwrap();
            let old = std::mem::replace(&mut w, x.clone());
            let mut results = step.call(vec![x.clone(), old]).unwrap();
            w = results.remove(1);
        }
    };
    run(1_500);
    let before = resident_bytes();
    run(10_000);
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < 4 << 20, "{grown} bytes more after 10,000 rounds");
}

/// Roots that need no input, so that every executor sees the same plan and nothing else.
fn roots() -> Result<Vec<LazyTensor>> {
    let randn = |dims: &[usize], seed| LazyTensor::randn(dims, DType::F32, seed, device());
    let x = randn(&[2, 96, 4, 32], 0)?;
    let seen = Attention::new().causal().forward(&x, &x, &x)?.reshape(&[192, 128])?;
    let (w, norm, output) = (randn(&[128, 300], 1)?, randn(&[300], 2)?, randn(&[1000, 300], 3)?);
    let hidden = seen.matmul(&w)?.rms_norm(&norm, 1e-5)?.silu()?;
    let labels = LazyTensor::arange(0, 192, DType::I64, device())?;
    let loss = hidden.linear_cross_entropy(&output, &labels, CrossEntropy::new())?;
    let gradients = grad(&loss, &[&x, &w, &norm, &output])?;
    let long = randn(&[300_000], 4)?;
    let sums = long.sqr()?.sum_all()?;
    let columns = long.reshape(&[3000, 100])?.exp()?.sum([0])?;
    let index = long.abs()?.affine(10.0, 0.0)?.to_dtype(DType::U32)?;
    let counts = LazyTensor::zeros(&[100], DType::F32, device())?.index_add(&index, &long, 0)?;
    let halves = randn(&[200, 300], 5)?.to_dtype(DType::BF16)?;
    let product = halves.matmul(&halves.t()?)?.cumsum(1)?.softmax(-1)?;
    Ok([vec![loss, sums, columns, counts, product, long.argmax(0)?], gradients].concat())
}

#[test]
fn one_plan_gives_the_same_bits_on_any_number_of_threads() {
    let _alone = alone();
    let roots = roots().unwrap();
    let executable = LazyTensor::cached_plan(&roots.iter().collect::<Vec<_>>()).unwrap();
    assert!(executable.plan().inputs.is_empty(), "{}", executable.plan());
    let run = |threads: usize| -> Vec<String> {
        let executor = AsyncGraphExecutor::with_threads(threads);
        let results = executor.run(&executable, Vec::new()).unwrap();
        // Bits by way of text: every element type, NaN included.
        results.iter().map(bits).collect()
    };
    let one = run(1);
    for threads in [1, 2, 3, 7] {
        for (i, (a, b)) in one.iter().zip(&run(threads)).enumerate() {
            assert_eq!(a, b, "result {i} on {threads} threads");
        }
    }
}

fn bits(buffer: &metal_candle_runtime::Buffer) -> String {
    match buffer.dtype() {
        DType::F32 => {
            let bits = buffer.to_vec::<f32>().unwrap().into_iter().map(f32::to_bits);
            format!("{:?}", bits.collect::<Vec<_>>())
        }
        DType::BF16 => format!("{:?}", buffer.to_vec::<half::bf16>().unwrap()),
        DType::U32 => format!("{:?}", buffer.to_vec::<u32>().unwrap()),
        dtype => panic!("{dtype} is no result here"),
    }
}

#[test]
fn every_plan_allocates_the_arena_it_predicts() {
    let _alone = alone();
    let roots = roots().unwrap();
    let roots: Vec<&LazyTensor> = roots.iter().collect();
    let executable = LazyTensor::cached_plan(&roots).unwrap();
    let predicted = LazyTensor::plan(&roots).unwrap().arena_bytes;
    assert!(predicted > 0);
    assert_eq!(executable.allocated_arena_bytes(), predicted);
    let executor = AsyncGraphExecutor::with_threads(2);
    for _ in 0..3 {
        executor.run(&executable, Vec::new()).unwrap();
        assert_eq!(executable.allocated_arena_bytes(), predicted);
    }
    // Each run in flight has an arena of its own, and no more are kept than a few.
    let pending: Vec<_> = (0..6).map(|_| executor.submit(executable.clone(), Vec::new())).collect();
    pending.into_iter().for_each(|p| drop(p.wait().unwrap()));
    let held = executable.allocated_arena_bytes();
    assert!(held.is_multiple_of(predicted) && held <= 4 * predicted, "{held} of {predicted}");
}

/// Keys are rotated on their way to the cache, in one step; and alone where somebody else reads them.
#[test]
fn a_rotary_embedding_reaches_a_slice_as_it_is() {
    let _alone = alone();
    let values = |n: usize| (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) / 25.0).collect();
    let tensor = |dims: &[usize], dtype: DType| {
        let x: Vec<f32> = values(dims.iter().product());
        LazyTensor::from_vec(x, dims, device()).unwrap().to_dtype(dtype).unwrap()
    };
    for dtype in [DType::F32, DType::BF16] {
        // 700 rows are more than one task's.
        let (x, cache) = (tensor(&[2, 350, 3, 64], dtype), tensor(&[2, 400, 3, 64], dtype));
        let tables = [(); 2].map(|()| tensor(&[350, 1, 32], DType::F32));
        let start = LazyTensor::from_vec(vec![17i64], &[], device()).unwrap();
        let rotated = || x.rope(&tables[0], &tables[1]).unwrap();
        let joined = cache.slice_update(1, &rotated(), &start).unwrap();
        let alone = rotated();
        alone.eval().unwrap();
        let in_two = cache.slice_update(1, &alone, &start).unwrap();
        let read = |x: &LazyTensor| x.to_dtype(DType::F32).unwrap().to_vec::<f32>().unwrap();
        assert_eq!(read(&joined), read(&in_two), "{dtype}");
    }
}

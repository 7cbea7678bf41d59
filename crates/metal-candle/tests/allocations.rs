//! A compiled call with the same shapes allocates nothing but its outputs, and the handles to them.

#[path = "../../runtime/tests/support/counting.rs"]
#[allow(unsafe_code, reason = "an allocator cannot do without; the file belongs to the runtime")]
mod counting;
#[path = "io/support.rs"]
#[allow(dead_code, reason = "only the GGUF writer is used here")]
mod support;
#[path = "support/testbed.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod testbed;
#[path = "regressions/tiny.rs"]
#[allow(dead_code, reason = "only the decoder is used here")]
mod tiny;

use crate::testbed::device;
use counting::{Allocated, Counting, watch};
use metal_candle::io::LoraConfig;
use metal_candle::io::data::Batch;
use metal_candle::nn::LoRAAdapter;
use metal_candle::train::{AdamWConfig, TrainStep};
use metal_candle::{Compiled, DType, LazyTensor, compile, grad};
use std::sync::Arc;
use tiny::Tiny;

#[global_allocator]
static COUNTING: Counting = Counting;

/// Handles, argument lists, result lists: what a call may allocate beside the elements of its
/// outputs.
const HANDLES_BYTES: usize = 2 << 10;

/// Why these are laws of the CPU.
const COUNTS: &str = "it counts the allocations of this process";

fn full(value: f32, dims: &[usize]) -> LazyTensor {
    LazyTensor::from_vec(vec![value; dims.iter().product()], dims, device()).unwrap()
}

/// What a call allocates; its results are still there. The median of many, for a thread that first takes part in the
/// work late, on a busy machine, makes its scratch memory then.
fn repeated_call(f: &Compiled, args: impl Fn() -> Vec<LazyTensor>) -> Allocated {
    (0..9).for_each(|_| drop(f.call(args()).unwrap()));
    median(|| {
        let args = args();
        // The arguments go with the call, their memory is not what it allocated.
        let kept = args.clone();
        let (results, allocated) = watch(|| f.call(args));
        drop((results.unwrap(), kept));
        allocated
    })
}

fn median(mut call: impl FnMut() -> Allocated) -> Allocated {
    let mut all: Vec<Allocated> = (0..21).map(|_| call()).collect();
    all.sort_unstable_by_key(|a| (a.live_bytes, a.bytes));
    all[10]
}

#[track_caller]
fn assert_only_outputs(allocated: Allocated, outputs: &[usize]) {
    let bytes: usize = outputs.iter().sum();
    assert!(allocated.bytes >= bytes, "{allocated:?} for outputs of {outputs:?} bytes");
    let rest = allocated.bytes - bytes;
    assert!(rest <= HANDLES_BYTES, "{rest} bytes beside outputs of {outputs:?}: {allocated:?}");
}

/// Other threads would be counted too: one test, law by law.
#[test]
fn a_compiled_call_allocates_its_outputs_and_nothing_else() {
    if !testbed::is_on_cpu("a_compiled_call_allocates_its_outputs_and_nothing_else", COUNTS) {
        return;
    }
    start_threads();
    kernels_and_calls_use_the_arena();
    donated_state_is_updated_in_place();
    what_a_call_keeps_is_its_arena_and_the_listed_workspaces();
    calls_leave_nothing_behind();
    evaluations_leave_nothing_behind();
    products_pack_into_memory_that_is_kept();
    training_steps_reuse_their_memory();
    calls_use_the_memory_of_results_that_were_dropped();
    evaluations_keep_nothing_of_their_results();
}

/// What threads allocate when they start is not a call's.
fn start_threads() {
    let f = compile(|x: &[LazyTensor]| Ok(vec![x[0].exp()?.sum([0])?]));
    (0..20).for_each(|_| drop(f.call(vec![full(0.5, &[500, 500])]).unwrap()));
    std::thread::sleep(std::time::Duration::from_millis(200));
}

/// Several steps with scratch memory, on one thread and on several.
fn kernels_and_calls_use_the_arena() {
    for n in [16, 300] {
        let f = compile(move |x: &[LazyTensor]| {
            let hidden = x[0].softmax(-1)?.cumsum(1)?.sub(&x[0].t()?)?.rms_norm(&x[1], 1e-5)?;
            let turned = hidden.rope(&x[0].narrow(1, 0, n / 2)?, &x[0].narrow(1, 0, n / 2)?)?;
            Ok(vec![turned.exp()?, hidden.sum([0])?, hidden.flip(0)?.argmax(1)?])
        });
        let args = || vec![full(0.5, &[n, n]), full(1.0, &[n])];
        assert!(f.plan(&args()).unwrap().arena_bytes >= 4 * n * n);
        assert_only_outputs(repeated_call(&f, args), &[4 * n * n, 4 * n, 4 * n]);
    }
}

/// The state of a step is updated in place: what is new is the loss.
fn donated_state_is_updated_in_place() {
    let n = 65_536;
    let step = compile(|x: &[LazyTensor]| {
        let loss = x[0].mul(&x[1])?.sqr()?.mean_all()?;
        let g = grad(&loss, &[&x[1]])?.remove(0);
        let moment = x[2].affine(0.9, 0.0)?.add(&g.affine(0.1, 0.0)?)?;
        Ok(vec![loss, x[1].sub(&moment.affine(1e-3, 0.0)?)?, moment])
    })
    .donate([1, 2]);
    let x = full(0.5, &[n]);
    let mut state = vec![full(0.1, &[n]), full(0.0, &[n])];
    let mut call = || {
        let args = std::iter::once(x.clone()).chain(std::mem::take(&mut state)).collect();
        let (results, allocated) = watch(|| step.call(args));
        state = results.unwrap().split_off(1);
        allocated
    };
    for _ in 0..9 {
        call();
    }
    assert_only_outputs(median(call), &[4]);
}

/// Of a function that is called for the first time, whose calls pack what they multiply.
fn what_a_call_keeps_is_its_arena_and_the_listed_workspaces() {
    /// The plan, its kernels, and the tables of a run.
    const TABLES_BYTES: usize = 64 << 10;
    let n = 1100;
    let f = compile(|x: &[LazyTensor]| {
        let hidden = x[0].matmul(&x[1])?.tanh()?;
        Ok(vec![hidden.matmul(&x[1].t()?)?.softmax(-1)?.cumsum(0)?.mean_all()?])
    });
    let args = || vec![full(0.5, &[n, n]), full(0.1, &[n, n])];
    let plan = f.plan(&args()).unwrap();
    let listed = || {
        let all = device().workspaces(&plan).unwrap();
        all.iter().map(|workspace| workspace.bytes).sum::<usize>()
    };
    let before = listed();
    let allocated = watch(|| (0..5).for_each(|_| drop(f.call(args()).unwrap()))).1;
    let expected = plan.arena_bytes + listed() - before;
    let kept = usize::try_from(allocated.live_bytes).unwrap();
    let arena = plan.arena_bytes;
    println!("{kept} bytes kept: arena {arena}, workspaces {before}, then {}", listed());
    assert!(arena >= 4 * n * n && listed() > before, "{before} {}", listed());
    assert!((expected..expected + TABLES_BYTES).contains(&kept), "{kept} {expected}");
}

/// The same from call to call, and nothing is left when the results are gone.
fn calls_leave_nothing_behind() {
    let f = compile(|x: &[LazyTensor]| Ok(vec![x[0].exp()?.add(&x[1])?]));
    let (x, y) = (full(0.5, &[100]), full(1.0, &[100]));
    let args = || vec![x.clone(), y.clone()];
    (0..9).for_each(|_| drop(f.call(args()).unwrap()));
    let once = || watch(|| drop(f.call(args()).unwrap())).1;
    let first = once();
    assert_eq!(first.live_bytes, 0, "{first:?}");
    for _ in 0..20 {
        assert_eq!(once(), first);
    }
}

/// Recording and evaluating with a cached plan leaves nothing behind either.
fn evaluations_leave_nothing_behind() {
    let x = full(0.5, &[64, 64]);
    let run = || drop(x.softmax(-1).unwrap().matmul(&x).unwrap().eval().unwrap());
    (0..10).for_each(|_| run());
    let allocated = median(|| watch(run).1);
    assert_eq!(allocated.live_bytes, 0, "{allocated:?}");
}

/// Operands are packed into memory that threads keep.
fn products_pack_into_memory_that_is_kept() {
    let n = 300;
    for dtype in [DType::F32, DType::BF16] {
        let f = compile(|x: &[LazyTensor]| Ok(vec![x[0].matmul(&x[1])?.tanh()?]));
        let square = |value| full(value, &[n, n]).to_dtype(dtype).unwrap().eval().unwrap();
        let (a, b) = (square(0.5), square(0.25));
        let args = || [&a, &b].map(|x| LazyTensor::from_tensor(x).unwrap()).into();
        assert_only_outputs(repeated_call(&f, args), &[dtype.size_bytes() * n * n]);
    }
}

/// After the first steps, a step allocates its batch and the handles of its parameters; nothing of it stays.
fn training_steps_reuse_their_memory() {
    let decoder = Arc::new(Tiny::new().decoder());
    let adapter = LoRAAdapter::new(LoraConfig::default(), decoder.modules(), 1, device()).unwrap();
    let parameters = adapter.parameters().len();
    let mut step = TrainStep::new(decoder, adapter, AdamWConfig::default(), 1.0, 0).unwrap();
    let ids: Vec<u32> = (0..96).map(|i| i % 7).collect();
    let labels = ids.iter().map(|id| i64::from(*id)).collect();
    let batch = Batch { batch: 2, seq: 48, trained: 96, ids, labels, documents: None };
    for _ in 0..9 {
        step.run(&batch, 1e-3).unwrap();
    }
    let allocated = median(|| watch(|| step.run(&batch, 1e-3).unwrap()).1);
    assert_eq!(allocated.live_bytes, 0, "{allocated:?}");
    let batch_bytes = 96 * (4 + 8);
    // Weight, mean and variance of each: as an argument, an input, a buffer and a result.
    let handles = HANDLES_BYTES + 3 * parameters * 512;
    assert!(allocated.bytes <= batch_bytes + handles, "{allocated:?}, {parameters} parameters");
    assert!(allocated.largest <= batch_bytes.max(3 * parameters * 64), "{allocated:?}");
}

/// A kernel's result, a library call's, and the first one again; each of them large.
fn calls_use_the_memory_of_results_that_were_dropped() {
    let (n, large) = (1100, 4 * 1100 * 1100);
    let f = compile(|x: &[LazyTensor]| {
        let y = x[0].exp()?;
        Ok(vec![y.clone(), x[0].cumsum(0)?, y])
    });
    let x = full(0.5, &[n, n]);
    let args = || vec![x.clone()];
    (0..2).for_each(|_| drop(f.call(args()).unwrap()));
    let again = watch(|| (0..5).for_each(|_| drop(f.call(args()).unwrap()))).1;
    assert!(again.largest <= HANDLES_BYTES && again.live_bytes == 0, "{again:?}");

    let former = f.call(args()).unwrap();
    let (beside, fresh) = watch(|| f.call(args()).unwrap());
    assert!(fresh.bytes >= 2 * large && fresh.largest == large, "{fresh:?}");
    let surplus = watch(|| drop((former, beside))).1.live_bytes;
    assert!((0..large as isize).contains(&(surplus + 2 * large as isize + 4096)), "{surplus}");
    assert_eq!(f.spare_bytes(), 2 * large);

    let escaped = f.call(args()).unwrap();
    let with_a_spare = f.call(args()).unwrap();
    drop(with_a_spare);
    let freed = -watch(|| drop(f)).1.live_bytes;
    assert!(freed >= 2 * large as isize, "{freed} bytes of two spares");
    let last = escaped[0].to_vec::<f32>().unwrap()[n * n - 1];
    assert!((last - 0.5f32.exp()).abs() < 1e-6, "{last}");
    let freed = -watch(|| drop(escaped)).1.live_bytes;
    assert!(freed >= 2 * large as isize, "{freed} bytes of two results");
}

/// Their plans are kept, for whoever asks for the same again; the memory of what was asked for is not.
fn evaluations_keep_nothing_of_their_results() {
    let x = full(0.5, &[1100, 1100]);
    let evaluate = || x.exp().unwrap().to_vec::<f32>().unwrap();
    drop(evaluate());
    let allocated = watch(|| drop(evaluate())).1;
    assert!(allocated.largest >= 4 * 1100 * 1100, "{allocated:?}");
    assert_eq!(allocated.live_bytes, 0, "{allocated:?}");
}

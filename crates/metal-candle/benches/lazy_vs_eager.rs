//! The same work through eager Candle and through `LazyTensor`, in one process, in turn.
//!
//! `cargo bench -p metal-candle --bench lazy_vs_eager [-- FILTER]`
//!
//! Both sides use all threads, read the same inputs and produce a `candle_core::Tensor` (or the new gradients).
//! The lazy side is a compiled function, as a program that repeats the work would use it. Each row is the median of
//! pairs measured in turn, so that a machine that slows down slows down both.

use candle_core::{D, DType, Device as CandleDevice, Module, Tensor, Var};
use metal_candle::{Attention, Compiled, Device, LazyTensor, compile, grad};
use std::time::{Duration, Instant};

type Eager = Box<dyn Fn()>;

/// One row: a name and the two ways to do its work.
struct Row {
    name: String,
    eager: Eager,
    lazy: Box<dyn Fn()>,
}

fn main() {
    let filter: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let wanted = |name: &str| filter.is_empty() || filter.iter().any(|f| name.contains(f.as_str()));
    println!(
        "{:44} {:>12} {:>12} {:>8}",
        "work (f32, all threads)", "candle us", "lazy us", "ratio"
    );
    for row in rows().into_iter().filter(|row| wanted(&row.name)) {
        let (eager, lazy) = pairs(&row);
        let ratio = eager.as_secs_f64() / lazy.as_secs_f64();
        println!("{:44} {:>12.1} {:>12.1} {:>7.2}x", row.name, us(eager), us(lazy), ratio);
    }
    if wanted("overhead") {
        overhead();
    }
}

fn us(t: Duration) -> f64 {
    t.as_secs_f64() * 1e6
}

/// Medians of both sides, measured in turn for about two seconds.
fn pairs(row: &Row) -> (Duration, Duration) {
    for _ in 0..3 {
        (row.eager)();
        (row.lazy)();
    }
    let time = |f: &dyn Fn()| {
        let start = Instant::now();
        f();
        start.elapsed()
    };
    let (mut eager, mut lazy) = (Vec::new(), Vec::new());
    let start = Instant::now();
    while eager.len() < 7 || start.elapsed() < Duration::from_secs(2) && eager.len() < 20_000 {
        eager.push(time(&row.eager));
        lazy.push(time(&row.lazy));
    }
    (median(eager), median(lazy))
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn rows() -> Vec<Row> {
    let mut rows = vec![lora_forward(), lora_step()];
    for dims in [[64, 512], [1024, 1024], [4096, 4096]] {
        rows.extend([softmax(dims), rms_norm(dims), swiglu(dims), gelu_chain(dims)]);
    }
    rows.extend([block(false), block(true)]);
    rows
}

fn randn(dims: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1.0, dims, &CandleDevice::Cpu).expect("random tensor")
}

fn lazy(x: &Tensor) -> LazyTensor {
    LazyTensor::from_tensor(x).expect("a contiguous tensor")
}

/// A compiled function of fixed arguments, run to a Candle tensor.
fn compiled(f: Compiled, args: Vec<LazyTensor>) -> Box<dyn Fn()> {
    Box::new(move || {
        let results = f.call(args.clone()).expect("the compiled call");
        for result in results {
            std::hint::black_box(result.eval().expect("a result"));
        }
    })
}

fn map(
    name: String,
    inputs: Vec<Tensor>,
    eager: fn(&[Tensor]) -> candle_core::Result<Tensor>,
    lazy_f: fn(&[LazyTensor]) -> metal_candle::Result<LazyTensor>,
) -> Row {
    let args = inputs.iter().map(lazy).collect();
    Row {
        name,
        eager: Box::new(move || drop(std::hint::black_box(eager(&inputs).expect("eager")))),
        lazy: compiled(compile(move |a: &[LazyTensor]| Ok(vec![lazy_f(a)?])), args),
    }
}

fn softmax(dims: [usize; 2]) -> Row {
    map(
        format!("softmax {dims:?}"),
        vec![randn(&dims)],
        |x| candle_nn::ops::softmax_last_dim(&x[0]),
        |x| x[0].softmax(-1),
    )
}

fn rms_norm(dims: [usize; 2]) -> Row {
    map(
        format!("rms_norm {dims:?}"),
        vec![randn(&dims), randn(&dims[1..])],
        |x| candle_nn::ops::rms_norm(&x[0], &x[1], 1e-6),
        |x| x[0].rms_norm(&x[1], 1e-6),
    )
}

fn swiglu(dims: [usize; 2]) -> Row {
    map(
        format!("silu(a) * b {dims:?}"),
        vec![randn(&dims), randn(&dims)],
        |x| x[0].silu()?.mul(&x[1]),
        |x| x[0].silu()?.mul(&x[1]),
    )
}

fn gelu_chain(dims: [usize; 2]) -> Row {
    map(
        format!("relu(gelu(2x + 1) * x + x) {dims:?}"),
        vec![randn(&dims)],
        |x| ((x[0].affine(2.0, 1.0)?.gelu_erf()? * &x[0])? + &x[0])?.relu(),
        |x| x[0].affine(2.0, 1.0)?.gelu()?.mul(&x[0])?.add(&x[0])?.relu(),
    )
}

/// x [4, 16, 512], W [512, 512], rank 8.
fn lora_inputs() -> Vec<Tensor> {
    vec![randn(&[4, 16, 512]), randn(&[512, 512]), randn(&[512, 8]), randn(&[8, 512])]
}

fn eager_lora(x: &[Tensor]) -> candle_core::Result<Tensor> {
    let branch = x[0].broadcast_matmul(&x[2])?.broadcast_matmul(&x[3])?;
    x[0].broadcast_matmul(&x[1])? + branch.affine(2.0, 0.0)?
}

fn lazy_lora(x: &[LazyTensor]) -> metal_candle::Result<LazyTensor> {
    let branch = x[0].matmul(&x[2])?.matmul(&x[3])?;
    x[0].matmul(&x[1])?.add(&branch.affine(2.0, 0.0)?)
}

fn lora_forward() -> Row {
    map("LoRA forward 4x16x512, W 512x512, r 8".into(), lora_inputs(), eager_lora, lazy_lora)
}

fn lora_step() -> Row {
    let inputs = lora_inputs();
    let args: Vec<LazyTensor> = inputs.iter().map(lazy).collect();
    let vars: Vec<Var> = inputs[2..].iter().map(|x| Var::from_tensor(x).expect("var")).collect();
    let eager_inputs: Vec<Tensor> = inputs[..2].to_vec();
    let step = compile(|x: &[LazyTensor]| {
        let loss = lazy_lora(x)?.sqr()?.mean_all()?;
        grad(&loss, &[&x[2], &x[3]])
    });
    Row {
        name: "LoRA forward + backward, same".into(),
        eager: Box::new(move || {
            let x =
                [&eager_inputs[..], &[vars[0].as_tensor().clone(), vars[1].as_tensor().clone()]]
                    .concat();
            let loss = eager_lora(&x).and_then(|y| y.sqr()?.mean_all()).expect("eager");
            std::hint::black_box(loss.backward().expect("backward"));
        }),
        lazy: compiled(step, args),
    }
}

const HIDDEN: usize = 576;
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;
const INNER: usize = 1536;
const TOKENS: usize = 256;

/// A SmolLM2-135M block on one row of 256 tokens; backward: to the input and a LoRA branch on q.
fn block(backward: bool) -> Row {
    let weight = |out: usize, input: usize| randn(&[out, input]).affine(0.02, 0.0).expect("scale");
    let kv = KV_HEADS * HEAD_DIM;
    let inputs = vec![
        randn(&[1, TOKENS, HIDDEN]),
        randn(&[HIDDEN]),
        weight(HIDDEN, HIDDEN),
        weight(kv, HIDDEN),
        weight(kv, HIDDEN),
        weight(HIDDEN, HIDDEN),
        randn(&[HIDDEN]),
        weight(INNER, HIDDEN),
        weight(INNER, HIDDEN),
        weight(HIDDEN, INNER),
        weight(8, HIDDEN),
        weight(HIDDEN, 8),
    ];
    let args: Vec<LazyTensor> = inputs.iter().map(lazy).collect();
    if !backward {
        return map("transformer block 256x576 forward".into(), inputs, eager_block, lazy_block);
    }
    let trained = [0, 10, 11];
    let vars: Vec<Var> =
        trained.iter().map(|i| Var::from_tensor(&inputs[*i]).expect("var")).collect();
    let step = compile(move |x: &[LazyTensor]| {
        let loss = lazy_block(x)?.sqr()?.mean_all()?;
        grad(&loss, &trained.map(|i| &x[i]))
    });
    Row {
        name: "transformer block 256x576 forward + backward".into(),
        eager: Box::new(move || {
            let mut x = inputs.clone();
            for (i, var) in trained.iter().zip(&vars) {
                x[*i] = var.as_tensor().clone();
            }
            let loss = eager_block_unfused(&x).and_then(|y| y.sqr()?.mean_all()).expect("eager");
            std::hint::black_box(loss.backward().expect("backward"));
        }),
        lazy: compiled(step, args),
    }
}

/// Candle with its fused norm and softmax, which have no gradient.
fn eager_block(x: &[Tensor]) -> candle_core::Result<Tensor> {
    eager_block_with(
        x,
        |x, w| candle_nn::ops::rms_norm(x, w, 1e-6),
        candle_nn::ops::softmax_last_dim,
    )
}

/// Candle with norm and softmax that can be differentiated.
fn eager_block_unfused(x: &[Tensor]) -> candle_core::Result<Tensor> {
    eager_block_with(
        x,
        |x, w| candle_nn::ops::rms_norm_slow(x, w, 1e-6),
        |x| candle_nn::ops::softmax(x, D::Minus1),
    )
}

fn eager_block_with(
    x: &[Tensor],
    norm: impl Fn(&Tensor, &Tensor) -> candle_core::Result<Tensor>,
    softmax: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
) -> candle_core::Result<Tensor> {
    let linear = |x: &Tensor, w: &Tensor| candle_nn::Linear::new(w.clone(), None).forward(x);
    let heads =
        |x: Tensor, n: usize| x.reshape((1, TOKENS, n, HEAD_DIM))?.transpose(1, 2)?.contiguous();
    let repeat = |x: Tensor| {
        let shape = (1, KV_HEADS, HEADS / KV_HEADS, TOKENS, HEAD_DIM);
        x.unsqueeze(2)?.expand(shape)?.reshape((1, HEADS, TOKENS, HEAD_DIM))
    };
    let h = norm(&x[0], &x[1])?;
    let low = linear(&linear(&h, &x[10])?, &x[11])?.affine(2.0, 0.0)?;
    let q = heads((linear(&h, &x[2])? + low)?, HEADS)?;
    let k = repeat(heads(linear(&h, &x[3])?, KV_HEADS)?)?;
    let v = repeat(heads(linear(&h, &x[4])?, KV_HEADS)?)?;
    let scores = q.matmul(&k.t()?)?.affine(1.0 / (HEAD_DIM as f64).sqrt(), 0.0)?;
    let seen = softmax(&scores.broadcast_add(&causal_mask()?)?)?.matmul(&v)?;
    let seen = seen.transpose(1, 2)?.reshape((1, TOKENS, HIDDEN))?;
    let y = (&x[0] + linear(&seen, &x[5])?)?;
    let h = norm(&y, &x[6])?;
    let inner = (linear(&h, &x[7])?.silu()? * linear(&h, &x[8])?)?;
    y + linear(&inner, &x[9])?
}

fn causal_mask() -> candle_core::Result<Tensor> {
    thread_local!(static MASK: Tensor = {
        let at = |i: usize| if i % TOKENS > i / TOKENS { f32::NEG_INFINITY } else { 0.0 };
        let values: Vec<f32> = (0..TOKENS * TOKENS).map(at).collect();
        Tensor::from_vec(values, (TOKENS, TOKENS), &CandleDevice::Cpu).expect("mask")
    });
    MASK.with(|mask| mask.to_dtype(DType::F32))
}

fn lazy_block(x: &[LazyTensor]) -> metal_candle::Result<LazyTensor> {
    let linear = |x: &LazyTensor, w: &LazyTensor| x.matmul(&w.t()?);
    let heads = |x: LazyTensor, n: usize| x.reshape(&[1, TOKENS, n, HEAD_DIM]);
    let h = x[0].rms_norm(&x[1], 1e-6)?;
    let low = linear(&linear(&h, &x[10])?, &x[11])?.affine(2.0, 0.0)?;
    let q = heads(linear(&h, &x[2])?.add(&low)?, HEADS)?;
    let k = heads(linear(&h, &x[3])?, KV_HEADS)?;
    let v = heads(linear(&h, &x[4])?, KV_HEADS)?;
    let seen = Attention::new().causal().forward(&q, &k, &v)?.reshape(&[1, TOKENS, HIDDEN])?;
    let y = x[0].add(&linear(&seen, &x[5])?)?;
    let h = y.rms_norm(&x[6], 1e-6)?;
    let inner = linear(&h, &x[7])?.silu()?.mul(&linear(&h, &x[8])?)?;
    y.add(&linear(&inner, &x[9])?)
}

/// What the graph itself costs: recording and finding the plan, and a compiled call of almost no work.
fn overhead() {
    let inputs: Vec<LazyTensor> = lora_inputs().iter().map(lazy).collect();
    let record = || lazy_lora(&inputs).expect("record");
    record().eval().expect("first run");
    let find = || drop(std::hint::black_box(LazyTensor::cached_plan(&[&record()]).expect("plan")));
    println!("\n{:57} {:>12.2}", "record the LoRA graph and find its plan", us(repeat(find)));
    let one = LazyTensor::from_vec(vec![1f32; 8], &[8], &Device::Cpu).expect("eight ones");
    let f = compile(|x: &[LazyTensor]| Ok(vec![x[0].add(&x[0])?]));
    let call = || drop(std::hint::black_box(f.call(vec![one.clone()]).expect("call")));
    println!("{:57} {:>12.2}", "a compiled call that adds eight numbers", us(repeat(call)));
}

fn repeat(f: impl Fn()) -> Duration {
    const TIMES: u32 = 200;
    let batch = || {
        let start = Instant::now();
        (0..TIMES).for_each(|_| f());
        start.elapsed() / TIMES
    };
    for _ in 0..10 {
        batch();
    }
    median((0..50).map(|_| batch()).collect())
}

//! What the CPU does of the work that peers are timed at, one JSON line a row.
//!
//! `cargo bench -p metal-candle --bench cpu [-- FILTER]`; `cargo xtask bench cpu` puts the peers and the machine's ceilings
//! beside it. Every row is a compiled function, called as a program that repeats the work would; the time is the median
//! of the calls of about a second.

use candle_core::{DType, Device as CandleDevice, Tensor};
use metal_candle::{LazyTensor, Result, compile};
use std::time::{Duration, Instant};

/// One row: its name, its inputs, the work, and what the work costs at least.
struct Row {
    name: String,
    inputs: Vec<Tensor>,
    work: fn(&[LazyTensor]) -> Result<LazyTensor>,
    /// Multiplications and additions; 0 where memory is the limit.
    flops: f64,
    /// Bytes that must be read and written.
    bytes: f64,
}

fn main() {
    let filter: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let wanted = |name: &str| filter.is_empty() || filter.iter().any(|f| name.contains(f.as_str()));
    for row in rows().into_iter().filter(|row| wanted(&row.name)) {
        let us = row.median_us();
        println!(
            r#"{{"work": "{}", "us": {us:.1}, "gflops": {:.1}, "gbytes": {:.1}}}"#,
            row.name,
            row.flops / us / 1e3,
            row.bytes / us / 1e3
        );
    }
}

fn rows() -> Vec<Row> {
    let mut rows = vec![lora_branch(), lora_forward()];
    for dims in [[64, 512], [1024, 1024], [4096, 4096]] {
        rows.extend([
            map("softmax", dims, false, |x| x[0].softmax(-1)),
            map("rms_norm", dims, true, |x| x[0].rms_norm(&x[1], 1e-6)),
            map("silu(x)*x", dims, false, |x| x[0].silu()?.mul(&x[0])),
            map("relu(gelu(2x+1)*x+x)", dims, false, |x| {
                x[0].affine(2.0, 1.0)?.gelu()?.mul(&x[0])?.add(&x[0])?.relu()
            }),
        ]);
    }
    for dtype in [DType::F32, DType::BF16] {
        for n in [512, 1024, 2048] {
            rows.push(matmul(dtype, [n, n, n], false));
        }
        // The projections of SmolLM2-135M on 4 x 256 tokens, their gradient, and a thin product of LoRA.
        rows.push(matmul(dtype, [1024, 576, 576], true));
        rows.push(matmul(dtype, [1024, 1536, 576], true));
        rows.push(matmul(dtype, [1024, 576, 1536], true));
        rows.push(matmul(dtype, [1024, 8, 576], false));
        rows.push(matmul(dtype, [1024, 576, 8], false));
        rows.push(matmul(dtype, [1, 49152, 576], true));
    }
    rows
}

fn randn(dims: &[usize], dtype: DType) -> Tensor {
    let x = Tensor::randn(0f32, 1.0, dims, &CandleDevice::Cpu).expect("random tensor");
    x.to_dtype(dtype).expect("a cast")
}

fn matmul(dtype: DType, [m, n, k]: [usize; 3], transposed: bool) -> Row {
    let b: &[usize] = if transposed { &[n, k] } else { &[k, n] };
    let size = dtype.size_in_bytes() as f64;
    Row {
        name: format!("matmul {dtype:?} {m}x{k}x{n}").to_lowercase(),
        inputs: vec![randn(&[m, k], dtype), randn(b, dtype)],
        work: if transposed { |x| x[0].matmul(&x[1].t()?) } else { |x| x[0].matmul(&x[1]) },
        flops: 2.0 * (m * n * k) as f64,
        bytes: size * (m * k + k * n + m * n) as f64,
    }
}

fn map(
    name: &str,
    dims: [usize; 2],
    weight: bool,
    work: fn(&[LazyTensor]) -> Result<LazyTensor>,
) -> Row {
    let mut inputs = vec![randn(&dims, DType::F32)];
    if weight {
        inputs.push(randn(&dims[1..], DType::F32));
    }
    let bytes = 8.0 * (dims[0] * dims[1]) as f64;
    Row { name: format!("{name} {}x{}", dims[0], dims[1]), inputs, work, flops: 0.0, bytes }
}

fn lora_inputs() -> Vec<Tensor> {
    let dims: [&[usize]; 4] = [&[64, 512], &[512, 512], &[512, 8], &[8, 512]];
    dims.map(|dims| randn(dims, DType::F32)).into()
}

fn lora_branch() -> Row {
    Row {
        name: "lora branch 64x512x512 r8".into(),
        inputs: lora_inputs(),
        work: |x| x[0].matmul(&x[2])?.matmul(&x[3])?.affine(2.0, 0.0),
        flops: 2.0 * 64.0 * 8.0 * 1024.0,
        bytes: 4.0 * (2.0 * 64.0 * 512.0 + 2.0 * 8.0 * 512.0),
    }
}

fn lora_forward() -> Row {
    Row {
        name: "base+lora 64x512x512 r8".into(),
        inputs: lora_inputs(),
        work: |x| {
            let branch = x[0].matmul(&x[2])?.matmul(&x[3])?.affine(2.0, 0.0)?;
            x[0].matmul(&x[1])?.add(&branch)
        },
        flops: 2.0 * 64.0 * (512.0 * 512.0 + 8.0 * 1024.0),
        bytes: 4.0 * (2.0 * 64.0 * 512.0 + 512.0 * 512.0),
    }
}

impl Row {
    fn median_us(&self) -> f64 {
        let work = self.work;
        let f = compile(move |x: &[LazyTensor]| Ok(vec![work(x)?]));
        let lazy = |x: &Tensor| LazyTensor::from_tensor(x).expect("a contiguous tensor");
        let args: Vec<LazyTensor> = self.inputs.iter().map(lazy).collect();
        let once = || {
            let start = Instant::now();
            let results = f.call(args.clone()).expect("the compiled call");
            std::hint::black_box(results[0].eval().expect("a result"));
            start.elapsed()
        };
        for _ in 0..3 {
            once();
        }
        let (mut times, start) = (Vec::new(), Instant::now());
        while times.len() < 7 || start.elapsed() < Duration::from_secs(1) && times.len() < 20_000 {
            times.push(once());
        }
        times.sort_unstable();
        times[times.len() / 2].as_secs_f64() * 1e6
    }
}

//! Single operations, by the device's own clock: what a plan takes, not what asking for it takes.

use crate::{Context, Failure, median};
use metal_candle::{Compiled, DType, Device, LazyTensor, Result, Timing, compile};

/// What the device can do at most, measured here and now.
pub(crate) struct Ceilings {
    /// Bytes a second, read and written.
    pub(crate) copy: f64,
    /// Multiplications and additions a second, in bf16.
    pub(crate) products: f64,
}

impl Ceilings {
    pub(crate) fn measure(context: &Context) -> std::result::Result<Ceilings, Failure> {
        let d = &context.device;
        let len = 1 << 29;
        let copy = compile(|x: &[LazyTensor]| Ok(vec![x[0].neg()?]));
        let x = LazyTensor::ones(&[len], DType::F32, d)?.to_owned_copy()?;
        let copy = 8.0 * len as f64 / seconds(&copy, &[x])?;
        let n = 8192;
        let product = compile(|x: &[LazyTensor]| Ok(vec![x[0].matmul(&x[1])?]));
        let side = |seed| normal(&[n, n], DType::BF16, seed, d);
        let products = 2.0 * (n as f64).powi(3) / seconds(&product, &[side(1)?, side(2)?])?;
        println!(
            r#"{{"row": "ceilings", "copy_tb_s": {:.2}, "bf16_tflop_s": {:.0}}}"#,
            copy / 1e12,
            products / 1e12
        );
        Ok(Ceilings { copy, products })
    }
}

/// The seconds of one run, the median of several.
fn seconds(f: &Compiled, args: &[LazyTensor]) -> Result<f64> {
    let mut times = Vec::new();
    for round in 0..23 {
        let (_, seconds) = f.profile(args.to_vec(), Timing::Whole)?;
        if round >= 3 {
            times.extend(seconds);
        }
    }
    Ok(median(times))
}

fn normal(dims: &[usize], dtype: DType, seed: u64, device: &Device) -> Result<LazyTensor> {
    LazyTensor::randn(dims, DType::F32, seed, device)?.to_dtype(dtype)?.to_owned_copy()
}

pub(crate) fn rows(context: &Context, ceilings: &Ceilings) -> std::result::Result<(), Failure> {
    for dtype in [DType::F32, DType::BF16] {
        for (m, k, n, r) in [(64, 512, 512, 8), (4096, 4096, 4096, 16)] {
            lora(context, ceilings, dtype, [m, k, n, r])?;
        }
        for dims in [[64, 512], [4096, 4096], [16384, 8192]] {
            maps(context, ceilings, dtype, dims)?;
        }
    }
    Ok(())
}

fn lora(
    context: &Context,
    ceilings: &Ceilings,
    dtype: DType,
    [m, k, n, r]: [usize; 4],
) -> std::result::Result<(), Failure> {
    let args: Vec<LazyTensor> = [[m, k], [k, n], [k, r], [r, n]]
        .iter()
        .enumerate()
        .map(|(seed, dims)| normal(dims, dtype, seed as u64, &context.device))
        .collect::<Result<_>>()?;
    let branch = |x: &[LazyTensor]| x[0].matmul(&x[2])?.matmul(&x[3])?.affine(2.0, 0.0);
    for (name, with_base) in [("lora branch", false), ("base+lora", true)] {
        let row = format!("{dtype} {name} {m}x{k}x{n} r{r}");
        if !context.wants(&row) {
            continue;
        }
        let f = compile(move |x: &[LazyTensor]| match with_base {
            true => Ok(vec![x[0].matmul(&x[1])?.add(&branch(x)?)?]),
            false => Ok(vec![branch(x)?]),
        });
        let us = seconds(&f, &args)? * 1e6;
        let base = if with_base { m * k * n } else { 0 };
        let flops = 2.0 * (base + m * r * (k + n)) as f64;
        let part = flops / (us * 1e-6) / ceilings.products;
        println!(r#"{{"row": "{row}", "us": {us:.2}, "part_of_bf16_ceiling": {part:.3}}}"#);
    }
    Ok(())
}

fn maps(
    context: &Context,
    ceilings: &Ceilings,
    dtype: DType,
    [rows, cols]: [usize; 2],
) -> std::result::Result<(), Failure> {
    type Op = fn(&[LazyTensor]) -> Result<LazyTensor>;
    let ops: [(&str, Op); 4] = [
        ("softmax", |x| x[0].softmax(1)),
        ("rms_norm", |x| x[0].rms_norm(&x[1], 1e-6)),
        ("silu(x)*x", |x| x[0].silu()?.mul(&x[0])),
        ("relu(gelu(2x+1)*x+x)", |x| x[0].affine(2.0, 1.0)?.gelu()?.mul(&x[0])?.add(&x[0])?.relu()),
    ];
    for (name, op) in ops {
        let row = format!("{dtype} {name} {rows}x{cols}");
        if !context.wants(&row) {
            continue;
        }
        let x = normal(&[rows, cols], dtype, 1, &context.device)?;
        let w = LazyTensor::ones(&[cols], dtype, &context.device)?.to_owned_copy()?;
        let f = compile(move |x: &[LazyTensor]| Ok(vec![op(x)?]));
        let us = seconds(&f, &[x, w])? * 1e6;
        let bytes = (2 * rows * cols * dtype.size_bytes()) as f64;
        let part = bytes / (us * 1e-6) / ceilings.copy;
        println!(r#"{{"row": "{row}", "us": {us:.2}, "part_of_copy_ceiling": {part:.3}}}"#);
    }
    Ok(())
}

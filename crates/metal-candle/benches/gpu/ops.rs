//! Single operations, by the device's own clock: what a plan takes, not what asking for it takes.

use crate::{Context, Failure, Row, median, rounded};
use metal_candle::{Compiled, DType, Device, LazyTensor, Result, Timing, compile};
use serde_json::{Value, json};

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
        Ok(Ceilings { copy, products })
    }

    pub(crate) fn json(&self) -> Value {
        let (copy, products) = (rounded(self.copy / 1e12, 2), rounded(self.products / 1e12, 0));
        json!({"row": "ceilings", "copy_tb_s": copy, "bf16_tflop_s": products})
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

pub(crate) fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for dtype in [DType::F32, DType::BF16] {
        for sizes in [[64, 512, 512, 8], [4096, 4096, 4096, 16]] {
            rows.extend(PRODUCTS.map(|(work, op)| {
                let [m, k, n, r] = sizes;
                let name = format!("{dtype} {work} {m}x{k}x{n} r{r}");
                let dims = [m, k, n];
                Row {
                    name,
                    work: json!({"work": work, "dtype": dtype.as_str(), "dims": dims, "rank": r}),
                    measure: Box::new(move |c, ceilings| {
                        let (has_base, has_branch) = (work != "lora branch", work != "linear");
                        let base = if has_base { m * k * n } else { 0 };
                        let branch = if has_branch { m * r * (k + n) } else { 0 };
                        product(c, ceilings, dtype, sizes, op, 2 * (base + branch))
                    }),
                }
            }));
        }
        for dims in [[64, 512], [4096, 4096], [16384, 8192]] {
            rows.extend(MAPS.map(|(work, op)| Row {
                name: format!("{dtype} {work} {}x{}", dims[0], dims[1]),
                work: json!({"work": work, "dtype": dtype.as_str(), "dims": dims}),
                measure: Box::new(move |c, ceilings| map(c, ceilings, dtype, dims, op)),
            }));
        }
    }
    rows
}

type Op = fn(&[LazyTensor]) -> Result<LazyTensor>;

/// Of x, a weight, both matrices of a branch, and a bias.
const PRODUCTS: [(&str, Op); 3] = [
    ("lora branch", branch),
    ("base+lora", |x| x[0].matmul(&x[1])?.add(&branch(x)?)),
    ("linear", |x| x[0].matmul(&x[1])?.add(&x[4])),
];

fn branch(x: &[LazyTensor]) -> Result<LazyTensor> {
    x[0].matmul(&x[2])?.matmul(&x[3])?.affine(2.0, 0.0)
}

fn product(
    context: &Context,
    ceilings: &Ceilings,
    dtype: DType,
    [m, k, n, r]: [usize; 4],
    op: Op,
    flops: usize,
) -> std::result::Result<Value, Failure> {
    let args: Vec<LazyTensor> = [&[m, k][..], &[k, n], &[k, r], &[r, n], &[n]]
        .iter()
        .enumerate()
        .map(|(seed, dims)| normal(dims, dtype, seed as u64, &context.device))
        .collect::<Result<_>>()?;
    let f = compile(move |x: &[LazyTensor]| Ok(vec![op(x)?]));
    let seconds = seconds(&f, &args)?;
    let floor = flops as f64 / ceilings.products;
    Ok(json!({
        "us": rounded(seconds * 1e6, 2),
        "part_of_bf16_ceiling": rounded(floor / seconds, 3),
        "seconds": seconds,
        "floor_seconds": floor,
        "ceiling": "bf16 products",
    }))
}

const MAPS: [(&str, Op); 4] = [
    ("softmax", |x| x[0].softmax(1)),
    ("rms_norm", |x| x[0].rms_norm(&x[1], 1e-6)),
    ("silu(x)*x", |x| x[0].silu()?.mul(&x[0])),
    ("relu(gelu(2x+1)*x+x)", |x| x[0].affine(2.0, 1.0)?.gelu()?.mul(&x[0])?.add(&x[0])?.relu()),
];

fn map(
    context: &Context,
    ceilings: &Ceilings,
    dtype: DType,
    [rows, cols]: [usize; 2],
    op: Op,
) -> std::result::Result<Value, Failure> {
    let x = normal(&[rows, cols], dtype, 1, &context.device)?;
    let w = LazyTensor::ones(&[cols], dtype, &context.device)?.to_owned_copy()?;
    let f = compile(move |x: &[LazyTensor]| Ok(vec![op(x)?]));
    let seconds = seconds(&f, &[x, w])?;
    let floor = (2 * rows * cols * dtype.size_bytes()) as f64 / ceilings.copy;
    Ok(json!({
        "us": rounded(seconds * 1e6, 2),
        "part_of_copy_ceiling": rounded(floor / seconds, 3),
        "seconds": seconds,
        "floor_seconds": floor,
        "ceiling": "copy",
    }))
}

//! Operations, by this library and by eager Candle.

use super::Failure;
use super::serve::{Prepared, number, text};
use candle_core::{DType, Device as CandleDevice, Tensor};
use metal_candle::{LazyTensor, Result, compile};
use serde_json::Value;

/// One row. The work is named as the table names it.
pub(crate) struct Op {
    pub(crate) work: &'static str,
    pub(crate) dtype: DType,
    /// Of a map `[rows, columns]`; of a product `[m, k, n]`.
    pub(crate) dims: Vec<usize>,
    /// Of LoRA.
    pub(crate) rank: usize,
    /// Whether the result is written over the first input, which is donated: no new memory is asked of the system.
    pub(crate) in_place: bool,
}

/// The same, recorded and run at once.
type Lazy = fn(&[LazyTensor]) -> Result<LazyTensor>;
type Eager = fn(&[Tensor]) -> candle_core::Result<Tensor>;

/// Every work; `matmul_t` takes its second operand as `[n, k]`.
const WORKS: [(&str, Lazy, Eager); 8] = [
    ("softmax", |x| x[0].softmax(-1), |x| candle_nn::ops::softmax_last_dim(&x[0])),
    ("rms_norm", |x| x[0].rms_norm(&x[1], 1e-6), |x| candle_nn::ops::rms_norm(&x[0], &x[1], 1e-6)),
    ("silu(x)*x", |x| x[0].silu()?.mul(&x[0]), |x| x[0].silu()?.mul(&x[0])),
    (
        "relu(gelu(2x+1)*x+x)",
        |x| x[0].affine(2.0, 1.0)?.gelu()?.mul(&x[0])?.add(&x[0])?.relu(),
        |x| x[0].affine(2.0, 1.0)?.gelu_erf()?.mul(&x[0])?.add(&x[0])?.relu(),
    ),
    ("matmul", |x| x[0].matmul(&x[1]), |x| x[0].matmul(&x[1])),
    ("matmul_t", |x| x[0].matmul(&x[1].t()?), |x| x[0].matmul(&x[1].t()?)),
    (
        "lora branch",
        |x| x[0].matmul(&x[2])?.matmul(&x[3])?.affine(2.0, 0.0),
        |x| x[0].matmul(&x[2])?.matmul(&x[3])?.affine(2.0, 0.0),
    ),
    (
        "base+lora",
        |x| {
            let branch = x[0].matmul(&x[2])?.matmul(&x[3])?.affine(2.0, 0.0)?;
            x[0].matmul(&x[1])?.add(&branch)
        },
        |x| {
            let branch = x[0].matmul(&x[2])?.matmul(&x[3])?.affine(2.0, 0.0)?;
            x[0].matmul(&x[1])?.add(&branch)
        },
    ),
];

impl Op {
    /// Of `{"work": "softmax", "dtype": "f32", "dims": [64, 512], "rank": 0}`; the work may end in ` in place`.
    pub(crate) fn parse(row: &Value) -> std::result::Result<Op, Failure> {
        let name = text(row, "work")?;
        let (name, in_place) =
            name.strip_suffix(" in place").map_or((name, false), |name| (name, true));
        let known = WORKS.iter().find(|(work, ..)| *work == name);
        let (work, ..) = known.ok_or_else(|| format!("nothing here does {name:?}"))?;
        let dtype = match text(row, "dtype")? {
            "f32" => DType::F32,
            "bf16" => DType::BF16,
            other => return Err(format!("a dtype {other:?}: expected f32 or bf16").into()),
        };
        let dims: Vec<usize> = serde_json::from_value(row["dims"].clone())?;
        let expected = if is_map(work) { 2 } else { 3 };
        if dims.len() != expected {
            return Err(format!("{work} of {dims:?}: expected {expected} numbers").into());
        }
        Ok(Op { work, dtype, dims, rank: number(row, "rank")?, in_place })
    }

    pub(crate) fn name(&self) -> String {
        let dims: Vec<String> = self.dims.iter().map(ToString::to_string).collect();
        let rank = if self.rank > 0 { format!(" r{}", self.rank) } else { String::new() };
        format!("{} {:?} {}{rank}", self.work, self.dtype, dims.join("x")).to_lowercase()
    }

    /// Multiplications and additions; 0 where memory is the limit.
    pub(crate) fn flops(&self) -> f64 {
        let [m, k, n] = self.dims[..] else { return 0.0 };
        let branch = m * self.rank * (k + n);
        2.0 * match self.work {
            "lora branch" => branch,
            _ => m * k * n + branch,
        } as f64
    }

    /// Bytes that must be read and written.
    pub(crate) fn bytes(&self) -> f64 {
        let elements = match self.dims[..] {
            [m, k, n] if self.work == "lora branch" => m * (k + n) + self.rank * (k + n),
            [m, k, n] => m * k + k * n + m * n + self.rank * (k + n),
            _ => 2 * self.dims.iter().product::<usize>(),
        };
        (elements * self.dtype.size_in_bytes()) as f64
    }

    fn inputs(&self) -> Vec<Tensor> {
        let randn = |dims: &[usize]| {
            let x = Tensor::randn(0f32, 1.0, dims, &CandleDevice::Cpu).expect("random tensor");
            x.to_dtype(self.dtype).expect("a cast")
        };
        match (self.work, &self.dims[..]) {
            ("rms_norm", dims) => vec![randn(dims), randn(&dims[1..])],
            ("matmul_t", &[m, k, n]) => vec![randn(&[m, k]), randn(&[n, k])],
            (_, &[m, k, n]) => {
                let mut inputs = vec![randn(&[m, k]), randn(&[k, n])];
                if self.rank > 0 {
                    inputs.extend([randn(&[k, self.rank]), randn(&[self.rank, n])]);
                }
                inputs
            }
            (_, dims) => vec![randn(dims)],
        }
    }

    fn ways(&self) -> (Lazy, Eager) {
        let known = WORKS.iter().find(|(work, ..)| *work == self.work);
        let (_, lazy, eager) = known.expect("every row is one of the works");
        (*lazy, *eager)
    }
}

fn is_map(work: &str) -> bool {
    !work.contains("matmul") && !work.contains("lora")
}

impl Prepared {
    /// By this library: a compiled function, called as a program that repeats the work would.
    pub(crate) fn lazy(op: &Op) -> Prepared {
        let work = op.ways().0;
        let f = compile(move |x: &[LazyTensor]| Ok(vec![work(x)?]));
        let lazy = |x: &Tensor| LazyTensor::from_tensor(x).expect("a contiguous tensor");
        let mut args: Vec<LazyTensor> = op.inputs().iter().map(lazy).collect();
        if op.in_place {
            let f = f.donate([0]);
            args[0] = args[0].to_owned_copy().expect("memory for an input");
            return Prepared::new(move || {
                let rest = args[1..].to_vec();
                let mut results = f.call(args.drain(..1).chain(rest.clone()).collect())?;
                args = std::iter::once(results.remove(0)).chain(rest).collect();
                Ok(())
            });
        }
        Prepared::new(move || {
            // In memory, as it is when the call returns; not handed over to Candle, which would keep the memory.
            std::hint::black_box(f.call(args.clone())?);
            Ok(())
        })
    }

    /// By eager Candle, with its fused softmax and norm.
    pub(crate) fn eager(op: &Op) -> Prepared {
        let (work, inputs, in_place) = (op.ways().1, op.inputs(), op.in_place);
        Prepared::new(move || {
            if in_place {
                return Err("Candle does it out of place only".into());
            }
            std::hint::black_box(work(&inputs)?);
            Ok(())
        })
    }
}

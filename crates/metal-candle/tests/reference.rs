//! Every operation against PyTorch in f64: outputs and input gradients.
//!
//! The vectors are made by `reference/ops.py`. A case is run in each dtype that its tolerance
//! names, on dense and on strided Candle tensors; an operation without a case fails [`coverage`].

#[path = "reference/call.rs"]
mod call;
#[path = "reference/coverage.rs"]
mod coverage;
#[path = "reference/dialects.rs"]
mod dialects;
#[path = "../../compiler/tests/dialects/machine.rs"]
#[allow(dead_code, reason = "shared with the compiler's tests")]
mod machine;
#[path = "../../compiler/tests/dialects/plans.rs"]
#[allow(dead_code, reason = "shared with the compiler's tests")]
mod plans;
#[path = "../../compiler/tests/dialects/program.rs"]
#[allow(dead_code, reason = "shared with the compiler's tests")]
mod program;
#[path = "reference/quantised.rs"]
mod quantised;
#[path = "support/testbed.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod testbed;
#[path = "support/values.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod values;
#[path = "../../runtime/tests/support/walk.rs"]
mod walk;

use candle_core::{DType, Device, Tensor};
use metal_candle::{LazyTensor, grad};
use serde::Deserialize;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

/// Relative and absolute.
type Tolerance = [f64; 2];

/// One line of the manifest.
#[derive(Deserialize)]
struct Case {
    op: String,
    case: String,
    file: String,
    attrs: Value,
    inputs: Vec<String>,
    /// What the operation sees of an input.
    views: BTreeMap<usize, Vec<View>>,
    output: String,
    grads: BTreeMap<usize, String>,
    tol: HashMap<String, Tolerance>,
    grad_tol: HashMap<String, Tolerance>,
}

/// A view of an input: `["transpose", 0, 1]`, ..
#[derive(Deserialize)]
#[serde(from = "Vec<Value>")]
struct View {
    name: String,
    args: Vec<usize>,
}

impl From<Vec<Value>> for View {
    fn from(step: Vec<Value>) -> View {
        let name = step[0].as_str().expect("the name of a view").to_string();
        let args = step[1..].iter().map(|v| v.as_u64().expect("a number of a view") as usize);
        View { name, args: args.collect() }
    }
}

/// The vectors of one file.
struct Vectors {
    cases: Vec<Case>,
    tensors: HashMap<String, Tensor>,
    /// The cotangent of every output is the beginning of this one.
    cotangent: Tensor,
}

fn folder() -> PathBuf {
    testbed::file("reference")
}

fn manifest() -> Vec<Case> {
    let text = std::fs::read(folder().join("manifest.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

fn load(file: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(folder().join(file), &Device::Cpu).unwrap()
}

impl Vectors {
    fn of(family: &str) -> Vectors {
        let file = format!("{family}.safetensors");
        let cases: Vec<Case> = manifest().into_iter().filter(|c| c.file == file).collect();
        assert!(!cases.is_empty(), "no cases of {family}");
        let cotangent = load("cotangent.safetensors").remove("cotangent").unwrap();
        Vectors { cases, tensors: load(&file), cotangent }
    }

    /// Runs every case in every dtype that its tolerance names.
    fn check(&self, layout: Layout) {
        let mut wrong = Vec::new();
        for dtype in ["f64", "f32", "bf16", "native"] {
            if dtype == "f64" && !testbed::computes(metal_candle::DType::F64) {
                continue;
            }
            for case in self.cases.iter().filter(|case| case.tol.contains_key(dtype)) {
                let slack = testbed::slack_of_device;
                let found = Run { vectors: self, case, dtype, layout, slack }.check();
                wrong.extend(
                    found.iter().map(|what| format!("{}/{} {dtype}: {what}", case.op, case.case)),
                );
            }
        }
        assert!(wrong.is_empty(), "{} values are wrong\n{}", wrong.len(), wrong.join("\n"));
    }
}

/// How the Candle tensors of the inputs lie in memory.
#[derive(Clone, Copy)]
enum Layout {
    Dense,
    /// In the order of other dims, and between elements that mean nothing.
    Strided,
}

impl Layout {
    fn lay(self, x: Tensor) -> candle_core::Result<Tensor> {
        // Candle does not stack tensors without elements on a GPU.
        let is_empty = x.elem_count() == 0 && !x.device().is_cpu();
        if matches!(self, Layout::Dense) || is_empty {
            return Ok(x);
        }
        let last = x.rank().max(1) - 1;
        let x = if x.rank() > 1 { x.transpose(0, last)? } else { x };
        let apart = Tensor::stack(&[x.ones_like()?, x.contiguous()?], x.rank())?;
        let x = apart.narrow(x.rank(), 1, 1)?.squeeze(x.rank())?;
        if x.rank() > 1 { x.transpose(0, last) } else { Ok(x) }
    }
}

/// One case in one dtype and layout.
struct Run<'a> {
    vectors: &'a Vectors,
    case: &'a Case,
    dtype: &'a str,
    layout: Layout,
    /// How much further off than the tolerance what runs it may be.
    slack: fn(metal_candle::DType) -> f64,
}

impl Run<'_> {
    /// Everything that is wrong.
    fn check(&self) -> Vec<String> {
        self.values().unwrap_or_else(|e| vec![e.to_string()])
    }

    fn values(&self) -> Result<Vec<String>, Box<dyn std::error::Error>> {
        let (y, gradients) = self.results()?;
        // Computed before y and without it: as in a training step, nothing but the gradients leaves the plan.
        let gradients = LazyTensor::eval_all(&gradients.iter().collect::<Vec<_>>())?;
        Ok(self.wrong(&y.eval()?, &gradients)?)
    }

    /// The output, and the gradients that there are vectors of, recorded.
    fn results(&self) -> Result<(LazyTensor, Vec<LazyTensor>), Box<dyn std::error::Error>> {
        let inputs = self.inputs()?;
        let y = self.call(&inputs)?;
        let wrt: Vec<&LazyTensor> = self.case.grads.keys().map(|i| &inputs[*i]).collect();
        let gradients = if wrt.is_empty() { vec![] } else { grad(&self.loss(&y)?, &wrt)? };
        Ok((y, gradients))
    }

    /// Everything that is wrong with these values.
    fn wrong(&self, y: &Tensor, gradients: &[Tensor]) -> candle_core::Result<Vec<String>> {
        let tolerance = self.case.tol[self.dtype];
        let mut wrong = self.compare("y", y, &self.case.output, tolerance)?;
        for ((i, name), got) in self.case.grads.iter().zip(gradients) {
            let tolerance = self.case.grad_tol[self.dtype];
            wrong.extend(self.compare(&format!("d{i}"), got, name, tolerance)?);
        }
        Ok(wrong)
    }

    /// The inputs as leaves: floats in this run's dtype, or as they are stored.
    fn inputs(&self) -> Result<Vec<LazyTensor>, Box<dyn std::error::Error>> {
        let candle = testbed::device().candle()?;
        let leaf = |name: &String| {
            let x = self.in_dtype(&self.vectors.tensors[name])?.to_device(&candle)?;
            Ok(LazyTensor::from_tensor(&self.layout.lay(x)?)?)
        };
        self.case.inputs.iter().map(leaf).collect()
    }

    fn in_dtype(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match self.float() {
            Some(dtype) if x.dtype().is_float() => x.to_dtype(dtype),
            _ => Ok(x.clone()),
        }
    }

    /// `None`: every tensor is of the dtype that it is stored in.
    fn float(&self) -> Option<DType> {
        (self.dtype != "native").then(|| self.dtype.parse().expect("a dtype of Candle's"))
    }

    fn call(&self, inputs: &[LazyTensor]) -> metal_candle::Result<LazyTensor> {
        let mut seen = inputs.to_vec();
        for (i, views) in &self.case.views {
            for view in views {
                seen[*i] = see(&seen[*i], view)?;
            }
        }
        call::call(self.case, &seen)
    }

    /// `sum(y * cotangent)`
    fn loss(&self, y: &LazyTensor) -> metal_candle::Result<LazyTensor> {
        let cotangent = self.vectors.cotangent.narrow(0, 0, y.elem_count())?;
        let cotangent = LazyTensor::from_tensor(&cotangent.reshape(y.dims())?)?;
        y.mul(&cotangent.to_dtype(y.dtype())?.to_device(y.device())?)?.sum_all()
    }

    fn compare(
        &self,
        what: &str,
        got: &Tensor,
        name: &str,
        tolerance: Tolerance,
    ) -> candle_core::Result<Vec<String>> {
        let want = &self.vectors.tensors[name];
        if got.dims() != want.dims() {
            let (got, want) = (got.dims(), want.dims());
            return Ok(vec![format!("{what} has shape {got:?}, expected {want:?}")]);
        }
        let dtype = self.dtype_of(what, want);
        if got.dtype() != dtype {
            return Ok(vec![format!("{what} has dtype {:?}, expected {dtype:?}", got.dtype())]);
        }
        if !dtype.is_float() {
            let (got, want) = (integers(got)?, integers(want)?);
            return Ok(if got == want {
                vec![]
            } else {
                vec![format!("{what}: {got:?}, expected {want:?}")]
            });
        }
        let [relative, absolute] = tolerance;
        let slack = (self.slack)(dtype_from_candle(dtype)) * testbed::largest(floats(want)?);
        let tolerance = [relative, absolute + slack];
        // What the dtype cannot hold is infinite in it.
        let held = floats(&want.to_dtype(dtype)?)?;
        let want = floats(want)?.into_iter().zip(held);
        let want: Vec<f64> =
            want.map(|(x, held)| if held.is_infinite() { held } else { x }).collect();
        Ok(differences(what, &floats(got)?, &want, tolerance))
    }

    /// The dtype that a result must have.
    fn dtype_of(&self, what: &str, want: &Tensor) -> DType {
        let is_loss = what == "y" && self.case.op.ends_with("cross_entropy");
        match self.float() {
            // Losses of narrow logits are f32.
            Some(DType::BF16) if is_loss => DType::F32,
            Some(dtype) if want.dtype().is_float() => dtype,
            _ => want.dtype(),
        }
    }
}

fn see(x: &LazyTensor, view: &View) -> metal_candle::Result<LazyTensor> {
    let a = &view.args;
    match view.name.as_str() {
        "transpose" => x.transpose(a[0], a[1]),
        "permute" => x.permute(a.iter().copied()),
        "narrow" => x.narrow(a[0], a[1], a[2]),
        "slice" => x.slice(a[0], a[1], a[2], a[3]),
        "broadcast_as" => x.broadcast_as(a),
        "flip" => a.iter().try_fold(x.clone(), |x, dim| x.flip(*dim)),
        other => panic!("the manifest has a view {other}, which no method is known for"),
    }
}

/// A dtype in Candle's words.
fn candle_dtype(dtype: metal_candle::DType) -> DType {
    match dtype {
        metal_candle::DType::U8 => DType::U8,
        metal_candle::DType::U32 => DType::U32,
        metal_candle::DType::I64 => DType::I64,
        metal_candle::DType::BF16 => DType::BF16,
        metal_candle::DType::F16 => DType::F16,
        metal_candle::DType::F32 => DType::F32,
        metal_candle::DType::F64 => DType::F64,
    }
}

/// A float dtype in this library's words.
fn dtype_from_candle(dtype: DType) -> metal_candle::DType {
    match dtype {
        DType::BF16 => metal_candle::DType::BF16,
        DType::F16 => metal_candle::DType::F16,
        DType::F32 => metal_candle::DType::F32,
        _ => metal_candle::DType::F64,
    }
}

fn floats(x: &Tensor) -> candle_core::Result<Vec<f64>> {
    // Not every device has f64.
    x.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

fn integers(x: &Tensor) -> candle_core::Result<Vec<i64>> {
    x.to_device(&Device::Cpu)?.to_dtype(DType::I64)?.flatten_all()?.to_vec1()
}

/// The worst element, if one is further off than allowed.
fn differences(
    what: &str,
    got: &[f64],
    want: &[f64],
    [relative, absolute]: Tolerance,
) -> Vec<String> {
    let excess = |(got, want): (&f64, &f64)| {
        if got == want || got.is_nan() && want.is_nan() {
            return 0.0;
        }
        let off = (got - want).abs() / (relative * want.abs() + absolute);
        if off.is_nan() { f64::INFINITY } else { off }
    };
    let excesses: Vec<f64> = got.iter().zip(want).map(excess).collect();
    let wrong = excesses.iter().filter(|e| **e > 1.0).count();
    let worst = (0..got.len()).max_by(|a, b| excesses[*a].total_cmp(&excesses[*b]));
    let Some(at) = worst.filter(|at| excesses[*at] > 1.0) else { return Vec::new() };
    let (got, want, off) = (got[at], want[at], excesses[at]);
    vec![format!(
        "{wrong} elements of {what} differ; at {at} it is {got:e}, expected {want:e}: \
         {off:.1} times the tolerance"
    )]
}

/// A module of tests for each file of vectors.
macro_rules! families {
    ($($family:ident)*) => {$(
        mod $family {
            use crate::{Layout, Vectors};

            #[test]
            fn values_and_gradients_equal_pytorch_on_dense_tensors() {
                Vectors::of(stringify!($family)).check(Layout::Dense);
            }

            #[test]
            fn values_and_gradients_equal_pytorch_on_strided_tensors() {
                Vectors::of(stringify!($family)).check(Layout::Strided);
            }

            #[test]
            fn values_and_gradients_equal_pytorch_in_metal() {
                crate::dialects::check(stringify!($family));
            }
        }
    )*};
}

families! { elementwise casts reductions movement indexing products norms attention losses }

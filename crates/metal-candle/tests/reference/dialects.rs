//! The same vectors by the kernels of Metal, which the machine of the compiler's tests runs on the CPU.

use crate::machine::METAL;
use crate::plans::{Outcome, Rendered, Renderer};
use crate::{Layout, Run, Vectors, candle_dtype, testbed, values};
use candle_core::{Device, Tensor};
use metal_candle::plan::render::{Dialect, RenderError, Status};
use metal_candle::{DType, LazyTensor, Recording};

/// What PyTorch gave, and what Metal has numbers for.
const DTYPES: [&str; 3] = ["f32", "bf16", "native"];

/// A case: the plan of its output, and that of its gradients, which sees nothing of the output.
struct Planned<'a> {
    run: Run<'a>,
    plans: Vec<(Recording, Rendered)>,
}

/// Runs every case of the family in every dtype that its tolerance names.
pub(crate) fn check(family: &str) {
    if !testbed::is_on_cpu("the vectors in Metal", "their kernels run on the CPU, on any machine") {
        return;
    }
    let vectors = Vectors::of(family);
    let mut renderer = Renderer::new(Dialect::METAL, METAL);
    let (mut cases, mut refused) = (Vec::new(), 0);
    for dtype in DTYPES {
        for case in vectors.cases.iter().filter(|case| case.tol.contains_key(dtype)) {
            let slack = testbed::slack_of_gpu;
            let run = Run { vectors: &vectors, case, dtype, layout: Layout::Dense, slack };
            match Planned::new(run, &mut renderer) {
                Ok(case) => cases.push(case),
                Err(RenderError::DType { .. }) => refused += 1,
                Err(error) => panic!("{}/{} {dtype}: {error}", case.op, case.case),
            }
        }
    }
    let inputs = |recording: &Recording| recording.inputs.iter().map(values::bytes).collect();
    let plans = cases.iter().flat_map(|case| &case.plans);
    let all = plans.map(|(recording, plan)| (plan, inputs(recording))).collect();
    let mut outcomes = renderer.run_on_bytes(&format!("reference-{family}"), all).into_iter();
    let wrong: Vec<String> = cases.iter().flat_map(|case| case.wrong(&mut outcomes)).collect();
    assert!(wrong.is_empty(), "{} values are wrong\n{}", wrong.len(), wrong.join("\n"));
    println!("{family}: {} cases run; {refused} of f64 refused", cases.len());
    assert!(cases.len() > refused, "most were refused");
}

impl<'a> Planned<'a> {
    fn new(run: Run<'a>, renderer: &mut Renderer) -> Result<Planned<'a>, RenderError> {
        let (y, gradients) = run.results().unwrap_or_else(|error| {
            panic!("{}/{} {}: {error}", run.case.op, run.case.case, run.dtype)
        });
        let gradients: Vec<&LazyTensor> = gradients.iter().collect();
        let mut plan = |roots: &[&LazyTensor]| {
            let recording = LazyTensor::recording(roots);
            let plan = renderer.plan(&recording.graph, &recording.donated)?;
            Ok((recording, plan))
        };
        let mut plans = vec![plan(&[&y])?];
        if !gradients.is_empty() {
            plans.push(plan(&gradients)?);
        }
        Ok(Planned { run, plans })
    }

    /// Everything that is wrong with the outcomes of its plans, the next ones.
    fn wrong(&self, outcomes: &mut impl Iterator<Item = Outcome>) -> Vec<String> {
        let Run { case, dtype, .. } = &self.run;
        let mut results = Vec::new();
        for ((recording, _), outcome) in self.plans.iter().zip(outcomes) {
            if outcome.status != Status::default() {
                return vec![format!("{}/{} {dtype}: {:?}", case.op, case.case, outcome.status)];
            }
            results.extend(tensors(recording, &outcome));
        }
        let wrong = self.run.wrong(&results[0], &results[1..]).unwrap();
        wrong.into_iter().map(|what| format!("{}/{} {dtype}: {what}", case.op, case.case)).collect()
    }
}

fn tensors(recording: &Recording, outcome: &Outcome) -> Vec<Tensor> {
    let graph = &recording.graph;
    let tensor = |(i, output): (usize, &metal_candle::graph::NodeId)| {
        let ty = graph.ty(*output);
        let (dims, device) = (ty.shape.dims(), &Device::Cpu);
        if ty.dtype == DType::I64 {
            let number = |bytes: &[u8]| i64::from_ne_bytes(bytes.try_into().unwrap());
            let data: Vec<i64> = outcome.bytes[i].chunks(8).map(number).collect();
            return Tensor::from_vec(data, dims, device).unwrap();
        }
        let tensor = Tensor::from_slice(&outcome.outputs[i], dims, device).unwrap();
        tensor.to_dtype(candle_dtype(ty.dtype)).unwrap()
    };
    graph.outputs.iter().enumerate().map(tensor).collect()
}

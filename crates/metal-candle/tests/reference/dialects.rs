//! The same vectors by the kernels of Metal, which the machine of the compiler's tests runs on the CPU.

use crate::machine::METAL;
use crate::plans::{Outcome, Rendered, Renderer};
use crate::{Layout, Run, Vectors, candle_dtype, testbed, values};
use candle_core::{Device, Tensor};
use metal_candle::graph::oracle::Value;
use metal_candle::plan::render::{Dialect, RenderError, Status};
use metal_candle::{LazyTensor, Recording};

/// What PyTorch gave, and what Metal has numbers for.
const DTYPES: [&str; 3] = ["f32", "bf16", "native"];

/// A case that is planned.
struct Planned<'a> {
    run: Run<'a>,
    recording: Recording,
    inputs: Vec<Value>,
}

/// Runs every case of the family in every dtype that its tolerance names.
pub(crate) fn check(family: &str) {
    if !testbed::is_on_cpu("the vectors in Metal", "their kernels run on the CPU, on any machine") {
        return;
    }
    let vectors = Vectors::of(family);
    let mut renderer = Renderer::new(Dialect::METAL, METAL);
    let (mut cases, mut plans, mut refused) = (Vec::new(), Vec::new(), 0);
    for dtype in DTYPES {
        for case in vectors.cases.iter().filter(|case| case.tol.contains_key(dtype)) {
            let slack = testbed::slack_of_gpu;
            let run = Run { vectors: &vectors, case, dtype, layout: Layout::Dense, slack };
            let name = format!("{}/{} {dtype}", case.op, case.case);
            let planned = Planned::new(run).unwrap_or_else(|error| panic!("{name}: {error}"));
            match renderer.plan(&planned.recording.graph, &planned.recording.donated) {
                Ok(plan) => {
                    plans.push(plan);
                    cases.push(planned);
                }
                Err(RenderError::DType { .. }) => refused += 1,
                Err(error) => panic!("{name}: {error}"),
            }
        }
    }
    let inputs = cases.iter().map(|case| &case.inputs[..]);
    let all: Vec<(Rendered, &[Value])> = plans.into_iter().zip(inputs).collect();
    let outcomes = renderer.run(&format!("reference-{family}"), &all);
    let wrong: Vec<String> =
        cases.iter().zip(&outcomes).flat_map(|(case, outcome)| case.wrong(outcome)).collect();
    assert!(wrong.is_empty(), "{} values are wrong\n{}", wrong.len(), wrong.join("\n"));
    println!("{family}: {} plans run; {refused} of f64 refused", cases.len());
    assert!(cases.len() > refused, "most were refused");
}

impl<'a> Planned<'a> {
    fn new(run: Run<'a>) -> Result<Planned<'a>, Box<dyn std::error::Error>> {
        let (y, gradients) = run.results()?;
        let roots: Vec<&LazyTensor> = std::iter::once(&y).chain(&gradients).collect();
        let recording = LazyTensor::recording(&roots);
        let inputs = recording.inputs.iter().map(values::value).collect();
        Ok(Planned { run, recording, inputs })
    }

    /// Everything that is wrong.
    fn wrong(&self, outcome: &Outcome) -> Vec<String> {
        let Run { case, dtype, .. } = &self.run;
        let name = format!("{}/{} {dtype}", case.op, case.case);
        if outcome.status != Status::default() {
            return vec![format!("{name}: {:?}", outcome.status)];
        }
        let graph = &self.recording.graph;
        let tensor = |(output, data): (&metal_candle::graph::NodeId, &Vec<f64>)| {
            let ty = graph.ty(*output);
            let tensor = Tensor::from_slice(data, ty.shape.dims(), &Device::Cpu).unwrap();
            tensor.to_dtype(candle_dtype(ty.dtype)).unwrap()
        };
        let results: Vec<Tensor> = graph.outputs.iter().zip(&outcome.outputs).map(tensor).collect();
        let wrong = self.run.wrong(&results[0], &results[1..]).unwrap();
        wrong.into_iter().map(|what| format!("{name}: {what}")).collect()
    }
}

//! What a run depends on, without the run.

use crate::lazy::{LazyTensor, Leaf, Trace, trace};
use metal_candle_graph::ComputationGraph;

/// A graph and the values that it reads: all that its results depend on. To be printed, planned for another device, or
/// computed by something else, as the tests of the GPU kernels do.
#[derive(Clone, Debug)]
pub struct Recording {
    /// Its outputs are what was asked for, in that order.
    pub graph: ComputationGraph,
    /// By input of the graph.
    pub inputs: Vec<LazyTensor>,
    /// By input: whether a run would give it away, to be updated in place.
    pub donated: Vec<bool>,
}

impl Recording {
    /// Of a function's trace, its arguments put in.
    pub(super) fn new(trace: &Trace, args: &[LazyTensor], donated: Vec<bool>) -> Recording {
        let input = |(leaf, handle): (&Leaf, &LazyTensor)| match leaf {
            Leaf::Argument(i) => args[*i as usize].clone(),
            Leaf::Value(_) | Leaf::Placeholder(_) | Leaf::Detached => handle.clone(),
        };
        let inputs = trace.leaves.iter().zip(trace.inputs()).map(input).collect();
        Recording { graph: trace.graph.clone(), inputs, donated }
    }
}

impl LazyTensor {
    /// What evaluating `roots` together would compute, and from what. Nothing is run.
    ///
    /// ```
    /// use metal_candle::{DType, Device, LazyTensor};
    /// let x = LazyTensor::full(2.0, &[3], DType::F32, &Device::Cpu)?.to_owned_copy()?;
    /// let y = x.sqr()?;
    /// let recording = LazyTensor::recording(&[&y]);
    /// assert_eq!(recording.inputs[0].to_vec1::<f32>()?, [2.0, 2.0, 2.0]);
    /// assert_eq!(recording.graph.outputs.len(), 1);
    /// # Ok::<(), metal_candle::Error>(())
    /// ```
    pub fn recording(roots: &[&LazyTensor]) -> Recording {
        let trace = trace(roots, false);
        let donated = vec![false; trace.leaves.len()];
        Recording::new(&trace, &[], donated)
    }
}

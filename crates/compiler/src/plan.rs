//! A [`Plan`] is the whole answer to "what will run, and where does every byte live?".

use crate::kernel::Kernel;
use crate::{Layout, LibraryCall, Result, Target, lower, memory, siblings};
use metal_candle_graph::{ComputationGraph, DType, TensorType, pass};
use std::fmt;

/// Where a buffer lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Slot {
    /// The `i`-th tensor of the caller.
    Input(u32),
    /// The `i`-th result, allocated for this run.
    Output(u32),
    /// Bytes `[offset_bytes, offset_bytes + len_bytes)` of the plan's arena.
    Arena { offset_bytes: usize, len_bytes: usize },
}

/// A value that a step reads or writes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Operand {
    /// The buffer that it lies in.
    pub slot: Slot,
    /// Of each element.
    pub dtype: DType,
    /// Where in the buffer its elements are.
    pub layout: Layout,
}

/// What a step does.
#[derive(Clone, Debug, PartialEq)]
pub enum Work {
    /// Accesses of the kernel index `args` and `outs`; operand layouts are those of the whole buffers.
    Kernel(Kernel),
    /// Its operands are `args` and `outs`, in the order that [`LibraryCall`] says.
    Call(LibraryCall),
}

/// One unit of work; steps run in order.
///
/// An output may share its slot with an argument: then the step updates in place, and the plan has made
/// sure that every element is read before it is written.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// What is done.
    pub work: Work,
    /// What is read.
    pub args: Vec<Operand>,
    /// What is written.
    pub outs: Vec<Operand>,
    /// The operations that went into this step, for people: `softmax`, `matmul + add`.
    pub label: String,
    /// Arithmetic operations: a multiplication and an addition are two, an exponential is one.
    pub flops: u64,
    /// Bytes read and written, each operand once.
    pub bytes: u64,
}

/// A tensor that the caller passes.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanInput {
    /// Its dtype and shape: row-major, dense.
    pub ty: TensorType,
    /// The caller gives the buffer away; an output may live in it.
    pub donated: bool,
}

/// How a result comes to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputSource {
    /// A fresh buffer that the steps write.
    Written,
    /// The steps update the donated input's buffer, which becomes the result.
    Donated(u32),
    /// The result is the input itself.
    Input(u32),
    /// The result equals an earlier result.
    SameAs(u32),
}

/// A tensor that comes out.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanOutput {
    /// Its dtype and shape: row-major, dense.
    pub ty: TensorType,
    /// Where it comes from.
    pub source: OutputSource,
}

/// What runs, in which order, and where everything lives.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The name of the [`Target`] that it was made for.
    pub target: &'static str,
    /// In the order in which they run.
    pub steps: Vec<Step>,
    /// What the caller passes, by index.
    pub inputs: Vec<PlanInput>,
    /// What comes out, by index.
    pub outputs: Vec<PlanOutput>,
    /// The size of the scratch arena: exactly what the runtime allocates.
    pub arena_bytes: usize,
    /// What the scratch buffers would take if none shared memory.
    pub unshared_bytes: usize,
    /// Why two neighbours run as two steps.
    pub splits: Vec<Split>,
}

/// Two steps, one feeding the other, that were not fused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// The number of the earlier step.
    pub producer: usize,
    /// The number of the later step.
    pub consumer: usize,
    /// Why they are two, for people.
    pub reason: &'static str,
}

impl Plan {
    /// Bytes alive at the worst moment: inputs, results and scratch.
    pub fn peak_bytes(&self) -> usize {
        let inputs: usize = self.inputs.iter().map(|i| i.ty.size_bytes()).sum();
        inputs + self.allocated_bytes()
    }

    /// Bytes that a run allocates beside its inputs: results and scratch.
    pub fn allocated_bytes(&self) -> usize {
        let written = |o: &&PlanOutput| o.source == OutputSource::Written;
        let outputs: usize = self.outputs.iter().filter(written).map(|o| o.ty.size_bytes()).sum();
        outputs + self.arena_bytes
    }

    /// The arithmetic operations of all steps.
    pub fn flops(&self) -> u64 {
        self.steps.iter().map(|s| s.flops).sum()
    }

    /// The bytes that all steps read and write.
    pub fn bytes(&self) -> u64 {
        self.steps.iter().map(|s| s.bytes).sum()
    }
}

/// Plans `g` for `target`. `donated[i]` says that input `i` may be overwritten.
///
/// # Errors
/// [`crate::Error`] where a composite's decomposition is ill-formed or the arena could not be addressed.
pub fn plan(g: &ComputationGraph, target: &Target, donated: &[bool]) -> Result<Plan> {
    // Of the graph as it was given: the caller passes an input even where the passes drop it.
    let inputs = lower::inputs(g, donated);
    let g = pass::expand(g, |c| target.keeps(c))?;
    let mut g = pass::simplify(&g)?;
    if target.max_low_rank == 0 {
        // A target that makes a LoRA branch as one step needs its two products as they are.
        g = pass::join_sums(&pass::share_factors(&g)?)?;
    }
    let g = pass::split_reductions(&g, target.max_reduce)?;
    let mut lowered = lower::lower(&g, target, inputs);
    siblings::join(&mut lowered, target);
    memory::place(lowered, target)
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        crate::print::plan(self, f)
    }
}

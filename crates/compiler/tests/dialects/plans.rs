//! Whole plans, as a backend runs them: fused kernels, the kernels of calls, and products as its library would do them,
//! against the graph's oracle.

use crate::machine::{Machine, units};
use crate::program::{Address, Part as Do, Program, Region};
use crate::walk;
use metal_candle_compiler::kernel::Kernel;
use metal_candle_compiler::render::{
    self, Ahead, Binding, Call, Dialect, Limits, Part, Place, RenderError, Source, Status, beside,
    render,
};
use metal_candle_compiler::{OutputSource, Plan, Slot, Step, Target, Work};
use metal_candle_graph::oracle::Value;
use metal_candle_graph::{ComputationGraph, DType};
use std::collections::HashMap;

/// A graph to be planned and run.
#[derive(Clone)]
pub(crate) struct Task {
    pub(crate) name: String,
    pub(crate) graph: ComputationGraph,
    pub(crate) inputs: Vec<Value>,
    pub(crate) donated: Vec<bool>,
    pub(crate) want: Vec<Value>,
    /// By output, in units of `1 + |expected|`.
    pub(crate) tolerances: Vec<f64>,
}

/// What a run gave.
pub(crate) struct Outcome {
    pub(crate) outputs: Vec<Vec<f64>>,
    /// The same as they are in memory: not every whole number is one of f64's.
    pub(crate) bytes: Vec<Vec<u8>>,
    pub(crate) status: Status,
}

/// A plan whose steps are rendered.
pub(crate) struct Rendered {
    plan: Plan,
    steps: Vec<Call>,
}

/// Renders plans; equal kernels once.
pub(crate) struct Renderer {
    pub(crate) dialect: &'static Dialect,
    pub(crate) limits: Limits,
    /// The dialect's, if nobody changes it.
    pub(crate) target: Target,
    known: HashMap<Kernel, Source>,
}

impl Renderer {
    pub(crate) fn new(dialect: &'static Dialect, limits: Limits) -> Renderer {
        let target = if dialect.has_f64 { Target::CUDA } else { Target::METAL };
        Renderer { dialect, limits, target, known: HashMap::new() }
    }

    /// # Errors
    /// What a dialect refuses.
    pub(crate) fn plan(
        &mut self,
        g: &ComputationGraph,
        donated: &[bool],
    ) -> Result<Rendered, RenderError> {
        let plan = metal_candle_compiler::plan(g, &self.target, donated).unwrap();
        let steps = plan.steps.iter().map(|step| self.step(step)).collect::<Result<_, _>>()?;
        Ok(Rendered { plan, steps })
    }

    fn step(&mut self, step: &Step) -> Result<Call, RenderError> {
        match &step.work {
            Work::Kernel(kernel) => {
                let source = self.kernel(kernel)?;
                Ok(Call { parts: vec![Part::Kernel(source)], workspace_bytes: 0 })
            }
            Work::Call(call) => {
                render::call(call, &step.args, &step.outs, self.dialect, &self.limits)
            }
        }
    }

    fn kernel(&mut self, kernel: &Kernel) -> Result<Source, RenderError> {
        if let Some(source) = self.known.get(kernel) {
            return Ok(source.clone());
        }
        let name = format!("k{}", self.known.len());
        let source = render(kernel, self.dialect, &self.limits, &name)?;
        self.known.insert(kernel.clone(), source.clone());
        Ok(source)
    }

    /// Runs each on its inputs.
    pub(crate) fn run(&self, name: &str, all: &[(Rendered, &[Value])]) -> Vec<Outcome> {
        let all: Vec<_> = all.iter().map(|(plan, inputs)| (plan, encoded(inputs))).collect();
        self.run_on_bytes(name, all)
    }

    /// [`Renderer::run`] on inputs as they are in memory.
    pub(crate) fn run_on_bytes(
        &self,
        name: &str,
        all: Vec<(&Rendered, Vec<Vec<u8>>)>,
    ) -> Vec<Outcome> {
        let name = format!("{name}-{}", self.dialect.language.replace(' ', "-"));
        let machine = Machine::build(
            self.dialect,
            &name,
            &units(sources(all.iter().map(|r| r.0)), self.dialect),
        );
        let (plans, programs): (Vec<&Rendered>, Vec<Program>) =
            all.into_iter().map(|(plan, inputs)| (plan, plan.program(inputs))).unzip();
        let outcome = |(plan, result): (&Rendered, Result<Vec<Vec<u8>>, String>)| match result {
            Ok(buffers) => plan.outcome(&buffers),
            Err(fault) => panic!("{fault}\n{}\n{}", plan.plan, plan.text()),
        };
        plans.into_iter().zip(machine.run(&programs)).map(outcome).collect()
    }
}

impl Renderer {
    /// Runs a plan of kernels only, the first of which is read by all others: one by one, or as one.
    pub(crate) fn run_joined(&self, rendered: &Rendered, inputs: &[Value], join: bool) -> Outcome {
        let kernels: Vec<&Source> = sources([rendered]).collect();
        let (first, readers) = kernels.split_first().unwrap();
        let mut program = rendered.program(encoded(inputs));
        let [made, addresses]: [Vec<Address>; 2] = {
            let operands = |part: &Do| match part {
                Do::Launch { operands, .. } => operands.clone(),
                Do::Product { .. } => panic!("a product"),
            };
            let (first, readers) = program.parts.split_first().unwrap();
            [operands(first), readers.iter().flat_map(operands).collect()]
        };
        let is_output = |n: &usize| matches!(first.bindings[*n], Binding::Out(_));
        let outputs: Vec<usize> = (0..first.bindings.len()).filter(is_output).collect();
        let output = |address: &Address| outputs.iter().copied().find(|n| made[*n] == *address);
        let readers_of: Vec<(usize, usize)> =
            addresses.iter().enumerate().filter_map(|(i, at)| Some((i, output(at)?))).collect();
        assert_eq!(readers_of.len(), readers.len());
        let len = |n: &usize| rendered.plan.steps[0].outs[*n].layout.shape.len() * 4;
        let outputs = outputs.iter().enumerate().map(|(i, n)| (*n, len(&i))).collect();
        let ahead = Ahead { source: first, outputs, readers: readers_of };
        let one = beside(readers, Some(&ahead), self.dialect).unwrap();
        let mut all: Vec<Source> = kernels.iter().map(|source| (*source).clone()).collect();
        if join {
            program = Program::joined(program, &one.name, one.launch);
            all = vec![one];
        }
        let name = format!("joined-{join}");
        let machine = Machine::build(self.dialect, &name, &units(&all, self.dialect));
        match machine.run(&[program]).remove(0) {
            Ok(buffers) => rendered.outcome(&buffers),
            Err(fault) => panic!("{fault}\n{}", all[0].text),
        }
    }
}

/// All kernels.
pub(crate) fn sources<'a>(
    all: impl IntoIterator<Item = &'a Rendered>,
) -> impl Iterator<Item = &'a Source> {
    let parts = all.into_iter().flat_map(|rendered| &rendered.steps).flat_map(|step| &step.parts);
    parts.filter_map(|part| match part {
        Part::Kernel(source) => Some(source),
        Part::Product(_) => None,
    })
}

impl Rendered {
    pub(crate) fn steps(&self) -> impl Iterator<Item = (&Step, &Call)> {
        self.plan.steps.iter().zip(&self.steps)
    }

    fn text(&self) -> String {
        let parts = self.steps.iter().flat_map(|step| &step.parts).enumerate();
        let text = |(i, part): (usize, &Part)| match part {
            Part::Kernel(source) => format!("part {i}:\n{}", source.text),
            Part::Product(_) => format!("part {i}: {part:?}\n"),
        };
        parts.map(text).collect()
    }

    /// Memory: the inputs' buffers, then outputs, arena, workspace, status. What nobody wrote is NaN, or a large number.
    fn program(&self, mut buffers: Vec<Vec<u8>>) -> Program {
        let unwritten = |len: usize| vec![0xff; len];
        buffers.extend(self.plan.outputs.iter().map(|o| unwritten(o.ty.size_bytes())));
        let workspace = self.steps.iter().map(|step| step.workspace_bytes).max().unwrap_or(0);
        buffers.extend([self.plan.arena_bytes, workspace].map(unwritten));
        buffers.push(vec![0; size_of::<Status>()]);
        let parts = self.steps().flat_map(|(step, call)| {
            call.parts.iter().map(|part| match part {
                Part::Kernel(source) => self.launch(step, call, source),
                Part::Product(product) => Do::Product {
                    alpha: product.alpha,
                    accumulate: product.accumulate,
                    has_bias: product.bias.is_some(),
                    places: product.places().map(|place| self.place(step, place)).collect(),
                },
            })
        });
        Program { buffers, parts: parts.collect() }
    }

    fn launch(&self, step: &Step, call: &Call, source: &Source) -> Do {
        let mut regions: Vec<(Slot, Region)> = Vec::new();
        let operands =
            step.args.iter().map(|o| (o, false)).chain(step.outs.iter().map(|o| (o, true)));
        for (operand, writable) in operands {
            let at = regions.iter().position(|(slot, _)| *slot == operand.slot);
            let at = at.unwrap_or_else(|| {
                let region = Region {
                    start: self.address(operand.slot),
                    len_bytes: self.len_bytes(operand.slot),
                    element_bytes: operand.dtype.size_bytes(),
                    writable: false,
                };
                regions.push((operand.slot, region));
                regions.len() - 1
            });
            regions[at].1.writable |= writable;
        }
        let mut regions: Vec<Region> = regions.into_iter().map(|(_, region)| region).collect();
        let whole = |buffer: usize, len_bytes, element_bytes| Region {
            start: Address { buffer, offset_bytes: 0 },
            len_bytes,
            element_bytes,
            writable: true,
        };
        regions.push(whole(self.first_buffer(2) + 1, call.workspace_bytes, 2));
        regions.push(whole(self.first_buffer(2) + 2, size_of::<Status>(), 4));
        Do::Launch {
            kernel: source.name.clone(),
            launch: source.launch,
            regions,
            operands: source.bindings.iter().map(|b| self.operand(step, *b)).collect(),
        }
    }

    fn place(&self, step: &Step, place: &Place) -> (Address, DType, metal_candle_compiler::Layout) {
        (self.operand(step, place.binding), place.dtype, place.layout)
    }

    fn operand(&self, step: &Step, binding: Binding) -> Address {
        let last = self.first_buffer(2);
        match binding {
            Binding::Arg(i) => self.address(step.args[i as usize].slot),
            Binding::Out(i) => self.address(step.outs[i as usize].slot),
            Binding::ArgAt { arg, offset_bytes } => {
                self.address(step.args[arg as usize].slot).further(offset_bytes)
            }
            Binding::OutAt { out, offset_bytes } => {
                self.address(step.outs[out as usize].slot).further(offset_bytes)
            }
            Binding::Workspace { offset_bytes } => Address { buffer: last + 1, offset_bytes },
            Binding::Status => Address { buffer: last + 2, offset_bytes: 0 },
        }
    }

    /// Of the inputs, the outputs, the arena.
    fn first_buffer(&self, kind: usize) -> usize {
        [0, self.plan.inputs.len(), self.plan.inputs.len() + self.plan.outputs.len()][kind]
    }

    fn address(&self, slot: Slot) -> Address {
        let (kind, i, offset_bytes) = match slot {
            Slot::Input(i) => (0, i, 0),
            Slot::Output(i) => (1, i, 0),
            Slot::Arena { offset_bytes, .. } => (2, 0, offset_bytes),
        };
        Address { buffer: self.first_buffer(kind) + i as usize, offset_bytes }
    }

    fn len_bytes(&self, slot: Slot) -> usize {
        match slot {
            Slot::Input(i) => self.plan.inputs[i as usize].ty.size_bytes(),
            Slot::Output(i) => self.plan.outputs[i as usize].ty.size_bytes(),
            Slot::Arena { len_bytes, .. } => len_bytes,
        }
    }

    fn outcome(&self, buffers: &[Vec<u8>]) -> Outcome {
        let (mut outputs, mut all): (Vec<Vec<f64>>, Vec<Vec<u8>>) = (Vec::new(), Vec::new());
        for (i, output) in self.plan.outputs.iter().enumerate() {
            let slot = match output.source {
                OutputSource::Written => Slot::Output(i as u32),
                OutputSource::Donated(input) | OutputSource::Input(input) => Slot::Input(input),
                OutputSource::SameAs(other) => {
                    outputs.push(outputs[other as usize].clone());
                    all.push(all[other as usize].clone());
                    continue;
                }
            };
            let bytes = &buffers[self.address(slot).buffer][..output.ty.size_bytes()];
            outputs.push(walk::decode(output.ty.dtype, bytes));
            all.push(bytes.to_vec());
        }
        Outcome { outputs, bytes: all, status: status(&buffers[buffers.len() - 1]) }
    }
}

fn encoded(inputs: &[Value]) -> Vec<Vec<u8>> {
    inputs.iter().map(|v| walk::encode(v.ty.dtype, &v.data)).collect()
}

fn status(bytes: &[u8]) -> Status {
    let i64_at = |at: usize| i64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap());
    let failed = u32::from_ne_bytes(bytes[..4].try_into().unwrap());
    Status { failed, reserved: 0, index: i64_at(8), extent: i64_at(16), position: i64_at(24) }
}

/// Runs all tasks and compares them with the oracle. `skips` says which refusals are expected; the rest must run.
pub(crate) fn check(
    name: &str,
    dialect: &'static Dialect,
    limits: Limits,
    tasks: &[Task],
    skips: impl Fn(&RenderError) -> bool,
) {
    check_by(Renderer::new(dialect, limits), name, tasks, skips);
}

/// [`check`] by this renderer.
pub(crate) fn check_by(
    mut renderer: Renderer,
    name: &str,
    tasks: &[Task],
    skips: impl Fn(&RenderError) -> bool,
) {
    let (mut all, mut of) = (Vec::new(), Vec::new());
    for task in tasks {
        match renderer.plan(&task.graph, &task.donated) {
            Ok(rendered) => {
                all.push((rendered, &task.inputs[..]));
                of.push(task);
            }
            Err(error) if skips(&error) => {}
            Err(error) => panic!("{}: {error}\n{}", task.name, task.graph),
        }
    }
    for ((task, outcome), (rendered, _)) in of.iter().zip(renderer.run(name, &all)).zip(&all) {
        assert_eq!(outcome.status, Status::default(), "{}", task.name);
        for (i, (got, want)) in outcome.outputs.iter().zip(&task.want).enumerate() {
            for (at, (got, want)) in got.iter().zip(&want.data).enumerate() {
                let same = got == want || (got.is_nan() && want.is_nan());
                let near = (got - want).abs() <= task.tolerances[i] * (1.0 + want.abs());
                assert!(
                    same || near,
                    "{}, output {i}, element {at}: expected {want}, got {got}\n{}\n{}\n{}",
                    task.name,
                    task.graph,
                    rendered.plan,
                    rendered.text()
                );
            }
        }
    }
    println!("{}: {} plans of {} run", renderer.dialect.language, all.len(), tasks.len());
    assert!(all.len() > tasks.len() / 2, "most were refused");
}

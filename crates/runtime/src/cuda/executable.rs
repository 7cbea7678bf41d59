//! A plan made ready for a device, and one run of it.
//!
//! A run binds its memory, copies what small inputs the host holds in one go, asks for the steps, copies back the
//! status and the small results in one go, and waits, or leaves that to [`Asked`]. When two runs in a row have all their
//! memory in the same place, the steps are recorded as a graph, which later runs replay.

use super::Gpu;
use super::bind::{Held, resident_mut};
use super::command::Commands;
use super::flight::{Asked, Hosts, arrived, fill_in_equal};
use super::gpu::Said;
use super::graph::Graph;
use super::marks::Marks;
use super::memory::{Allocation, Pinned, Resident};
use super::product::WORKSPACE_BYTES;
use super::staging::Staging;
use crate::buffer::{Buffer, Memory};
use crate::executable::{Backend, Clock, Timing};
use crate::in_flight::Started;
use crate::places::Bases;
use crate::run_memories::RunMemories;
use crate::team::Team;
use crate::{Error, Result, Workspace, World, parts, verify};
use cudarc::driver::result;
use cudarc::driver::sys::{self, CUdeviceptr};
use metal_candle_compiler::render::{Dialect, Status};
use metal_candle_compiler::{OutputSource, Plan, PlanOutput};
use std::ops::Range;
use std::sync::Arc;

/// Memories of runs that are kept while nothing runs.
const IDLE_MEMORIES: usize = 2;

/// What a device keeps of a plan.
pub(crate) struct CudaExecutable {
    pub(super) gpu: Arc<Gpu>,
    commands: Commands,
    pub(super) staging: Arc<Staging>,
    hosts: Arc<Hosts>,
    /// By input: whether a command refers to it.
    pub(super) used: Vec<bool>,
    /// By output: whether its memory must be zeroed.
    zeroed: Vec<bool>,
    memories: RunMemories<RunMemory>,
    /// Where it sums over ranks, if it does.
    world: Option<Arc<World>>,
}

/// The device's memory of one run. The next run may have it as soon as this one is asked for, since it comes later.
pub(super) struct RunMemory {
    pub(super) arena: Allocation,
    pub(super) scratch: Allocation,
    pub(super) staging: Allocation,
    /// Where the run before this had its memory.
    last: Vec<CUdeviceptr>,
    graph: Option<Graph>,
}

impl RunMemory {
    fn new(
        gpu: &Arc<Gpu>,
        plan: &Plan,
        commands: &Commands,
        staging: &Staging,
    ) -> Result<RunMemory> {
        Ok(RunMemory {
            arena: gpu.allocate(plan.arena_bytes, "the arena")?,
            scratch: gpu.allocate(commands.scratch_bytes, "the calls' scratch memory")?,
            staging: gpu.allocate(staging.len_bytes, "small inputs and results")?,
            last: Vec::new(),
            graph: None,
        })
    }
}

impl Gpu {
    /// See [`Device::workspaces`](crate::Device::workspaces).
    pub(crate) fn workspaces(&self, plan: &Plan) -> Result<Vec<Workspace>> {
        let scratch_bytes = parts::scratch_bytes(plan, Dialect::CUDA, &self.limits)?;
        Ok(workspaces(scratch_bytes, &Staging::new(plan)))
    }
}

fn workspaces(scratch_bytes: usize, staging: &Staging) -> Vec<Workspace> {
    vec![
        Workspace::own("scratch memory of calls", scratch_bytes),
        Workspace::own("small inputs and results", staging.len_bytes),
        Workspace::shared("cuBLASLt", WORKSPACE_BYTES),
    ]
}

impl CudaExecutable {
    /// # Errors
    /// [`Error::Render`], [`Error::Compile`], [`Error::OutOfMemory`]; what the driver says.
    pub(crate) fn new(
        gpu: Arc<Gpu>,
        plan: &Plan,
        world: Option<Arc<World>>,
    ) -> Result<CudaExecutable> {
        gpu.bind()?;
        let commands = Commands::new(&gpu, plan, world.as_ref())?;
        let mut used = vec![false; plan.inputs.len()];
        for place in commands.list.iter().flat_map(|c| &c.places) {
            if (Bases::INPUTS..Bases::outputs(plan)).contains(&place.base) {
                used[place.base - Bases::INPUTS] = true;
            }
        }
        let staging = Arc::new(Staging::new(plan));
        let make = || RunMemory::new(&gpu, plan, &commands, &staging);
        Ok(CudaExecutable {
            memories: RunMemories::new(IDLE_MEMORIES, plan.arena_bytes, make)?,
            zeroed: (0..plan.outputs.len()).map(|i| !verify::is_written_whole(plan, i)).collect(),
            hosts: Arc::new(Hosts::new(&gpu, staging.len_bytes)?),
            staging,
            used,
            commands,
            gpu,
            world,
        })
    }

    /// Asks for all that a run does, with its memory at `bases`.
    fn enqueue(
        &self,
        plan: &Plan,
        memory: &mut RunMemory,
        bases: Vec<CUdeviceptr>,
        marks: Option<&Marks>,
    ) -> Result<()> {
        if memory.graph.is_some() && memory.last != bases {
            memory.graph = None;
        } else if memory.graph.is_none() && memory.last == bases {
            let commands = |recorder| self.enqueue_commands(plan, &bases, recorder, None);
            memory.graph = Some(Graph::record(&self.gpu, commands)?);
        }
        let stream = self.gpu.raw_stream();
        let (steps, whole) = match marks {
            Some(marks) if marks.timing == Timing::Steps => (Some(marks), None),
            whole => (None, whole),
        };
        whole.map_or(Ok(()), |marks| marks.set(0, stream))?;
        match &memory.graph {
            // SAFETY: recorded with these addresses.
            Some(graph) if steps.is_none() => unsafe { graph.replay(&self.gpu) }?,
            _ => self.enqueue_commands(plan, &bases, stream, steps)?,
        }
        whole.map_or(Ok(()), |marks| marks.set(1, stream))?;
        memory.last = bases;
        Ok(())
    }

    fn enqueue_commands(
        &self,
        plan: &Plan,
        bases: &[CUdeviceptr],
        stream: sys::CUstream,
        marks: Option<&Marks>,
    ) -> Result<()> {
        let zero = |at, len, what: &str| {
            // SAFETY: the run's own memory, of at least this length.
            unsafe { result::memset_d8_async(at, 0, len, stream) }
                .said(|| format!("zeroing {what}"))
        };
        zero(bases[Bases::STATUS], size_of::<Status>(), "the status")?;
        for (i, output) in plan.outputs.iter().enumerate() {
            if self.zeroed[i] && output.source == OutputSource::Written {
                zero(bases[Bases::outputs(plan) + i], output.ty.size_bytes(), "a result")?;
            }
        }
        for (number, command) in self.commands.list.iter().enumerate() {
            marks.map_or(Ok(()), |marks| marks.set(number, stream))?;
            // SAFETY: the plan has been verified; the run holds the memory at `bases`, of the plan's sizes, until the
            // stream is through.
            unsafe { command.enqueue(&self.gpu, bases, stream) }.map_err(|error| {
                let (step, source) = (command.steps[0], Box::new(error));
                Error::Step { step, label: plan.steps[step].label.clone(), source }
            })?;
        }
        marks.map_or(Ok(()), |marks| marks.set(self.commands.list.len(), stream))
    }

    /// The seconds of commands as those of the steps: what steps do together is shared out by the bytes that they move.
    fn by_step(&self, plan: &Plan, seconds: &[f64]) -> Vec<f64> {
        let mut of_steps = vec![0.0; plan.steps.len()];
        for (command, seconds) in self.commands.list.iter().zip(seconds) {
            let bytes = |step: &usize| (plan.steps[*step].bytes + 1) as f64;
            let all: f64 = command.steps.iter().map(bytes).sum();
            command.steps.iter().for_each(|step| of_steps[*step] += seconds * bytes(step) / all);
        }
        of_steps
    }

    /// Copies a part of the staging memory there or back.
    fn exchange(
        &self,
        memory: &RunMemory,
        host: &mut Pinned,
        range: Range<usize>,
        there: bool,
    ) -> Result<()> {
        let device = memory.staging.address() + range.start as u64;
        let host = &mut host.bytes_mut()[range];
        let stream = self.gpu.raw_stream();
        // SAFETY: as many bytes on both sides; the run waits for the stream before anyone touches the host's again.
        unsafe {
            match there {
                true => result::memcpy_htod_async(device, host, stream),
                false => result::memcpy_dtoh_async(host, device, stream),
            }
        }
        .said(|| "exchanging small values".into())
    }

    /// Asks the stream for a run, from the copy of what goes there to that of what comes back.
    fn ask<'a>(
        &self,
        plan: &Plan,
        memory: &mut RunMemory,
        host: &mut Pinned,
        (inputs, outputs): (&'a [Buffer], &[Option<Allocation>]),
        held: &mut Held<'a>,
        marks: Option<&Marks>,
    ) -> Result<()> {
        let bases = self.bind(plan, memory, host, (inputs, outputs), held)?;
        for range in &held.staged {
            self.exchange(memory, host, range.clone(), true)?;
        }
        self.enqueue(plan, memory, bases, marks)?;
        self.exchange(memory, host, self.staging.status..self.staging.len_bytes, false)
    }

    fn run_steps(
        &self,
        plan: &Plan,
        memory: &mut RunMemory,
        host: &mut Pinned,
        (inputs, outputs): (&[Buffer], &[Option<Allocation>]),
        clock: Option<&mut Clock>,
    ) -> Result<()> {
        // Until the end: a rank that is lost meanwhile must not let this one wait for ever.
        let watch = self.world.as_ref().map(|world| world.nccl().watch()).transpose()?;
        let mut held = Held::default();
        let timing = clock.as_ref().map(|clock| clock.timing);
        let marks = timing
            .map(|timing| Marks::new(&self.gpu, timing, self.commands.list.len()))
            .transpose()?;
        let outcome = self.ask(plan, memory, host, (inputs, outputs), &mut held, marks.as_ref());
        // Whatever happened, nothing may still be running on memory that is given back.
        let waited = self.gpu.synchronize();
        watch.map_or(Ok(()), |watch| watch.end())?;
        outcome.and(waited)?;
        if let (Some(clock), Some(marks)) = (clock, marks) {
            clock.seconds = match timing {
                Some(Timing::Steps) => self.by_step(plan, &marks.seconds()?),
                _ => marks.seconds()?,
            };
        }
        Ok(())
    }

    /// Those that do not come back to the host first.
    fn results(
        &self,
        plan: &Plan,
        inputs: &[Buffer],
        outputs: Vec<Option<Allocation>>,
    ) -> Vec<Option<Buffer>> {
        let mut results: Vec<Option<Buffer>> = Vec::with_capacity(plan.outputs.len());
        for (i, (output, allocation)) in plan.outputs.iter().zip(outputs).enumerate() {
            let dtype = output.ty.dtype;
            results.push(match (output.source, self.staging.outputs[i], allocation) {
                (OutputSource::Written, Some(_), _) | (OutputSource::SameAs(_), ..) => None,
                (OutputSource::Written, None, Some(allocation)) => {
                    Some(Buffer::on_device(Box::new(Resident::on_device(allocation, dtype))))
                }
                (OutputSource::Written, None, None) => {
                    panic!("metal-candle bug: output {i} has no memory")
                }
                (OutputSource::Donated(i) | OutputSource::Input(i), ..) => {
                    Some(inputs[i as usize].clone())
                }
            });
        }
        fill_in_equal(plan, &mut results);
        results
    }

    /// Sees that what the run will write is on the device, and has memory for the rest of its results.
    fn outputs(&self, plan: &Plan, inputs: &mut [Buffer]) -> Result<Vec<Option<Allocation>>> {
        for (buffer, input) in inputs.iter_mut().zip(&plan.inputs) {
            if input.donated
                && let Some(memory) = buffer.unique_device_mut()
            {
                resident_mut(memory).address_mut()?;
            }
        }
        let outputs = plan.outputs.iter().zip(&self.staging.outputs);
        outputs.map(|(output, slot)| self.fresh(output, *slot)).collect()
    }

    fn fresh(&self, output: &PlanOutput, slot: Option<usize>) -> Result<Option<Allocation>> {
        let own = output.source == OutputSource::Written && slot.is_none();
        own.then(|| self.gpu.allocate(output.ty.size_bytes(), "a result")).transpose()
    }
}

impl Backend for CudaExecutable {
    fn run(
        &self,
        plan: &Plan,
        mut inputs: Vec<Buffer>,
        _team: Option<&Team>,
        clock: Option<&mut Clock>,
    ) -> Result<Vec<Buffer>> {
        self.gpu.bind()?;
        let outputs = self.outputs(plan, &mut inputs)?;
        let mut host = self.hosts.take()?;
        let make = || RunMemory::new(&self.gpu, plan, &self.commands, &self.staging);
        let mut memory = self.memories.take(make)?;
        let run = self.run_steps(plan, &mut memory, &mut host, (&inputs, &outputs), clock);
        self.memories.give_back(memory);
        let outcome = run.and_then(|()| {
            let mut results = self.results(plan, &inputs, outputs);
            arrived(&self.gpu, plan, &self.staging, &host, &mut results)?;
            Ok(results)
        });
        self.hosts.give_back(host);
        let all = |results: Vec<Option<Buffer>>| results.into_iter().collect::<Option<Vec<_>>>();
        outcome.map(|results| all(results).expect("metal-candle bug: a result is missing"))
    }

    fn start(&self, plan: &Plan, mut inputs: Vec<Buffer>, team: Option<&Team>) -> Result<Started> {
        // A lock of Candle's is a thread's, and who sums over ranks must be watched: these are waited for.
        let is_candle = |buffer: &Buffer| matches!(buffer.memory(), Memory::Shared(_));
        if self.world.is_some() || inputs.iter().any(is_candle) {
            return self.run(plan, inputs, team, None).map(Started::over);
        }
        self.gpu.bind()?;
        let outputs = self.outputs(plan, &mut inputs)?;
        let mut host = self.hosts.take()?;
        let make = || RunMemory::new(&self.gpu, plan, &self.commands, &self.staging);
        let mut memory = self.memories.take(make)?;
        let mut held = Held::default();
        let run = self.ask(plan, &mut memory, &mut host, (&inputs, &outputs), &mut held, None);
        if run.is_err() {
            // A part of it may run; that it cannot be waited for is said by whoever tries next.
            let _ = self.gpu.synchronize();
        }
        drop(held);
        self.memories.give_back(memory);
        run?;
        let asked = Asked::new(&self.gpu, &self.hosts, &self.staging, host)?;
        let results = self.results(plan, &inputs, outputs);
        Ok(Started { results, flight: Some(Box::new(asked)) })
    }

    fn workspaces(&self) -> Vec<Workspace> {
        workspaces(self.commands.scratch_bytes, &self.staging)
    }

    fn allocated_arena_bytes(&self) -> usize {
        self.memories.allocated_arena_bytes()
    }
}

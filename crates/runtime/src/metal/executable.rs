//! A plan made ready for a device, and its runs.
//!
//! A run binds its memory, puts all commands into one command buffer, and gives it to the queue. When the device is through,
//! Metal calls the completion handler, which reads the status and hands the results over: only then is the run over.

use super::Gpu;
use super::command::Commands;
use super::gpu::metal;
use super::memory::Unified;
use crate::buffer::{Buffer, DeviceMemory, Memory};
use crate::executable::{Backend, Clock, Done, Timing, wait};
use crate::places::Bases;
use crate::run_memories::RunMemories;
use crate::team::Team;
use crate::{Error, Result, Workspace, parts};
use block2::RcBlock;
use candle_core::backend::BackendStorage;
use candle_core::{MetalStorage, Storage, StorageRef};
use candle_metal_kernels::metal::{Buffer as RawBuffer, CommandBuffer};
use metal_candle_compiler::render::{Dialect, Status};
use metal_candle_compiler::{OutputSource, Plan, PlanOutput};
use objc2::rc::autoreleasepool;
use objc2::runtime::ProtocolObject;
use objc2_metal::{MTLCommandBuffer, MTLCommandBufferStatus, MTLCommandEncoder, MTLDispatchType};
use std::any::Any;
use std::collections::BTreeMap;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

/// Memories of runs that are kept while nothing runs.
const IDLE_MEMORIES: usize = 2;

/// What a device keeps of a plan.
pub(crate) struct MetalExecutable {
    prepared: Arc<Prepared>,
}

struct Prepared {
    gpu: Arc<Gpu>,
    commands: Commands,
    outputs: Vec<PlanOutput>,
    arena_bytes: usize,
    memories: RunMemories<RunMemory>,
}

/// The memory of one run.
struct RunMemory {
    arena: Arc<RawBuffer>,
    scratch: Arc<RawBuffer>,
    status: Arc<RawBuffer>,
}

/// A run on its way, and all that the device may touch meanwhile.
struct Run {
    prepared: Arc<Prepared>,
    memory: RunMemory,
    inputs: Vec<Buffer>,
    outputs: Vec<Option<Arc<RawBuffer>>>,
}

type RawCommandBuffer = ProtocolObject<dyn MTLCommandBuffer>;

/// Storages of Candle's, by their key, that nobody may write now.
type Locked<'a> = BTreeMap<usize, StorageRef<'a>>;

impl Gpu {
    /// See [`Device::workspaces`](crate::Device::workspaces).
    pub(crate) fn workspaces(&self, plan: &Plan) -> Result<Vec<Workspace>> {
        Ok(workspaces(parts::scratch_bytes(plan, Dialect::METAL, &self.limits)?))
    }
}

fn workspaces(scratch_bytes: usize) -> Vec<Workspace> {
    vec![
        Workspace::own("scratch memory of calls", scratch_bytes),
        Workspace::own("the status", size_of::<Status>()),
    ]
}

impl MetalExecutable {
    /// # Errors
    /// [`Error::Render`], [`Error::Compile`], [`Error::OutOfMemory`]; what Metal says.
    pub(crate) fn new(gpu: Arc<Gpu>, plan: &Plan) -> Result<MetalExecutable> {
        let (commands, arena_bytes) = (Commands::new(&gpu, plan)?, plan.arena_bytes);
        let make = || RunMemory::new(&gpu, arena_bytes, commands.scratch_bytes);
        let memories = RunMemories::new(IDLE_MEMORIES, arena_bytes, make)?;
        let outputs = plan.outputs.clone();
        let prepared = Prepared { gpu, commands, outputs, arena_bytes, memories };
        Ok(MetalExecutable { prepared: Arc::new(prepared) })
    }

    /// A run with all its memory.
    fn new_run(&self, inputs: Vec<Buffer>) -> Result<Run> {
        let prepared = &self.prepared;
        let outputs = prepared.outputs.iter().map(|output| prepared.fresh(output));
        let outputs = outputs.collect::<Result<Vec<_>>>()?;
        let scratch_bytes = prepared.commands.scratch_bytes;
        let make = || RunMemory::new(&prepared.gpu, prepared.arena_bytes, scratch_bytes);
        let memory = prepared.memories.take(make)?;
        Ok(Run { prepared: Arc::clone(prepared), memory, inputs, outputs })
    }

    /// Gives all commands of a run to the device, which calls `done` once it is through.
    fn start(&self, inputs: Vec<Buffer>, locked: &Locked<'_>, done: Done) -> Result<()> {
        wait_for_candle(locked)?;
        let run = self.new_run(inputs)?;
        autoreleasepool(|_| {
            run.clear_status();
            match run.command_buffer(locked, 0..usize::MAX) {
                Ok(buffer) => run.commit(&buffer, done),
                Err(error) => drop(run.finish(Err(error))?),
            }
            Ok(())
        })
    }

    /// Gives the device one step after the other, or all of them, and takes its word for how long it worked.
    fn profile(
        &self,
        inputs: Vec<Buffer>,
        locked: &Locked<'_>,
        steps: usize,
        clock: &mut Clock,
    ) -> Result<Vec<Buffer>> {
        wait_for_candle(locked)?;
        let run = self.new_run(inputs)?;
        run.clear_status();
        let mut timed = |steps: Range<usize>| {
            let buffer = run.command_buffer(locked, steps)?;
            let raw: &RawCommandBuffer = buffer.as_ref();
            raw.commit();
            raw.waitUntilCompleted();
            clock.seconds.push(raw.GPUEndTime() - raw.GPUStartTime());
            outcome(raw)
        };
        let outcome = match clock.timing {
            Timing::Whole => autoreleasepool(|_| timed(0..steps)),
            Timing::Steps => (0..steps).try_for_each(|i| autoreleasepool(|_| timed(i..i + 1))),
        };
        run.finish(outcome)
    }
}

impl Backend for MetalExecutable {
    fn run(
        &self,
        plan: &Plan,
        inputs: Vec<Buffer>,
        _team: Option<&Team>,
        clock: Option<&mut Clock>,
    ) -> Result<Vec<Buffer>> {
        // Handles of our own: the locks live as long as the device reads.
        let shared: Vec<Buffer> = inputs.iter().filter(|b| candle(b).is_some()).cloned().collect();
        let mut keyed: Vec<_> = shared.iter().filter_map(candle).collect();
        // In one order everywhere, so that no two runs and no writer wait for each other in a circle.
        keyed.sort_unstable_by_key(|storage| storage.key());
        keyed.dedup_by_key(|storage| storage.key());
        let locked: Locked<'_> =
            keyed.into_iter().map(|storage| (storage.key(), storage.lock())).collect();
        match clock {
            None => wait(|done| self.start(inputs, &locked, done)),
            Some(clock) => self.profile(inputs, &locked, plan.steps.len(), clock),
        }
    }

    fn submit(
        &self,
        plan: &Plan,
        inputs: Vec<Buffer>,
        team: Option<&Team>,
        done: Done,
    ) -> Option<Result<Vec<Buffer>>> {
        // A lock is a thread's: this one keeps it until the device is through.
        if inputs.iter().any(|buffer| candle(buffer).is_some()) {
            return Some(self.run(plan, inputs, team, None));
        }
        self.start(inputs, &Locked::new(), done).err().map(Err)
    }

    fn workspaces(&self) -> Vec<Workspace> {
        workspaces(self.prepared.commands.scratch_bytes)
    }

    fn allocated_arena_bytes(&self) -> usize {
        self.prepared.memories.allocated_arena_bytes()
    }
}

impl RunMemory {
    fn new(gpu: &Arc<Gpu>, arena_bytes: usize, scratch_bytes: usize) -> Result<RunMemory> {
        Ok(RunMemory {
            arena: gpu.allocate(arena_bytes, "the arena")?,
            scratch: gpu.allocate(scratch_bytes, "the calls' scratch memory")?,
            status: gpu.allocate(size_of::<Status>(), "the status")?,
        })
    }
}

impl Prepared {
    /// Memory for a result that the commands write, all zeros; none for the others.
    fn fresh(&self, output: &PlanOutput) -> Result<Option<Arc<RawBuffer>>> {
        let is_written = output.source == OutputSource::Written;
        let what = || format!("a result {}", output.ty);
        is_written.then(|| self.gpu.allocate(output.ty.size_bytes(), &what())).transpose()
    }
}

impl Run {
    fn clear_status(&self) {
        let status = self.memory.status.contents();
        // SAFETY: so many bytes of this run's own, which nothing runs on yet.
        unsafe { status.write_bytes(0, size_of::<Status>()) };
    }

    /// The commands of these steps.
    fn command_buffer(&self, locked: &Locked<'_>, steps: Range<usize>) -> Result<CommandBuffer> {
        let bases = self.bases(locked)?;
        let gpu = &self.prepared.gpu;
        let buffer = gpu.command_buffer()?;
        let raw: &RawCommandBuffer = buffer.as_ref();
        let encoder = raw
            .computeCommandEncoderWithDispatchType(MTLDispatchType::Concurrent)
            .ok_or_else(|| metal("making a command encoder", "there are no more"))?;
        // SAFETY: the plan has been verified; the run holds its memory until the commands have completed.
        unsafe { self.prepared.commands.encode(gpu, &encoder, &bases, steps) };
        encoder.endEncoding();
        Ok(buffer)
    }

    /// Hands itself to the completion handler, and the commands to the device.
    fn commit(self, buffer: &CommandBuffer, done: Done) {
        let run = Mutex::new(Some((self, done)));
        let handler = RcBlock::new(move |raw: NonNull<RawCommandBuffer>| {
            let run = run.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some((run, done)) = run {
                // SAFETY: Metal hands over the command buffer that has completed.
                let outcome = outcome(unsafe { raw.as_ref() });
                done(run.finish(outcome));
            }
        });
        let raw: &RawCommandBuffer = buffer.as_ref();
        // SAFETY: a block, which Metal copies. What it holds may be sent to Metal's threads.
        unsafe { raw.addCompletedHandler(RcBlock::as_ptr(&handler)) };
        raw.commit();
    }

    /// Where this run's memory is.
    fn bases<'a>(&'a self, locked: &'a Locked<'_>) -> Result<Vec<Option<(&'a RawBuffer, usize)>>> {
        let RunMemory { arena, scratch, status } = &self.memory;
        let mut bases: Vec<Option<(&RawBuffer, usize)>> =
            [arena, scratch, status].map(|b| Some((&**b, 0))).to_vec();
        for (index, input) in self.inputs.iter().enumerate() {
            let is_used = self.prepared.commands.used[Bases::INPUTS + index];
            bases.push(match input.memory() {
                _ if !is_used => None,
                Memory::Device(memory) => {
                    let (buffer, offset) = unified(memory.as_ref()).place();
                    Some((&**buffer, offset))
                }
                Memory::Shared(shared) => {
                    let offset = shared.start() * shared.dtype().size_bytes();
                    let storage = locked.get(&shared.key()).and_then(|s| metal_storage(s));
                    let storage = storage.ok_or_else(|| Error::Device { got: "cpu".into() })?;
                    Some((storage.buffer(), offset))
                }
                Memory::Owned(_) | Memory::Mapped(_) => {
                    panic!("metal-candle bug: input {index} is on the host")
                }
            });
        }
        bases.extend(self.outputs.iter().map(|o| o.as_ref().map(|buffer| (&**buffer, 0))));
        Ok(bases)
    }

    /// The results, once the device has ceased to work on them.
    fn finish(self, outcome: Result<()>) -> Result<Vec<Buffer>> {
        let Run { prepared, memory, inputs, outputs } = self;
        let status = memory.status.contents();
        // SAFETY: so many bytes, which the device has ceased to write.
        let status = unsafe { std::slice::from_raw_parts(status, size_of::<Status>()) };
        let checked =
            outcome.and_then(|()| Status::from_bytes(status).check().map_err(Error::Graph));
        prepared.memories.give_back(memory);
        checked.map(|()| results(&prepared, inputs, outputs))
    }
}

fn results(
    prepared: &Prepared,
    inputs: Vec<Buffer>,
    outputs: Vec<Option<Arc<RawBuffer>>>,
) -> Vec<Buffer> {
    let mut results: Vec<Buffer> = Vec::with_capacity(outputs.len());
    for (output, buffer) in prepared.outputs.iter().zip(outputs) {
        results.push(match output.source {
            OutputSource::Written => {
                let buffer = buffer.expect("metal-candle bug: an output without memory");
                let (dtype, len) = (output.ty.dtype, output.ty.shape.len());
                Buffer::on_device(Box::new(Unified::new(&prepared.gpu, buffer, dtype, len)))
            }
            OutputSource::Donated(i) | OutputSource::Input(i) => inputs[i as usize].clone(),
            OutputSource::SameAs(i) => results[i as usize].clone(),
        });
    }
    results
}

/// How the device got through.
fn outcome(buffer: &RawCommandBuffer) -> Result<()> {
    if buffer.status() != MTLCommandBufferStatus::Error {
        return Ok(());
    }
    let error = buffer.error().map(|error| error.localizedDescription().to_string());
    Err(metal("running a plan", error.unwrap_or_else(|| "unknown".into())))
}

/// What Candle has asked for may write what the run reads.
fn wait_for_candle(locked: &Locked<'_>) -> Result<()> {
    let mut waited = Vec::new();
    for storage in locked.values().filter_map(|storage| metal_storage(storage)) {
        let device = storage.device();
        if !waited.contains(&device.id()) {
            device.flush_and_wait_current()?;
            waited.push(device.id());
        }
    }
    Ok(())
}

fn metal_storage(storage: &Storage) -> Option<&MetalStorage> {
    match storage {
        Storage::Metal(storage) => Some(storage),
        Storage::Cpu(_) | Storage::Cuda(_) => None,
    }
}

fn candle(buffer: &Buffer) -> Option<&crate::candle::Shared> {
    match buffer.memory() {
        Memory::Shared(shared) => Some(shared),
        Memory::Owned(_) | Memory::Mapped(_) | Memory::Device(_) => None,
    }
}

fn unified(memory: &dyn DeviceMemory) -> &Unified {
    let memory: &dyn Any = memory;
    memory.downcast_ref().expect("metal-candle bug: an input is on another device")
}

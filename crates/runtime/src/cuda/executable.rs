//! A plan made ready for a device, and one run of it.
//!
//! A run binds its memory, copies what small inputs the host holds in one go, asks for the steps, copies back the
//! status and the small results in one go, and waits. When two runs in a row have all their memory in the same place,
//! the steps are recorded as a graph, which later runs replay.

use super::Gpu;
use super::command::{Bases, Commands};
use super::gpu::Said;
use super::marks::Marks;
use super::memory::{Allocation, Pinned, Resident, STAGED_BYTES};
use crate::buffer::{Buffer, DeviceMemory, Memory};
use crate::candle::Shared;
use crate::executable::{Backend, Clock, Timing};
use crate::{Error, Result, mapped, verify};
use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::{Storage, StorageRef};
use cudarc::driver::sys::{self, CUdeviceptr};
use cudarc::driver::{DevicePtr, result};
use metal_candle_compiler::render::Status;
use metal_candle_compiler::{OutputSource, Plan, PlanOutput};
use rayon::ThreadPool;
use std::any::Any;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Workspaces that are kept while nothing runs.
const IDLE_WORKSPACES: usize = 2;
/// Results of up to so many bytes come back to the host with the run.
const RETURNED_BYTES: usize = 1 << 20;
/// What every part of a workspace starts at a multiple of.
const ALIGN_BYTES: usize = 256;

/// What a device keeps of a plan.
pub(crate) struct CudaExecutable {
    gpu: Arc<Gpu>,
    commands: Commands,
    staging: Staging,
    /// By input: whether a command refers to it.
    used: Vec<bool>,
    /// By output: whether its memory must be zeroed.
    zeroed: Vec<bool>,
    idle: Mutex<Vec<Workspace>>,
    allocated: AtomicUsize,
}

/// Memory that the host and the device exchange: `[small inputs | status | small results]`. What the host holds of the
/// first goes there, the rest comes back in one copy.
struct Staging {
    /// By input: where it lies if the host holds it.
    inputs: Vec<Option<usize>>,
    /// By output: where it lies if it is small.
    outputs: Vec<Option<usize>>,
    status: usize,
    len_bytes: usize,
}

/// The memory of one run.
struct Workspace {
    arena: Allocation,
    scratch: Allocation,
    staging: Allocation,
    host: Pinned,
    /// Where the run before this had its memory.
    last: Vec<CUdeviceptr>,
    graph: Option<Graph>,
}

/// What a run holds until it is over.
#[derive(Default)]
struct Held<'a> {
    /// Keep Candle from writing.
    guards: Vec<StorageRef<'a>>,
    copies: Vec<Allocation>,
    /// The parts of the staging memory that the host has filled.
    staged: Vec<Range<usize>>,
}

/// The commands of a run, recorded with the addresses in `Workspace::last`.
struct Graph {
    graph: sys::CUgraph,
    executable: sys::CUgraphExec,
}

// SAFETY: handles that any thread may give to the driver, one at a time: a workspace has one owner.
unsafe impl Send for Graph {}

impl CudaExecutable {
    /// # Errors
    /// [`Error::Render`], [`Error::Compile`], [`Error::OutOfMemory`]; what the driver says.
    pub(crate) fn new(gpu: Arc<Gpu>, plan: &Plan) -> Result<CudaExecutable> {
        gpu.bind()?;
        let commands = Commands::new(&gpu, plan)?;
        let mut used = vec![false; plan.inputs.len()];
        for place in commands.list.iter().flat_map(|c| &c.places) {
            if (Bases::INPUTS..Bases::outputs(plan)).contains(&place.base) {
                used[place.base - Bases::INPUTS] = true;
            }
        }
        let executable = CudaExecutable {
            staging: Staging::new(plan),
            zeroed: (0..plan.outputs.len()).map(|i| !verify::is_written_whole(plan, i)).collect(),
            used,
            commands,
            idle: Mutex::default(),
            allocated: AtomicUsize::new(0),
            gpu,
        };
        let workspace = executable.new_workspace(plan)?;
        executable.idle().push(workspace);
        Ok(executable)
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Workspace>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn new_workspace(&self, plan: &Plan) -> Result<Workspace> {
        let arena = self.gpu.allocate(plan.arena_bytes, "the arena")?;
        let scratch =
            self.gpu.allocate(self.commands.scratch_bytes, "the calls' scratch memory")?;
        let staging = self.gpu.allocate(self.staging.len_bytes, "small inputs and results")?;
        let host = Pinned::new(&self.gpu, self.staging.len_bytes)?;
        self.allocated.fetch_add(plan.arena_bytes, Ordering::Relaxed);
        Ok(Workspace { arena, scratch, staging, host, last: Vec::new(), graph: None })
    }

    /// Asks for all that a run does, with its memory at `bases`.
    fn enqueue(
        &self,
        plan: &Plan,
        workspace: &mut Workspace,
        bases: Vec<CUdeviceptr>,
        marks: Option<&Marks>,
    ) -> Result<()> {
        if workspace.graph.is_some() && workspace.last != bases {
            workspace.graph = None;
        } else if workspace.graph.is_none() && workspace.last == bases {
            workspace.graph = Some(self.record(plan, &bases)?);
        }
        let stream = self.gpu.raw_stream();
        let (steps, whole) = match marks {
            Some(marks) if marks.timing == Timing::Steps => (Some(marks), None),
            whole => (None, whole),
        };
        whole.map_or(Ok(()), |marks| marks.set(0, stream))?;
        match &workspace.graph {
            Some(graph) if steps.is_none() => {
                let _alone = self.gpu.library.alone();
                // SAFETY: recorded with these addresses.
                unsafe { result::graph::launch(graph.executable, stream) }
                    .said(|| "replaying a plan".into())?;
            }
            _ => self.enqueue_commands(plan, &bases, stream, steps)?,
        }
        whole.map_or(Ok(()), |marks| marks.set(1, stream))?;
        workspace.last = bases;
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
        let mut reached = 0;
        for command in &self.commands.list {
            while let Some(marks) = marks.filter(|_| reached <= command.step) {
                marks.set(reached, stream)?;
                reached += 1;
            }
            // SAFETY: the plan has been verified; the run holds the memory at `bases`, of the plan's sizes, until the
            // stream is through.
            unsafe { command.enqueue(&self.gpu, bases, stream) }.map_err(|error| {
                let label = plan.steps[command.step].label.clone();
                Error::Step { step: command.step, label, source: Box::new(error) }
            })?;
        }
        while let Some(marks) = marks.filter(|_| reached <= plan.steps.len()) {
            marks.set(reached, stream)?;
            reached += 1;
        }
        Ok(())
    }

    fn record(&self, plan: &Plan, bases: &[CUdeviceptr]) -> Result<Graph> {
        let recorder = self.gpu.recorder.lock().unwrap_or_else(PoisonError::into_inner);
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        let doing = || "recording a plan".to_owned();
        recorder.begin_capture(mode).said(doing)?;
        let outcome = self.enqueue_commands(plan, bases, recorder.cu_stream(), None);
        // SAFETY: capture has begun, and ends whatever happened in between.
        let graph = unsafe { result::stream::end_capture(recorder.cu_stream()) };
        outcome?;
        let graph = graph.said(doing)?;
        // SAFETY: a graph that was just recorded.
        match unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) } {
            Ok(executable) => Ok(Graph { graph, executable }),
            Err(error) => {
                // SAFETY: as above.
                let _ = unsafe { result::graph::destroy(graph) };
                Err(error).said(doing)
            }
        }
    }

    /// Where this run's memory starts.
    fn bind<'a>(
        &self,
        plan: &Plan,
        workspace: &mut Workspace,
        inputs: &'a [Buffer],
        outputs: &[Option<Allocation>],
        held: &mut Held<'a>,
    ) -> Result<Vec<CUdeviceptr>> {
        let staging = workspace.staging.address();
        let at = |offset: usize| staging + offset as u64;
        let (arena, scratch) = (workspace.arena.address(), workspace.scratch.address());
        let mut bases = vec![arena, scratch, at(self.staging.status)];
        for (i, buffer) in inputs.iter().enumerate() {
            bases.push(match buffer.memory() {
                _ if !self.used[i] => 0,
                Memory::Device(memory) => {
                    let resident = resident(memory.as_ref());
                    let slot = self.staging.inputs[i].filter(|_| !plan.inputs[i].donated);
                    match slot.and_then(|slot| Some((slot, resident.staged()?))) {
                        Some((slot, bytes)) => {
                            let range = slot..slot + bytes.len();
                            workspace.host.bytes_mut()[range.clone()].copy_from_slice(bytes);
                            join(&mut held.staged, range);
                            at(slot)
                        }
                        None => resident.address()?,
                    }
                }
                Memory::Shared(shared) => self.bind_candle(plan, i, shared, held)?,
                Memory::Owned(_) | Memory::Mapped(_) => {
                    panic!("metal-candle bug: input {i} is on the host")
                }
            });
        }
        for (i, output) in plan.outputs.iter().enumerate() {
            bases.push(match (&output.source, self.staging.outputs[i], &outputs[i]) {
                (OutputSource::Written, Some(slot), _) => at(slot),
                (OutputSource::Written, None, Some(allocation)) => allocation.address(),
                _ => 0,
            });
        }
        Ok(bases)
    }

    fn bind_candle<'a>(
        &self,
        plan: &Plan,
        index: usize,
        shared: &'a Shared,
        held: &mut Held<'a>,
    ) -> Result<CUdeviceptr> {
        let (expected, got) = (plan.inputs[index].ty, shared.dtype());
        let guard = shared.lock();
        // Candle may have put another storage there since.
        let changed = || Error::InputType { index, expected, got, len: 0 };
        let storage = self.candle_address(&guard).ok_or_else(changed)?;
        held.guards.push(guard);
        let address = storage + (shared.start() * got.size_bytes()) as u64;
        self.aligned(address, expected.size_bytes(), &mut held.copies)
    }

    /// Where a Candle tensor's storage starts.
    fn candle_address(&self, storage: &Storage) -> Option<CUdeviceptr> {
        let Storage::Cuda(storage) = storage else { return None };
        let stream = self.gpu.stream();
        // The guard makes our stream wait for whoever wrote it on another.
        Some(match &storage.slice {
            CudaStorageSlice::U8(slice) => slice.device_ptr(stream).0,
            CudaStorageSlice::U32(slice) => slice.device_ptr(stream).0,
            CudaStorageSlice::I64(slice) => slice.device_ptr(stream).0,
            CudaStorageSlice::BF16(slice) => slice.device_ptr(stream).0,
            CudaStorageSlice::F16(slice) => slice.device_ptr(stream).0,
            CudaStorageSlice::F32(slice) => slice.device_ptr(stream).0,
            CudaStorageSlice::F64(slice) => slice.device_ptr(stream).0,
            _ => return None,
        })
    }

    /// A tensor that starts in the middle of a wide access is copied first.
    fn aligned(
        &self,
        address: CUdeviceptr,
        len: usize,
        held: &mut Vec<Allocation>,
    ) -> Result<CUdeviceptr> {
        if address.is_multiple_of(16) {
            return Ok(address);
        }
        let copy = self.gpu.allocate(len, "an aligned copy")?;
        let to = copy.address();
        held.push(copy);
        // SAFETY: both have `len` bytes.
        unsafe { result::memcpy_dtod_async(to, address, len, self.gpu.raw_stream()) }
            .said(|| "aligning an input".into())?;
        Ok(to)
    }

    /// Copies a part of the staging memory there or back.
    fn exchange(&self, workspace: &mut Workspace, range: Range<usize>, there: bool) -> Result<()> {
        let device = workspace.staging.address() + range.start as u64;
        let host = &mut workspace.host.bytes_mut()[range];
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

    fn run_steps(
        &self,
        plan: &Plan,
        workspace: &mut Workspace,
        inputs: &[Buffer],
        outputs: &[Option<Allocation>],
        clock: Option<&mut Clock>,
    ) -> Result<()> {
        let mut held = Held::default();
        let timing = clock.as_ref().map(|clock| clock.timing);
        let marks =
            timing.map(|timing| Marks::new(&self.gpu, timing, plan.steps.len())).transpose()?;
        let outcome = (|| {
            let bases = self.bind(plan, workspace, inputs, outputs, &mut held)?;
            for range in &held.staged {
                self.exchange(workspace, range.clone(), true)?;
            }
            self.enqueue(plan, workspace, bases, marks.as_ref())?;
            self.exchange(workspace, self.staging.status..self.staging.len_bytes, false)
        })();
        // Whatever happened, nothing may still be running on memory that is given back.
        let waited = self.gpu.synchronize();
        outcome.and(waited)?;
        if let (Some(clock), Some(marks)) = (clock, marks) {
            clock.seconds = marks.seconds()?;
        }
        let status = Status::from_bytes(&workspace.host.bytes()[self.staging.status..]);
        status.check().map_err(Error::Graph)
    }

    fn results(
        &self,
        plan: &Plan,
        workspace: &Workspace,
        inputs: &[Buffer],
        outputs: Vec<Option<Allocation>>,
    ) -> Vec<Buffer> {
        let mut results: Vec<Buffer> = Vec::with_capacity(plan.outputs.len());
        for (i, (output, allocation)) in plan.outputs.iter().zip(outputs).enumerate() {
            let dtype = output.ty.dtype;
            results.push(match (output.source, self.staging.outputs[i], allocation) {
                (OutputSource::Written, Some(slot), _) => {
                    let bytes = &workspace.host.bytes()[slot..][..output.ty.size_bytes()];
                    let data = mapped::copy(bytes, dtype);
                    Buffer::on_device(Box::new(Resident::on_host(&self.gpu, data)))
                }
                (OutputSource::Written, None, Some(allocation)) => {
                    Buffer::on_device(Box::new(Resident::on_device(allocation, dtype)))
                }
                (OutputSource::Written, None, None) => {
                    panic!("metal-candle bug: output {i} has no memory")
                }
                (OutputSource::Donated(i) | OutputSource::Input(i), ..) => {
                    inputs[i as usize].clone()
                }
                (OutputSource::SameAs(i), ..) => results[i as usize].clone(),
            });
        }
        results
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
        _pool: Option<&ThreadPool>,
        clock: Option<&mut Clock>,
    ) -> Result<Vec<Buffer>> {
        self.gpu.bind()?;
        for (buffer, input) in inputs.iter_mut().zip(&plan.inputs) {
            if input.donated
                && let Some(memory) = buffer.unique_device_mut()
            {
                resident_mut(memory).address_mut()?;
            }
        }
        let idle = self.idle().pop();
        let mut workspace = idle.map_or_else(|| self.new_workspace(plan), Ok)?;
        let outputs = plan.outputs.iter().zip(&self.staging.outputs);
        let outputs = outputs.map(|(o, slot)| self.fresh(o, *slot)).collect::<Result<Vec<_>>>();
        let outcome = outputs.and_then(|outputs| {
            self.run_steps(plan, &mut workspace, &inputs, &outputs, clock)?;
            Ok(self.results(plan, &workspace, &inputs, outputs))
        });
        let mut idle = self.idle();
        if idle.len() < IDLE_WORKSPACES {
            idle.push(workspace);
        } else {
            self.allocated.fetch_sub(plan.arena_bytes, Ordering::Relaxed);
        }
        outcome
    }

    fn allocated_arena_bytes(&self) -> usize {
        self.allocated.load(Ordering::Relaxed)
    }
}

/// Adds a range behind the others; one that follows closely makes the last longer, as a copy costs more than its bytes.
fn join(ranges: &mut Vec<Range<usize>>, next: Range<usize>) {
    const CLOSE_BYTES: usize = 16 << 10;
    match ranges.last_mut() {
        Some(last) if next.start - last.end <= CLOSE_BYTES => last.end = next.end,
        _ => ranges.push(next),
    }
}

fn resident(memory: &dyn DeviceMemory) -> &Resident {
    let any: &dyn Any = memory;
    any.downcast_ref().expect("metal-candle bug: memory of another backend")
}

fn resident_mut(memory: &mut dyn DeviceMemory) -> &mut Resident {
    let any: &mut dyn Any = memory;
    any.downcast_mut().expect("metal-candle bug: memory of another backend")
}

impl Staging {
    fn new(plan: &Plan) -> Staging {
        let mut len_bytes = 0;
        let mut place = |bytes: usize, limit: usize| {
            (bytes <= limit).then(|| {
                let at = len_bytes;
                len_bytes += bytes.next_multiple_of(ALIGN_BYTES);
                at
            })
        };
        let inputs =
            plan.inputs.iter().map(|input| place(input.ty.size_bytes(), STAGED_BYTES)).collect();
        let status = place(size_of::<Status>(), usize::MAX).expect("metal-candle bug: no status");
        let output = |o: &PlanOutput| match o.source {
            OutputSource::Written => place(o.ty.size_bytes(), RETURNED_BYTES),
            OutputSource::Donated(_) | OutputSource::Input(_) | OutputSource::SameAs(_) => None,
        };
        let outputs = plan.outputs.iter().map(output).collect();
        Staging { inputs, outputs, status, len_bytes }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made in `record`; every run has waited for its replay. A failure can be told to nobody.
        unsafe {
            let _ = result::graph::exec_destroy(self.executable);
            let _ = result::graph::destroy(self.graph);
        }
    }
}

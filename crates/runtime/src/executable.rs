//! A plan made ready to run on its device.

use crate::buffer::Buffer;
use crate::cpu::CpuExecutable;
#[cfg(feature = "cuda")]
use crate::cuda::CudaExecutable;
use crate::in_flight::Started;
use crate::inputs::Inputs;
#[cfg(feature = "metal")]
use crate::metal::MetalExecutable;
use crate::team::Team;
use crate::{Device, Result, Workspace, World, WorldError, verify};
use metal_candle_compiler::{LibraryCall, Plan, Work};
use std::any::Any;
use std::fmt;
use std::sync::Arc;

/// A [`Plan`] made ready to run: its kernels compiled, its memory kept from run to run.
///
/// Several runs may be in flight; each has an arena of its own.
pub struct Executable {
    plan: Plan,
    device: Device,
    inputs: Arc<Inputs>,
    backend: Box<dyn Backend>,
}

/// What is to be done with the results of a run that was not waited for.
pub(crate) type Done = Box<dyn FnOnce(Result<Vec<Buffer>>) + Send>;

/// The results of a run that `start` starts, and whose end it is told of: nothing is returned before.
///
/// # Errors
/// Those of `start`, and of the run; [`Error::Lost`](crate::Error::Lost) if that is given up.
#[cfg(any(test, feature = "metal"))]
pub(crate) fn wait(start: impl FnOnce(Done) -> Result<()>) -> Result<Vec<Buffer>> {
    let (sender, receiver) = std::sync::mpsc::channel();
    // Nobody may be waiting any more.
    start(Box::new(move |results| drop(sender.send(results))))?;
    receiver.recv().unwrap_or(Err(crate::Error::Lost))
}

/// What a run is to be timed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timing {
    /// Each step. The whole takes longer than otherwise, for a GPU's steps are then asked for one by one.
    Steps,
    /// All steps as one.
    Whole,
}

/// The seconds that a run took on its device.
pub(crate) struct Clock {
    pub(crate) timing: Timing,
    pub(crate) seconds: Vec<f64>,
}

/// What a device makes of a plan.
pub(crate) trait Backend: Send + Sync {
    /// Whether it has taken the inputs that are held, and runs are given the others only; else they are given all.
    fn holds_inputs(&self) -> bool {
        false
    }

    /// Runs the steps and waits for them; the CPU on this thread, with the `team` if there is one and they are worth
    /// it. The inputs that are used have the plan's types, those that are donated are unique.
    fn run(
        &self,
        plan: &Plan,
        inputs: Vec<Buffer>,
        team: Option<&Team>,
        clock: Option<&mut Clock>,
    ) -> Result<Vec<Buffer>>;

    /// As [`Backend::run`], but it need not wait.
    fn start(&self, plan: &Plan, inputs: Vec<Buffer>, team: Option<&Team>) -> Result<Started> {
        self.run(plan, inputs, team, None).map(Started::over)
    }

    /// As [`Backend::run`], but it need not wait: then it returns nothing, and `done` gets the results once they are there,
    /// on whatever thread.
    fn submit(
        &self,
        plan: &Plan,
        inputs: Vec<Buffer>,
        team: Option<&Team>,
        done: Done,
    ) -> Option<Result<Vec<Buffer>>> {
        drop(done);
        Some(self.run(plan, inputs, team, None))
    }

    /// See [`Executable::keeping_spares`].
    fn keep_spares(&mut self) {}

    /// See [`Executable::prepacking`].
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory)
    fn prepack(&mut self, _plan: &Plan) -> Result<()> {
        Ok(())
    }

    /// See [`Executable::spare_bytes`].
    fn spare_bytes(&self) -> usize {
        0
    }

    /// See [`Executable::workspaces`].
    fn workspaces(&self) -> Vec<Workspace>;

    /// See [`Executable::allocated_arena_bytes`].
    fn allocated_arena_bytes(&self) -> usize;
}

impl Executable {
    /// Checks the plan and makes it ready to run on `device`.
    ///
    /// # Errors
    /// [`Error::Plan`] if a step would touch memory that is not its own; [`Error::OutOfMemory`] for the arena;
    /// [`Error::NotInBuild`] and [`Error::NotInMachine`], and what its driver says.
    ///
    /// [`Error::Plan`]: crate::Error::Plan
    /// [`Error::OutOfMemory`]: crate::Error::OutOfMemory
    /// [`Error::NotInBuild`]: crate::Error::NotInBuild
    /// [`Error::NotInMachine`]: crate::Error::NotInMachine
    pub fn new(plan: Plan, device: &Device) -> Result<Executable> {
        Executable::holding(plan, device, None, Vec::new())
    }

    /// [`Executable::new`]; where the plan sums over ranks, over those of this world.
    ///
    /// The buffers in `held`, one place for each input of the plan, are the same in every run, which is then given the
    /// others only, in their order. As long as the executable lives, nothing can donate or write what it holds, unless it
    /// is a Candle tensor, whose storage is locked and looked up in every run. If `held` is empty, so is nothing held.
    ///
    /// # Errors
    /// As [`Executable::new`]; [`WorldError::OtherDevice`]; for what is held, as [`AsyncGraphExecutor::run`].
    ///
    /// [`AsyncGraphExecutor::run`]: crate::AsyncGraphExecutor::run
    pub fn holding(
        plan: Plan,
        device: &Device,
        world: Option<&Arc<World>>,
        held: Vec<Option<Buffer>>,
    ) -> Result<Executable> {
        verify::verify(&plan)?;
        let inputs = Arc::new(Inputs::new(&plan, device, held)?);
        let world = world.filter(|_| sums_over_ranks(&plan)).cloned();
        if let Some(world) = world.as_ref().filter(|world| world.device() != device) {
            let (plan, world) = (*device, *world.device());
            return Err(WorldError::OtherDevice { plan, world }.into());
        }
        let backend: Box<dyn Backend> = match device {
            Device::Cpu => Box::new(CpuExecutable::new(&plan, world, Arc::clone(&inputs))?),
            #[cfg(feature = "cuda")]
            Device::Cuda(number) => {
                Box::new(CudaExecutable::new(crate::cuda::Gpu::get(*number)?, &plan, world)?)
            }
            #[cfg(feature = "metal")]
            Device::Metal(number) => {
                Box::new(MetalExecutable::new(crate::metal::Gpu::get(*number)?, &plan)?)
            }
            other => return Err(other.missing()),
        };
        Ok(Executable { plan, device: *device, inputs, backend })
    }

    /// For whoever repeats the run: keeps the memory of large results (4 MiB and more) that nobody holds any more for the next
    /// one, at most that of one result for each output, until the executable is dropped. Fresh memory has its pages zeroed by
    /// the system as they are first written, which takes longer than the work of many a kernel.
    ///
    /// What has become a Candle tensor or was donated does not come back. On the CPU only: the memory of GPUs comes from pools.
    #[must_use]
    pub fn keeping_spares(mut self) -> Executable {
        self.backend.keep_spares();
        self
    }

    /// For whoever repeats the run on the CPU: lays out the matrices that are held, and that products of many rows read, once and
    /// for all as the loops of those products take them, and not in every run. The results have the same bits.
    ///
    /// It takes their memory once more, or twice where one is read along both of its axes, as a trained model's weights are:
    /// forward along the one, backward along the other ([`Executable::workspaces`] says how much). Executables that hold the same
    /// matrices share it. Candle tensors, whose elements others may write, and weights in blocks stay as they are. Elsewhere,
    /// nothing is done: there, products read a matrix as it lies.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory)
    pub fn prepacking(mut self) -> Result<Executable> {
        self.backend.prepack(&self.plan)?;
        Ok(self)
    }

    /// What it runs.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Where it runs.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The scratch memory that is held now: that of the plan for each run in flight, and for a few that are kept. Results, and
    /// the [spares](Executable::spare_bytes) of them, come on top.
    pub fn allocated_arena_bytes(&self) -> usize {
        self.backend.allocated_arena_bytes()
    }

    /// The memory of earlier results that is kept for the next run: none, unless it is [told to](Executable::keeping_spares).
    pub fn spare_bytes(&self) -> usize {
        self.backend.spare_bytes()
    }

    /// What each run holds beside the plan's own memory, and what it shares with others: as [`Device::workspaces`] says it
    /// of the plan.
    pub fn workspaces(&self) -> Vec<Workspace> {
        self.backend.workspaces()
    }

    pub(crate) fn run(&self, given: Vec<Buffer>, team: Option<&Team>) -> Result<Vec<Buffer>> {
        let inputs = self.checked(given)?;
        self.backend.run(&self.plan, inputs, team, None)
    }

    /// See [`Backend::start`].
    pub(crate) fn start(&self, given: Vec<Buffer>, team: Option<&Team>) -> Result<Started> {
        let inputs = self.checked(given)?;
        self.backend.start(&self.plan, inputs, team)
    }

    pub(crate) fn profile(
        &self,
        given: Vec<Buffer>,
        team: Option<&Team>,
        timing: Timing,
    ) -> Result<(Vec<Buffer>, Vec<f64>)> {
        let inputs = self.checked(given)?;
        let mut clock = Clock { timing, seconds: Vec::new() };
        let results = self.backend.run(&self.plan, inputs, team, Some(&mut clock))?;
        Ok((results, clock.seconds))
    }

    /// See [`Backend::submit`].
    pub(crate) fn submit(
        &self,
        given: Vec<Buffer>,
        team: Option<&Team>,
        done: Done,
    ) -> Option<Result<Vec<Buffer>>> {
        match self.checked(given) {
            Ok(inputs) => self.backend.submit(&self.plan, inputs, team, done),
            Err(error) => Some(Err(error)),
        }
    }

    /// What the backend is to be given of these inputs, once they have been looked at.
    fn checked(&self, mut given: Vec<Buffer>) -> Result<Vec<Buffer>> {
        Buffer::prefetch(&given);
        self.inputs.check(&self.plan, &mut given)?;
        Ok(if self.backend.holds_inputs() { given } else { self.inputs.all(given) })
    }
}

impl fmt::Debug for Executable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Executable")
            .field("device", &self.device)
            .field("steps", &self.plan.steps.len())
            .field("arena_bytes", &self.plan.arena_bytes)
            .finish_non_exhaustive()
    }
}

fn sums_over_ranks(plan: &Plan) -> bool {
    plan.steps.iter().any(|step| matches!(step.work, Work::Call(LibraryCall::AllReduce)))
}

pub(crate) fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic without a message")
        .to_string()
}

#[cfg(test)]
mod tests;

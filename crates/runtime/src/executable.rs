//! A plan made ready to run on its device.

use crate::buffer::Buffer;
use crate::cpu::CpuExecutable;
#[cfg(feature = "cuda")]
use crate::cuda::CudaExecutable;
use crate::in_flight::Started;
#[cfg(feature = "metal")]
use crate::metal::MetalExecutable;
use crate::{Device, Error, Result, Workspace, World, WorldError, verify};
use metal_candle_compiler::{LibraryCall, OutputSource, Plan, Slot, Work};
use rayon::ThreadPool;
use std::any::Any;
use std::fmt;
use std::sync::Arc;

/// A [`Plan`] made ready to run: its kernels compiled, its memory kept from run to run.
///
/// Several runs may be in flight; each has an arena of its own.
pub struct Executable {
    plan: Plan,
    device: Device,
    /// By input: whether a step or a result refers to it.
    used: Vec<bool>,
    backend: Box<dyn Backend>,
}

/// What is to be done with the results of a run that was not waited for.
pub(crate) type Done = Box<dyn FnOnce(Result<Vec<Buffer>>) + Send>;

/// The results of a run that `start` starts, and whose end it is told of: nothing is returned before.
///
/// # Errors
/// Those of `start`, and of the run; [`Error::Lost`] if that is given up.
#[cfg(any(test, feature = "metal"))]
pub(crate) fn wait(start: impl FnOnce(Done) -> Result<()>) -> Result<Vec<Buffer>> {
    let (sender, receiver) = std::sync::mpsc::channel();
    // Nobody may be waiting any more.
    start(Box::new(move |results| drop(sender.send(results))))?;
    receiver.recv().unwrap_or(Err(Error::Lost))
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
    /// Runs the steps and waits for them; the CPU on `pool`, if there is one and they are worth it, else on this
    /// thread. The inputs that are used have the plan's types, those that are donated are unique.
    fn run(
        &self,
        plan: &Plan,
        inputs: Vec<Buffer>,
        pool: Option<&ThreadPool>,
        clock: Option<&mut Clock>,
    ) -> Result<Vec<Buffer>>;

    /// As [`Backend::run`], but it need not wait.
    fn start(
        &self,
        plan: &Plan,
        inputs: Vec<Buffer>,
        pool: Option<&ThreadPool>,
    ) -> Result<Started> {
        self.run(plan, inputs, pool, None).map(Started::over)
    }

    /// As [`Backend::run`], but it need not wait: then it returns nothing, and `done` gets the results once they are there,
    /// on whatever thread.
    fn submit(
        &self,
        plan: &Plan,
        inputs: Vec<Buffer>,
        pool: Option<&ThreadPool>,
        done: Done,
    ) -> Option<Result<Vec<Buffer>>> {
        drop(done);
        Some(self.run(plan, inputs, pool, None))
    }

    /// See [`Executable::workspaces`].
    fn workspaces(&self) -> Vec<Workspace>;

    /// See [`Executable::allocated_arena_bytes`].
    fn allocated_arena_bytes(&self) -> usize;
}

impl Executable {
    /// # Errors
    /// [`Error::Plan`] if a step would touch memory that is not its own; [`Error::OutOfMemory`] for the arena;
    /// [`Error::NotInBuild`] and [`Error::NotInMachine`], and what its driver says.
    pub fn new(plan: Plan, device: &Device) -> Result<Executable> {
        Executable::within(plan, device, None)
    }

    /// [`Executable::new`]; where the plan sums over ranks, over those of this world.
    ///
    /// # Errors
    /// As [`Executable::new`]; [`WorldError::OtherDevice`].
    pub fn within(plan: Plan, device: &Device, world: Option<&Arc<World>>) -> Result<Executable> {
        verify::verify(&plan)?;
        let world = world.filter(|_| sums_over_ranks(&plan)).cloned();
        if let Some(world) = world.as_ref().filter(|world| world.device() != device) {
            let (plan, world) = (*device, *world.device());
            return Err(WorldError::OtherDevice { plan, world }.into());
        }
        let backend: Box<dyn Backend> = match device {
            Device::Cpu => Box::new(CpuExecutable::new(&plan, world)?),
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
        let used = used_inputs(&plan);
        Ok(Executable { plan, device: *device, used, backend })
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The scratch memory that is held now: that of the plan for each run in flight, and for a few that are kept.
    pub fn allocated_arena_bytes(&self) -> usize {
        self.backend.allocated_arena_bytes()
    }

    /// What each run holds beside the plan's own memory, and what it shares with others: as [`Device::workspaces`] says it
    /// of the plan.
    pub fn workspaces(&self) -> Vec<Workspace> {
        self.backend.workspaces()
    }

    pub(crate) fn run(
        &self,
        mut inputs: Vec<Buffer>,
        pool: Option<&ThreadPool>,
    ) -> Result<Vec<Buffer>> {
        self.check_inputs(&mut inputs)?;
        self.backend.run(&self.plan, inputs, pool, None)
    }

    /// See [`Backend::start`].
    pub(crate) fn start(
        &self,
        mut inputs: Vec<Buffer>,
        pool: Option<&ThreadPool>,
    ) -> Result<Started> {
        self.check_inputs(&mut inputs)?;
        self.backend.start(&self.plan, inputs, pool)
    }

    pub(crate) fn profile(
        &self,
        mut inputs: Vec<Buffer>,
        pool: Option<&ThreadPool>,
        timing: Timing,
    ) -> Result<(Vec<Buffer>, Vec<f64>)> {
        self.check_inputs(&mut inputs)?;
        let mut clock = Clock { timing, seconds: Vec::new() };
        let results = self.backend.run(&self.plan, inputs, pool, Some(&mut clock))?;
        Ok((results, clock.seconds))
    }

    /// See [`Backend::submit`].
    pub(crate) fn submit(
        &self,
        mut inputs: Vec<Buffer>,
        pool: Option<&ThreadPool>,
        done: Done,
    ) -> Option<Result<Vec<Buffer>>> {
        match self.check_inputs(&mut inputs) {
            Ok(()) => self.backend.submit(&self.plan, inputs, pool, done),
            Err(error) => Some(Err(error)),
        }
    }

    /// # Errors
    /// [`Error::InputCount`], [`Error::InputType`], [`Error::InputDevice`] and [`Error::DonatedShared`].
    fn check_inputs(&self, inputs: &mut [Buffer]) -> Result<()> {
        let (expected, got) = (self.plan.inputs.len(), inputs.len());
        if expected != got {
            return Err(Error::InputCount { expected, got });
        }
        let each = inputs.iter_mut().zip(&self.plan.inputs).zip(&self.used).enumerate();
        for (index, ((buffer, input), _)) in each.filter(|(_, (_, used))| **used) {
            let (expected, got, len) = (input.ty, buffer.dtype(), buffer.len());
            if expected.dtype != got || expected.shape.len() != len {
                return Err(Error::InputType { index, expected, got, len });
            }
            let (expected, got) = (self.device, buffer.device());
            if expected != got {
                return Err(Error::InputDevice { index, expected, got });
            }
            if input.donated && !buffer.is_unique_now() {
                return Err(Error::DonatedShared { input: index });
            }
        }
        Ok(())
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

fn used_inputs(plan: &Plan) -> Vec<bool> {
    let mut used = vec![false; plan.inputs.len()];
    for operand in plan.steps.iter().flat_map(|s| s.args.iter().chain(&s.outs)) {
        if let Slot::Input(i) = operand.slot {
            used[i as usize] = true;
        }
    }
    for output in &plan.outputs {
        if let OutputSource::Input(i) | OutputSource::Donated(i) = output.source {
            used[i as usize] = true;
        }
    }
    used
}

pub(crate) fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic without a message")
        .to_string()
}

#[cfg(test)]
mod tests;

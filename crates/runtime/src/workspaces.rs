//! What runs hold beside what their plan counts.

use crate::{Device, Result};
use metal_candle_compiler::Plan;

/// Memory that the runs of a plan hold on their device beside [`Plan::peak_bytes`]: scratch memory of its calls and of
/// the libraries that they go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workspace {
    /// What it is for, as people read it.
    pub name: &'static str,
    /// How much.
    pub bytes: usize,
    /// Whether all plans of the device share it: it is there with the first one, and counts once.
    pub shared: bool,
}

impl Workspace {
    /// Of each run in flight.
    #[cfg(any(feature = "cuda", feature = "metal"))]
    pub(crate) const fn own(name: &'static str, bytes: usize) -> Workspace {
        Workspace { name, bytes, shared: false }
    }

    /// Of the device.
    pub(crate) const fn shared(name: &'static str, bytes: usize) -> Workspace {
        Workspace { name, bytes, shared: true }
    }
}

impl Device {
    /// What a run of `plan` holds here beside the plan's own memory, known before there is any: nothing is compiled or
    /// allocated.
    ///
    /// On a GPU these are the sizes that an [`Executable`](crate::Executable) of the plan allocates. The CPU's threads keep
    /// scratch memory of their own, and which thread takes which part of a call is settled as it runs: there it is what they
    /// hold by now. What a driver takes for machine code and recorded runs, and NCCL for its links, is theirs, and not
    /// listed.
    ///
    /// # Errors
    /// [`Error::NotInBuild`](crate::Error::NotInBuild), [`Error::NotInMachine`](crate::Error::NotInMachine);
    /// [`Error::Render`](crate::Error::Render) for a step that the device cannot run.
    #[cfg_attr(
        not(any(feature = "cuda", feature = "metal")),
        expect(unused_variables, reason = "the CPU's are not of a plan")
    )]
    pub fn workspaces(&self, plan: &Plan) -> Result<Vec<Workspace>> {
        Ok(match self {
            Device::Cpu => crate::cpu::workspaces(),
            #[cfg(feature = "cuda")]
            Device::Cuda(number) => crate::cuda::Gpu::get(*number)?.workspaces(plan)?,
            #[cfg(feature = "metal")]
            Device::Metal(number) => crate::metal::Gpu::get(*number)?.workspaces(plan)?,
            other => return Err(other.missing()),
        })
    }

    /// What an executable of `plan` that is [prepacking](crate::Executable::prepacking) holds here for it, if it holds the inputs of
    /// which `is_held` is true. Other executables that hold the same may share it.
    pub fn prepacked(&self, plan: &Plan, is_held: impl Fn(usize) -> bool) -> Workspace {
        let on_cpu = matches!(self, Device::Cpu);
        crate::cpu::prepacked_workspace(plan, |input| on_cpu && is_held(input))
    }
}

//! Where plans run.

use crate::{Error, Result};
use metal_candle_compiler::Target;

/// A device that runs plans.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Device {
    #[default]
    Cpu,
    /// The NVIDIA GPU of this number.
    Cuda(u32),
    /// The GPU of this number of an Apple computer.
    Metal(u32),
}

impl Device {
    /// What the compiler may rely on here.
    pub const fn target(&self) -> &'static Target {
        match self {
            Device::Cpu => &Target::CPU,
            Device::Cuda(_) => &Target::CUDA,
            Device::Metal(_) => &Target::METAL,
        }
    }

    /// The same device in Candle's words.
    ///
    /// # Errors
    /// [`Error::Device`] for a device that this build has no kernels for.
    pub fn candle(&self) -> Result<candle_core::Device> {
        match self {
            Device::Cpu => Ok(candle_core::Device::Cpu),
            other => Err(Error::Device { got: format!("{other:?}") }),
        }
    }
}

impl TryFrom<&candle_core::Device> for Device {
    type Error = Error;

    /// # Errors
    /// [`Error::Device`] for a device that this build has no kernels for.
    fn try_from(device: &candle_core::Device) -> Result<Device> {
        match device {
            candle_core::Device::Cpu => Ok(Device::Cpu),
            other => Err(Error::Device { got: format!("{:?}", other.location()) }),
        }
    }
}

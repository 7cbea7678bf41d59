//! Where plans run.

use crate::{Error, Result};
use metal_candle_compiler::Target;
use std::fmt;

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
    /// [`Error::Device`] for a device that this build or machine lacks.
    pub fn candle(&self) -> Result<candle_core::Device> {
        match self {
            Device::Cpu => Ok(candle_core::Device::Cpu),
            #[cfg(feature = "cuda")]
            Device::Cuda(number) => Ok(crate::cuda::Gpu::get(*number)?.candle()),
            other => Err(other.missing()),
        }
    }

    /// Why there is no such device.
    pub(crate) fn missing(&self) -> Error {
        Error::Device { got: self.to_string() }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(number) => write!(f, "cuda:{number}"),
            Device::Metal(number) => write!(f, "metal:{number}"),
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
            #[cfg(feature = "cuda")]
            candle_core::Device::Cuda(device) => crate::cuda::Gpu::of_candle(device),
            other => Err(Error::Device { got: format!("{:?}", other.location()) }),
        }
    }
}

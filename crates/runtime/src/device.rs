//! Where plans run.

use crate::{Error, Result};
use metal_candle_compiler::Target;

/// A device that runs plans.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Device {
    #[default]
    Cpu,
}

impl Device {
    /// What the compiler may rely on here.
    pub const fn target(&self) -> &'static Target {
        match self {
            Device::Cpu => &Target::CPU,
        }
    }

    /// The same device in Candle's words.
    pub const fn candle(&self) -> candle_core::Device {
        match self {
            Device::Cpu => candle_core::Device::Cpu,
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

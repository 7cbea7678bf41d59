//! Where plans run.

use crate::{Error, Result};
use metal_candle_compiler::Target;
use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};

/// A device that runs plans. In text it is `cpu`, `cuda:0`, `metal:0`.
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

/// A device's memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// What can still be allocated.
    pub free_bytes: usize,
    /// What this process uses now: on a GPU its tensors and plans, and not the driver's and the libraries' own; on the CPU
    /// all that is resident.
    pub used_bytes: usize,
    /// The most that it ever used.
    pub peak_bytes: usize,
}

impl Device {
    /// The device of this name: `cpu`, `cuda` or `cuda:1`, `metal` or `metal:0`. Whether it is there is another
    /// question: [`Device::check`].
    ///
    /// # Errors
    /// [`Error::DeviceName`]
    pub fn parse(name: &str) -> Result<Device> {
        let (kind, number) = match name.split_once(':') {
            Some((kind, number)) => (kind, number.parse::<u32>().ok()),
            None => (name, Some(0)),
        };
        match (kind, number) {
            ("cpu", Some(_)) if !name.contains(':') => Ok(Device::Cpu),
            ("cuda", Some(number)) => Ok(Device::Cuda(number)),
            ("metal", Some(number)) => Ok(Device::Metal(number)),
            _ => Err(Error::DeviceName { got: name.to_owned() }),
        }
    }

    /// All that this build can use of this machine, the best one first.
    pub fn available() -> Vec<Device> {
        let numbers = |names: Option<Vec<String>>| 0..names.map_or(0, |names| names.len() as u32);
        let cuda = numbers(cuda_names()).map(Device::Cuda);
        cuda.chain(numbers(metal_names()).map(Device::Metal)).chain([Device::Cpu]).collect()
    }

    /// The best device that this build can use of this machine.
    pub fn best() -> Device {
        Device::available()[0]
    }

    /// Sees that this build can use it and this machine has it.
    ///
    /// # Errors
    /// [`Error::NotInBuild`], [`Error::NotInMachine`]
    pub fn check(&self) -> Result<()> {
        self.hardware().map(drop)
    }

    /// Name and number, as people know it: `NVIDIA H100 80GB HBM3 (cuda:0)`.
    ///
    /// # Errors
    /// As [`Device::check`].
    pub fn describe(&self) -> Result<String> {
        Ok(format!("{} ({self})", self.hardware()?))
    }

    /// What the maker calls it.
    fn hardware(&self) -> Result<String> {
        let (names, number) = match *self {
            Device::Cpu => {
                let threads = std::thread::available_parallelism().map_or(1, usize::from);
                return Ok(format!("{threads} threads"));
            }
            Device::Cuda(number) => (cuda_names(), number),
            Device::Metal(number) => (metal_names(), number),
        };
        let mut names = names.ok_or(Error::NotInBuild { device: *self })?;
        match number < names.len() as u32 {
            true => Ok(names.swap_remove(number as usize)),
            false => Err(Error::NotInMachine { device: *self, names }),
        }
    }

    /// How much of its memory is used; `None` where the system does not say.
    pub fn memory(&self) -> Option<Memory> {
        match self {
            Device::Cpu => crate::pages::memory(),
            #[cfg(feature = "cuda")]
            Device::Cuda(number) => crate::cuda::Gpu::get(*number).ok()?.memory(),
            _ => None,
        }
    }

    /// The part of a build that it takes.
    pub(crate) const fn feature(&self) -> &'static str {
        match self {
            Device::Cpu => "default",
            Device::Cuda(_) => "cuda",
            Device::Metal(_) => "metal",
        }
    }

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
    /// [`Error::NotInBuild`], [`Error::NotInMachine`].
    pub fn candle(&self) -> Result<candle_core::Device> {
        match self {
            Device::Cpu => Ok(candle_core::Device::Cpu),
            #[cfg(feature = "cuda")]
            Device::Cuda(number) => Ok(crate::cuda::Gpu::get(*number)?.candle()),
            #[cfg(feature = "metal")]
            Device::Metal(number) => Ok(crate::metal::Gpu::get(*number)?.candle()),
            other => Err(other.missing()),
        }
    }

    /// Why there is no such device.
    pub(crate) fn missing(&self) -> Error {
        self.check().err().unwrap_or_else(|| Error::Device { got: self.to_string() })
    }
}

static TF32: AtomicBool = AtomicBool::new(false);

/// Whether products of f32 factors may take them as TF32, with 10 bits of fraction instead of 23, on GPUs that multiply
/// those faster (NVIDIA's, from compute capability 8.0 on). They may not unless this is called; it is for what is planned
/// from then on.
pub fn allow_tf32(allow: bool) {
    TF32.store(allow, Ordering::Relaxed);
}

#[cfg(feature = "cuda")]
pub(crate) fn tf32_is_allowed() -> bool {
    TF32.load(Ordering::Relaxed)
}

/// The NVIDIA GPUs of this machine, by number; `None` where this build has no kernels for them.
#[cfg(not(feature = "cuda"))]
fn cuda_names() -> Option<Vec<String>> {
    None
}

/// The NVIDIA GPUs of this machine, by number: none where there is no driver.
#[cfg(feature = "cuda")]
fn cuda_names() -> Option<Vec<String>> {
    use cudarc::driver::result::{device, init};
    let count = init().and_then(|()| device::get_count()).unwrap_or(0);
    let name = |i| device::get(i).and_then(device::get_name);
    Some((0..count).map_while(|i| name(i).ok()).collect())
}

/// The GPUs of an Apple computer, by number.
#[cfg(feature = "metal")]
fn metal_names() -> Option<Vec<String>> {
    Some(crate::metal::Gpu::names())
}

/// The GPUs of an Apple computer, by number; `None` where this build has no kernels for them.
#[cfg(not(feature = "metal"))]
fn metal_names() -> Option<Vec<String>> {
    None
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

impl FromStr for Device {
    type Err = Error;

    /// As [`Device::parse`].
    fn from_str(name: &str) -> Result<Device> {
        Device::parse(name)
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
            #[cfg(feature = "metal")]
            candle_core::Device::Metal(device) => crate::metal::Gpu::of_candle(device),
            other => Err(Error::Device { got: format!("{:?}", other.location()) }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Device, Error};

    #[test]
    fn names_are_read_as_they_are_written() {
        for device in [Device::Cpu, Device::Cuda(0), Device::Cuda(12), Device::Metal(0)] {
            assert_eq!(Device::parse(&device.to_string()).unwrap(), device);
        }
        assert_eq!(Device::parse("cuda").unwrap(), Device::Cuda(0));
        assert_eq!(Device::parse("metal").unwrap(), Device::Metal(0));
        for name in ["", "gpu", "cpu:0", "cuda:", "cuda:-1", "cuda:x", "CUDA", "metal:0:1"] {
            let error = Device::parse(name).unwrap_err().to_string();
            assert!(error.contains(&format!("{name:?}")), "{error}");
        }
    }

    #[test]
    fn the_best_device_is_available_and_the_cpu_always() {
        let all = Device::available();
        assert_eq!(all.last(), Some(&Device::Cpu));
        for device in &all {
            let name = device.describe().unwrap();
            assert!(name.ends_with(&format!("({device})")), "{name}");
        }
        assert!(all.contains(&Device::best()));
    }

    #[test]
    fn a_machine_without_the_gpu_says_which_ones_it_has() {
        let message = |device, names: &[&str]| {
            let names = names.iter().map(|name| (*name).to_owned()).collect();
            Error::NotInMachine { device, names }.to_string()
        };
        let none = message(Device::Metal(0), &[]);
        assert_eq!(none, "metal:0: this machine has no GPU that Metal can use");
        let one = message(Device::Metal(1), &["Apple M2 Pro"]);
        assert_eq!(one, "metal:1: this machine has one GPU of this kind, number 0: Apple M2 Pro");
        let two = message(Device::Cuda(2), &["A", "B"]);
        assert_eq!(two, "cuda:2: this machine has GPUs 0 to 1: A, B");
        let none = message(Device::Cuda(0), &[]);
        assert!(none.contains("no NVIDIA GPU") && none.contains("nvidia-smi"), "{none}");
    }

    #[test]
    fn a_device_that_is_not_there_says_what_to_do() {
        for device in [Device::Cuda(99), Device::Metal(99)] {
            let error = device.check().unwrap_err().to_string();
            let told = error.contains("--features") || error.contains("this machine has");
            assert!(told && error.starts_with(&device.to_string()), "{error}");
        }
    }
}

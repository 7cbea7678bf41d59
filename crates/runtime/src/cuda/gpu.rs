//! A device: its context, stream and libraries.

use super::compile::Kernels;
use super::memory::{Allocation, Resident};
use super::product::Library;
use crate::device::Memory;
use crate::{Device, Error, Result};
use candle_core::CudaDevice;
use cudarc::driver::sys::{CUdevice_attribute as Attribute, CUmemPool_attribute as PoolAttribute};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};
use metal_candle_compiler::render::Limits;
use metal_candle_graph::DType;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// A device that is in use. There is one for each number, and it lives as long as the process.
pub(crate) struct Gpu {
    number: u32,
    candle: CudaDevice,
    stream: Arc<CudaStream>,
    /// Records graphs: what other threads ask of the device's own stream must not get into them.
    pub(super) recorder: Mutex<Arc<CudaStream>>,
    pub(super) limits: Limits,
    /// Compute capability: 90 for 9.0.
    pub(super) architecture: i32,
    pub(super) library: Library,
    pub(super) kernels: Kernels,
}

static GPUS: Mutex<BTreeMap<u32, Arc<Gpu>>> = Mutex::new(BTreeMap::new());

impl Gpu {
    /// # Errors
    /// [`Error::NotInMachine`] for a number that this machine lacks; what the driver says.
    pub(crate) fn get(number: u32) -> Result<Arc<Gpu>> {
        let mut gpus = GPUS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gpu) = gpus.get(&number) {
            return Ok(Arc::clone(gpu));
        }
        if number >= Gpu::count() {
            return Err(Device::Cuda(number).missing());
        }
        let gpu = Arc::new(Gpu::open(number)?);
        gpus.insert(number, Arc::clone(&gpu));
        Ok(gpu)
    }

    /// How many devices the driver has; 0 if there is no driver.
    pub(crate) fn count() -> u32 {
        CudaContext::device_count().ok().and_then(|n| u32::try_from(n).ok()).unwrap_or(0)
    }

    /// The device behind one of Candle's. Candle knows a device by its handle: to mix tensors with ours, make them
    /// on [`Device::candle`].
    pub(crate) fn of_candle(device: &CudaDevice) -> Result<Device> {
        let number = device.cuda_stream().context().ordinal();
        u32::try_from(number)
            .map(Device::Cuda)
            .map_err(|_| Error::Device { got: number.to_string() })
    }

    fn open(number: u32) -> Result<Gpu> {
        let candle = CudaDevice::new_with_stream(number as usize)?;
        let stream = candle.cuda_stream();
        let context = stream.context();
        let attribute = |a| context.attribute(a).said(|| format!("opening cuda:{number}"));
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let threads = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR)?;
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        keep_freed_memory(context).said(|| format!("opening cuda:{number}"))?;
        let recorder = context.new_stream().said(|| format!("opening cuda:{number}"))?;
        Ok(Gpu {
            number,
            recorder: Mutex::new(recorder),
            limits: Limits::cuda(multiprocessors as usize, threads as usize)
                .of_capability(major as u32, minor as u32),
            architecture: major * 10 + minor,
            library: Library::new(&stream)?,
            kernels: Kernels::default(),
            stream,
            candle,
        })
    }

    pub(crate) fn device(&self) -> Device {
        Device::Cuda(self.number)
    }

    pub(crate) fn candle(&self) -> candle_core::Device {
        candle_core::Device::Cuda(self.candle.clone())
    }

    pub(super) fn candle_device(&self) -> &CudaDevice {
        &self.candle
    }

    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    pub(super) fn raw_stream(&self) -> sys::CUstream {
        self.stream.cu_stream()
    }

    /// What the device's pool has given out, and what the driver and the pool still have.
    pub(crate) fn memory(&self) -> Option<Memory> {
        self.bind().ok()?;
        let pool = |attribute| {
            let mut bytes = 0u64;
            // SAFETY: the context's device, its own pool, and a place for the attribute's value.
            unsafe {
                let pool = result::device::get_default_mem_pool(self.stream.context().cu_device());
                let at = (&raw mut bytes).cast();
                result::mem_pool::get_attribute(pool.ok()?, attribute, at).ok()?;
            }
            usize::try_from(bytes).ok()
        };
        let used_bytes = pool(PoolAttribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
        let kept = pool(PoolAttribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
        Some(Memory {
            free_bytes: result::mem_get_info().ok()?.0 + kept.saturating_sub(used_bytes),
            used_bytes,
            peak_bytes: pool(PoolAttribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?,
        })
    }

    /// Makes the context that of this thread, as every call of the driver wants.
    pub(super) fn bind(&self) -> Result<()> {
        self.stream.context().bind_to_thread().said(|| format!("using {}", self.device()))
    }

    /// Waits for all that was asked of the stream.
    pub(super) fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().said(|| format!("waiting for {}", self.device()))
    }

    /// Elements in the machine's order, on the device; the few bytes of a small value stay here until they are wanted.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; what the driver says.
    pub(crate) fn upload(self: &Arc<Self>, bytes: &[u8], dtype: DType) -> Result<Resident> {
        Resident::new(self, bytes, dtype)
    }

    /// # Errors
    /// [`Error::OutOfMemory`]
    pub(super) fn allocate(self: &Arc<Self>, bytes: usize, what: &str) -> Result<Allocation> {
        Allocation::new(self, bytes, what)
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gpu({})", self.number)
    }
}

/// Freed memory stays with the process: without this the driver would give it back at every wait.
fn keep_freed_memory(context: &CudaContext) -> std::result::Result<(), DriverError> {
    context.bind_to_thread()?;
    let mut all = u64::MAX;
    // SAFETY: the context's device, its own pool, and a value of the attribute's type.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device())?;
        let threshold = PoolAttribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        result::mem_pool::set_attribute(pool, threshold, (&raw mut all).cast())
    }
}

/// What a library of NVIDIA's said, as our error.
pub(super) trait Said<T> {
    /// # Errors
    /// [`Error::Cuda`] with what was being done.
    fn said(self, doing: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: fmt::Display> Said<T> for std::result::Result<T, E> {
    fn said(self, doing: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error::Cuda { doing: doing(), message: error.to_string() })
    }
}

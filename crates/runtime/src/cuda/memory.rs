//! Device memory, and host memory that the device reads and writes.

use super::Gpu;
use super::gpu::Said;
use crate::buffer::DeviceMemory;
use crate::element::{Data, Element};
use crate::{Device, Error, Result, mapped};
use candle_core::cuda_backend::{CudaDType, CudaStorage};
use candle_core::op::BackpropOp;
use candle_core::{Storage, Tensor};
use cudarc::driver::sys::{self, CUdeviceptr};
use cudarc::driver::{DriverError, result};
use half::{bf16, f16};
use metal_candle_graph::{DType, Shape};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

/// Values of up to so many bytes that a caller makes stay on the host until a run wants them: token ids, labels and
/// step counters then travel together.
pub(super) const STAGED_BYTES: usize = 64 << 10;

/// Memory of a device, in the order of its stream: it is freed once what was asked before is done.
pub(crate) struct Allocation {
    gpu: Arc<Gpu>,
    address: CUdeviceptr,
    len_bytes: usize,
}

impl Allocation {
    pub(super) fn new(gpu: &Arc<Gpu>, len_bytes: usize, what: &str) -> Result<Allocation> {
        gpu.bind()?;
        // SAFETY: the stream lives as long as the device. Nothing reads the bytes before they are written.
        let address = unsafe { result::malloc_async(gpu.raw_stream(), len_bytes.max(1)) };
        match address {
            Ok(address) => Ok(Allocation { gpu: Arc::clone(gpu), address, len_bytes }),
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                let what = format!("{what} on {}{}", gpu.device(), free_memory());
                Err(Error::OutOfMemory { what, bytes: len_bytes })
            }
            Err(other) => Err(other).said(|| format!("allocating {len_bytes} bytes for {what}")),
        }
    }

    pub(super) fn address(&self) -> CUdeviceptr {
        self.address
    }

    pub(super) fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Copies bytes here. Returns once they may change.
    pub(super) fn fill(&self, bytes: &[u8]) -> Result<()> {
        assert!(bytes.len() <= self.len_bytes, "metal-candle bug: {} bytes", bytes.len());
        self.gpu.bind()?;
        // SAFETY: there is room. Ordinary memory is read before the call returns.
        unsafe { result::memcpy_htod_async(self.address, bytes, self.gpu.raw_stream()) }
            .said(|| format!("copying {} bytes to {}", bytes.len(), self.gpu.device()))
    }

    /// Copies its bytes to the host, once the stream is through.
    pub(super) fn read(&self, bytes: &mut [u8]) -> Result<()> {
        assert!(bytes.len() <= self.len_bytes, "metal-candle bug: {} bytes", bytes.len());
        self.gpu.bind()?;
        // SAFETY: there are as many bytes; the wait below ends the copy.
        unsafe { result::memcpy_dtoh_async(bytes, self.address, self.gpu.raw_stream()) }
            .said(|| format!("copying {} bytes from {}", bytes.len(), self.gpu.device()))?;
        self.gpu.synchronize()
    }

    fn copied(&self) -> Result<Allocation> {
        let copy = Allocation::new(&self.gpu, self.len_bytes, "a copy")?;
        let (to, from, len) = (copy.address, self.address, self.len_bytes);
        // SAFETY: both have as many bytes.
        unsafe { result::memcpy_dtod_async(to, from, len, self.gpu.raw_stream()) }
            .said(|| "copying on the device".into())?;
        Ok(copy)
    }

    fn leak(self) -> CUdeviceptr {
        std::mem::ManuallyDrop::new(self).address
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: it was allocated on this stream. A failure can be told to nobody.
            let _ = unsafe { result::free_async(self.address, self.gpu.raw_stream()) };
        }
    }
}

/// For the message of an error: what is left.
fn free_memory() -> String {
    match result::mem_get_info() {
        Ok((free, total)) => {
            format!(" ({} of {} MiB are free)", free >> 20, total >> 20)
        }
        Err(_) => String::new(),
    }
}

/// Host memory that the device copies from and to without the driver's help.
pub(super) struct Pinned {
    gpu: Arc<Gpu>,
    data: *mut u8,
    len_bytes: usize,
}

// SAFETY: it owns its bytes.
unsafe impl Send for Pinned {}
// SAFETY: `&Pinned` reads bytes that nobody writes meanwhile, see `bytes`.
unsafe impl Sync for Pinned {}

impl Pinned {
    pub(super) fn new(gpu: &Arc<Gpu>, len_bytes: usize) -> Result<Pinned> {
        gpu.bind()?;
        // SAFETY: a call without conditions.
        let data = unsafe { result::malloc_host(len_bytes.max(1), 0) }
            .said(|| format!("locking {len_bytes} bytes of the host's memory"))?
            .cast::<u8>();
        // SAFETY: so many bytes, just allocated.
        unsafe { data.write_bytes(0, len_bytes) };
        Ok(Pinned { gpu: Arc::clone(gpu), data, len_bytes })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: initialised in `new`; the device writes only for the run that holds this, which reads once it has waited.
        unsafe { std::slice::from_raw_parts(self.data, self.len_bytes) }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`.
        unsafe { std::slice::from_raw_parts_mut(self.data, self.len_bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: from `malloc_host`. A failure can be told to nobody.
            let _ = unsafe { result::free_host(self.data.cast()) };
        }
    }
}

/// The elements of a buffer on a device: there, or still on the host, or both.
pub(crate) struct Resident {
    gpu: Arc<Gpu>,
    dtype: DType,
    len: usize,
    host: Option<Data>,
    device: OnceLock<Allocation>,
    /// Whether a run has taken it from the host: the second one wants it on the device.
    wanted: AtomicBool,
}

impl Resident {
    pub(super) fn new(gpu: &Arc<Gpu>, bytes: &[u8], dtype: DType) -> Result<Resident> {
        if bytes.len() <= STAGED_BYTES {
            return Ok(Resident::on_host(gpu, mapped::copy(bytes, dtype)));
        }
        let allocation = gpu.allocate(bytes.len(), "a tensor")?;
        allocation.fill(bytes)?;
        Ok(Resident::on_device(allocation, dtype))
    }

    pub(super) fn on_host(gpu: &Arc<Gpu>, data: Data) -> Resident {
        Resident {
            gpu: Arc::clone(gpu),
            dtype: data.dtype(),
            len: data.len(),
            host: Some(data),
            device: OnceLock::new(),
            wanted: AtomicBool::new(false),
        }
    }

    pub(super) fn on_device(allocation: Allocation, dtype: DType) -> Resident {
        Resident {
            gpu: Arc::clone(&allocation.gpu),
            dtype,
            len: allocation.len_bytes() / dtype.size_bytes(),
            host: None,
            device: OnceLock::from(allocation),
            wanted: AtomicBool::new(true),
        }
    }

    /// The bytes of a value that no run wanted before, for that run to take along.
    pub(super) fn staged(&self) -> Option<&[u8]> {
        let host = self.host.as_ref().filter(|_| self.device.get().is_none())?;
        let first = !self.wanted.swap(true, Ordering::Relaxed);
        (first && host.as_bytes().len() <= STAGED_BYTES).then(|| host.as_bytes())
    }

    /// Where the elements are on the device; they are brought there now if they were not.
    pub(super) fn address(&self) -> Result<CUdeviceptr> {
        if let Some(allocation) = self.device.get() {
            return Ok(allocation.address());
        }
        let host = self.host.as_ref().expect("metal-candle bug: a buffer without memory");
        let allocation = self.gpu.allocate(host.as_bytes().len(), "a tensor")?;
        allocation.fill(host.as_bytes())?;
        // Another thread may have been faster; its copy is as good.
        Ok(self.device.get_or_init(|| allocation).address())
    }

    /// [`Resident::address`] for writing: what the host held is out of date from then on.
    pub(super) fn address_mut(&mut self) -> Result<CUdeviceptr> {
        let address = self.address()?;
        self.host = None;
        Ok(address)
    }
}

impl DeviceMemory for Resident {
    fn device(&self) -> Device {
        self.gpu.device()
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn len(&self) -> usize {
        self.len
    }

    fn to_data(&self) -> Result<Data> {
        if let Some(host) = &self.host {
            return Ok(host.copied());
        }
        let bytes = self.len * self.dtype.size_bytes();
        let out_of_memory = || Error::OutOfMemory { what: "a copy on the host".into(), bytes };
        let mut data = Data::zeroed(self.dtype, self.len).ok_or_else(out_of_memory)?;
        // SAFETY: so many bytes of numbers, for which any bytes will do.
        let to = unsafe { std::slice::from_raw_parts_mut(data.as_mut_ptr(), bytes) };
        self.gpu.bind()?;
        // SAFETY: as many bytes on both sides; the wait below ends the copy.
        unsafe { result::memcpy_dtoh_async(to, self.address()?, self.gpu.raw_stream()) }
            .said(|| format!("copying {bytes} bytes from {}", self.gpu.device()))?;
        self.gpu.synchronize()?;
        Ok(data)
    }

    fn duplicate(&self) -> Result<Box<dyn DeviceMemory>> {
        Ok(Box::new(match &self.host {
            Some(host) => Resident::on_host(&self.gpu, host.copied()),
            None => {
                let allocation = self.device.get().expect("metal-candle bug: no memory");
                Resident::on_device(allocation.copied()?, self.dtype)
            }
        }))
    }

    fn into_tensor(self: Box<Self>, shape: &Shape) -> Result<Tensor> {
        self.address()?;
        let (gpu, dtype) = (self.gpu, self.dtype);
        let allocation = self.device.into_inner().expect("metal-candle bug: no memory");
        let storage = match dtype {
            DType::U8 => storage::<u8>(&gpu, allocation),
            DType::U32 => storage::<u32>(&gpu, allocation),
            DType::I64 => storage::<i64>(&gpu, allocation),
            DType::BF16 => storage::<bf16>(&gpu, allocation),
            DType::F16 => storage::<f16>(&gpu, allocation),
            DType::F32 => storage::<f32>(&gpu, allocation),
            DType::F64 => storage::<f64>(&gpu, allocation),
        };
        let storage = Storage::Cuda(storage);
        Ok(Tensor::from_storage(storage, shape.dims(), BackpropOp::none(), false))
    }
}

/// The allocation in Candle's hands.
fn storage<T: Element + CudaDType>(gpu: &Gpu, allocation: Allocation) -> CudaStorage {
    let len = allocation.len_bytes() / T::DTYPE.size_bytes();
    // SAFETY: allocated on this stream, with so many elements, and owned by nobody else from here on.
    let slice = unsafe { gpu.stream().upgrade_device_ptr::<T>(allocation.leak(), len) };
    T::wrap_cuda_slice(slice, gpu.candle_device().clone())
}

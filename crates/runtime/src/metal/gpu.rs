//! A device, its queue, and what was compiled for it.

use super::library::Library;
use super::memory::Unified;
use crate::{Device, Error, MappedBytes, Result};
use candle_core::MetalDevice;
use candle_core::backend::BackendDevice;
use candle_metal_kernels::metal::{
    Buffer, CommandBuffer, CommandQueue, ComputePipeline, Device as RawDevice, MTLResourceOptions,
    MetalDeviceType,
};
use metal_candle_compiler::render::{Dialect, Limits, Source};
use metal_candle_graph::DType;
use objc2::rc::autoreleasepool;
use objc2_metal::{MTLCommandQueue, MTLCompileOptions, MTLDevice, MTLLanguageVersion, MTLMathMode};
use std::collections::BTreeMap;
use std::fmt;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

/// A device that is in use. There is one for each number, and it lives as long as the process.
pub(crate) struct Gpu {
    number: u32,
    candle: MetalDevice,
    queue: Queue,
    pub(super) limits: Limits,
    /// Whether it is one of the smaller GPUs, by which MLX chooses tiles.
    pub(super) few_cores: bool,
    pub(super) library: Library<ComputePipeline>,
    /// A lone zero.
    pub(super) zero: Buffer,
}

struct Queue(CommandQueue);

// SAFETY: "Command queues are thread-safe" (Metal Programming Guide, "Command organization and execution model").
unsafe impl Send for Queue {}
// SAFETY: as above.
unsafe impl Sync for Queue {}

static GPUS: Mutex<BTreeMap<u32, Arc<Gpu>>> = Mutex::new(BTreeMap::new());

/// Memory of both processors. Metal keeps track of what is ours, so that command buffers come one after the other.
const SHARED: MTLResourceOptions = MTLResourceOptions::StorageModeShared;

impl Gpu {
    /// # Errors
    /// [`Error::Device`] for a number that this machine lacks; what Metal says.
    pub(crate) fn get(number: u32) -> Result<Arc<Gpu>> {
        let mut gpus = GPUS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gpu) = gpus.get(&number) {
            return Ok(Arc::clone(gpu));
        }
        // Asked before Candle is, which panics.
        if number as usize >= Gpu::names().len() {
            return Err(Device::Metal(number).missing());
        }
        let gpu = Arc::new(Gpu::open(number)?);
        gpus.insert(number, Arc::clone(&gpu));
        Ok(gpu)
    }

    /// What the devices of this machine are called, by number.
    pub(crate) fn names() -> Vec<String> {
        RawDevice::all().iter().map(|device| device.as_ref().name().to_string()).collect()
    }

    fn open(number: u32) -> Result<Gpu> {
        let candle = MetalDevice::new(number as usize)?;
        let raw = candle.metal_device();
        let queue = raw.new_command_queue().said(|| format!("opening metal:{number}"))?;
        let zero = raw.new_buffer(16, SHARED).said(|| format!("opening metal:{number}"))?;
        // Metal does not tell; it only decides how often a grid fills the device.
        let (few_cores, cores) = match raw.device_type() {
            MetalDeviceType::Phone => (true, 6),
            MetalDeviceType::BasePro => (true, 16),
            MetalDeviceType::Max => (false, 40),
            MetalDeviceType::Ultra => (false, 80),
            MetalDeviceType::Medium => (false, 16),
        };
        Ok(Gpu {
            number,
            queue: Queue(queue),
            limits: Limits::metal(cores),
            few_cores,
            library: Library::default(),
            zero,
            candle,
        })
    }

    /// The device behind one of Candle's. Candle knows a device by its handle: to mix tensors with ours, make them
    /// on [`Device::candle`].
    pub(crate) fn of_candle(device: &MetalDevice) -> Result<Device> {
        let id = device.metal_device().registry_id();
        let at = RawDevice::all().iter().position(|d| d.registry_id() == id);
        let number = at.and_then(|at| u32::try_from(at).ok());
        number.map(Device::Metal).ok_or_else(|| Error::Device { got: format!("Metal's {id:#x}") })
    }

    pub(crate) fn device(&self) -> Device {
        Device::Metal(self.number)
    }

    pub(crate) fn candle(&self) -> candle_core::Device {
        candle_core::Device::Metal(self.candle.clone())
    }

    pub(super) fn candle_device(&self) -> &MetalDevice {
        &self.candle
    }

    pub(super) fn raw(&self) -> &RawDevice {
        self.candle.metal_device()
    }

    pub(super) fn command_buffer(&self) -> Result<CommandBuffer> {
        let buffer = self.queue.0.commandBuffer().map(CommandBuffer::new);
        buffer.ok_or_else(|| metal("making a command buffer", "there are no more"))
    }

    /// Memory of zeros.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub(super) fn allocate(&self, bytes: usize, what: &str) -> Result<Arc<Buffer>> {
        let most = self.raw().as_ref().maxBufferLength();
        let buffer = (bytes <= most).then(|| self.raw().new_buffer(bytes.max(16), SHARED).ok());
        buffer.flatten().map(Arc::new).ok_or_else(|| {
            let used = self.raw().current_allocated_size() >> 20;
            let of = self.raw().recommended_max_working_set_size() >> 20;
            let what = format!("{what} on {} ({used} of {of} MiB are in use)", self.device());
            Error::OutOfMemory { what, bytes }
        })
    }

    /// Elements in the machine's order, copied into memory that both processors see.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub(crate) fn upload(self: &Arc<Self>, bytes: &[u8], dtype: DType) -> Result<Unified> {
        let buffer = self.allocate(bytes.len(), "a tensor")?;
        // SAFETY: new memory of at least this length, which nobody else has.
        unsafe { buffer.contents().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(Unified::new(self, buffer, dtype, bytes.len() / dtype.size_bytes()))
    }

    /// Elements of a file where they lie, if the GPU can read them there; else a copy.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub(crate) fn map(self: &Arc<Self>, bytes: &MappedBytes, dtype: DType) -> Result<Unified> {
        match Unified::mapped(self, bytes, dtype) {
            Some(unified) => Ok(unified),
            None => self.upload(bytes, dtype),
        }
    }

    /// The memory of whole pages as a buffer, without a copy. The caller keeps them.
    pub(super) fn buffer_of_pages(&self, start: NonNull<u8>, len: usize) -> Option<Buffer> {
        if len == 0 || len > self.raw().as_ref().maxBufferLength() {
            return None;
        }
        // SAFETY: a valid pointer; without a deallocator, the pages stay the caller's.
        let buffer = unsafe {
            self.raw().as_ref().newBufferWithBytesNoCopy_length_options_deallocator(
                start.cast(),
                len,
                SHARED,
                None,
            )
        };
        buffer.map(Buffer::new)
    }

    /// The function of a rendered kernel; the compiler's log where there is none.
    pub(super) fn compile(&self, source: &Source) -> std::result::Result<ComputePipeline, String> {
        autoreleasepool(|_| {
            let text = format!("{}\n{}", Dialect::METAL.header_of(source), source.text);
            let raw = self.raw();
            let library = raw.new_library_with_source(&text, Some(&options()));
            let function = library.and_then(|library| library.get_function(&source.name, None));
            let pipeline = function.and_then(|f| raw.new_compute_pipeline_state_with_function(&f));
            let pipeline = pipeline.map_err(|error| error.to_string())?;
            let (most, block) = (pipeline.max_total_threads_per_threadgroup(), source.launch.block);
            match block <= most {
                true => Ok(pipeline),
                false => Err(format!("a block of {block} threads: this GPU takes {most} of it")),
            }
        })
    }
}

/// As [`Dialect::options`] of Metal says, in this interface's words.
fn options() -> objc2::rc::Retained<MTLCompileOptions> {
    let options = MTLCompileOptions::new();
    options.setLanguageVersion(MTLLanguageVersion::Version3_1);
    if objc2::available!(macos = 15, ios = 18) {
        options.setMathMode(MTLMathMode::Safe);
    } else {
        #[allow(deprecated, reason = "what older systems know")]
        options.setFastMathEnabled(false);
    }
    options
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gpu({})", self.number)
    }
}

pub(super) fn metal(doing: &str, message: impl fmt::Display) -> Error {
    Error::Metal { doing: doing.to_owned(), message: message.to_string() }
}

/// What Metal said, as our error.
pub(super) trait Said<T> {
    /// # Errors
    /// [`Error::Metal`] with what was being done.
    fn said(self, doing: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: fmt::Display> Said<T> for std::result::Result<T, E> {
    fn said(self, doing: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error::Metal { doing: doing(), message: error.to_string() })
    }
}

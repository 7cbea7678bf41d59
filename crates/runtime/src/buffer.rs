//! The memory that goes into a plan and comes out of it.

use crate::candle::Shared;
use crate::element::{Data, Element};
use crate::mapped::{self, Mapped, MappedBytes};
use crate::prefetch::prefetch;
use crate::spares::{Owned, Spares};
use crate::{Device, Error, Result};
use candle_core::Tensor;
use metal_candle_graph::{DType, Shape};
use std::any::Any;
use std::fmt;
use std::sync::Arc;

/// Dense row-major elements of one dtype on a device.
///
/// A handle: cloning it copies nothing. The memory is the buffer's own, or that of a Candle tensor or a
/// mapped file, which it then keeps alive.
#[derive(Clone)]
pub struct Buffer {
    memory: Arc<Memory>,
}

pub(crate) enum Memory {
    Owned(Owned),
    Shared(Shared),
    Mapped(Mapped),
    /// Of a device other than the CPU.
    Device(Box<dyn DeviceMemory>),
}

impl Memory {
    fn is_own(&self) -> bool {
        match self {
            Memory::Owned(_) => true,
            Memory::Shared(_) | Memory::Mapped(_) => false,
            Memory::Device(memory) => memory.is_own(),
        }
    }
}

/// Elements that a device other than the CPU holds.
pub(crate) trait DeviceMemory: Any + Send + Sync {
    fn device(&self) -> Device;
    fn dtype(&self) -> DType;
    fn len(&self) -> usize;
    /// Whether it may be written: not the pages of a file.
    fn is_own(&self) -> bool {
        true
    }
    /// The elements, once all that writes them is done.
    fn to_data(&self) -> Result<Data>;
    fn duplicate(&self) -> Result<Box<dyn DeviceMemory>>;
    /// A tensor that takes the memory over.
    fn into_tensor(self: Box<Self>, shape: &Shape) -> Result<Tensor>;
}

impl Buffer {
    /// Takes the vector over without a copy.
    pub fn from_vec<T: Element>(data: Vec<T>) -> Buffer {
        Buffer::from_data(Data::new(data))
    }

    /// `len` zeros, in host memory.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub fn zeroed(dtype: DType, len: usize) -> Result<Buffer> {
        let data = Data::zeroed(dtype, len).ok_or_else(|| Error::OutOfMemory {
            what: format!("a buffer of {len} {dtype}"),
            bytes: len.saturating_mul(dtype.size_bytes()),
        })?;
        Ok(Buffer::from_data(data))
    }

    /// Reads the tensor's own memory where it is contiguous, wherever that starts; else one contiguous copy.
    ///
    /// # Errors
    /// [`Error::UnsupportedDType`] and [`Error::Device`]; [`Error::Candle`] if the copy fails.
    pub fn from_candle(tensor: &Tensor) -> Result<Buffer> {
        let shared = Shared::new(tensor)?;
        if shared.len() == 0 {
            // There is nothing to share, and on some devices no memory of no bytes.
            return Buffer::zeroed(shared.dtype(), 0)?.to_device(&shared.device());
        }
        Ok(Buffer { memory: Arc::new(Memory::Shared(shared)) })
    }

    /// Little-endian elements. Bytes are taken over as they are, others copied; what makes no whole element is
    /// left out.
    pub fn from_bytes(bytes: Vec<u8>, dtype: DType) -> Buffer {
        match dtype {
            DType::U8 => Buffer::from_vec(bytes),
            dtype => Buffer::from_data(mapped::copy(&bytes, dtype)),
        }
    }

    /// Elements that lie in a file, little-endian; bytes that make no whole element are left out. They are
    /// read where they lie if their address is a multiple of their size, else copied.
    pub fn from_mapped(bytes: MappedBytes, dtype: DType) -> Buffer {
        match Mapped::new(bytes, dtype) {
            Ok(mapped) => Buffer { memory: Arc::new(Memory::Mapped(mapped)) },
            Err(bytes) => Buffer::from_data(mapped::copy(&bytes, dtype)),
        }
    }

    /// Whether its elements are read where they lie in a file.
    pub fn is_mapped(&self) -> bool {
        matches!(&*self.memory, Memory::Mapped(_))
    }

    pub(crate) fn from_data(data: Data) -> Buffer {
        Buffer { memory: Arc::new(Memory::Owned(Owned::new(data))) }
    }

    /// A result, whose memory goes back when the last handle is dropped, unless Candle or another run has taken it over.
    pub(crate) fn lent(data: Data, spares: &Arc<Spares>, output: usize) -> Buffer {
        Buffer { memory: Arc::new(Memory::Owned(Owned::lent(data, spares, output))) }
    }

    #[cfg_attr(
        not(any(feature = "cuda", feature = "metal")),
        expect(dead_code, reason = "the CPU needs none")
    )]
    pub(crate) fn on_device(memory: Box<dyn DeviceMemory>) -> Buffer {
        Buffer { memory: Arc::new(Memory::Device(memory)) }
    }

    /// Where the memory is.
    pub fn device(&self) -> Device {
        match &*self.memory {
            Memory::Owned(_) | Memory::Mapped(_) => Device::Cpu,
            Memory::Shared(shared) => shared.device(),
            Memory::Device(memory) => memory.device(),
        }
    }

    /// The same elements on `device`: this buffer itself if it is there already, else a copy.
    ///
    /// A small copy may stay in the host's memory until a run wants it.
    ///
    /// # Errors
    /// [`Error::NotInBuild`], [`Error::NotInMachine`]; [`Error::OutOfMemory`], and what else
    /// its driver says.
    pub fn to_device(&self, device: &Device) -> Result<Buffer> {
        if self.device() == *device {
            return Ok(self.clone());
        }
        match device {
            Device::Cpu => Ok(Buffer::from_data(self.to_data()?)),
            #[cfg(feature = "cuda")]
            Device::Cuda(number) => {
                let gpu = crate::cuda::Gpu::get(*number)?;
                let memory = match &*self.memory {
                    Memory::Mapped(mapped) => gpu.upload(mapped.bytes(), mapped.dtype())?,
                    Memory::Owned(data) => gpu.upload(data.as_bytes(), data.dtype())?,
                    Memory::Shared(_) | Memory::Device(_) => {
                        let data = self.to_data()?;
                        gpu.upload(data.as_bytes(), data.dtype())?
                    }
                };
                Ok(Buffer::on_device(Box::new(memory)))
            }
            #[cfg(feature = "metal")]
            Device::Metal(number) => {
                let gpu = crate::metal::Gpu::get(*number)?;
                let memory = match &*self.memory {
                    Memory::Mapped(mapped) => gpu.map(mapped.file(), mapped.dtype())?,
                    Memory::Owned(data) => gpu.upload(data.as_bytes(), data.dtype())?,
                    Memory::Shared(_) | Memory::Device(_) => {
                        let data = self.to_data()?;
                        gpu.upload(data.as_bytes(), data.dtype())?
                    }
                };
                Ok(Buffer::on_device(Box::new(memory)))
            }
            other => Err(other.missing()),
        }
    }

    /// Of each element.
    pub fn dtype(&self) -> DType {
        match &*self.memory {
            Memory::Owned(data) => data.dtype(),
            Memory::Shared(shared) => shared.dtype(),
            Memory::Mapped(mapped) => mapped.dtype(),
            Memory::Device(memory) => memory.dtype(),
        }
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        match &*self.memory {
            Memory::Owned(data) => data.len(),
            Memory::Shared(shared) => shared.len(),
            Memory::Mapped(mapped) => mapped.len(),
            Memory::Device(memory) => memory.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether this is the only handle to memory of its own, so that it may be donated. Memory that came
    /// from Candle is never unique, as tensors may see it; that of a file is read only.
    pub fn is_unique(&self) -> bool {
        self.memory.is_own() && Arc::strong_count(&self.memory) == 1
    }

    /// [`Buffer::is_unique`], and nobody can change that while the borrow lasts.
    pub(crate) fn is_unique_now(&mut self) -> bool {
        Arc::get_mut(&mut self.memory).is_some_and(|memory| memory.is_own())
    }

    /// This buffer if it [is unique](Buffer::is_unique), else a copy that is.
    ///
    /// # Errors
    /// [`Error::Candle`] if a tensor's storage cannot be read; what a device's driver says.
    pub fn into_owned(self) -> Result<Buffer> {
        if self.is_unique() {
            return Ok(self);
        }
        match &*self.memory {
            Memory::Device(memory) => {
                Ok(Buffer { memory: Arc::new(Memory::Device(memory.duplicate()?)) })
            }
            Memory::Shared(shared) if shared.device() != Device::Cpu => {
                Buffer::from_data(shared.to_data()?).to_device(&shared.device())
            }
            _ => Ok(Buffer::from_data(self.to_data()?)),
        }
    }

    fn to_data(&self) -> Result<Data> {
        match &*self.memory {
            Memory::Owned(data) => Ok(data.copied()),
            Memory::Shared(shared) => shared.to_data(),
            Memory::Mapped(mapped) => Ok(mapped.to_data()),
            Memory::Device(memory) => memory.to_data(),
        }
    }

    /// The elements, copied out.
    ///
    /// # Errors
    /// [`Error::DType`] if they are of another type; what a device's driver says.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        match &*self.memory {
            Memory::Owned(data) => Ok(data.as_slice()?.to_vec()),
            _ => self.to_data()?.into_vec(),
        }
    }

    /// A tensor of `shape`. Copies only where another handle to memory of our own exists, or what lies in a
    /// file; what came from Candle goes back as the same storage.
    ///
    /// # Errors
    /// [`Error::Len`] if the shape has another number of elements; [`Error::Candle`]; what a device's driver says.
    pub fn into_candle(self, shape: &Shape) -> Result<Tensor> {
        let (expected, got) = (self.len(), shape.len());
        if expected != got {
            return Err(Error::Len { expected, got });
        }
        match Arc::try_unwrap(self.memory) {
            Ok(Memory::Owned(owned)) => owned.into_data().into_tensor(shape),
            Ok(Memory::Shared(shared)) => shared.to_tensor(shape),
            Ok(Memory::Mapped(mapped)) => mapped.to_data().into_tensor(shape),
            Ok(Memory::Device(memory)) => memory.into_tensor(shape),
            Err(memory) => match &*memory {
                Memory::Owned(data) => data.copied().into_tensor(shape),
                Memory::Shared(shared) => shared.to_tensor(shape),
                Memory::Mapped(mapped) => mapped.to_data().into_tensor(shape),
                Memory::Device(memory) => memory.duplicate()?.into_tensor(shape),
            },
        }
    }

    /// Asks for what these know of their memory, which is about to be read.
    pub(crate) fn prefetch(buffers: &[Buffer]) {
        prefetch(buffers.iter().map(|buffer| &buffer.memory));
    }

    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The memory for writing, if nothing else can see it and it is a device's.
    #[cfg(feature = "cuda")]
    pub(crate) fn unique_device_mut(&mut self) -> Option<&mut dyn DeviceMemory> {
        match Arc::get_mut(&mut self.memory)? {
            Memory::Device(memory) => Some(memory.as_mut()),
            Memory::Owned(_) | Memory::Shared(_) | Memory::Mapped(_) => None,
        }
    }

    /// The elements of a buffer that was donated, for writing, if nothing else can see them and the CPU can.
    pub(crate) fn donated_mut(&mut self) -> Option<&mut Data> {
        match Arc::get_mut(&mut self.memory)? {
            Memory::Owned(owned) => Some(owned.given_away()),
            Memory::Shared(_) | Memory::Mapped(_) | Memory::Device(_) => None,
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({}[{}])", self.dtype(), self.len())
    }
}

//! The memory that goes into a plan and comes out of it.

use crate::candle::Shared;
use crate::element::{Data, Element};
use crate::mapped::{self, Mapped, MappedBytes};
use crate::{Device, Error, Result};
use candle_core::Tensor;
use metal_candle_graph::{DType, Shape};
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
    Owned(Data),
    Shared(Shared),
    Mapped(Mapped),
}

impl Buffer {
    /// Takes the vector over without a copy.
    pub fn from_vec<T: Element>(data: Vec<T>) -> Buffer {
        Buffer::from_data(Data::new(data))
    }

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
        Buffer { memory: Arc::new(Memory::Owned(data)) }
    }

    pub fn device(&self) -> Device {
        Device::Cpu
    }

    /// The same elements on `device`: this buffer itself if it is there already, else a copy.
    ///
    /// # Errors
    /// [`Error::Device`] for a device that this build has no kernels for.
    pub fn to_device(&self, device: &Device) -> Result<Buffer> {
        match device {
            Device::Cpu => Ok(self.clone()),
            other => Err(Error::Device { got: format!("{other:?}") }),
        }
    }

    pub fn dtype(&self) -> DType {
        match &*self.memory {
            Memory::Owned(data) => data.dtype(),
            Memory::Shared(shared) => shared.dtype(),
            Memory::Mapped(mapped) => mapped.dtype(),
        }
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        match &*self.memory {
            Memory::Owned(data) => data.len(),
            Memory::Shared(shared) => shared.len(),
            Memory::Mapped(mapped) => mapped.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether this is the only handle to memory of its own, so that it may be donated. Memory that came
    /// from Candle is never unique, as tensors may see it; that of a file is read only.
    pub fn is_unique(&self) -> bool {
        matches!(&*self.memory, Memory::Owned(_)) && Arc::strong_count(&self.memory) == 1
    }

    /// This buffer if it [is unique](Buffer::is_unique), else a copy that is.
    ///
    /// # Errors
    /// [`Error::Candle`] if a tensor's storage cannot be read.
    pub fn into_owned(self) -> Result<Buffer> {
        if self.is_unique() {
            return Ok(self);
        }
        let data = match &*self.memory {
            Memory::Owned(data) => data.copied(),
            Memory::Shared(shared) => shared.to_data()?,
            Memory::Mapped(mapped) => mapped.to_data(),
        };
        Ok(Buffer::from_data(data))
    }

    /// The elements, copied out.
    ///
    /// # Errors
    /// [`Error::DType`] if they are of another type.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        match &*self.memory {
            Memory::Owned(data) => Ok(data.as_slice()?.to_vec()),
            Memory::Shared(shared) => Ok(shared.to_data()?.as_slice()?.to_vec()),
            Memory::Mapped(mapped) => Ok(mapped.to_data().as_slice()?.to_vec()),
        }
    }

    /// A tensor of `shape`. Copies only where another handle to memory of our own exists, or what lies in a
    /// file; what came from Candle goes back as the same storage.
    ///
    /// # Errors
    /// [`Error::Len`] if the shape has another number of elements; [`Error::Candle`].
    pub fn into_candle(self, shape: &Shape) -> Result<Tensor> {
        let (expected, got) = (self.len(), shape.len());
        if expected != got {
            return Err(Error::Len { expected, got });
        }
        match Arc::try_unwrap(self.memory) {
            Ok(Memory::Owned(data)) => data.into_tensor(shape),
            Ok(Memory::Shared(shared)) => shared.to_tensor(shape),
            Ok(Memory::Mapped(mapped)) => mapped.to_data().into_tensor(shape),
            Err(memory) => match &*memory {
                Memory::Owned(data) => data.copied().into_tensor(shape),
                Memory::Shared(shared) => shared.to_tensor(shape),
                Memory::Mapped(mapped) => mapped.to_data().into_tensor(shape),
            },
        }
    }

    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The elements for writing, if nothing else can see them.
    pub(crate) fn unique_mut(&mut self) -> Option<&mut Data> {
        match Arc::get_mut(&mut self.memory)? {
            Memory::Owned(data) => Some(data),
            Memory::Shared(_) | Memory::Mapped(_) => None,
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({}[{}])", self.dtype(), self.len())
    }
}

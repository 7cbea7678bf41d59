//! Memory that both processors see.

use super::Gpu;
use crate::buffer::DeviceMemory;
use crate::element::Data;
use crate::{Device, Error, MappedBytes, Result};
use candle_core::op::BackpropOp;
use candle_core::{MetalStorage, Storage, Tensor};
use candle_metal_kernels::metal::Buffer;
use metal_candle_graph::{DType, Shape};
use std::ptr::NonNull;
use std::sync::Arc;

/// What the widest access of a kernel wants the address of an operand to be a multiple of.
pub(super) const ALIGN_BYTES: usize = 16;
/// A page of a computer with Apple's processor.
const PAGE_BYTES: usize = 16 << 10;

/// The elements of a buffer on a device. Runs that write them are over when anyone else sees them.
pub(crate) struct Unified {
    gpu: Arc<Gpu>,
    buffer: Arc<Buffer>,
    offset_bytes: usize,
    dtype: DType,
    len: usize,
    /// The file whose pages they are.
    file: Option<MappedBytes>,
}

impl Unified {
    /// The first `len` elements of memory that is nobody else's.
    pub(super) fn new(gpu: &Arc<Gpu>, buffer: Arc<Buffer>, dtype: DType, len: usize) -> Unified {
        Unified { gpu: Arc::clone(gpu), buffer, offset_bytes: 0, dtype, len, file: None }
    }

    /// Elements where they lie in a file; `None` where kernels cannot read them there.
    pub(super) fn mapped(gpu: &Arc<Gpu>, bytes: &MappedBytes, dtype: DType) -> Option<Unified> {
        let start = bytes.as_ptr();
        let offset_bytes = start.addr() % PAGE_BYTES;
        let has_such_pages = cfg!(target_arch = "aarch64");
        if !has_such_pages || !offset_bytes.is_multiple_of(ALIGN_BYTES) || bytes.is_empty() {
            return None;
        }
        // A map begins with a page, and has whole ones.
        let pages = NonNull::new(start.wrapping_sub(offset_bytes).cast_mut())?;
        let len_bytes = (offset_bytes + bytes.len()).next_multiple_of(PAGE_BYTES);
        let buffer = gpu.buffer_of_pages(pages, len_bytes)?;
        Some(Unified {
            gpu: Arc::clone(gpu),
            buffer: Arc::new(buffer),
            offset_bytes,
            dtype,
            len: bytes.len() / dtype.size_bytes(),
            file: Some(bytes.clone()),
        })
    }

    /// The memory, and where in it the elements start.
    pub(super) fn place(&self) -> (&Arc<Buffer>, usize) {
        (&self.buffer, self.offset_bytes)
    }

    fn bytes(&self) -> &[u8] {
        let len = self.len * self.dtype.size_bytes();
        // SAFETY: so many bytes of the buffer, which the processor sees; whoever writes them has the only handle.
        unsafe { std::slice::from_raw_parts(self.buffer.contents().add(self.offset_bytes), len) }
    }
}

impl DeviceMemory for Unified {
    fn device(&self) -> Device {
        self.gpu.device()
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn len(&self) -> usize {
        self.len
    }

    fn is_own(&self) -> bool {
        self.file.is_none()
    }

    fn to_data(&self) -> Result<Data> {
        let bytes = self.bytes();
        let out_of_memory =
            || Error::OutOfMemory { what: "a copy on the host".into(), bytes: bytes.len() };
        let mut data = Data::zeroed(self.dtype, self.len).ok_or_else(out_of_memory)?;
        // SAFETY: as many bytes of numbers, for which any bytes will do.
        unsafe { data.as_mut_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(data)
    }

    fn duplicate(&self) -> Result<Box<dyn DeviceMemory>> {
        Ok(Box::new(self.gpu.upload(self.bytes(), self.dtype)?))
    }

    fn into_tensor(self: Box<Self>, shape: &Shape) -> Result<Tensor> {
        if self.file.is_some() {
            return self.duplicate()?.into_tensor(shape);
        }
        let (buffer, device) = (self.buffer, self.gpu.candle_device().clone());
        let dtype = crate::dtype_to_candle(self.dtype);
        let storage = Storage::Metal(MetalStorage::new(buffer, device, self.len, dtype));
        Ok(Tensor::from_storage(storage, shape.dims(), BackpropOp::none(), false))
    }
}

//! Candle tensors as buffers, in both directions without a copy.

use crate::element::Data;
use crate::{Device, Error, Result};
use candle_core::{CpuStorage, Storage, StorageRef, Tensor};
use metal_candle_graph::{DType, Shape};

impl Error {
    fn unsupported(got: candle_core::DType) -> Error {
        Error::UnsupportedDType { got }
    }
}

/// [`DType`] of a Candle dtype.
///
/// # Errors
/// [`Error::UnsupportedDType`]
pub fn dtype_from_candle(dtype: candle_core::DType) -> Result<DType> {
    use candle_core::DType as Candle;
    match dtype {
        Candle::U8 => Ok(DType::U8),
        Candle::U32 => Ok(DType::U32),
        Candle::I64 => Ok(DType::I64),
        Candle::BF16 => Ok(DType::BF16),
        Candle::F16 => Ok(DType::F16),
        Candle::F32 => Ok(DType::F32),
        Candle::F64 => Ok(DType::F64),
        other => Err(Error::unsupported(other)),
    }
}

/// Candle's name of `dtype`.
pub const fn dtype_to_candle(dtype: DType) -> candle_core::DType {
    use candle_core::DType as Candle;
    match dtype {
        DType::U8 => Candle::U8,
        DType::U32 => Candle::U32,
        DType::I64 => Candle::I64,
        DType::BF16 => Candle::BF16,
        DType::F16 => Candle::F16,
        DType::F32 => Candle::F32,
        DType::F64 => Candle::F64,
    }
}

/// Whether kernels may read it with their widest accesses where it starts.
fn is_aligned(tensor: &Tensor) -> bool {
    (tensor.layout().start_offset() * tensor.dtype().size_in_bytes()).is_multiple_of(16)
}

/// The memory of a contiguous tensor.
///
/// Candle's in-place ops may change or even replace it, so it is looked up anew, under the storage's read
/// lock, whenever it is read.
pub(crate) struct Shared {
    tensor: Tensor,
    device: Device,
    dtype: DType,
    len: usize,
    start: usize,
    key: usize,
}

impl Shared {
    pub(crate) fn new(tensor: &Tensor) -> Result<Shared> {
        let device = Device::try_from(tensor.device())?;
        let dtype = dtype_from_candle(tensor.dtype())?;
        // Detached: the graph that Candle keeps for its own gradients must not live on in here.
        let mut tensor = tensor.detach().contiguous()?;
        if tensor.elem_count() == 0 {
            // A view of nothing may start beyond its storage, where Candle's own readers panic.
            tensor = Tensor::zeros(tensor.dims(), tensor.dtype(), tensor.device())?;
        }
        if matches!(device, Device::Metal(_)) && !is_aligned(&tensor) {
            tensor = tensor.force_contiguous()?;
        }
        let (len, start) = (tensor.elem_count(), tensor.layout().start_offset());
        let key = {
            let storage = tensor.storage_and_layout().0;
            std::ptr::from_ref::<Storage>(&storage).addr()
        };
        Ok(Shared { tensor, device, dtype, len, start, key })
    }

    pub(crate) fn device(&self) -> Device {
        self.device
    }

    /// Equal for tensors of one storage.
    pub(crate) fn key(&self) -> usize {
        self.key
    }

    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where its elements start in the storage.
    #[cfg(any(feature = "cuda", feature = "metal"))]
    pub(crate) fn start(&self) -> usize {
        self.start
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Keeps everyone from writing the storage for as long as the guard lives.
    pub(crate) fn lock(&self) -> StorageRef<'_> {
        self.tensor.storage_and_layout().0
    }

    /// The elements in a storage that is locked; `None` if it no longer holds them.
    pub(crate) fn address(&self, storage: &Storage) -> Option<*const u8> {
        let end = self.start + self.len;
        macro_rules! start_of {
            ($data:expr) => {
                $data.get(self.start..end).map(|elements| elements.as_ptr().cast())
            };
        }
        let Storage::Cpu(storage) = storage else { return None };
        match (storage, self.dtype) {
            (CpuStorage::U8(data), DType::U8) => start_of!(data),
            (CpuStorage::U32(data), DType::U32) => start_of!(data),
            (CpuStorage::I64(data), DType::I64) => start_of!(data),
            (CpuStorage::BF16(data), DType::BF16) => start_of!(data),
            (CpuStorage::F16(data), DType::F16) => start_of!(data),
            (CpuStorage::F32(data), DType::F32) => start_of!(data),
            (CpuStorage::F64(data), DType::F64) => start_of!(data),
            _ => None,
        }
    }

    pub(crate) fn to_data(&self) -> Result<Data> {
        let flat = self.tensor.flatten_all()?;
        Ok(match self.dtype {
            DType::U8 => Data::U8(flat.to_vec1()?),
            DType::U32 => Data::U32(flat.to_vec1()?),
            DType::I64 => Data::I64(flat.to_vec1()?),
            DType::BF16 => Data::BF16(flat.to_vec1()?),
            DType::F16 => Data::F16(flat.to_vec1()?),
            DType::F32 => Data::F32(flat.to_vec1()?),
            DType::F64 => Data::F64(flat.to_vec1()?),
        })
    }

    /// The same storage in another shape.
    pub(crate) fn to_tensor(&self, shape: &Shape) -> Result<Tensor> {
        Ok(self.tensor.reshape(shape.dims())?)
    }
}

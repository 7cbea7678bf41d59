//! Tensors from data, constants and random numbers.

use super::{LazyTensor, State};
use crate::error::{AtCaller, ErrorKind};
use crate::io::Bytes;
use crate::{DType, Device, Error, Result};
use metal_candle_graph::{Distribution, Operation, Scalar, Shape, TensorType};
use metal_candle_runtime::{Buffer, Element};

impl LazyTensor {
    /// A Candle tensor's own memory, not copied if it is contiguous.
    ///
    /// # Errors
    /// For a dtype or a device that this build has no kernels for.
    #[track_caller]
    pub fn from_tensor(tensor: &candle_core::Tensor) -> Result<LazyTensor> {
        let buffer = Buffer::from_candle(tensor).at_caller()?;
        let shape = Shape::new(tensor.dims()).at_caller()?;
        let ty = TensorType::new(buffer.dtype(), shape);
        Ok(LazyTensor::ready(buffer, ty))
    }

    /// The vector's own memory, in row-major order.
    ///
    /// # Errors
    /// Where `data` has not the elements of `dims`.
    #[track_caller]
    pub fn from_vec<T: Element>(
        data: Vec<T>,
        dims: &[usize],
        device: &Device,
    ) -> Result<LazyTensor> {
        let shape = Shape::new(dims).at_caller()?;
        let got = data.len();
        let buffer = Buffer::from_vec(data);
        let dtype = buffer.dtype();
        if got != shape.len() {
            let expected = shape.len();
            return Err(Error::from(ErrorKind::DataLength { dtype, shape, expected, got }));
        }
        let buffer = buffer.to_device(device).at_caller()?;
        Ok(LazyTensor::ready(buffer, TensorType::new(dtype, shape)))
    }

    /// Little-endian elements of a file, in row-major order: read where they lie in it, if it is mapped and
    /// they lie at multiples of their size, else copied.
    ///
    /// # Errors
    /// Where `bytes` has not the elements of `dims`.
    #[track_caller]
    pub fn from_bytes(
        bytes: Bytes,
        dtype: DType,
        dims: &[usize],
        device: &Device,
    ) -> Result<LazyTensor> {
        let shape = Shape::new(dims).at_caller()?;
        let (expected, size) = (shape.len(), dtype.size_bytes());
        if Some(bytes.len()) != expected.checked_mul(size) {
            let got = bytes.len() / size;
            return Err(Error::from(ErrorKind::DataLength { dtype, shape, expected, got }));
        }
        let buffer = match bytes {
            Bytes::Owned(bytes) => Buffer::from_bytes(bytes, dtype),
            Bytes::Mapped(bytes) => Buffer::from_mapped(bytes, dtype),
        };
        let buffer = buffer.to_device(device).at_caller()?;
        Ok(LazyTensor::ready(buffer, TensorType::new(dtype, shape)))
    }

    /// Whether its elements are in memory only as far as the system keeps a mapped file there.
    pub fn is_mapped(&self) -> bool {
        matches!(self.0.read(), State::Ready(buffer) if buffer.is_mapped())
    }

    /// A copy of `data`, in row-major order.
    ///
    /// # Errors
    /// Where `data` has not the elements of `dims`.
    #[track_caller]
    pub fn from_slice<T: Element>(
        data: &[T],
        dims: &[usize],
        device: &Device,
    ) -> Result<LazyTensor> {
        LazyTensor::from_vec(data.to_vec(), dims, device)
    }

    /// A type without a value, which takes no memory: what is recorded on it can be planned
    /// ([`LazyTensor::plan`], [`Compiled::outline`](crate::Compiled::outline)) and not run.
    ///
    /// ```
    /// use metal_candle::{DType, Device, LazyTensor};
    /// let w = LazyTensor::placeholder(&[1 << 20, 1 << 20], DType::F32, &Device::Cpu)?;
    /// let plan = LazyTensor::plan(&[&w.matmul(&w)?])?;
    /// assert_eq!(plan.peak_bytes(), 2 * (4 << 40));
    /// # Ok::<(), metal_candle::Error>(())
    /// ```
    ///
    /// # Errors
    /// Where the shape cannot be addressed.
    #[track_caller]
    pub fn placeholder(dims: &[usize], dtype: DType, device: &Device) -> Result<LazyTensor> {
        let ty = TensorType::new(dtype, Shape::new(dims).at_caller()?);
        Ok(LazyTensor::new(State::Placeholder, ty, *device))
    }

    /// `value` everywhere. Takes no memory until it is needed.
    ///
    /// # Errors
    /// Where the shape cannot be addressed.
    #[track_caller]
    pub fn full(value: f64, dims: &[usize], dtype: DType, device: &Device) -> Result<LazyTensor> {
        let shape = Shape::new(dims).at_caller()?;
        let scalar = LazyTensor::constant(Scalar::from_f64(dtype, value), device);
        scalar.broadcast_shape(shape)
    }

    /// 0 everywhere. Takes no memory until it is needed.
    ///
    /// # Errors
    /// As [`LazyTensor::full`].
    #[track_caller]
    pub fn zeros(dims: &[usize], dtype: DType, device: &Device) -> Result<LazyTensor> {
        LazyTensor::full(0.0, dims, dtype, device)
    }

    /// 1 everywhere. Takes no memory until it is needed.
    ///
    /// # Errors
    /// As [`LazyTensor::full`].
    #[track_caller]
    pub fn ones(dims: &[usize], dtype: DType, device: &Device) -> Result<LazyTensor> {
        LazyTensor::full(1.0, dims, dtype, device)
    }

    /// Zeros of this tensor's shape and dtype.
    ///
    /// # Errors
    /// Never for a tensor that exists.
    #[track_caller]
    pub fn zeros_like(&self) -> Result<LazyTensor> {
        LazyTensor::zeros(self.dims(), self.dtype(), self.device())
    }

    /// Ones of this tensor's shape and dtype.
    ///
    /// # Errors
    /// Never for a tensor that exists.
    #[track_caller]
    pub fn ones_like(&self) -> Result<LazyTensor> {
        LazyTensor::ones(self.dims(), self.dtype(), self.device())
    }

    /// `start, start + 1, ..` below `end`, rank 1.
    ///
    /// # Errors
    /// Where `end` is below `start`.
    #[track_caller]
    pub fn arange(start: i64, end: i64, dtype: DType, device: &Device) -> Result<LazyTensor> {
        let len = end.checked_sub(start).and_then(|len| usize::try_from(len).ok());
        let len = len.ok_or_else(|| metal_candle_graph::Error::Attribute {
            op: "arange",
            what: "end",
            expected: "at least start",
            got: format!("{end} for start {start}"),
        });
        let len = len.at_caller()?;
        let ty = TensorType::new(dtype, Shape::new(&[len]).at_caller()?);
        let op = Operation::Iota { len, dtype };
        let iota = LazyTensor::from_parts(op, smallvec::SmallVec::new(), ty, *device);
        if start == 0 { Ok(iota) } else { iota.affine(1.0, start as f64) }
    }

    /// Uniform on `[0, 1)`: element `i` depends on `seed` and `i` only.
    ///
    /// # Errors
    /// For an integer dtype, or a shape that cannot be addressed.
    #[track_caller]
    pub fn rand(dims: &[usize], dtype: DType, seed: u64, device: &Device) -> Result<LazyTensor> {
        LazyTensor::random(Distribution::Uniform, dims, dtype, seed, device)
    }

    /// Standard normal: element `i` depends on `seed` and `i` only.
    ///
    /// # Errors
    /// As [`LazyTensor::rand`].
    #[track_caller]
    pub fn randn(dims: &[usize], dtype: DType, seed: u64, device: &Device) -> Result<LazyTensor> {
        LazyTensor::random(Distribution::Normal, dims, dtype, seed, device)
    }

    #[track_caller]
    fn random(
        distribution: Distribution,
        dims: &[usize],
        dtype: DType,
        seed: u64,
        device: &Device,
    ) -> Result<LazyTensor> {
        let shape = Shape::new(dims).at_caller()?;
        let seed = LazyTensor::constant(Scalar::from_i64(DType::I64, seed as i64), device);
        let op = Operation::Random { distribution, stream: 0, dtype, shape };
        LazyTensor::record(op, &[&seed])
    }

    pub(crate) fn constant(value: Scalar, device: &Device) -> LazyTensor {
        let ty = TensorType::new(value.dtype(), Shape::SCALAR);
        LazyTensor::from_parts(Operation::Const(value), smallvec::SmallVec::new(), ty, *device)
    }

    /// A constant of this tensor's dtype and device, rank 0.
    pub(crate) fn scalar_like(&self, value: f64) -> LazyTensor {
        LazyTensor::constant(Scalar::from_f64(self.dtype(), value), self.device())
    }
}

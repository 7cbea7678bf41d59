//! Tensors as the oracle holds them, and the other way round.

use crate::testbed::device;
use half::{bf16, f16};
use metal_candle::graph::oracle::Value;
use metal_candle::{DType, Element, LazyTensor, Result};

/// The tensor of these values.
pub(crate) fn tensor(value: &Value) -> LazyTensor {
    let (dims, data) = (value.ty.shape.dims(), value.data.iter().copied());
    let on = device();
    match value.ty.dtype {
        DType::U8 => LazyTensor::from_vec(data.map(|x| x as u8).collect(), dims, on),
        DType::U32 => LazyTensor::from_vec(data.map(|x| x as u32).collect(), dims, on),
        DType::I64 => LazyTensor::from_vec(data.map(|x| x as i64).collect(), dims, on),
        DType::BF16 => LazyTensor::from_vec(data.map(bf16::from_f64).collect(), dims, on),
        DType::F16 => LazyTensor::from_vec(data.map(f16::from_f64).collect(), dims, on),
        DType::F32 => LazyTensor::from_vec(data.map(|x| x as f32).collect(), dims, on),
        DType::F64 => LazyTensor::from_vec(data.collect(), dims, on),
    }
    .unwrap()
}

/// The value of a tensor, which is computed if need be.
pub(crate) fn value(x: &LazyTensor) -> Value {
    Value::new(x.dtype(), x.dims(), values(x).unwrap()).expect("as many elements as it has")
}

/// The elements as they are in memory.
pub(crate) fn bytes(x: &LazyTensor) -> Vec<u8> {
    fn of<T: Element, const N: usize>(x: &LazyTensor, bytes: fn(T) -> [u8; N]) -> Vec<u8> {
        x.to_vec::<T>().unwrap().into_iter().flat_map(bytes).collect()
    }
    match x.dtype() {
        DType::U8 => of(x, u8::to_ne_bytes),
        DType::U32 => of(x, u32::to_ne_bytes),
        DType::I64 => of(x, i64::to_ne_bytes),
        DType::BF16 => of(x, bf16::to_ne_bytes),
        DType::F16 => of(x, f16::to_ne_bytes),
        DType::F32 => of(x, f32::to_ne_bytes),
        DType::F64 => of(x, f64::to_ne_bytes),
    }
}

/// The elements, as the oracle holds them.
pub(crate) fn values(x: &LazyTensor) -> Result<Vec<f64>> {
    Ok(match x.dtype() {
        DType::U8 => x.to_vec::<u8>()?.into_iter().map(f64::from).collect(),
        DType::U32 => x.to_vec::<u32>()?.into_iter().map(f64::from).collect(),
        DType::I64 => x.to_vec::<i64>()?.into_iter().map(|x| x as f64).collect(),
        DType::BF16 => x.to_vec::<bf16>()?.into_iter().map(bf16::to_f64).collect(),
        DType::F16 => x.to_vec::<f16>()?.into_iter().map(f16::to_f64).collect(),
        DType::F32 => x.to_vec::<f32>()?.into_iter().map(f64::from).collect(),
        DType::F64 => x.to_vec::<f64>()?,
    })
}

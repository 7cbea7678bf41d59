//! A constant of any dtype, compared and hashed by its bits.

use crate::{Class, DType};
use std::fmt;

/// One value of a given dtype. Two NaNs of the same bits are equal; `0.0` and `-0.0` are not.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Scalar {
    dtype: DType,
    /// The bits of an `f64` for floats, of an `i64` for integers.
    bits: u64,
}

impl Scalar {
    /// `value` as a float of `dtype`, or truncated and wrapped to an integer `dtype`.
    pub fn from_f64(dtype: DType, value: f64) -> Scalar {
        match dtype.class() {
            Class::I64 => Scalar::from_i64(dtype, value as i64),
            // Round once here, so that equal constants meet and every backend sees the same value.
            Class::F32 => Scalar { dtype, bits: f64::from(value as f32).to_bits() },
            Class::F64 => Scalar { dtype, bits: value.to_bits() },
        }
    }

    /// `value` converted to `dtype`; integers wrap.
    pub fn from_i64(dtype: DType, value: i64) -> Scalar {
        let wrapped = match dtype {
            DType::U8 => i64::from(value as u8),
            DType::U32 => i64::from(value as u32),
            DType::I64 => value,
            DType::BF16 | DType::F16 | DType::F32 | DType::F64 => {
                return Scalar::from_f64(dtype, value as f64);
            }
        };
        Scalar { dtype, bits: wrapped as u64 }
    }

    /// The dtype that the value was converted to.
    pub fn dtype(self) -> DType {
        self.dtype
    }

    /// The value as a float; integers beyond 2^53 are rounded.
    pub fn as_f64(self) -> f64 {
        match self.dtype.class() {
            Class::I64 => self.bits as i64 as f64,
            Class::F32 | Class::F64 => f64::from_bits(self.bits),
        }
    }

    /// The value as an integer; floats are truncated towards zero.
    pub fn as_i64(self) -> i64 {
        match self.dtype.class() {
            Class::I64 => self.bits as i64,
            Class::F32 | Class::F64 => f64::from_bits(self.bits) as i64,
        }
    }
}

impl fmt::Debug for Scalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.dtype.class() {
            Class::I64 => write!(f, "{}", self.as_i64()),
            Class::F32 => write!(f, "{:?}", self.as_f64() as f32),
            Class::F64 => write!(f, "{:?}", self.as_f64()),
        }
    }
}

//! Functions with a number as an argument, and conversions.

use crate::error::AtCaller;
use crate::{DType, LazyTensor, Result};
use metal_candle_graph::{BinaryOp, Error, Operation, Scalar};

impl LazyTensor {
    /// The same values as another dtype; itself where it is that dtype.
    ///
    /// # Shapes
    /// Any; the result has the same.
    ///
    /// # Numerics
    /// To a float: rounds once, half to even. From a float to an integer: truncates towards 0 and
    /// saturates, NaN gives 0. Between integers: wraps. Between floats it has a gradient.
    ///
    /// # Errors
    /// Never for a tensor that exists.
    #[track_caller]
    pub fn to_dtype(&self, dtype: DType) -> Result<LazyTensor> {
        if self.dtype() == dtype {
            return Ok(self.clone());
        }
        LazyTensor::record(Operation::Cast(dtype), &[self])
    }

    /// `mul · x + add`
    ///
    /// # Shapes
    /// Any; the result has the same.
    ///
    /// # Numerics
    /// bf16 and f16 are computed in f32; integers wrap.
    ///
    /// # Errors
    /// Where the tensor's dtype is an integer that cannot be `mul` or `add`.
    #[track_caller]
    pub fn affine(&self, mul: f64, add: f64) -> Result<LazyTensor> {
        let (mul, add) = (self.scalar("affine", mul)?, self.scalar("affine", add)?);
        let scaled = if mul.as_f64() == 1.0 {
            self.clone()
        } else {
            self.binary(BinaryOp::Mul, &LazyTensor::constant(mul, self.device()))?
        };
        if add.as_f64() == 0.0 {
            return Ok(scaled);
        }
        scaled.binary(BinaryOp::Add, &LazyTensor::constant(add, self.device()))
    }

    /// `xᵉ` for one exponent.
    ///
    /// # Shapes
    /// Any; the result has the same.
    ///
    /// # Numerics
    /// As [`LazyTensor::pow`].
    ///
    /// # Errors
    /// Where the tensor's dtype is an integer that cannot be `exponent`.
    #[track_caller]
    pub fn powf(&self, exponent: f64) -> Result<LazyTensor> {
        let exponent = self.scalar("powf", exponent)?;
        self.binary(BinaryOp::Pow, &LazyTensor::constant(exponent, self.device()))
    }

    /// x within `min` and `max`; NaN stays NaN. The gradient is 1 within and at the bounds, 0
    /// beyond.
    ///
    /// # Shapes
    /// Any; the result has the same.
    ///
    /// # Errors
    /// Where `min` exceeds `max` or one is NaN, and where the tensor's dtype is an integer that
    /// cannot be one of them.
    #[track_caller]
    pub fn clamp(&self, min: f64, max: f64) -> Result<LazyTensor> {
        let op = "clamp";
        if min.is_nan() || max.is_nan() || min > max {
            let (what, expected) = ("min", "at most max");
            let got = format!("{min} for max {max}");
            return Err(Error::Attribute { op, what, expected, got }).at_caller();
        }
        // Chosen, because the larger and the smaller one would halve the gradient at the bounds.
        let mut x = self.clone();
        for (bound, beyond) in [(min, BinaryOp::Lt), (max, BinaryOp::Gt)] {
            let bound = LazyTensor::constant(self.scalar(op, bound)?, self.device());
            x = x.binary(beyond, &bound)?.where_cond(&bound, &x)?;
        }
        Ok(x)
    }

    /// `value` in this tensor's dtype.
    #[track_caller]
    pub(super) fn scalar(&self, op: &'static str, value: f64) -> Result<Scalar> {
        let dtype = self.dtype();
        let scalar = Scalar::from_f64(dtype, value);
        // i64::MAX as a float is 2^63, which no i64 is.
        let is_it = || scalar.as_f64() == value && value < i64::MAX as f64;
        if dtype.is_float() || is_it() {
            return Ok(scalar);
        }
        let (what, expected) = ("the scalar", "a value of the tensor's dtype");
        let got = format!("{value} for {dtype}");
        Err(Error::Attribute { op, what, expected, got }).at_caller()
    }
}

//! Tensors out of parts.

use super::Dim;
use crate::error::AtCaller;
use crate::{LazyTensor, Result};
use metal_candle_graph::{Error, Operation};
use std::borrow::Borrow;

impl LazyTensor {
    /// The parts one after the other along `dim`.
    ///
    /// # Shapes
    /// `[3, 2]` and `[3, 5]` along 1 give `[3, 7]`; the other extents are equal.
    ///
    /// # Errors
    /// Where there are no parts, they differ in dtype, device, rank or another extent, or the dim
    /// is not there.
    #[track_caller]
    pub fn cat<T: Borrow<LazyTensor>>(parts: &[T], dim: impl Into<Dim>) -> Result<LazyTensor> {
        let op = "cat";
        let parts: Vec<&LazyTensor> = parts.iter().map(Borrow::borrow).collect();
        let Some(first) = parts.first() else {
            return Err(Error::Arity { op, expected: 1, got: 0 }).at_caller();
        };
        let dim = first.dim_of(op, dim)?;
        match parts[..] {
            [only] => Ok(only.clone()),
            _ => LazyTensor::record(Operation::Concat { dim }, &parts),
        }
    }

    /// The parts one after the other along a new dim.
    ///
    /// # Shapes
    /// Two `[3, 7]` at 0 give `[2, 3, 7]`, at -1 `[3, 7, 2]`.
    ///
    /// # Errors
    /// Where there are no parts, they differ in dtype, device or shape, or the dim exceeds their
    /// rank.
    #[track_caller]
    pub fn stack<T: Borrow<LazyTensor>>(parts: &[T], dim: impl Into<Dim>) -> Result<LazyTensor> {
        let op = "stack";
        let Some(first) = parts.first().map(Borrow::borrow) else {
            return Err(Error::Arity { op, expected: 1, got: 0 }).at_caller();
        };
        let dim = first.new_dim_of(op, dim)?;
        let mut layers = Vec::new();
        for part in parts.iter().map(Borrow::borrow) {
            let (expected, got) = (first.ty().shape, part.ty().shape);
            if expected != got {
                return Err(Error::Shape { op, expected, got }).at_caller();
            }
            layers.push(part.unsqueeze(dim)?);
        }
        LazyTensor::cat(&layers, dim)
    }

    /// `before` and `after` positions of `value` around those along `dim`.
    ///
    /// # Shapes
    /// `[3, 7]` along 1 with 1 and 2 gives `[3, 10]`.
    ///
    /// # Errors
    /// For a dim that is not there, a result that cannot be addressed, or a value that the dtype
    /// has not.
    #[track_caller]
    pub fn pad(
        &self,
        dim: impl Into<Dim>,
        before: usize,
        after: usize,
        value: f64,
    ) -> Result<LazyTensor> {
        let dim = self.dim_of("pad", dim)?;
        let value = self.scalar("pad", value)?;
        if (before, after) == (0, 0) {
            return Ok(self.clone());
        }
        LazyTensor::record(Operation::Pad { dim, before, after, value }, &[self])
    }
}

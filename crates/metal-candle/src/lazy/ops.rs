//! The operations of a [`LazyTensor`]: a file per family.
//!
//! The graph wants shapes and dtypes explicit. These methods insert the broadcasts and reshapes,
//! refuse what does not fit, and name the caller's line; dtypes are never converted unasked.

mod attention;
mod binary;
mod dim;
mod index;
mod join;
mod loss;
mod norm;
mod overload;
mod product;
mod random;
mod reduce;
mod scalar;
mod shape;
#[cfg(test)]
mod tests;
mod unary;

use super::LazyTensor;
use crate::Result;
use crate::error::AtCaller;
use metal_candle_graph::{Error as GraphError, MAX_RANK, Operation, Shape, broadcast_shapes};

pub use attention::Attention;
pub use dim::Dim;
pub use loss::CrossEntropy;

impl LazyTensor {
    /// These elements in row-major order as `shape`; itself where nothing changes.
    #[track_caller]
    fn reshape_to(&self, shape: Shape) -> Result<LazyTensor> {
        if self.ty().shape == shape {
            return Ok(self.clone());
        }
        LazyTensor::record(Operation::Reshape(shape), &[self])
    }

    /// This tensor repeated to `shape`: leading dims are added, dims of extent 1 repeated.
    #[track_caller]
    pub(super) fn broadcast_shape(&self, shape: Shape) -> Result<LazyTensor> {
        self.broadcast_for("broadcast_as", shape)
    }

    /// [`LazyTensor::broadcast_shape`] as an operand of `op`, which the error names.
    #[track_caller]
    fn broadcast_for(&self, op: &'static str, to: Shape) -> Result<LazyTensor> {
        let from = self.ty().shape;
        if from == to {
            return Ok(self.clone());
        }
        if broadcast_shapes(op, &from, &to).at_caller()? != to {
            return Err(GraphError::Broadcast { op, lhs: from, rhs: to }).at_caller();
        }
        let mut dims = [1; MAX_RANK];
        dims[to.rank() - from.rank()..to.rank()].copy_from_slice(from.dims());
        let x = self.reshape_to(Shape::new(&dims[..to.rank()]).at_caller()?)?;
        if x.ty().shape == to {
            return Ok(x);
        }
        LazyTensor::record(Operation::Broadcast(to), &[&x])
    }

    /// Both tensors repeated to the shape that they have in common.
    #[track_caller]
    fn broadcast_pair(&self, op: &'static str, rhs: &LazyTensor) -> Result<[LazyTensor; 2]> {
        let shape = broadcast_shapes(op, &self.ty().shape, &rhs.ty().shape).at_caller()?;
        Ok([self.broadcast_for(op, shape)?, rhs.broadcast_for(op, shape)?])
    }
}

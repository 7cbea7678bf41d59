//! Shapes: up to [`MAX_RANK`] extents, copied by value so that recording an op allocates nothing.

use crate::{DType, Error, Result};
use std::fmt;

/// The largest rank of a tensor.
pub const MAX_RANK: usize = 8;

/// The extents of a tensor, outermost first. Extents may be 0; rank 0 is a scalar.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    rank: u8,
    /// 0 beyond the rank.
    dims: [usize; MAX_RANK],
}

impl std::hash::Hash for Shape {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.dims().hash(state);
    }
}

impl Shape {
    pub const SCALAR: Shape = Shape { rank: 0, dims: [0; MAX_RANK] };

    /// A shape of these extents.
    ///
    /// # Errors
    /// [`Error::Rank`] beyond [`MAX_RANK`]; [`Error::ShapeOverflow`] if the tensor could not be addressed.
    pub fn new(dims: &[usize]) -> Result<Shape> {
        if dims.len() > MAX_RANK {
            return Err(Error::Rank { op: "shape", expected: "at most 8", got: dims.len() });
        }
        // isize::MAX bytes of the widest element is the most that any allocation may have.
        let limit = isize::MAX as usize / 8;
        let mut len = 1usize;
        for &d in dims {
            // An empty axis must not hide an overflow elsewhere: strides are still computed from it.
            len = len
                .checked_mul(d.max(1))
                .filter(|len| *len <= limit)
                .ok_or_else(|| Error::ShapeOverflow { dims: dims.to_vec() })?;
        }
        Ok(Self::from_slice(dims))
    }

    fn from_slice(dims: &[usize]) -> Shape {
        let mut s = Shape { rank: dims.len() as u8, dims: [0; MAX_RANK] };
        s.dims[..dims.len()].copy_from_slice(dims);
        s
    }

    /// The number of dims.
    pub const fn rank(&self) -> usize {
        self.rank as usize
    }

    /// The extents, from the outermost dim on.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank()]
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.dims().iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.dims().contains(&0)
    }

    /// The extent of the innermost dim; `None` for a scalar.
    pub fn last(&self) -> Option<usize> {
        self.dims().last().copied()
    }

    /// This shape with `dims[dim] = extent`.
    pub fn with(mut self, dim: usize, extent: usize) -> Shape {
        assert!(dim < self.rank(), "metal-candle bug: dim {dim} of {self}");
        self.dims[dim] = extent;
        self
    }

    /// The strides, in elements, of a contiguous tensor of this shape.
    pub fn contiguous_strides(&self) -> [isize; MAX_RANK] {
        let mut strides = [0; MAX_RANK];
        let mut stride = 1isize;
        for i in (0..self.rank()).rev() {
            strides[i] = stride;
            stride *= self.dims[i].max(1) as isize;
        }
        strides
    }
}

impl std::ops::Index<usize> for Shape {
    type Output = usize;
    fn index(&self, i: usize) -> &usize {
        &self.dims()[i]
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.dims(), f)
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.dims(), f)
    }
}

/// The dtype and the shape of a value.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TensorType {
    /// Of each element.
    pub dtype: DType,
    /// The extents.
    pub shape: Shape,
}

impl TensorType {
    /// A dtype and a shape.
    pub fn new(dtype: DType, shape: Shape) -> TensorType {
        TensorType { dtype, shape }
    }

    /// The bytes of all elements.
    pub fn size_bytes(&self) -> usize {
        self.shape.len() * self.dtype.size_bytes()
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.dtype, self.shape)
    }
}

impl fmt::Debug for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

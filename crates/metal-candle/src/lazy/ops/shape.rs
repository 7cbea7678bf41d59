//! Views: the same elements in other places. None of them copies unless what reads it needs dense
//! memory.

use super::Dim;
use crate::error::AtCaller;
use crate::{LazyTensor, Result};
use metal_candle_graph::{Error, Operation, Permutation, Shape};

impl LazyTensor {
    /// The same elements, in row-major order, in another shape.
    ///
    /// # Shapes
    /// Any of as many elements.
    ///
    /// # Errors
    /// For another number of elements.
    #[track_caller]
    pub fn reshape(&self, dims: &[usize]) -> Result<LazyTensor> {
        self.reshape_to(Shape::new(dims).at_caller()?)
    }

    /// The dims from `start` to `end`, both included, as one.
    ///
    /// # Shapes
    /// `[2, 3, 4, 5]` from 1 to 2 gives `[2, 12, 5]`.
    ///
    /// # Errors
    /// For dims that are not there, or `end` before `start`.
    #[track_caller]
    pub fn flatten(&self, start: impl Into<Dim>, end: impl Into<Dim>) -> Result<LazyTensor> {
        let op = "flatten";
        let (start, end) = (self.dim_of(op, start)?, self.dim_of(op, end)?);
        if start > end {
            let (dims, rank) = (vec![start, end], self.rank());
            return Err(Error::Dims { op, dims, rank }).at_caller();
        }
        let dims = self.dims();
        let joined = dims[start..=end].iter().product();
        self.reshape(&[&dims[..start], &[joined], &dims[end + 1..]].concat())
    }

    /// All elements in row-major order, rank 1.
    ///
    /// # Errors
    /// Never for a tensor that exists.
    #[track_caller]
    pub fn flatten_all(&self) -> Result<LazyTensor> {
        self.reshape(&[self.elem_count()])
    }

    /// Exchanges two dims.
    ///
    /// # Shapes
    /// `[2, 3, 4]` with 0 and -1 gives `[4, 3, 2]`.
    ///
    /// # Errors
    /// For dims that are not there.
    #[track_caller]
    pub fn transpose(&self, dim0: impl Into<Dim>, dim1: impl Into<Dim>) -> Result<LazyTensor> {
        let (dim0, dim1) = (self.dim_of("transpose", dim0)?, self.dim_of("transpose", dim1)?);
        let mut dims: Vec<usize> = (0..self.rank()).collect();
        dims.swap(dim0, dim1);
        self.permute(dims)
    }

    /// Exchanges the last two dims.
    ///
    /// # Shapes
    /// `[.., m, n]` gives `[.., n, m]`.
    ///
    /// # Errors
    /// Below rank 2.
    #[track_caller]
    pub fn t(&self) -> Result<LazyTensor> {
        let got = self.rank();
        if got < 2 {
            return Err(Error::Rank { op: "t", expected: "at least 2", got }).at_caller();
        }
        self.transpose(got - 2, got - 1)
    }

    /// Puts the dims in another order: dim `i` of the result is dim `dims[i]` of this tensor.
    ///
    /// # Shapes
    /// `[2, 3, 4]` by `[2, 0, 1]` gives `[4, 2, 3]`.
    ///
    /// # Errors
    /// Where `dims` does not name every dim once.
    #[track_caller]
    pub fn permute(&self, dims: impl IntoIterator<Item = impl Into<Dim>>) -> Result<LazyTensor> {
        let op = "permute";
        let (dims, rank) = (self.dims_of(op, dims)?, self.rank());
        match Permutation::new(&dims) {
            Some(p) if p.rank() == rank && p.is_identity() => Ok(self.clone()),
            Some(p) if p.rank() == rank => LazyTensor::record(Operation::Permute(p), &[self]),
            _ => Err(Error::Dims { op, dims, rank }).at_caller(),
        }
    }

    /// Removes `dim` if its extent is 1, and changes nothing if it is not, as Candle and PyTorch
    /// do.
    ///
    /// # Shapes
    /// `[3, 1, 7]` at 1 gives `[3, 7]`.
    ///
    /// # Errors
    /// For a dim that is not there.
    #[track_caller]
    pub fn squeeze(&self, dim: impl Into<Dim>) -> Result<LazyTensor> {
        let dim = self.dim_of("squeeze", dim)?;
        let mut dims = self.dims().to_vec();
        if dims[dim] == 1 {
            dims.remove(dim);
        }
        self.reshape(&dims)
    }

    /// Inserts a dim of extent 1.
    ///
    /// # Shapes
    /// `[3, 7]` at 1 gives `[3, 1, 7]`, at -1 `[3, 7, 1]`.
    ///
    /// # Errors
    /// Where `dim` exceeds the rank, or the result would have more dims than a tensor may.
    #[track_caller]
    pub fn unsqueeze(&self, dim: impl Into<Dim>) -> Result<LazyTensor> {
        let dim = self.new_dim_of("unsqueeze", dim)?;
        let mut dims = self.dims().to_vec();
        dims.insert(dim, 1);
        self.reshape(&dims)
    }

    /// Repeats the tensor to `dims`. Takes no memory.
    ///
    /// # Shapes
    /// Leading dims are added, dims of extent 1 repeated: `[3, 1]` to `[2, 3, 4]`.
    ///
    /// # Errors
    /// Where another extent than 1 would have to change.
    #[track_caller]
    pub fn broadcast_as(&self, dims: &[usize]) -> Result<LazyTensor> {
        self.broadcast_shape(Shape::new(dims).at_caller()?)
    }

    /// `len` positions along `dim` from `start`.
    ///
    /// # Shapes
    /// `[3, 7]` along 1 with `len` 4 gives `[3, 4]`.
    ///
    /// # Errors
    /// For a dim that is not there, or positions beyond its extent.
    #[track_caller]
    pub fn narrow(&self, dim: impl Into<Dim>, start: usize, len: usize) -> Result<LazyTensor> {
        self.slice(dim, start, len, 1)
    }

    /// `len` positions along `dim` from `start`, every `step`-th one.
    ///
    /// # Shapes
    /// `[3, 7]` along 1 with `len` 3 and `step` 2 gives `[3, 3]`.
    ///
    /// # Errors
    /// For a dim that is not there, a step of 0, or positions beyond the extent.
    #[track_caller]
    pub fn slice(
        &self,
        dim: impl Into<Dim>,
        start: usize,
        len: usize,
        step: usize,
    ) -> Result<LazyTensor> {
        let dim = self.dim_of("slice", dim)?;
        if start == 0 && step == 1 && len == self.dims()[dim] {
            return Ok(self.clone());
        }
        LazyTensor::record(Operation::Slice { dim, start, len, step }, &[self])
    }

    /// Cuts `dim` into `chunks` parts of equal length, the first ones longer by one where it does
    /// not divide.
    ///
    /// # Shapes
    /// `[3, 7]` along 1 into 3 gives `[3, 3]`, `[3, 2]` and `[3, 2]`. There are no empty parts: an
    /// extent below `chunks` gives fewer.
    ///
    /// # Errors
    /// For a dim that is not there, or no chunks.
    #[track_caller]
    pub fn chunk(&self, chunks: usize, dim: impl Into<Dim>) -> Result<Vec<LazyTensor>> {
        let op = "chunk";
        let dim = self.dim_of(op, dim)?;
        if chunks == 0 {
            let (what, expected, got) = ("the number of chunks", "at least 1", 0.to_string());
            return Err(Error::Attribute { op, what, expected, got }).at_caller();
        }
        let extent = self.dims()[dim];
        let mut parts = Vec::new();
        let mut start = 0;
        for i in 0..chunks.min(extent.max(1)) {
            let len = extent / chunks + usize::from(i < extent % chunks);
            parts.push(self.narrow(dim, start, len)?);
            start += len;
        }
        Ok(parts)
    }

    /// Reverses `dim`.
    ///
    /// # Shapes
    /// Any with that dim; the result has the same.
    ///
    /// # Errors
    /// For a dim that is not there.
    #[track_caller]
    pub fn flip(&self, dim: impl Into<Dim>) -> Result<LazyTensor> {
        let dim = self.dim_of("flip", dim)?;
        LazyTensor::record(Operation::Flip { dim }, &[self])
    }
}

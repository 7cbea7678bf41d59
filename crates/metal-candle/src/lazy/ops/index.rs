//! Elements and slices chosen by indices, or by a position that is known when it runs.
//!
//! Indices are u8, u32 or i64 and not negative. They are checked when they are read: one out of
//! range is an error of the evaluation, with its value and position.

use super::Dim;
use crate::{LazyTensor, Result};
use metal_candle_graph::Operation;

impl LazyTensor {
    /// One element for each index: `y[.., i, ..] = x[.., index[.., i, ..], ..]` (`torch.gather`).
    ///
    /// # Shapes
    /// The index has this tensor's rank, and at most its extents in every dim but `dim`; the result
    /// has the index's shape.
    ///
    /// # Numerics
    /// Gradients of one element accumulate in the order of the indices.
    ///
    /// # Errors
    /// Where the shapes do not fit, the index is a float, or the dim is not there.
    #[track_caller]
    pub fn gather(&self, index: &LazyTensor, dim: impl Into<Dim>) -> Result<LazyTensor> {
        let dim = self.dim_of("gather", dim)?;
        LazyTensor::record(Operation::Gather { dim }, &[self, index])
    }

    /// The slices along `dim` that the index names, in its order.
    ///
    /// # Shapes
    /// `[5, 3]` along 0 by an index `[7]` gives `[7, 3]`.
    ///
    /// # Errors
    /// Where the index is not of rank 1, is a float, or the dim is not there.
    #[track_caller]
    pub fn index_select(&self, index: &LazyTensor, dim: impl Into<Dim>) -> Result<LazyTensor> {
        let dim = self.dim_of("index_select", dim)?;
        LazyTensor::record(Operation::IndexSelect { dim }, &[self, index])
    }

    /// The rows of this table that the ids name.
    ///
    /// # Shapes
    /// A table `[rows, d]` and ids of any shape `[..]` give `[.., d]`.
    ///
    /// # Errors
    /// Where the table is no matrix or the ids are floats.
    #[track_caller]
    pub fn embedding(&self, ids: &LazyTensor) -> Result<LazyTensor> {
        self.check_rank("embedding", "2 (rows, features)", 2)?;
        let rows = self.index_select(&ids.flatten_all()?, 0)?;
        rows.reshape(&[ids.dims(), &self.dims()[1..]].concat())
    }

    /// This tensor with `src[.., i, ..]` added at `[.., index[.., i, ..], ..]`
    /// (`torch.scatter_add`).
    ///
    /// # Shapes
    /// Index and `src` have one shape, of this tensor's rank, and at most its extents in every dim
    /// but `dim`; the result has this tensor's.
    ///
    /// # Numerics
    /// Accumulates in f32 (f64 for f64, i64 for integers), in the order of the indices.
    ///
    /// # Errors
    /// Where the shapes do not fit, dtypes differ, the index is a float, or the dim is not there.
    #[track_caller]
    pub fn scatter_add(
        &self,
        index: &LazyTensor,
        src: &LazyTensor,
        dim: impl Into<Dim>,
    ) -> Result<LazyTensor> {
        let dim = self.dim_of("scatter_add", dim)?;
        LazyTensor::record(Operation::ScatterAdd { dim }, &[self, index, src])
    }

    /// This tensor with slice `i` of `src` added to slice `index[i]` along `dim`.
    ///
    /// # Shapes
    /// The index is `[n]`; `src` has this tensor's shape, but `n` positions along `dim`.
    ///
    /// # Numerics
    /// As [`LazyTensor::scatter_add`].
    ///
    /// # Errors
    /// Where the shapes do not fit, dtypes differ, the index is a float, or the dim is not there.
    #[track_caller]
    pub fn index_add(
        &self,
        index: &LazyTensor,
        src: &LazyTensor,
        dim: impl Into<Dim>,
    ) -> Result<LazyTensor> {
        let dim = self.dim_of("index_add", dim)?;
        LazyTensor::record(Operation::IndexAdd { dim }, &[self, index, src])
    }

    /// This tensor with `update` written at position `start` along `dim`; `start` is known when it
    /// runs.
    ///
    /// In place where this tensor is a donated argument of a compiled function and nothing else
    /// reads it.
    ///
    /// # Shapes
    /// `update` has this tensor's shape, but at most as many positions along `dim`; `start` is
    /// `i64[]`.
    ///
    /// # Errors
    /// Where the shapes do not fit, dtypes differ, or the dim is not there. When it runs: where
    /// `update` would reach beyond the extent.
    #[track_caller]
    pub fn slice_update(
        &self,
        dim: impl Into<Dim>,
        update: &LazyTensor,
        start: &LazyTensor,
    ) -> Result<LazyTensor> {
        let dim = self.dim_of("slice_update", dim)?;
        LazyTensor::record(Operation::SliceUpdate { dim }, &[self, update, start])
    }

    /// `len` positions along `dim` from `start`, which is known when it runs.
    ///
    /// # Shapes
    /// `[9, 3]` along 0 with `len` 4 gives `[4, 3]`; `start` is `i64[]`.
    ///
    /// # Errors
    /// Where `len` exceeds the extent, or the dim is not there. When it runs: for positions beyond
    /// the extent.
    #[track_caller]
    pub fn dynamic_slice(
        &self,
        dim: impl Into<Dim>,
        start: &LazyTensor,
        len: usize,
    ) -> Result<LazyTensor> {
        let dim = self.dim_of("dynamic_slice", dim)?;
        LazyTensor::record(Operation::DynamicSlice { dim, len }, &[self, start])
    }
}

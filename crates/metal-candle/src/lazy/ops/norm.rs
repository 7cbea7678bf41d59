//! Softmax, normalisation and rotary embedding.

use super::Dim;
use crate::error::AtCaller;
use crate::{DType, LazyTensor, Result};
use metal_candle_graph::composite::RopeLayout;
use metal_candle_graph::{Composite, Error, Operation, Scalar};

impl LazyTensor {
    /// `exp(x - max) / Σ exp(x - max)` along `dim`.
    ///
    /// # Shapes
    /// Any with that dim; the result has the same.
    ///
    /// # Numerics
    /// Computed in f32 (f64 for f64) and rounded once.
    ///
    /// # Errors
    /// For a dim that is not there, and for an integer dtype.
    #[track_caller]
    pub fn softmax(&self, dim: impl Into<Dim>) -> Result<LazyTensor> {
        let dim = self.dim_of("softmax", dim)?;
        composite(Composite::Softmax { dim }, &[self])
    }

    /// `x - max - log Σ exp(x - max)` along `dim`.
    ///
    /// # Shapes
    /// Any with that dim; the result has the same.
    ///
    /// # Numerics
    /// Computed in f32 (f64 for f64) and rounded once.
    ///
    /// # Errors
    /// For a dim that is not there, and for an integer dtype.
    #[track_caller]
    pub fn log_softmax(&self, dim: impl Into<Dim>) -> Result<LazyTensor> {
        let dim = self.dim_of("log_softmax", dim)?;
        composite(Composite::LogSoftmax { dim }, &[self])
    }

    /// `x / √(mean(x²) + eps) · weight` over the last dim (Zhang & Sennrich 2019).
    ///
    /// # Shapes
    /// `x: [.., n]` and `weight: [n]`; the result has x's.
    ///
    /// # Numerics
    /// Computed in f32 (f64 for f64) and rounded once.
    ///
    /// # Errors
    /// Where the weight has another shape or dtype, for an integer dtype, rank 0, or an `eps` below
    /// 0.
    #[track_caller]
    pub fn rms_norm(&self, weight: &LazyTensor, eps: f64) -> Result<LazyTensor> {
        let eps = Scalar::from_f64(DType::F64, eps);
        composite(Composite::RmsNorm { eps }, &[self, weight])
    }

    /// `(x - mean) / √(var + eps) · weight + bias` over the last dim, with the variance of the
    /// whole population (Ba et al. 2016).
    ///
    /// # Shapes
    /// `x: [.., n]`, `weight: [n]` and `bias: [n]`; the result has x's.
    ///
    /// # Numerics
    /// Computed in f32 (f64 for f64) and rounded once.
    ///
    /// # Errors
    /// Where weight or bias have another shape or dtype, for an integer dtype, rank 0, or an `eps`
    /// below 0.
    #[track_caller]
    pub fn layer_norm(
        &self,
        weight: &LazyTensor,
        bias: &LazyTensor,
        eps: f64,
    ) -> Result<LazyTensor> {
        let eps = Scalar::from_f64(DType::F64, eps);
        composite(Composite::LayerNorm { eps }, &[self, weight, bias])
    }

    /// Turns the pairs `(x[i], x[i + d/2])` of the last dim by an angle each (Su et al. 2021):
    /// Hugging Face's layout.
    ///
    /// `(a, b)` becomes `(a cos - b sin, b cos + a sin)`. The tables have no gradient.
    ///
    /// # Shapes
    /// `x: [.., d]`, and `cos` and `sin` that broadcast to `[.., d/2]`; the result has x's.
    ///
    /// # Numerics
    /// Computed in f32 (f64 for f64) and rounded once; the tables may be of any float dtype.
    ///
    /// # Errors
    /// Where `d` is odd, a table does not broadcast, or a dtype is an integer.
    #[track_caller]
    pub fn rope(&self, cos: &LazyTensor, sin: &LazyTensor) -> Result<LazyTensor> {
        self.rope_as(RopeLayout::Half, cos, sin)
    }

    /// [`LazyTensor::rope`] of the pairs `(x[2i], x[2i + 1])`: the paper's layout, and GGUF's.
    ///
    /// # Errors
    /// As [`LazyTensor::rope`].
    #[track_caller]
    pub fn rope_interleaved(&self, cos: &LazyTensor, sin: &LazyTensor) -> Result<LazyTensor> {
        self.rope_as(RopeLayout::Interleaved, cos, sin)
    }

    #[track_caller]
    fn rope_as(
        &self,
        layout: RopeLayout,
        cos: &LazyTensor,
        sin: &LazyTensor,
    ) -> Result<LazyTensor> {
        let (op, shape) = ("rope", self.ty().shape);
        let rope = Composite::Rope { layout };
        let Some(d) = shape.last() else {
            return Err(Error::Rank { op, expected: "at least 1", got: 0 }).at_caller();
        };
        if !d.is_multiple_of(2) {
            // Refused, in the words of the operation.
            return composite(rope, &[self, cos, sin]);
        }
        let table = shape.with(shape.rank() - 1, d / 2);
        let (cos, sin) = (cos.broadcast_for(op, table)?, sin.broadcast_for(op, table)?);
        composite(rope, &[self, &cos, &sin])
    }
}

#[track_caller]
pub(super) fn composite(composite: Composite, inputs: &[&LazyTensor]) -> Result<LazyTensor> {
    LazyTensor::record(Operation::Composite(composite), inputs)
}

//! The frozen matrices of a model, however they are held.

use crate::{CrossEntropy, DType, LazyTensor, Result};
use metal_candle_graph::BlockFormat;

/// A matrix `[out, in]`: of a linear layer, or of an embedding, whose rows are tokens.
#[derive(Clone, Debug)]
pub enum Weight {
    /// A float tensor `[out, in]`.
    Dense(LazyTensor),
    /// Blocks, GGUF's or NF4, row by row: stays quantised, is unpacked tile by tile inside the product.
    Quantised {
        /// The blocks, `u8[bytes]`.
        blocks: LazyTensor,
        /// How a block is laid out.
        format: BlockFormat,
        /// Output features.
        rows: usize,
        /// Input features.
        cols: usize,
    },
}

impl Weight {
    /// The matrices one below the other, in memory of their own: one product with it reads x once, where one with each
    /// reads it each time. `None` where they are held in different ways or have different inputs.
    ///
    /// # Errors
    /// Where there is no memory for it.
    pub fn stacked(parts: &[&Weight]) -> Result<Option<Weight>> {
        let tensors = parts.iter().map(|part| match part {
            Weight::Dense(tensor) => tensor,
            Weight::Quantised { blocks, .. } => blocks,
        });
        let tensors: Vec<&LazyTensor> = tensors.collect();
        let Some(first) = parts.first() else { return Ok(None) };
        if parts.iter().any(|part| !part.is_like(first)) {
            return Ok(None);
        }
        let all = LazyTensor::cat(&tensors, 0)?.into_owned()?;
        Ok(Some(match **first {
            Weight::Dense(_) => Weight::Dense(all),
            Weight::Quantised { format, cols, .. } => {
                let rows = parts.iter().map(|part| part.dims()[0]).sum();
                Weight::Quantised { blocks: all, format, rows, cols }
            }
        }))
    }

    /// Whether the rows are held as those of another.
    fn is_like(&self, other: &Weight) -> bool {
        match (self, other) {
            (Weight::Dense(a), Weight::Dense(b)) => {
                a.dtype() == b.dtype() && a.dims()[1] == b.dims()[1]
            }
            (
                Weight::Quantised { format, cols, .. },
                Weight::Quantised { format: other, cols: others, .. },
            ) => format == other && cols == others,
            _ => false,
        }
    }

    /// `[out, in]`
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Weight::Dense(w) => [w.dims()[0], w.dims()[1]],
            Weight::Quantised { rows, cols, .. } => [*rows, *cols],
        }
    }

    /// `x Wᵀ`, `[.., in]` to `[.., out]`. A dense weight is multiplied in its own dtype: x is rounded to it, and so is
    /// the result, which then comes back in x's.
    ///
    /// # Errors
    /// Where the last dim of x is not the input size.
    pub fn product(&self, x: &LazyTensor) -> Result<LazyTensor> {
        match self {
            Weight::Dense(w) => x.to_dtype(w.dtype())?.matmul(&w.t()?)?.to_dtype(x.dtype()),
            Weight::Quantised { blocks, format, rows, cols } => {
                x.quant_matmul(blocks, *format, *rows, *cols)
            }
        }
    }

    /// The rows of these ids as `dtype`: `u32 [b, t]` to `[b, t, in]`.
    ///
    /// # Errors
    /// Where an id is no row (when it runs).
    pub fn rows(&self, ids: &LazyTensor, dtype: DType) -> Result<LazyTensor> {
        match self {
            Weight::Dense(w) => w.embedding(ids)?.to_dtype(dtype),
            Weight::Quantised { blocks, format, rows, cols } => {
                let row_bytes = blocks.elem_count() / rows;
                let rows = blocks.reshape(&[*rows, row_bytes])?.embedding(ids)?.flatten_all()?;
                let rows = rows.dequantize(*format, ids.elem_count(), *cols)?;
                rows.reshape(&[ids.dims(), &[*cols]].concat())?.to_dtype(dtype)
            }
        }
    }

    /// The cross-entropy of the logits `x Wᵀ`, which are never held: `[n, in]` and `i64 [n]` to rank 0.
    ///
    /// # Errors
    /// As [`LazyTensor::linear_cross_entropy`].
    pub fn cross_entropy(
        &self,
        x: &LazyTensor,
        labels: &LazyTensor,
        options: CrossEntropy,
    ) -> Result<LazyTensor> {
        match self {
            Weight::Dense(w) => x.to_dtype(w.dtype())?.linear_cross_entropy(w, labels, options),
            Weight::Quantised { blocks, format, .. } => {
                x.quant_linear_cross_entropy(blocks, *format, labels, options)
            }
        }
    }

    /// All of it in f32.
    ///
    /// # Errors
    /// Never so far; recording an operation is fallible.
    pub fn to_f32(&self) -> Result<LazyTensor> {
        match self {
            Weight::Dense(w) => w.to_dtype(DType::F32),
            Weight::Quantised { blocks, format, rows, cols } => {
                blocks.dequantize(*format, *rows, *cols)
            }
        }
    }

    /// How it is held, in a word: `f32`, `Q4_1`.
    pub fn encoding(&self) -> String {
        match self {
            Weight::Dense(w) => w.dtype().to_string(),
            Weight::Quantised { format, .. } => format!("{format:?}"),
        }
    }
}

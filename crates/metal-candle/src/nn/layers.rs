//! The layers of a decoder.

use super::LoRALayer;
use super::rope::{attention_factor, inverse_frequencies};
use crate::io::RopeScaling;
use crate::{DType, LazyTensor, Result};
use metal_candle_graph::BlockFormat;
use metal_candle_graph::composite::RopeLayout;

/// The matrix of a linear layer, `[out, in]`.
#[derive(Clone, Debug)]
pub enum Weight {
    /// A float tensor `[out, in]`.
    Dense(LazyTensor),
    /// GGUF blocks, row by row: stays quantised, is dequantised tile by tile inside the product.
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
    /// `[out, in]`
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Weight::Dense(w) => [w.dims()[0], w.dims()[1]],
            Weight::Quantised { rows, cols, .. } => [*rows, *cols],
        }
    }
}

/// `y = x Wᵀ + b`, with room for a LoRA branch.
#[derive(Clone, Debug)]
pub struct Linear {
    /// The module path in Hugging Face's terms, as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// The frozen matrix.
    pub weight: Weight,
    /// `[out]`
    pub bias: Option<LazyTensor>,
}

impl Linear {
    /// Applies the layer, and the adapter's branch if there is one.
    ///
    /// # Shapes
    /// `x: [.., in]` gives `[.., out]`.
    ///
    /// # Errors
    /// Where the last dim of x is not the layer's input size.
    pub fn forward(&self, x: &LazyTensor, lora: Option<&LoRALayer>) -> Result<LazyTensor> {
        let base = match &self.weight {
            Weight::Dense(w) => x.matmul(&w.t()?)?,
            Weight::Quantised { blocks, format, rows, cols } => {
                x.quant_matmul(blocks, *format, *rows, *cols)?
            }
        };
        let adapted = match lora {
            Some(lora) => base.add(&lora.branch(x)?)?,
            None => base,
        };
        match &self.bias {
            Some(bias) => adapted.add(bias),
            None => Ok(adapted),
        }
    }
}

/// A table of token vectors.
#[derive(Clone, Debug)]
pub struct Embedding {
    /// `[vocabulary, hidden]`
    pub weight: LazyTensor,
}

impl Embedding {
    /// # Shapes
    /// `ids: u32 [b, t]` gives `[b, t, hidden]`.
    ///
    /// # Errors
    /// Where an id is no row of the table (when it runs).
    pub fn forward(&self, ids: &LazyTensor) -> Result<LazyTensor> {
        self.weight.embedding(ids)
    }
}

/// Root-mean-square normalisation (Zhang & Sennrich 2019).
#[derive(Clone, Debug)]
pub struct RmsNorm {
    /// `[hidden]`
    pub weight: LazyTensor,
    /// Added to the mean square.
    pub eps: f64,
}

impl RmsNorm {
    /// # Errors
    /// Where the last dim of x is not that of the weight.
    pub fn forward(&self, x: &LazyTensor) -> Result<LazyTensor> {
        x.rms_norm(&self.weight, self.eps)
    }
}

/// The tables of a rotary embedding (Su et al. 2021).
#[derive(Clone, Debug)]
pub struct Rotary {
    cos: LazyTensor,
    sin: LazyTensor,
    layout: RopeLayout,
}

impl Rotary {
    /// Tables for `positions` positions of heads of `head_dim` elements: the angle of pair `i` at
    /// position `p` is `p · theta^(-2i / head_dim)`, before scaling.
    ///
    /// # Errors
    /// Where there are not as many [`RopeScaling::Divisors`] as pairs, or no memory for the tables.
    pub fn new(
        head_dim: usize,
        theta: f64,
        scaling: &RopeScaling,
        positions: usize,
        layout: RopeLayout,
    ) -> Result<Rotary> {
        let inverse = inverse_frequencies(head_dim, theta, scaling)?;
        let half = inverse.len();
        let attention = attention_factor(scaling) as f32;
        // Hugging Face rounds the product to f32; so do we, to follow its logits.
        let angle = |at: usize| f64::from((at / half) as f32 * inverse[at % half]);
        let table = |f: fn(f64) -> f64| {
            let value = |at| f(angle(at)) as f32 * attention;
            let values: Vec<f32> = (0..positions * half).map(value).collect();
            LazyTensor::from_vec(values, &[positions, half], &crate::Device::Cpu)
        };
        let (cos, sin) = (table(f64::cos)?.named("rope.cos"), table(f64::sin)?.named("rope.sin"));
        Ok(Rotary { cos, sin, layout })
    }

    /// Tables of these shapes without values.
    ///
    /// # Errors
    /// Where they cannot be addressed.
    pub fn placeholder(head_dim: usize, positions: usize, layout: RopeLayout) -> Result<Rotary> {
        let dims = [positions, head_dim / 2];
        let table = || LazyTensor::placeholder(&dims, DType::F32, &crate::Device::Cpu);
        Ok(Rotary { cos: table()?.named("rope.cos"), sin: table()?.named("rope.sin"), layout })
    }

    /// The rows for `t` positions from `start` (a run-time `i64[]`), or from 0.
    ///
    /// # Errors
    /// Where there are fewer than `t` positions in the table.
    pub fn at(&self, start: Option<&LazyTensor>, t: usize) -> Result<Rotation> {
        let rows = |table: &LazyTensor| {
            let rows = match start {
                Some(start) => table.dynamic_slice(0, start, t)?,
                None => table.narrow(0, 0, t)?,
            };
            let half = rows.dims()[1];
            rows.reshape(&[1, t, 1, half])
        };
        Ok(Rotation { cos: rows(&self.cos)?, sin: rows(&self.sin)?, layout: self.layout })
    }

    /// The rows for the positions of every token, `[b, t]`.
    ///
    /// # Errors
    /// Where a position is beyond the table (when it runs).
    pub fn rows(&self, positions: &LazyTensor) -> Result<Rotation> {
        let [b, t] = [positions.dims()[0], positions.dims()[1]];
        let rows = |table: &LazyTensor| {
            let half = table.dims()[1];
            table.embedding(positions)?.reshape(&[b, t, 1, half])
        };
        Ok(Rotation { cos: rows(&self.cos)?, sin: rows(&self.sin)?, layout: self.layout })
    }
}

/// The rotation of the positions that one forward pass looks at.
#[derive(Clone, Debug)]
pub struct Rotation {
    cos: LazyTensor,
    sin: LazyTensor,
    layout: RopeLayout,
}

impl Rotation {
    /// # Shapes
    /// `x: [b, t, heads, head_dim]`, result alike.
    ///
    /// # Errors
    /// Where x is of another shape than the tables.
    pub fn apply(&self, x: &LazyTensor) -> Result<LazyTensor> {
        match self.layout {
            RopeLayout::Half => x.rope(&self.cos, &self.sin),
            RopeLayout::Interleaved => x.rope_interleaved(&self.cos, &self.sin),
        }
    }
}

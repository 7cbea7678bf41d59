//! The layers of a model.

use super::rope::{attention_factor, inverse_frequencies};
use super::{LoRALayer, Weight};
use crate::io::RopeScaling;
use crate::{DType, Device, LazyTensor, Result};
use metal_candle_graph::composite::RopeLayout;
use std::sync::{Arc, OnceLock};

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
        let base = self.weight.product(x)?;
        let adapted = match lora {
            Some(lora) => base.add(&lora.branch(x)?)?,
            None => base,
        };
        match &self.bias {
            Some(bias) => adapted.add(&bias.to_dtype(x.dtype())?),
            None => Ok(adapted),
        }
    }
}

/// A table of token vectors.
#[derive(Clone, Debug)]
pub struct Embedding {
    /// `[vocabulary, hidden]`
    pub weight: Weight,
}

impl Embedding {
    /// The rows of these ids.
    ///
    /// # Shapes
    /// `ids: u32 [b, t]` gives `[b, t, hidden]` of `dtype`.
    ///
    /// # Errors
    /// Where an id is no row of the table (when it runs).
    pub fn forward(&self, ids: &LazyTensor, dtype: DType) -> Result<LazyTensor> {
        self.weight.rows(ids, dtype)
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
    /// [`LazyTensor::rms_norm`] with the weight in x's dtype.
    ///
    /// # Shapes
    /// `x: [.., hidden]`, result alike.
    ///
    /// # Errors
    /// Where the last dim of x is not that of the weight.
    pub fn forward(&self, x: &LazyTensor) -> Result<LazyTensor> {
        x.rms_norm(&self.weight.to_dtype(x.dtype())?, self.eps)
    }
}

/// Layer normalisation (Ba et al. 2016).
#[derive(Clone, Debug)]
pub struct LayerNorm {
    /// `[hidden]`
    pub weight: LazyTensor,
    /// `[hidden]`
    pub bias: LazyTensor,
    /// Added to the variance.
    pub eps: f64,
}

impl LayerNorm {
    /// [`LazyTensor::layer_norm`] with weight and bias in x's dtype.
    ///
    /// # Shapes
    /// `x: [.., hidden]`, result alike.
    ///
    /// # Errors
    /// Where the last dim of x is not that of the weight.
    pub fn forward(&self, x: &LazyTensor) -> Result<LazyTensor> {
        let [weight, bias] = [self.weight.to_dtype(x.dtype())?, self.bias.to_dtype(x.dtype())?];
        x.layer_norm(&weight, &bias, self.eps)
    }
}

/// The tables of a rotary embedding (Su et al. 2021).
#[derive(Clone, Debug)]
pub struct Rotary {
    /// cos and sin, made when they are first asked for: `[positions, head_dim / 2]`.
    tables: Arc<OnceLock<[LazyTensor; 2]>>,
    /// Of each pair.
    inverse: Vec<f32>,
    /// What multiplies cos and sin.
    attention: f32,
    positions: usize,
    layout: RopeLayout,
    device: Device,
}

impl Rotary {
    /// Tables for `positions` positions of heads of `head_dim` elements: the angle of pair `i` at
    /// position `p` is `p · theta^(-2i / head_dim)`, before scaling.
    ///
    /// # Errors
    /// Where there are not as many [`RopeScaling::Divisors`] as pairs.
    pub fn new(
        head_dim: usize,
        theta: f64,
        scaling: &RopeScaling,
        positions: usize,
        layout: RopeLayout,
        device: &Device,
    ) -> Result<Rotary> {
        let inverse = inverse_frequencies(head_dim, theta, scaling)?;
        let attention = attention_factor(scaling) as f32;
        let (tables, device) = (Arc::default(), *device);
        Ok(Rotary { tables, inverse, attention, positions, layout, device })
    }

    /// With [placeholders](LazyTensor::placeholder) for tables, to be planned.
    ///
    /// # Errors
    /// Where the tables cannot be addressed.
    pub fn without_values(self) -> Result<Rotary> {
        let dims = [self.positions, self.inverse.len()];
        let table = || LazyTensor::placeholder(&dims, DType::F32, &self.device);
        let tables = [table()?.named("rope.cos"), table()?.named("rope.sin")];
        Ok(Rotary { tables: Arc::new(OnceLock::from(tables)), ..self })
    }

    fn tables(&self) -> Result<&[LazyTensor; 2]> {
        if let Some(tables) = self.tables.get() {
            return Ok(tables);
        }
        let (positions, half) = (self.positions, self.inverse.len());
        // Hugging Face rounds the product to f32; so do we, to follow its logits.
        let angle = |at: usize| f64::from((at / half) as f32 * self.inverse[at % half]);
        let table = |f: fn(f64) -> f64| {
            let value = |at| f(angle(at)) as f32 * self.attention;
            let values: Vec<f32> = (0..positions * half).map(value).collect();
            LazyTensor::from_vec(values, &[positions, half], &self.device)
        };
        let tables = [table(f64::cos)?.named("rope.cos"), table(f64::sin)?.named("rope.sin")];
        // Another thread may have been faster: its are the same.
        Ok(self.tables.get_or_init(|| tables))
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
        let [cos, sin] = self.tables()?;
        Ok(Rotation { cos: rows(cos)?, sin: rows(sin)?, layout: self.layout })
    }

    /// The rows for these positions, which differ from row to row of a batch: `u32 [b, t]`.
    ///
    /// # Errors
    /// Where a position is not in the table (when it runs).
    pub fn at_each(&self, positions: &LazyTensor) -> Result<Rotation> {
        let rows = |table: &LazyTensor| table.embedding(positions)?.unsqueeze(2);
        let [cos, sin] = self.tables()?;
        Ok(Rotation { cos: rows(cos)?, sin: rows(sin)?, layout: self.layout })
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
    /// Queries or keys, turned.
    ///
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

//! An encoder of the BERT family (Devlin et al. 2019), driven by its config.

use crate::io::{Activation, EncoderConfig};
use crate::nn::{Embedding, LayerNorm, Linear};
use crate::{Attention, DType, Device, LazyTensor, Result};

/// One block: attention and a feed-forward, each added to the residual, which is then normalised.
#[derive(Clone, Debug)]
pub struct EncoderLayer {
    /// Query, key and value, one below the other: `[3 hidden, hidden]`.
    pub(crate) qkv: Linear,
    pub(crate) attention_output: Linear,
    pub(crate) attention_norm: LayerNorm,
    pub(crate) intermediate: Linear,
    pub(crate) output: Linear,
    pub(crate) output_norm: LayerNorm,
}

/// A model in which every token of a text sees every other.
#[derive(Clone, Debug)]
pub struct Encoder {
    /// Sizes and constants.
    pub config: EncoderConfig,
    pub(crate) words: Embedding,
    /// `[max_position_embeddings, hidden]`
    pub(crate) positions: LazyTensor,
    /// `[type_vocab_size, hidden]`
    pub(crate) token_types: LazyTensor,
    pub(crate) norm: LayerNorm,
    pub(crate) layers: Vec<EncoderLayer>,
    /// Of the residual stream and all that lies between the products.
    pub(crate) activations: DType,
}

impl Encoder {
    /// The same model with all that lies between the products in another dtype; at first it is f32. See
    /// [`Decoder::with_activations`](super::Decoder::with_activations).
    #[must_use]
    pub fn with_activations(self, dtype: DType) -> Encoder {
        Encoder { activations: dtype, ..self }
    }

    /// See [`Encoder::with_activations`].
    pub fn activations(&self) -> DType {
        self.activations
    }

    /// Where its weights are, and so where it computes.
    pub fn device(&self) -> &Device {
        self.positions.device()
    }

    /// The vectors of the tokens after the last layer.
    ///
    /// # Shapes
    /// `ids: u32 [b, t]` gives `[b, t, hidden]`. `mask: u8 [b, t]` is 1 where there is a token and 0 where there is
    /// padding, which no token sees; without it there is none. What stands at padding means nothing.
    ///
    /// # Errors
    /// Where `t` exceeds the model's positions, or the mask is of another shape.
    pub fn hidden(&self, ids: &LazyTensor, mask: Option<&LazyTensor>) -> Result<LazyTensor> {
        let attention = Attention::new();
        let attention = mask.map_or(attention, |mask| attention.segments(mask, mask));
        let mut x = self.embed(ids)?;
        for layer in &self.layers {
            x = self.layer(layer, &x, attention)?;
        }
        Ok(x)
    }

    /// Words, positions and token types: `[b, t]` to `[b, t, hidden]`.
    fn embed(&self, ids: &LazyTensor) -> Result<LazyTensor> {
        let words = self.words.forward(ids, self.activations)?;
        let positions = self.positions.narrow(0, self.config.position_offset, ids.dims()[1])?;
        // A text on its own is of type 0 as a whole.
        let places = positions.add(&self.token_types.narrow(0, 0, 1)?)?; // [t, hidden]
        self.norm.forward(&words.add(&places.to_dtype(self.activations)?)?)
    }

    fn layer(
        &self,
        layer: &EncoderLayer,
        x: &LazyTensor,
        attention: Attention<'_>,
    ) -> Result<LazyTensor> {
        let [b, t] = [x.dims()[0], x.dims()[1]];
        let (heads, head_dim) = (self.config.num_heads, self.config.head_dim());
        let qkv = layer.qkv.forward(x, None)?.reshape(&[b, t, 3 * heads, head_dim])?;
        let part = |i: usize| qkv.narrow(2, i * heads, heads); // [b, t, heads, head dim]
        let seen = attention.forward(&part(0)?, &part(1)?, &part(2)?)?;
        let seen = seen.reshape(&[b, t, heads * head_dim])?;
        let x = x.add(&layer.attention_output.forward(&seen, None)?)?;
        let x = layer.attention_norm.forward(&x)?;

        let inner = layer.intermediate.forward(&x, None)?;
        let inner = match self.config.activation {
            Activation::Gelu => inner.gelu()?,
            Activation::GeluTanh => inner.gelu_tanh()?,
            Activation::Relu => inner.relu()?,
        };
        layer.output_norm.forward(&x.add(&layer.output.forward(&inner, None)?)?)
    }
}

#[cfg(test)]
mod tests {
    use crate::models::{BaseWeights, load_encoder};
    use crate::{DType, Device, LazyTensor, grad};
    use std::path::Path;

    #[test]
    fn the_gradient_of_a_table_equals_finite_differences() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/embed/bert");
        let mut encoder = load_encoder(&folder, BaseWeights::F32, &Device::Cpu).unwrap();
        let ids = LazyTensor::from_slice(&[2u32, 7, 9, 3, 2, 8, 3, 0], &[2, 4], &Device::Cpu);
        let (ids, table) = (ids.unwrap(), encoder.positions.clone());
        let mask = [1u8, 1, 1, 1, 1, 1, 1, 0];
        let mask = LazyTensor::from_slice(&mask, &[2, 4], &Device::Cpu).unwrap();
        let weights = LazyTensor::randn(&[2, 4, 32], DType::F32, 5, &Device::Cpu).unwrap();
        // The padding's own vector means nothing.
        let weights = weights.mul(&mask.to_dtype(DType::F32).unwrap().unsqueeze(2).unwrap());
        let weights = weights.unwrap();
        let mut loss = |table: &LazyTensor| {
            encoder.positions = table.clone();
            let hidden = encoder.hidden(&ids, Some(&mask)).unwrap();
            hidden.mul(&weights).unwrap().sum_all().unwrap()
        };
        let gradient = grad(&loss(&table), &[&table]).unwrap().remove(0);
        let way = LazyTensor::randn(table.dims(), DType::F32, 6, &Device::Cpu).unwrap();
        let slope: f32 = gradient.mul(&way).unwrap().sum_all().unwrap().to_scalar().unwrap();
        let step = 1e-3;
        let mut at = |step: f64| -> f32 {
            let moved = table.add(&way.affine(step, 0.0).unwrap()).unwrap();
            loss(&moved).to_scalar().unwrap()
        };
        let want = (at(step) - at(-step)) / (2.0 * step as f32);
        assert!((slope - want).abs() < 2e-2 * want.abs(), "{slope}, expected {want}");
    }
}

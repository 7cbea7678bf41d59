//! The shapes of decoders and encoders, whatever file they came from.

use std::collections::BTreeMap;

pub use metal_candle_graph::composite::RopeLayout;

/// A Llama-like decoder: grouped-query attention, RMS norm, SwiGLU, rotary embedding.
///
/// Names are those of Hugging Face's `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// `llama`, `mistral`, `qwen2`, `qwen3`: the family's name in the file.
    pub architecture: String,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Epsilon of every RMS norm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How the rotary frequencies are stretched for contexts longer than the pretraining's.
    pub rope_scaling: RopeScaling,
    /// How the weights, as loaded, pair a head's dims: Hugging Face's order, `(i, i + d/2)`, for
    /// every model once loaded.
    pub rope_layout: RopeLayout,
    /// The longest context that the model was made for.
    pub max_position_embeddings: usize,
    /// Keys that a query sees, itself included; `None` is all before it.
    pub sliding_window: Option<usize>,
    /// Whether the output projection is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether q, k and v have biases (Qwen2).
    pub attention_bias: bool,
    /// Whether the attention's output projection has one, too.
    pub attention_output_bias: bool,
    /// Whether q and k are normalised per head (Qwen3).
    pub qk_norm: bool,
}

impl DecoderConfig {
    /// The longest context that is accepted: every position has a row in the rotary tables.
    pub const MAX_POSITIONS: usize = 1 << 21;

    /// The linear modules that an adapter may target, with `[out, in]`, without loading the model.
    pub fn modules(&self) -> BTreeMap<String, [usize; 2]> {
        let [q, kv] = [self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim];
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let of_layer = [
            ("self_attn.q_proj", [q, hidden]),
            ("self_attn.k_proj", [kv, hidden]),
            ("self_attn.v_proj", [kv, hidden]),
            ("self_attn.o_proj", [hidden, q]),
            ("mlp.gate_proj", [inner, hidden]),
            ("mlp.up_proj", [inner, hidden]),
            ("mlp.down_proj", [hidden, inner]),
        ];
        let layer = |i| of_layer.map(|(module, dims)| (format!("model.layers.{i}.{module}"), dims));
        (0..self.num_layers).flat_map(layer).collect()
    }
}

/// A BERT-like encoder (Devlin et al. 2019): learned positions, norms after the residual, every token sees every other.
///
/// Names are those of Hugging Face's `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct EncoderConfig {
    /// `bert`, `roberta`, `xlm-roberta`, `camembert`: the family's name in the file.
    pub architecture: String,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Encoder layers.
    pub num_layers: usize,
    /// Heads; divides `hidden_size`.
    pub num_heads: usize,
    /// Epsilon of every norm.
    pub layer_norm_eps: f64,
    /// Of the MLP.
    pub activation: Activation,
    /// Rows of the table of positions.
    pub max_position_embeddings: usize,
    /// The row of a text's first token: RoBERTa's begin after that of its padding.
    pub position_offset: usize,
    /// Rows of the table of token types; a text of its own is of type 0.
    pub type_vocab_size: usize,
}

impl EncoderConfig {
    /// Tokens of the longest text that there are positions for.
    pub fn max_tokens(&self) -> usize {
        self.max_position_embeddings - self.position_offset
    }

    /// Width of one head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_heads
    }
}

/// What stands between the products of an encoder's MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// By the error function.
    Gelu,
    /// By the hyperbolic tangent.
    GeluTanh,
    /// `max(x, 0)`
    Relu,
}

/// What is done to the rotary frequencies `f_i = theta^(-2i / head_dim)`; `L` is the context of the
/// pretraining.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum RopeScaling {
    /// Nothing.
    #[default]
    None,
    /// `f / factor` (Chen et al. 2023).
    Linear {
        /// How many times longer the context became.
        factor: f64,
    },
    /// As Llama 3.1: `f` where the wavelength `2 pi / f` is below `L / high_freq_factor`,
    /// `f / factor` where it is above `L / low_freq_factor`, and a mixture of the two between.
    Llama3 {
        /// Divides the low frequencies.
        factor: f64,
        /// The wavelength from which on `factor` applies in full, as `L / wavelength`.
        low_freq_factor: f64,
        /// The wavelength up to which nothing changes, as `L / wavelength`.
        high_freq_factor: f64,
        /// `L`.
        original_max_position_embeddings: f64,
    },
    /// YaRN (Peng et al. 2023): `f` for the pairs that turn more than `beta_fast` times in `L`,
    /// `f / factor` for those that turn less than `beta_slow` times, and a ramp between.
    Yarn {
        /// Divides the low frequencies.
        factor: f64,
        /// `L`.
        original_max_position_embeddings: f64,
        /// Multiplies cos and sin.
        attention_factor: f64,
        /// Turns above which a pair keeps its frequency.
        beta_fast: f64,
        /// Turns below which a pair is divided by `factor`.
        beta_slow: f64,
        /// Whether the ramp's ends are rounded outwards to whole pairs.
        truncate: bool,
    },
    /// Every `f_i` is divided by its own number, as GGUF files write Llama 3's scaling.
    Divisors(Vec<f32>),
}

impl RopeScaling {
    /// YaRN's attention factor where the file names none: `0.1 ln(factor) + 1`.
    pub fn yarn_attention_factor(factor: f64) -> f64 {
        yarn_temperature(factor, 1.0)
    }

    /// YaRN's attention factor of DeepSeek's kind, from its two weights of `ln(factor)`.
    pub fn yarn_attention_ratio(factor: f64, mscale: f64, mscale_all_dim: f64) -> f64 {
        yarn_temperature(factor, mscale) / yarn_temperature(factor, mscale_all_dim)
    }
}

fn yarn_temperature(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

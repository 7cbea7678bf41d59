//! The shape of a decoder, whatever file it came from.

pub use metal_candle_graph::composite::RopeLayout;

/// A Llama-like decoder: grouped-query attention, RMS norm, SwiGLU, rotary embedding.
///
/// Names are those of Hugging Face's `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// `llama`, `qwen2`, `qwen3`: the family's name in the file.
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
    /// How the weights, as loaded, pair a head's dims: Hugging Face's order, `(i, i + d/2)`, for every
    /// model once loaded.
    pub rope_layout: RopeLayout,
    /// The longest context that the model was made for.
    pub max_position_embeddings: usize,
    /// Keys that a query sees, itself included; `None` is all before it.
    pub sliding_window: Option<usize>,
    /// Whether the output projection is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether q, k and v have biases (Qwen2).
    pub attention_bias: bool,
    /// Whether q and k are normalised per head (Qwen3).
    pub qk_norm: bool,
}

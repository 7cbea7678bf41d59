//! A GGUF file seen as a decoder of Hugging Face's: its config, and its weights by their names.
//!
//! llama.cpp's converter permutes the rows of q and k of `llama` files, because its rotary
//! embedding pairs neighbours. They are put back on loading, so that module names, adapters and
//! PEFT files mean the same as anywhere else.

use super::{GgufFile, Problem, StoredTensor, TensorInfo, gguf_name, hf_name};
use crate::io::{DecoderConfig, Result, RopeLayout};

/// What llama.cpp does to the rows of q and k.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rows {
    Permuted,
    AsInHuggingFace,
}

/// The architectures that are decoders of ours. Mistral and SmolLM files call themselves `llama`.
const ARCHITECTURES: [(&str, Rows); 3] =
    [("llama", Rows::Permuted), ("qwen2", Rows::AsInHuggingFace), ("qwen3", Rows::AsInHuggingFace)];

/// What llama.cpp calls the architecture of a decoder. Its converter makes `llama` of Mistral, too.
pub(super) fn architecture_of(config: &DecoderConfig) -> &str {
    match config.architecture.as_str() {
        "mistral" => "llama",
        other => other,
    }
}

/// Whether llama.cpp permutes the rows of this module (by Hugging Face's name), and if so within
/// how many heads, where the base is known.
pub(super) fn permuted_heads(
    architecture: &str,
    module: &str,
    base: Option<&DecoderConfig>,
) -> Option<Option<usize>> {
    if !ARCHITECTURES.contains(&(architecture, Rows::Permuted)) {
        return None;
    }
    match module.rsplit('.').next() {
        Some("q_proj") => Some(base.map(|base| base.num_heads)),
        Some("k_proj") => Some(base.map(|base| base.num_kv_heads)),
        _ => None,
    }
}

impl GgufFile {
    /// The decoder's shape, from the `<architecture>.*` keys and from which tensors there are.
    ///
    /// # Errors
    /// [`Problem::Architecture`] and [`Problem::Unsupported`] for what would compute something
    /// else than the model; [`Problem::NoKey`], [`Problem::ValueType`] and
    /// [`Problem::Inconsistent`] for a header that is not whole.
    pub fn decoder_config(&self) -> Result<DecoderConfig> {
        let (architecture, _) = self.architecture()?;
        let key = |name: &str| format!("{architecture}.{name}");
        let size = |name: &str| self.size(&key(name));
        self.refuse_unsupported(architecture)?;
        let hidden_size = size("embedding_length")?;
        let num_heads = size("attention.head_count")?;
        let head_dim = match self.u32_opt(&key("attention.key_length"))? {
            Some(_) => size("attention.key_length")?,
            None => hidden_size / num_heads,
        };
        let num_kv_heads = match self.u32_opt(&key("attention.head_count_kv"))? {
            Some(_) => size("attention.head_count_kv")?,
            None => num_heads,
        };
        let config = DecoderConfig {
            architecture: architecture.to_owned(),
            vocab_size: self.vocab_size(hidden_size)?,
            hidden_size,
            intermediate_size: size("feed_forward_length")?,
            num_layers: size("block_count")?,
            num_heads,
            num_kv_heads,
            head_dim,
            rms_norm_eps: self.f64(&key("attention.layer_norm_rms_epsilon"))?,
            rope_theta: self.f64_opt(&key("rope.freq_base"))?.unwrap_or(10_000.0),
            rope_scaling: self.rope_scaling(architecture, head_dim)?,
            rope_layout: RopeLayout::Half,
            max_position_embeddings: size("context_length")?,
            sliding_window: match self.u32_opt(&key("attention.sliding_window"))? {
                None | Some(0) => None,
                Some(window) => Some(window as usize),
            },
            tie_word_embeddings: !self.has_tensor("output.weight"),
            attention_bias: self.has_tensor("blk.0.attn_q.bias"),
            attention_output_bias: self.has_tensor("blk.0.attn_output.bias"),
            qk_norm: self.has_tensor("blk.0.attn_q_norm.weight"),
        };
        self.check_heads(&config)?;
        self.check_context(&config)?;
        Ok(config)
    }

    /// The weights of the decoder, by Hugging Face's names, in the order of the file.
    pub fn weight_names(&self) -> impl Iterator<Item = String> + '_ {
        self.tensors().iter().filter_map(|tensor| hf_name(&tensor.name))
    }

    /// One weight by Hugging Face's name, with its rows in Hugging Face's order.
    ///
    /// # Errors
    /// [`Problem::WeightName`], [`Problem::NoTensor`], [`Problem::Heads`]; [`File`](crate::io::Error::File).
    pub fn weight(&self, name: &str) -> Result<StoredTensor> {
        let stored_name = self.stored_name(name)?;
        let mut stored = self.tensor_bytes(&stored_name)?;
        let (architecture, rows) = self.architecture()?;
        if rows == Rows::Permuted
            && let Some(heads) = self.permuted_heads(architecture, &stored_name)?
        {
            stored.unpermute_rope_rows(heads).map_err(|problem| self.error(problem))?;
        }
        Ok(stored)
    }

    /// Puts the rows of a weight, as [`Self::weight`] gives it, back into the order of the file.
    ///
    /// # Errors
    /// As [`Self::weight`].
    pub fn permute_rows(&self, name: &str, stored: &mut StoredTensor) -> Result<()> {
        let stored_name = self.stored_name(name)?;
        let (architecture, rows) = self.architecture()?;
        if rows == Rows::Permuted
            && let Some(heads) = self.permuted_heads(architecture, &stored_name)?
        {
            stored.permute_rope_rows(heads).map_err(|problem| self.error(problem))?;
        }
        Ok(())
    }

    /// The shape of one weight, by Hugging Face's name.
    ///
    /// # Errors
    /// [`Problem::WeightName`], [`Problem::NoTensor`].
    pub fn weight_shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.weight_info(name)?.shape)
    }

    /// Where one weight lies and how, by Hugging Face's name; rows are in the file's order.
    ///
    /// # Errors
    /// [`Problem::WeightName`], [`Problem::NoTensor`].
    pub fn weight_info(&self, name: &str) -> Result<&TensorInfo> {
        self.tensor(&self.stored_name(name)?)
    }

    fn stored_name(&self, name: &str) -> Result<String> {
        gguf_name(name).ok_or_else(|| {
            self.error(Problem::WeightName {
                name: name.to_owned(),
                example: "model.layers.0.self_attn.q_proj.weight",
            })
        })
    }

    fn architecture(&self) -> Result<(&str, Rows)> {
        let got = self.str("general.architecture")?;
        let known = ARCHITECTURES.iter().find(|(name, _)| *name == got);
        known.copied().ok_or_else(|| {
            self.error(Problem::Architecture {
                got: got.to_owned(),
                known: ARCHITECTURES.iter().map(|(name, _)| *name).collect(),
            })
        })
    }

    /// The heads within which the rows of this tensor were permuted.
    fn permuted_heads(&self, architecture: &str, name: &str) -> Result<Option<usize>> {
        let module = name.strip_prefix("blk.").and_then(|rest| rest.split('.').nth(1));
        let query = || self.u32(&format!("{architecture}.attention.head_count"));
        let heads = match module {
            Some("attn_q") => query()?,
            Some("attn_k") => {
                match self.u32_opt(&format!("{architecture}.attention.head_count_kv"))? {
                    Some(heads) => heads,
                    None => query()?,
                }
            }
            _ => return Ok(None),
        };
        Ok(Some(heads as usize))
    }

    /// What the keys may ask for and our decoder does not do.
    fn refuse_unsupported(&self, architecture: &str) -> Result<()> {
        let refuse =
            |what: String, value: String| Err(self.error(Problem::Unsupported { what, value }));
        let key = format!("{architecture}.expert_count");
        if let Some(experts) = self.u32_opt(&key)?.filter(|&experts| experts > 0) {
            return refuse(key, experts.to_string());
        }
        Ok(())
    }

    /// The embedding's rows are the vocabulary, whatever a key says.
    fn vocab_size(&self, hidden_size: usize) -> Result<usize> {
        let shape = &self.tensor("token_embd.weight")?.shape;
        match shape[..] {
            [vocab_size, width] if width == hidden_size => Ok(vocab_size),
            _ => Err(self.error(Problem::Inconsistent {
                what: "the shape of token_embd.weight",
                got: format!("{shape:?}"),
                expected: format!("[vocabulary, {hidden_size}]"),
            })),
        }
    }

    fn check_context(&self, config: &DecoderConfig) -> Result<()> {
        let (got, limit) = (config.max_position_embeddings, DecoderConfig::MAX_POSITIONS);
        if got <= limit {
            return Ok(());
        }
        let (what, expected) = ("context_length", format!("at most {limit}"));
        Err(self.error(Problem::Inconsistent { what, got: got.to_string(), expected }))
    }

    fn check_heads(&self, config: &DecoderConfig) -> Result<()> {
        let inconsistent = |what, got: usize, expected: String| {
            Err(self.error(Problem::Inconsistent { what, got: got.to_string(), expected }))
        };
        let DecoderConfig { num_heads, num_kv_heads, head_dim, .. } = *config;
        if !num_heads.is_multiple_of(num_kv_heads) {
            let expected = format!("a divisor of the {num_heads} query heads");
            return inconsistent("attention.head_count_kv", num_kv_heads, expected);
        }
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return inconsistent("the width of a head", head_dim, "an even number".to_owned());
        }
        let key = format!("{}.rope.dimension_count", config.architecture);
        match self.u32_opt(&key)? {
            Some(rotated) if rotated as usize != head_dim => inconsistent(
                "rope.dimension_count",
                rotated as usize,
                format!("the width of a head, {head_dim}"),
            ),
            _ => Ok(()),
        }
    }

    /// A key that counts something, and so cannot be zero.
    fn size(&self, key: &str) -> Result<usize> {
        match self.u32(key)? {
            0 => Err(self.error(Problem::ValueType {
                key: key.to_owned(),
                expected: "a positive integer",
                got: "0".to_owned(),
            })),
            size => Ok(size as usize),
        }
    }
}

//! From a model file to a decoder.

use super::{Decoder, DecoderLayer};
use crate::error::ErrorKind;
use crate::io::gguf::{Encoding, GgufFile, StoredTensor};
use crate::io::tokenizer::Tokenizer;
use crate::io::{self, DecoderConfig};
use crate::nn::{Embedding, Linear, RmsNorm, Rotary, Weight};
use crate::{Device, Error, LazyTensor, Result};
use std::path::Path;

/// How the frozen weights of the linear layers are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BaseWeights {
    /// As the file has them: quantised blocks stay quantised.
    #[default]
    AsStored,
    /// As f32.
    F32,
}

/// A model with what belongs to it.
#[derive(Debug)]
pub struct LoadedModel {
    /// The weights.
    pub decoder: Decoder,
    /// Text to ids and back, and the chat template.
    pub tokenizer: Tokenizer,
}

/// Loads a decoder, its tokenizer and its chat template from a GGUF file.
///
/// Module names are Hugging Face's, and q and k rows are put back into its order, so that adapters are those of
/// the original model. Norms and the embedding are f32 in any case.
///
/// # Errors
/// Where the file is malformed, of an unknown architecture, or misses a tensor.
pub fn load_gguf(path: &Path, base: BaseWeights, device: &Device) -> Result<LoadedModel> {
    let file = GgufFile::open(path)?;
    let config = file.decoder_config()?;
    let source = Source { file: &file, base, device };
    let decoder = source.decoder(config)?;
    Ok(LoadedModel { decoder, tokenizer: Tokenizer::from_gguf(&file)? })
}

struct Source<'a> {
    file: &'a GgufFile,
    base: BaseWeights,
    device: &'a Device,
}

impl Source<'_> {
    fn decoder(&self, config: DecoderConfig) -> Result<Decoder> {
        let embed = self.float("model.embed_tokens.weight")?;
        let output = match config.tie_word_embeddings {
            true => embed.clone(),
            false => self.float("lm_head.weight")?,
        };
        let layers = (0..config.num_layers).map(|i| self.layer(i, &config));
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let rotary = Rotary::new(
            config.head_dim,
            config.rope_theta,
            config.max_position_embeddings,
            config.rope_layout,
        )?;
        Ok(Decoder {
            embed: Embedding { weight: embed },
            layers,
            norm: self.norm("model.norm.weight", &config)?,
            output,
            rotary,
            adapter: None,
            config,
        })
    }

    fn layer(&self, i: usize, config: &DecoderConfig) -> Result<DecoderLayer> {
        let name = |module: &str| format!("model.layers.{i}.{module}");
        let attention = |module: &str| {
            self.linear(name(&format!("self_attn.{module}")), config.attention_bias)
        };
        let mlp = |module: &str| self.linear(name(&format!("mlp.{module}")), false);
        let norm = |module: &str| self.norm(&name(&format!("{module}.weight")), config);
        let head_norm = |module: &str| match config.qk_norm {
            true => norm(&format!("self_attn.{module}")).map(Some),
            false => Ok(None),
        };
        Ok(DecoderLayer {
            input_norm: norm("input_layernorm")?,
            q_proj: attention("q_proj")?,
            k_proj: attention("k_proj")?,
            v_proj: attention("v_proj")?,
            q_norm: head_norm("q_norm")?,
            k_norm: head_norm("k_norm")?,
            o_proj: self.linear(name("self_attn.o_proj"), false)?,
            post_norm: norm("post_attention_layernorm")?,
            gate_proj: mlp("gate_proj")?,
            up_proj: mlp("up_proj")?,
            down_proj: mlp("down_proj")?,
        })
    }

    fn norm(&self, name: &str, config: &DecoderConfig) -> Result<RmsNorm> {
        Ok(RmsNorm { weight: self.float(name)?, eps: config.rms_norm_eps })
    }

    fn linear(&self, module: String, bias: bool) -> Result<Linear> {
        let stored = self.file.weight(&format!("{module}.weight"))?;
        let weight = match (stored.encoding, self.base) {
            (Encoding::Blocks(format), BaseWeights::AsStored) => {
                let [rows, cols] = matrix(&module, &stored)?;
                let len = stored.bytes.len();
                let blocks = LazyTensor::from_vec(stored.bytes, &[len], self.device)?;
                Weight::Quantised { blocks, format, rows, cols }
            }
            _ => Weight::Dense(self.dequantise(&stored)?),
        };
        let bias = match bias {
            true => Some(self.float(&format!("{module}.bias"))?),
            false => None,
        };
        Ok(Linear { name: module, weight, bias })
    }

    fn float(&self, name: &str) -> Result<LazyTensor> {
        self.dequantise(&self.file.weight(name)?)
    }

    fn dequantise(&self, stored: &StoredTensor) -> Result<LazyTensor> {
        let tensor = stored.dequantize().map_err(|problem| {
            Error::from(io::Error::Gguf { path: self.file.path().to_owned(), problem })
        })?;
        LazyTensor::from_tensor(&tensor)
    }
}

fn matrix(module: &str, stored: &StoredTensor) -> Result<[usize; 2]> {
    <[usize; 2]>::try_from(stored.shape.as_slice()).map_err(|_| {
        let (name, got) = (module.to_string(), stored.shape.clone());
        ErrorKind::NotAMatrix { name, got }.into()
    })
}

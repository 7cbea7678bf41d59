//! From a folder to an encoder.

use super::{BaseWeights, Builder, Read, WeightSource};
use crate::io::hf::{Problem, encoder_config};
use crate::io::{self, EncoderConfig, HfWeights};
use crate::models::{Encoder, EncoderLayer};
use crate::nn::{Embedding, LayerNorm, Linear, Weight};
use crate::{DType, Device, LazyTensor, Result};
use std::path::Path;

/// What stands before every name where the encoder was a part of another model.
const PREFIXES: [&str; 3] = ["", "bert.", "roberta."];

/// Loads an encoder from a Hugging Face folder: `config.json`, and safetensors in one file or in shards.
///
/// Query, key and value are joined to one matrix, in memory of its own; all else stays in the file where it is stored as
/// it is asked for.
///
/// # Errors
/// Where a file is malformed or missing, the architecture is unknown, or a weight does not fit the config.
pub fn load_encoder(folder: &Path, base: BaseWeights, device: &Device) -> Result<Encoder> {
    let config = encoder_config(folder)?;
    let weights = HfWeights::open(folder)?;
    let has = |prefix: &&str| {
        weights.weight_shape(&format!("{prefix}embeddings.word_embeddings.weight")).is_ok()
    };
    let prefix = PREFIXES.into_iter().find(|prefix| has(prefix)).unwrap_or_default();
    let source = WeightSource::Folder(&weights);
    let builder = Builder { source, read: Read::Weights, base, device };
    EncoderBuilder { builder, weights: &weights, prefix, config: &config }.encoder()
}

struct EncoderBuilder<'a> {
    builder: Builder<'a>,
    weights: &'a HfWeights,
    prefix: &'static str,
    config: &'a EncoderConfig,
}

impl EncoderBuilder<'_> {
    fn encoder(&self) -> Result<Encoder> {
        self.builder.check_base()?;
        let c = self.config;
        let name = |module: &str| format!("{}embeddings.{module}", self.prefix);
        let table = |module: &str, rows| {
            self.builder.float(&name(&format!("{module}.weight")), &[rows, c.hidden_size])
        };
        let words = name("word_embeddings.weight");
        let words = self.builder.matrix(&words, [c.vocab_size, c.hidden_size])?;
        Ok(Encoder {
            words: Embedding { weight: words },
            positions: table("position_embeddings", c.max_position_embeddings)?,
            token_types: table("token_type_embeddings", c.type_vocab_size)?,
            norm: self.norm(&name("LayerNorm"))?,
            layers: (0..c.num_layers).map(|i| self.layer(i)).collect::<Result<_>>()?,
            activations: DType::F32,
            config: c.clone(),
        })
    }

    fn layer(&self, i: usize) -> Result<EncoderLayer> {
        let name = |module: &str| format!("{}encoder.layer.{i}.{module}", self.prefix);
        let linear = |module: &str, dims| self.builder.linear(name(module), dims, true);
        let (hidden, inner) = (self.config.hidden_size, self.config.intermediate_size);
        let square = [hidden, hidden];
        let parts = [
            linear("attention.self.query", square)?,
            linear("attention.self.key", square)?,
            linear("attention.self.value", square)?,
        ];
        Ok(EncoderLayer {
            qkv: self.joined(name("attention.self"), parts)?,
            attention_output: linear("attention.output.dense", square)?,
            attention_norm: self.norm(&name("attention.output.LayerNorm"))?,
            intermediate: linear("intermediate.dense", [inner, hidden])?,
            output: linear("output.dense", [hidden, inner])?,
            output_norm: self.norm(&name("output.LayerNorm"))?,
        })
    }

    /// Layers that read the same as one.
    fn joined(&self, name: String, parts: [Linear; 3]) -> Result<Linear> {
        let weights = parts.each_ref().map(|part| &part.weight);
        let Some(weight) = Weight::stacked(&weights)? else {
            let held: Vec<String> = weights.iter().map(|weight| weight.encoding()).collect();
            let (key, value) = ("the storage of query, key and value", held.join(", "));
            let problem = Problem::Unsupported { key, value, expected: "one for all three" };
            let path = self.weights.path().to_owned();
            return Err(io::Error::Model { path, problem }.into());
        };
        let biases: Vec<LazyTensor> = parts.into_iter().filter_map(|part| part.bias).collect();
        let bias = LazyTensor::cat(&biases, 0)?.into_owned()?;
        Ok(Linear { name, weight, bias: Some(bias) })
    }

    fn norm(&self, module: &str) -> Result<LayerNorm> {
        // Files from before 2020 call them as TensorFlow did.
        let part = |new: &str, old: &str| {
            let [new, old] = [new, old].map(|part| format!("{module}.{part}"));
            let name = if self.weights.weight_shape(&old).is_ok() { old } else { new };
            self.builder.float(&name, &[self.config.hidden_size])
        };
        let (weight, bias) = (part("weight", "gamma")?, part("bias", "beta")?);
        Ok(LayerNorm { weight, bias, eps: self.config.layer_norm_eps })
    }
}

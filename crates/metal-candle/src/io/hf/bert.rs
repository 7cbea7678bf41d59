//! `config.json` as an encoder's shape. Defaults are those of transformers.

use std::path::Path;

use serde::Deserialize;

use super::Problem;
use super::config::{MAX_SIZE, inconsistent, read_family, size};
use crate::io::{Activation, EncoderConfig, Result};

/// The families that are encoders of ours.
const FAMILIES: [&str; 4] = ["bert", "roberta", "xlm-roberta", "camembert"];

/// What of a `config.json` changes what an encoder computes.
#[derive(Deserialize)]
struct Json {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    max_position_embeddings: usize,
    type_vocab_size: Option<usize>,
    hidden_act: Option<String>,
    layer_norm_eps: Option<f64>,
    position_embedding_type: Option<String>,
    pad_token_id: Option<usize>,
    #[serde(default)]
    is_decoder: bool,
}

pub(super) fn read(path: &Path) -> Result<EncoderConfig> {
    let unknown = |got| Problem::Encoder { got, known: FAMILIES.to_vec() };
    read_family(path, &FAMILIES, unknown, Json::encoder)
}

impl Json {
    fn encoder(&self, architecture: String) -> std::result::Result<EncoderConfig, Problem> {
        let hidden_size = size("hidden_size", self.hidden_size, MAX_SIZE)?;
        let num_heads = size("num_attention_heads", self.num_attention_heads, MAX_SIZE)?;
        if !hidden_size.is_multiple_of(num_heads) {
            let expected = format!("a multiple of the {num_heads} heads");
            return Err(inconsistent("hidden_size", hidden_size, expected));
        }
        self.refuse_unsupported()?;
        let positions = size("max_position_embeddings", self.max_position_embeddings, MAX_SIZE)?;
        let position_offset = match architecture.as_str() {
            "bert" => 0,
            _ => self.pad_token_id.unwrap_or(1).saturating_add(1),
        };
        if position_offset >= positions {
            let expected = format!("fewer than the {positions} positions, less one");
            return Err(inconsistent("pad_token_id", position_offset - 1, expected));
        }
        Ok(EncoderConfig {
            architecture,
            vocab_size: size("vocab_size", self.vocab_size, MAX_SIZE)?,
            hidden_size,
            intermediate_size: size("intermediate_size", self.intermediate_size, MAX_SIZE)?,
            num_layers: size("num_hidden_layers", self.num_hidden_layers, MAX_SIZE)?,
            num_heads,
            layer_norm_eps: self.layer_norm_eps.unwrap_or(1e-12),
            activation: self.activation()?,
            max_position_embeddings: positions,
            position_offset,
            type_vocab_size: size("type_vocab_size", self.type_vocab_size.unwrap_or(2), MAX_SIZE)?,
        })
    }

    fn refuse_unsupported(&self) -> std::result::Result<(), Problem> {
        match self.position_embedding_type.as_deref() {
            None | Some("absolute") => {}
            Some(other) => {
                let (key, value) = ("position_embedding_type", format!("{other:?}"));
                return Err(Problem::Unsupported { key, value, expected: "\"absolute\"" });
            }
        }
        if self.is_decoder {
            let (key, value) = ("is_decoder", "true".to_owned());
            return Err(Problem::Unsupported { key, value, expected: "false" });
        }
        Ok(())
    }

    fn activation(&self) -> std::result::Result<Activation, Problem> {
        match self.hidden_act.as_deref() {
            None | Some("gelu") => Ok(Activation::Gelu),
            Some("gelu_new" | "gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
            Some("relu") => Ok(Activation::Relu),
            Some(other) => {
                let (key, value) = ("hidden_act", format!("{other:?}"));
                let expected = "\"gelu\", \"gelu_new\", \"gelu_pytorch_tanh\" or \"relu\"";
                Err(Problem::Unsupported { key, value, expected })
            }
        }
    }
}

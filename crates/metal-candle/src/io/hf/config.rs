//! `config.json` as a decoder's shape. Defaults are those of transformers.

use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::Problem;
use super::rope::{self, RopeJson};
use crate::io::{DecoderConfig, Error, Result, RopeLayout, file};

/// The families that are decoders of ours. TinyLlama and SmolLM call themselves `llama`.
const FAMILIES: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];
/// More than any model counts, and two of them multiply without overflow.
pub(super) const MAX_SIZE: usize = 1 << 31;

/// The key that says how to read the others.
#[derive(Deserialize)]
struct Family {
    model_type: Option<String>,
}

/// What of a `config.json` changes what a decoder computes.
#[derive(Deserialize)]
pub(super) struct Json {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    hidden_act: Option<String>,
    pub(super) max_position_embeddings: usize,
    rms_norm_eps: Option<f64>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    #[serde(default = "default_window")]
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    pub(super) rope_theta: Option<f64>,
    pub(super) partial_rotary_factor: Option<f64>,
    pub(super) original_max_position_embeddings: Option<f64>,
    pub(super) rope_scaling: Option<RopeJson>,
    pub(super) rope_parameters: Option<RopeJson>,
    quantization_config: Option<QuantizationJson>,
}

/// How the weights are stored, if not as floats.
#[derive(Deserialize)]
struct QuantizationJson {
    quant_method: Option<String>,
    #[serde(default)]
    load_in_4bit: bool,
    bnb_4bit_quant_type: Option<String>,
}

/// Where the key is absent; `null` means no window.
fn default_window() -> Option<usize> {
    Some(4096)
}

pub(super) fn read(path: &Path) -> Result<DecoderConfig> {
    let unknown = |got| Problem::Architecture { got, known: FAMILIES.to_vec() };
    read_family(path, &FAMILIES, unknown, Json::decoder)
}

/// What `shape` makes of a `config.json` and its family, one of `known`; `unknown` is said of any other.
pub(super) fn read_family<J: DeserializeOwned, C>(
    path: &Path,
    known: &[&str],
    unknown: impl FnOnce(String) -> Problem,
    shape: impl FnOnce(&J, String) -> std::result::Result<C, Problem>,
) -> Result<C> {
    let bytes = file::read(path)?;
    let json = |cause| Error::Json { path: path.to_owned(), cause };
    let family: Family = serde_json::from_slice(&bytes).map_err(json)?;
    let got = family.model_type.unwrap_or_default();
    let in_file = |problem| Error::Model { path: path.to_owned(), problem };
    if !known.contains(&got.as_str()) {
        return Err(in_file(unknown(got)));
    }
    let config: J = serde_json::from_slice(&bytes).map_err(json)?;
    shape(&config, got).map_err(in_file)
}

impl Json {
    fn decoder(&self, architecture: String) -> std::result::Result<DecoderConfig, Problem> {
        self.refuse_unsupported()?;
        let family = architecture.as_str();
        let num_heads = size("num_attention_heads", self.num_attention_heads, MAX_SIZE)?;
        let num_kv_heads = self.num_key_value_heads.unwrap_or(num_heads);
        let num_kv_heads = size("num_key_value_heads", num_kv_heads, MAX_SIZE)?;
        if !num_heads.is_multiple_of(num_kv_heads) {
            let expected = format!("a divisor of the {num_heads} query heads");
            return Err(inconsistent("num_key_value_heads", num_kv_heads, expected));
        }
        let num_layers = size("num_hidden_layers", self.num_hidden_layers, MAX_SIZE)?;
        let (positions, limit) = (self.max_position_embeddings, DecoderConfig::MAX_POSITIONS);
        let positions = size("max_position_embeddings", positions, limit)?;
        let optional_bias =
            matches!(family, "llama" | "qwen3") && self.attention_bias == Some(true);
        let (rope_theta, rope_scaling) = rope::scaling(self)?;
        Ok(DecoderConfig {
            vocab_size: size("vocab_size", self.vocab_size, MAX_SIZE)?,
            hidden_size: size("hidden_size", self.hidden_size, MAX_SIZE)?,
            intermediate_size: size("intermediate_size", self.intermediate_size, MAX_SIZE)?,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim: self.head_dim(family)?,
            rms_norm_eps: self.rms_norm_eps.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            rope_layout: RopeLayout::Half,
            max_position_embeddings: positions,
            sliding_window: self.window(family)?,
            tie_word_embeddings: self.tie_word_embeddings.unwrap_or(false),
            attention_bias: family == "qwen2" || optional_bias,
            attention_output_bias: optional_bias,
            qk_norm: family == "qwen3",
            architecture,
        })
    }

    fn refuse_unsupported(&self) -> std::result::Result<(), Problem> {
        let refuse = |key, value: &str, expected| {
            Err(Problem::Unsupported { key, value: value.to_owned(), expected })
        };
        // transformers knows SiLU under both names.
        match self.hidden_act.as_deref() {
            None | Some("silu" | "swish") => {}
            Some(other) => return refuse("hidden_act", &format!("{other:?}"), "\"silu\""),
        }
        if self.mlp_bias == Some(true) {
            return refuse("mlp_bias", "true", "false");
        }
        let is_nf4 = |q: &QuantizationJson| {
            q.load_in_4bit && q.bnb_4bit_quant_type.as_deref() == Some("nf4")
        };
        match &self.quantization_config {
            Some(q) if !is_nf4(q) => {
                let method = q.quant_method.as_deref().unwrap_or("no method");
                let kind = match (q.load_in_4bit, &q.bnb_4bit_quant_type) {
                    (true, kind) => kind.as_deref().unwrap_or("fp4"),
                    (false, _) => "not in 4 bits",
                };
                let expected = "weights in F32, F16 or BF16, in bitsandbytes' NF4, or a GGUF";
                refuse("quantization_config", &format!("{method}, {kind}"), expected)
            }
            _ => Ok(()),
        }
    }

    fn head_dim(&self, family: &str) -> std::result::Result<usize, Problem> {
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
        let head_dim = match (self.head_dim, family) {
            (Some(head_dim), _) => head_dim,
            (None, "qwen3") => 128,
            (None, _) if hidden.is_multiple_of(heads) => hidden / heads,
            (None, _) => {
                let expected = format!("a multiple of the {heads} query heads");
                return Err(inconsistent("hidden_size", hidden, expected));
            }
        };
        match size("head_dim", head_dim, MAX_SIZE)? {
            even if even.is_multiple_of(2) => Ok(even),
            odd => Err(inconsistent("head_dim", odd, "an even number".to_owned())),
        }
    }

    /// The window of all layers: one that only some of them have is refused.
    fn window(&self, family: &str) -> std::result::Result<Option<usize>, Problem> {
        let wanted = match family {
            "mistral" => true,
            "qwen2" | "qwen3" => self.use_sliding_window == Some(true),
            _ => false,
        };
        let Some(window) = self.sliding_window.filter(|_| wanted) else { return Ok(None) };
        let window = size("sliding_window", window, MAX_SIZE)?;
        let (layers, first) = (self.num_hidden_layers, self.max_window_layers.unwrap_or(28));
        let windowed = match (&self.layer_types, family) {
            (_, "mistral") => layers,
            (Some(types), _) => types.iter().filter(|kind| *kind == "sliding_attention").count(),
            (None, _) => layers.saturating_sub(first),
        };
        match windowed {
            0 => Ok(None),
            all if all == layers => Ok(Some(window)),
            some => Err(Problem::Unsupported {
                key: "use_sliding_window",
                value: format!("true for {some} of the {layers} layers"),
                expected: "all of them or none",
            }),
        }
    }
}

/// A key that counts something.
pub(super) fn size(
    key: &'static str,
    got: usize,
    limit: usize,
) -> std::result::Result<usize, Problem> {
    match got {
        size if (1..=limit).contains(&size) => Ok(size),
        _ => Err(inconsistent(key, got, format!("1 to {limit}"))),
    }
}

pub(super) fn inconsistent(key: &'static str, got: usize, expected: String) -> Problem {
    Problem::Inconsistent { key, got: got.to_string(), expected }
}

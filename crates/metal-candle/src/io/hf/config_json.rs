//! A decoder's shape as a `config.json`: the way back from [`super::config`].

use metal_candle_graph::DType;
use serde_json::{Map, Value, json};

use super::Problem;
use crate::io::{DecoderConfig, RopeScaling};

/// The object of a `config.json` that transformers and [`super::HfFolder`] read as this decoder.
///
/// # Errors
/// [`Problem::NoConfig`] for a shape that no `config.json` of these families spells.
pub(crate) fn config_json(
    config: &DecoderConfig,
    dtype: DType,
) -> Result<Map<String, Value>, Problem> {
    let c = config;
    let (family, class) = family(c)?;
    let mut json = json!({
        "architectures": [class],
        "model_type": family,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_position_embeddings,
        "rms_norm_eps": short(c.rms_norm_eps),
        "rope_theta": short(c.rope_theta),
        "tie_word_embeddings": c.tie_word_embeddings,
        "torch_dtype": match dtype {
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
            _ => "float32",
        },
    });
    match (family, c.sliding_window) {
        ("mistral", window) => json["sliding_window"] = json!(window),
        ("qwen2" | "qwen3", Some(window)) => {
            json["use_sliding_window"] = true.into();
            json["sliding_window"] = window.into();
            json["max_window_layers"] = 0.into();
        }
        _ => {}
    }
    if family == "llama" || family == "qwen3" {
        json["attention_bias"] = c.attention_bias.into();
    }
    if let Some(scaling) = rope_scaling(&c.rope_scaling)? {
        json["rope_scaling"] = scaling;
    }
    match json {
        Value::Object(json) => Ok(json),
        other => unreachable!("metal-candle bug: a config is {other}"),
    }
}

/// `model_type` and the class of transformers'.
fn family(c: &DecoderConfig) -> Result<(&'static str, &'static str), Problem> {
    let no_config = |what: String| Err(Problem::NoConfig { what });
    // llama.cpp calls Mistral a llama; only its window tells.
    let (family, class) = match (c.architecture.as_str(), c.sliding_window) {
        ("llama", None) => ("llama", "LlamaForCausalLM"),
        ("llama" | "mistral", _) => ("mistral", "MistralForCausalLM"),
        ("qwen2", _) => ("qwen2", "Qwen2ForCausalLM"),
        ("qwen3", _) => ("qwen3", "Qwen3ForCausalLM"),
        (other, _) => return no_config(format!("the architecture {other:?}")),
    };
    let biases = match family {
        "mistral" => !c.attention_bias && !c.attention_output_bias,
        "qwen2" => c.attention_bias && !c.attention_output_bias,
        _ => c.attention_bias == c.attention_output_bias,
    };
    if !biases {
        return no_config(format!("{family} with such biases of its attention"));
    }
    if c.qk_norm != (family == "qwen3") {
        return no_config(format!("{family} with such norms of its heads"));
    }
    Ok((family, class))
}

fn rope_scaling(scaling: &RopeScaling) -> Result<Option<Value>, Problem> {
    Ok(Some(match scaling {
        RopeScaling::None => return Ok(None),
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_position_embeddings,
        }),
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            attention_factor,
            beta_fast,
            beta_slow,
            truncate,
        } => json!({
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original_max_position_embeddings,
            "attention_factor": attention_factor,
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
            "truncate": truncate,
        }),
        RopeScaling::Divisors(_) => {
            let what = "rope_freqs.weight, which stands for rope scaling of Llama 3's kind";
            return Err(Problem::NoConfig { what: what.to_owned() });
        }
    }))
}

/// GGUF files hold f32: 1e-5 rather than 9.999999747378752e-6.
fn short(value: f64) -> f64 {
    let single = value as f32;
    if f64::from(single) == value { single.to_string().parse().unwrap_or(value) } else { value }
}

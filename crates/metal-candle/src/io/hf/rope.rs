//! `rope_scaling` of older files, `rope_parameters` of newer ones.

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::Problem;
use super::config::Json;
use crate::io::RopeScaling;

/// Every key that a kind of scaling has.
#[derive(Default, Deserialize)]
pub(super) struct RopeJson {
    rope_type: Option<String>,
    #[serde(rename = "type")]
    older_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    attention_factor: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    truncate: Option<bool>,
    partial_rotary_factor: Option<f64>,
    full_attention: Option<IgnoredAny>,
    sliding_attention: Option<IgnoredAny>,
}

/// The base of the frequencies, and how they are scaled.
pub(super) fn scaling(config: &Json) -> std::result::Result<(f64, RopeScaling), Problem> {
    let none = RopeJson::default();
    let rope = config.rope_scaling.as_ref().or(config.rope_parameters.as_ref()).unwrap_or(&none);
    let parameters_theta = config.rope_parameters.as_ref().and_then(|rope| rope.rope_theta);
    let theta = rope.rope_theta.or(config.rope_theta).or(parameters_theta).unwrap_or(10_000.0);
    let theta = positive("rope_theta", theta)?;
    refuse_unsupported(config, rope)?;
    // The outer key wins, as in transformers.
    let original = config
        .original_max_position_embeddings
        .or(rope.original_max_position_embeddings)
        .unwrap_or(config.max_position_embeddings as f64);
    let original = positive("original_max_position_embeddings", original)?;
    let kind = rope.rope_type.as_deref().or(rope.older_type.as_deref());
    let scaling = match kind.unwrap_or("default") {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: needed("linear", "factor", rope.factor)? },
        "llama3" => rope.llama3(original)?,
        "yarn" => rope.yarn(original, config.max_position_embeddings as f64)?,
        other => {
            return Err(Problem::Unsupported {
                key: "rope_type",
                value: format!("{other:?}"),
                expected: "default, linear, llama3 or yarn",
            });
        }
    };
    Ok((theta, scaling))
}

impl RopeJson {
    fn llama3(&self, original: f64) -> std::result::Result<RopeScaling, Problem> {
        let low = needed("llama3", "low_freq_factor", self.low_freq_factor)?;
        let high = needed("llama3", "high_freq_factor", self.high_freq_factor)?;
        if high <= low {
            let (key, got) = ("high_freq_factor", high.to_string());
            let expected = format!("more than low_freq_factor, {low}");
            return Err(Problem::Inconsistent { key, got, expected });
        }
        Ok(RopeScaling::Llama3 {
            factor: needed("llama3", "factor", self.factor)?,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings: original,
        })
    }

    fn yarn(&self, original: f64, context: f64) -> std::result::Result<RopeScaling, Problem> {
        let factor = positive("factor", self.factor.unwrap_or(context / original))?;
        // 0 counts as absent, as in transformers.
        let set = |value: Option<f64>| value.filter(|&value| value != 0.0);
        let inferred = match (set(self.mscale), set(self.mscale_all_dim)) {
            (Some(mscale), Some(all_dim)) => {
                RopeScaling::yarn_attention_ratio(factor, mscale, all_dim)
            }
            _ => RopeScaling::yarn_attention_factor(factor),
        };
        let attention_factor = self.attention_factor.unwrap_or(inferred);
        Ok(RopeScaling::Yarn {
            factor,
            original_max_position_embeddings: original,
            attention_factor: positive("attention_factor", attention_factor)?,
            beta_fast: positive("beta_fast", set(self.beta_fast).unwrap_or(32.0))?,
            beta_slow: positive("beta_slow", set(self.beta_slow).unwrap_or(1.0))?,
            truncate: self.truncate.unwrap_or(true),
        })
    }
}

fn refuse_unsupported(config: &Json, rope: &RopeJson) -> std::result::Result<(), Problem> {
    if rope.full_attention.is_some() || rope.sliding_attention.is_some() {
        return Err(Problem::Unsupported {
            key: "rope_parameters",
            value: "one set per kind of layer".to_owned(),
            expected: "one set for all layers",
        });
    }
    match rope.partial_rotary_factor.or(config.partial_rotary_factor) {
        Some(part) if part != 1.0 => Err(Problem::Unsupported {
            key: "partial_rotary_factor",
            value: part.to_string(),
            expected: "1",
        }),
        _ => Ok(()),
    }
}

fn needed(
    rope_type: &'static str,
    key: &'static str,
    value: Option<f64>,
) -> std::result::Result<f64, Problem> {
    positive(key, value.ok_or(Problem::RopeKey { rope_type, key })?)
}

fn positive(key: &'static str, got: f64) -> std::result::Result<f64, Problem> {
    if got > 0.0 && got.is_finite() {
        return Ok(got);
    }
    let expected = "a positive number".to_owned();
    Err(Problem::Inconsistent { key, got: got.to_string(), expected })
}

//! Rope scaling as llama.cpp writes it down.

use super::{GgufFile, Problem};
use crate::io::{Result, RopeScaling};

/// What changes YaRN in newer files and is not carried out here.
const YARN_EXTRAS: [&str; 4] =
    ["attn_factor", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier"];

impl GgufFile {
    /// `rope.scaling.*`, and the divisors of the frequencies that stand for Llama 3's scaling.
    pub(super) fn rope_scaling(&self, architecture: &str, head_dim: usize) -> Result<RopeScaling> {
        let key = |name: &str| format!("{architecture}.rope.scaling.{name}");
        let kind = self.str_opt(&key("type"))?;
        let refuse = |what: String, value: &str| {
            Err(self.error(Problem::Unsupported { what, value: value.to_owned() }))
        };
        if self.has_tensor("rope_freqs.weight") {
            // llama.cpp divides by both; no converter writes both.
            return match kind {
                None | Some("none") => self.divisors(head_dim),
                Some(kind) => refuse(key("type"), &format!("{kind} beside rope_freqs.weight")),
            };
        }
        match kind {
            Some("none") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear { factor: self.positive(&key("factor"))? }),
            // A factor without a type is linear.
            None => match self.f64_opt(&key("factor"))?.filter(|&factor| factor != 0.0) {
                Some(_) => Ok(RopeScaling::Linear { factor: self.positive(&key("factor"))? }),
                None => Ok(RopeScaling::None),
            },
            Some("yarn") => {
                if let Some(extra) = YARN_EXTRAS.iter().find(|name| self.has_key(&key(name))) {
                    return refuse(key(extra), "set");
                }
                let or = |name: &str, default: f64| match self.f64_opt(&key(name))? {
                    Some(_) => self.positive(&key(name)),
                    None => Ok(default),
                };
                let original = self.u32_opt(&key("original_context_length"))?;
                let original = match original.filter(|&original| original > 0) {
                    Some(original) => original,
                    None => self.u32(&format!("{architecture}.context_length"))?,
                };
                let factor = self.positive(&key("factor"))?;
                Ok(RopeScaling::Yarn {
                    factor,
                    original_max_position_embeddings: original.into(),
                    attention_factor: RopeScaling::yarn_attention_factor(factor),
                    beta_fast: or("yarn_beta_fast", 32.0)?,
                    beta_slow: or("yarn_beta_slow", 1.0)?,
                    truncate: true,
                })
            }
            Some(other) => refuse(key("type"), other),
        }
    }

    fn divisors(&self, head_dim: usize) -> Result<RopeScaling> {
        let name = "rope_freqs.weight";
        let shape = &self.tensor(name)?.shape;
        if shape[..] != [head_dim / 2] {
            return Err(self.error(Problem::Inconsistent {
                what: "the shape of rope_freqs.weight",
                got: format!("{shape:?}"),
                expected: format!("[{}], half the width of a head", head_dim / 2),
            }));
        }
        let values = self.dequantize(name)?.to_vec1();
        let values = values.map_err(|cause| self.error(Problem::Candle { cause }))?;
        Ok(RopeScaling::Divisors(values))
    }

    fn has_key(&self, key: &str) -> bool {
        self.metadata.contains_key(key)
    }

    fn positive(&self, key: &str) -> Result<f64> {
        match self.f64(key)? {
            value if value > 0.0 && value.is_finite() => Ok(value),
            value => Err(self.error(Problem::ValueType {
                key: key.to_owned(),
                expected: "a positive number",
                got: value.to_string(),
            })),
        }
    }
}

//! Looking for weights that are no numbers.

use super::Decoder;
use crate::error::ErrorKind;
use crate::nn::RmsNorm;
use crate::{DType, LazyTensor, Result};

impl Decoder {
    /// Reads every weight: for when a result was not finite, to say whether the model is to blame.
    ///
    /// # Errors
    /// [`ErrorKind::WeightNotFinite`] with the name of the first that has a NaN or an infinity.
    pub fn check_weights(&self) -> Result<()> {
        check("model.embed_tokens", "weight", &self.embed.weight.to_f32()?)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let norms: [(&str, Option<&RmsNorm>); 4] = [
                ("input_layernorm", Some(&layer.input_norm)),
                ("self_attn.q_norm", layer.q_norm.as_ref()),
                ("self_attn.k_norm", layer.k_norm.as_ref()),
                ("post_attention_layernorm", Some(&layer.post_norm)),
            ];
            for (module, norm) in norms {
                if let Some(norm) = norm {
                    check(&format!("model.layers.{i}.{module}"), "weight", &norm.weight)?;
                }
            }
            for linear in layer.linears() {
                check(&linear.name, "weight", &linear.weight.to_f32()?)?;
                if let Some(bias) = &linear.bias {
                    check(&linear.name, "bias", bias)?;
                }
            }
        }
        check("model.norm", "weight", &self.norm.weight)?;
        check("lm_head", "weight", &self.output.to_f32()?)
    }
}

fn check(module: &str, part: &str, weight: &LazyTensor) -> Result<()> {
    let weight = weight.to_dtype(DType::F32)?;
    // What is not finite less itself is NaN, everything else 0.
    let zero: f32 = weight.sub(&weight)?.sum_all()?.to_scalar()?;
    if zero == 0.0 {
        return Ok(());
    }
    Err(ErrorKind::WeightNotFinite { tensor: format!("{module}.{part}") }.into())
}

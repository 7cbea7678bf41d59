//! What tells one base model from another, and a sound one from a broken one.

use super::Decoder;
use crate::fnv::Fnv;
use crate::nn::Weight;
use crate::{DType, Device, LazyTensor, Result};

/// Bytes of a quantised matrix that are looked at.
const BLOCK_BYTES: usize = 1024;

impl Decoder {
    /// A line that tells this base from others: its family and size, how its weights are held, and
    /// a hash of a piece of every matrix. Reads a little of each, so that it costs next to nothing.
    ///
    /// # Errors
    /// Where memory runs out.
    pub fn fingerprint(&self) -> Result<String> {
        let c = &self.config;
        let linears: Vec<_> = self.layers.iter().flat_map(|layer| layer.linears()).collect();
        let held = linears.first().map_or_else(String::new, |linear| match &linear.weight {
            Weight::Dense(w) => w.dtype().to_string(),
            Weight::Quantised { format, .. } => format!("{format:?}"),
        });
        let mut pieces = vec![self.norm.weight.clone(), self.embed.weight.narrow(0, 0, 1)?];
        for linear in linears {
            pieces.push(match &linear.weight {
                Weight::Dense(w) => w.narrow(0, 0, 1)?,
                Weight::Quantised { blocks, .. } => {
                    blocks.narrow(0, 0, BLOCK_BYTES.min(blocks.elem_count()))?
                }
            });
        }
        let pieces = pieces.iter().map(|x| x.flatten_all()?.to_dtype(DType::F32));
        let all = LazyTensor::cat(&pieces.collect::<Result<Vec<_>>>()?, 0)?;
        let mut hash = Fnv::default();
        format!("{c:?}").bytes().for_each(|byte| hash.add(byte.into()));
        all.to_vec::<f32>()?.iter().for_each(|x| hash.add(x.to_bits().into()));
        Ok(format!(
            "{}, {} layers of {}, held as {held}, {hash:016x}",
            c.architecture, c.num_layers, c.hidden_size
        ))
    }

    /// The first weight that holds a value which is not finite. Reads all of them.
    ///
    /// # Errors
    /// Where memory runs out.
    pub fn first_not_finite(&self) -> Result<Option<String>> {
        // Not finite minus itself is NaN, and of everything else 0.
        let broken = |x: &LazyTensor| -> Result<bool> {
            let x = x.to_dtype(DType::F32)?;
            Ok(x.sub(&x)?.sum_all()?.to_scalar::<f32>()?.is_nan())
        };
        if broken(&self.embed.weight)? {
            return Ok(Some("model.embed_tokens".to_owned()));
        }
        for (i, layer) in self.layers.iter().enumerate() {
            let norms = [
                ("input_layernorm", &layer.input_norm),
                ("post_attention_layernorm", &layer.post_norm),
            ];
            for (name, norm) in norms {
                if broken(&norm.weight)? {
                    return Ok(Some(format!("model.layers.{i}.{name}")));
                }
            }
            for linear in layer.linears() {
                // Its rows' sums: [1, out].
                let ones =
                    LazyTensor::ones(&[1, linear.weight.dims()[1]], DType::F32, &Device::Cpu)?;
                if broken(&linear.forward(&ones, None)?)? {
                    return Ok(Some(linear.name.clone()));
                }
            }
        }
        let last = [("model.norm", &self.norm.weight), ("lm_head", &self.output)];
        for (name, weight) in last {
            if broken(weight)? {
                return Ok(Some(name.to_owned()));
            }
        }
        Ok(None)
    }
}

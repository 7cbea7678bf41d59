//! What tells one base model from another.

use super::Decoder;
use crate::fnv::Fnv;
use crate::nn::Weight;
use crate::{DType, LazyTensor, Result};

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
        let held = linears.first().map_or_else(String::new, |linear| linear.weight.encoding());
        let mut pieces = vec![self.norm.weight.clone()];
        for weight in linears.iter().map(|l| &l.weight).chain([&self.embed.weight]) {
            pieces.push(match weight {
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
}

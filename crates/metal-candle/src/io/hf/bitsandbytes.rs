//! Weights that bitsandbytes wrote in four bits, as `save_pretrained` of a model loaded with `load_in_4bit` leaves them.
//!
//! A weight `W` lies in several tensors: the codes in `W`, two to a byte; the largest magnitude of every block in
//! `W.absmax`; the code's values in `W.quant_map`; the rest, as JSON, in `W.quant_state.bitsandbytes__nf4`. With double
//! quantisation `W.absmax` is bytes, which `W.nested_quant_map`, `W.nested_absmax` and an offset make floats. Here they
//! become self-contained blocks of [`BlockFormat::NF4`], with the same values to the bit.

use std::collections::BTreeMap;

use metal_candle_graph::{BlockFormat, DType};
use safetensors::tensor::Dtype;
use serde::Deserialize;

use super::{HfWeights, Problem};
use crate::io::bytes::Bytes;
use crate::io::gguf::{Encoding, StoredTensor};
use crate::io::{Error, Result, nf4};

const STATE: &str = ".quant_state.bitsandbytes__";
const PARTS: [&str; 4] = [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"];

/// What is said about a weight.
#[derive(Debug)]
pub(super) struct Nf4 {
    pub(super) shape: Vec<usize>,
    /// Before it was quantised.
    pub(super) dtype: DType,
    /// Weights that share a magnitude: a multiple of a block's of ours.
    share: usize,
    nested: Option<Nested>,
}

#[derive(Debug)]
struct Nested {
    /// Magnitudes that share a scale.
    share: usize,
    offset: f32,
}

/// `quant_state`, as far as it matters.
#[derive(Deserialize)]
struct State {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f32>,
}

impl Nf4 {
    /// Weights.
    fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Of the blocks that they become.
    pub(super) fn len_bytes(&self) -> usize {
        self.len() / nf4::LEN * nf4::BYTES
    }
}

/// The weights in four bits, of the tensors by their names. Their parts go out of `index`, into the other map that comes
/// back: they are no weights.
pub(super) fn split(
    index: &mut BTreeMap<String, usize>,
) -> (BTreeMap<String, String>, BTreeMap<String, usize>) {
    let states = index.keys().filter_map(|name| Some((name.split_once(STATE)?.0, name)));
    let states: BTreeMap<String, String> =
        states.map(|(weight, state)| (weight.to_owned(), state.clone())).collect();
    let mut parts = BTreeMap::new();
    for (weight, state) in &states {
        let names = PARTS.iter().map(|part| format!("{weight}{part}"));
        for name in names.chain([state.clone()]) {
            if let Some((name, shard)) = index.remove_entry(&name) {
                parts.insert(name, shard);
            }
        }
    }
    (states, parts)
}

impl HfWeights {
    /// Reads and checks what is said about a weight.
    pub(super) fn nf4_state(&self, weight: &str, state: &str) -> Result<Nf4> {
        let json: State =
            serde_json::from_slice(&self.part(state, Dtype::U8)?).map_err(|cause| {
                self.wrong(state, Problem::QuantState { tensor: state.to_owned(), cause })
            })?;
        let nf4 = json.check().map_err(|(key, got, expected)| {
            self.wrong(state, Problem::bitsandbytes(weight, key, got, expected))
        })?;
        self.check_parts(weight, &nf4)?;
        Ok(nf4)
    }

    /// Whether the parts of a weight are as long as they must be.
    fn check_parts(&self, weight: &str, nf4: &Nf4) -> Result<()> {
        let part = |part: &str, dtype: Dtype, len: usize| -> Result<Bytes> {
            let name = format!("{weight}{part}");
            let bytes = self.part(&name, dtype)?;
            self.check_len(&name, bytes.len(), len)?;
            Ok(bytes)
        };
        // The bytes of the codes may be called elements of any type.
        self.check_len(weight, self.shard(weight)?.len_bytes(weight)?, nf4.len() / 2)?;
        let blocks = nf4.len().div_ceil(nf4.share);
        if let Some(nested) = &nf4.nested {
            part(".nested_absmax", Dtype::F32, 4 * blocks.div_ceil(nested.share))?;
            part(".nested_quant_map", Dtype::F32, 4 * 256)?;
            part(".absmax", Dtype::U8, blocks)?;
        } else {
            part(".absmax", Dtype::F32, 4 * blocks)?;
        }
        let map = floats(&part(".quant_map", Dtype::F32, 4 * 16)?);
        if map == BlockFormat::NF4_VALUES {
            return Ok(());
        }
        let expected = format!("NF4's: {:?}", BlockFormat::NF4_VALUES);
        let problem = Problem::bitsandbytes(weight, "quant_map", format!("{map:?}"), expected);
        Err(self.wrong(weight, problem))
    }

    fn check_len(&self, tensor: &str, got: usize, expected: usize) -> Result<()> {
        if got == expected {
            return Ok(());
        }
        let problem = Problem::bitsandbytes(tensor, "length", format!("{got} bytes"), expected);
        Err(self.wrong(tensor, problem))
    }

    /// The error of what is wrong with a tensor.
    fn wrong(&self, tensor: &str, problem: Problem) -> Error {
        match self.part_shard(tensor) {
            Ok(shard) => Error::Model { path: shard.path().to_owned(), problem },
            Err(error) => error,
        }
    }

    /// A weight in four bits, as blocks.
    pub(super) fn read_nf4(&self, weight: &str, nf4: &Nf4) -> Result<StoredTensor> {
        let codes = self.shard(weight)?.bytes(weight)?;
        let absmax = self.absmax(weight, nf4)?;
        let mut bytes = Vec::with_capacity(nf4.len_bytes());
        for (i, codes) in codes.chunks_exact(nf4::LEN / 2).enumerate() {
            bytes.extend(absmax[i * nf4::LEN / nf4.share].to_le_bytes());
            bytes.extend(codes);
        }
        let encoding = Encoding::Blocks(BlockFormat::NF4);
        Ok(StoredTensor { encoding, shape: nf4.shape.clone(), bytes: bytes.into() })
    }

    /// The largest magnitude of every block.
    fn absmax(&self, weight: &str, nf4: &Nf4) -> Result<Vec<f32>> {
        let part = |part: &str, dtype| self.part(&format!("{weight}{part}"), dtype);
        let Some(nested) = &nf4.nested else { return Ok(floats(&part(".absmax", Dtype::F32)?)) };
        let scales = floats(&part(".nested_absmax", Dtype::F32)?);
        let map = floats(&part(".nested_quant_map", Dtype::F32)?);
        let codes = part(".absmax", Dtype::U8)?;
        let magnitude = |(i, code): (usize, &u8)| {
            map[usize::from(*code)] * scales[i / nested.share] + nested.offset
        };
        Ok(codes.iter().enumerate().map(magnitude).collect())
    }

    /// The bytes of a tensor of this type.
    fn part(&self, name: &str, dtype: Dtype) -> Result<Bytes> {
        let shard = self.part_shard(name)?;
        let got = shard.stored_dtype(name)?;
        if got == dtype {
            return shard.bytes(name);
        }
        Err(self.wrong(name, Problem::bitsandbytes(name, "dtype", got, dtype)))
    }
}

type Wrong = (&'static str, String, &'static str);

impl State {
    fn check(self) -> std::result::Result<Nf4, Wrong> {
        if self.quant_type != "nf4" {
            return Err(("quant_type", self.quant_type, "nf4, the only one that is supported"));
        }
        if self.blocksize == 0 || !self.blocksize.is_multiple_of(nf4::LEN) {
            return Err(("blocksize", self.blocksize.to_string(), "a multiple of 64"));
        }
        let shape = format!("{:?}", self.shape);
        let len = match self.shape[..] {
            [rows, cols] if cols.is_multiple_of(nf4::LEN) => rows.checked_mul(cols),
            _ => None,
        };
        if len.is_none_or(|len| len == 0 || len > 1 << 48) {
            return Err(("shape", shape, "a matrix with rows of a multiple of 64 weights"));
        }
        let dtype = match self.dtype.as_str() {
            "float32" => DType::F32,
            "float16" => DType::F16,
            "bfloat16" => DType::BF16,
            _ => return Err(("dtype", self.dtype, "float32, float16 or bfloat16")),
        };
        let nested = match (self.nested_blocksize, self.nested_offset) {
            (None, None) => None,
            (Some(share), Some(offset)) if share > 0 => Some(Nested { share, offset }),
            (share, _) => {
                return Err(("nested_blocksize", format!("{share:?}"), "one, with nested_offset"));
            }
        };
        Ok(Nf4 { shape: self.shape, dtype, share: self.blocksize, nested })
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

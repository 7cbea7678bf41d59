//! A tensor's bytes, whatever file they came from.

use super::{Encoding, Problem};
use crate::io::{Bytes, nf4};
use candle_core::quantized::{QStorage, QTensor};
use candle_core::{Device, Tensor};
use half::{bf16, f16};
use metal_candle_graph::{BlockFormat, DType};
use rayon::prelude::*;
use std::borrow::Cow;

/// More than any block wants, and no more than what the allocator gives.
const BLOCK_ALIGN_BYTES: usize = 8;

/// A tensor's bytes as they lie in the file.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredTensor {
    /// How `bytes` are to be read.
    pub encoding: Encoding,
    /// Row-major, slowest dim first.
    pub shape: Vec<usize>,
    /// Rows are whole: a block never spans two of them.
    pub bytes: Bytes,
}

impl StoredTensor {
    /// Every element as `f32`, on the CPU; blocks of GGUF's by Candle's dequantisation.
    ///
    /// # Errors
    /// [`Problem::StoredLength`], [`Problem::Candle`].
    pub fn dequantize(&self) -> std::result::Result<Tensor, Problem> {
        self.check_len()?;
        let values = match self.encoding {
            Encoding::Dense(DType::F32) => self.floats(f32::from_le_bytes),
            Encoding::Dense(DType::F16) => self.floats(|b| f16::from_le_bytes(b).to_f32()),
            Encoding::Dense(DType::BF16) => self.floats(|b| bf16::from_le_bytes(b).to_f32()),
            Encoding::Blocks(BlockFormat::NF4) => nf4::dequantise(&self.bytes),
            Encoding::Dense(_) | Encoding::Blocks(_) => return self.by_candle(),
        };
        Tensor::from_vec(values, self.shape.as_slice(), &Device::Cpu)
            .map_err(|cause| Problem::Candle { cause })
    }

    /// These elements as `encoding` spells them; blocks of GGUF's by Candle's quantisation, NF4 as bitsandbytes.
    ///
    /// # Errors
    /// [`Problem::SplitBlock`], [`Problem::StoredLength`], [`Problem::Candle`]; [`Problem::Quantise`]
    /// for a dtype that is no float of 32 or 16 bits; [`Problem::NotFinite`] for blocks of NF4.
    pub fn encode(
        values: &[f32],
        shape: &[usize],
        encoding: Encoding,
    ) -> std::result::Result<StoredTensor, Problem> {
        let bytes: Vec<u8> = match encoding {
            Encoding::Dense(DType::F32) => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Encoding::Dense(DType::F16) => {
                values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect()
            }
            Encoding::Dense(DType::BF16) => {
                values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect()
            }
            Encoding::Dense(_) => return Err(Problem::Quantise { encoding }),
            Encoding::Blocks(_) => quantise(values, shape, encoding)?,
        };
        let stored = StoredTensor { encoding, shape: shape.to_vec(), bytes: bytes.into() };
        stored.check_len()?;
        Ok(stored)
    }

    /// Dense floats, element by element, into the memory that the tensor then has.
    fn floats<const N: usize>(&self, read: impl Fn([u8; N]) -> f32) -> Vec<f32> {
        let (elements, _) = self.bytes.as_chunks::<N>();
        elements.iter().map(|&bytes| read(bytes)).collect()
    }

    fn by_candle(&self) -> std::result::Result<Tensor, Problem> {
        let device = Device::Cpu;
        // Candle asserts that blocks are aligned; a file may have put them anywhere.
        let bytes = match self.bytes.as_ptr().addr().is_multiple_of(BLOCK_ALIGN_BYTES) {
            true => Cow::Borrowed(&self.bytes[..]),
            false => Cow::Owned(self.bytes.to_vec()),
        };
        QStorage::from_data(bytes, &device, self.encoding.ggml())
            .and_then(|storage| QTensor::new(storage, self.shape.as_slice()))
            .and_then(|tensor| tensor.dequantize(&device))
            .map_err(|cause| Problem::Candle { cause })
    }

    /// Puts rows that llama.cpp stored for interleaved rotary embedding back into Hugging Face's
    /// order: within each head, row `2i + s` becomes row `s·d/2 + i`.
    ///
    /// The rows are moved as bytes, so quantised weights stay exactly what they were. A bias (rank
    /// 1) has rows of one element.
    ///
    /// # Errors
    /// [`Problem::Heads`] unless the rows split into `heads` heads of an even width;
    /// [`Problem::StoredLength`].
    pub fn unpermute_rope_rows(&mut self, heads: usize) -> std::result::Result<(), Problem> {
        self.move_rope_rows(heads, |row, half| (row % half) * 2 + row / half)
    }

    /// The inverse of [`Self::unpermute_rope_rows`]: Hugging Face's order to llama.cpp's.
    ///
    /// # Errors
    /// As [`Self::unpermute_rope_rows`].
    pub fn permute_rope_rows(&mut self, heads: usize) -> std::result::Result<(), Problem> {
        self.move_rope_rows(heads, |row, half| (row % 2) * half + row / 2)
    }

    /// `source` says which row of a head comes to a place, from half the rows of a head.
    fn move_rope_rows(
        &mut self,
        heads: usize,
        source: impl Fn(usize, usize) -> usize,
    ) -> std::result::Result<(), Problem> {
        self.check_len()?;
        let rows = self.shape.first().copied().unwrap_or(0);
        if heads == 0 || rows == 0 || !rows.is_multiple_of(2 * heads) {
            return Err(Problem::Heads { rows, heads });
        }
        let (row_bytes, head_rows) = (self.bytes.len() / rows, rows / heads);
        let mut moved = Vec::with_capacity(self.bytes.len());
        for head in self.bytes.chunks_exact(head_rows * row_bytes) {
            for row in 0..head_rows {
                let from = source(row, head_rows / 2) * row_bytes;
                moved.extend_from_slice(&head[from..][..row_bytes]);
            }
        }
        self.bytes = moved.into();
        Ok(())
    }

    /// The fields are public: what follows relies on their telling the same story.
    fn check_len(&self) -> std::result::Result<(), Problem> {
        let (row, rows) = self.shape.split_last().map_or((1, &[][..]), |(&row, rows)| (row, rows));
        let expected = rows
            .iter()
            .try_fold(self.encoding.row_bytes(row).unwrap_or(0), |n, &dim| n.checked_mul(dim))
            .unwrap_or(0);
        if expected == self.bytes.len() && expected > 0 {
            return Ok(());
        }
        let (shape, got) = (self.shape.clone(), self.bytes.len());
        Err(Problem::StoredLength { encoding: self.encoding, shape, expected, got })
    }
}

/// On all processors: formats with a search for their scales take a minute for a billion weights on one.
fn quantise(
    values: &[f32],
    shape: &[usize],
    encoding: Encoding,
) -> std::result::Result<Vec<u8>, Problem> {
    let row = shape.last().copied().unwrap_or(1);
    if encoding.row_bytes(row).is_none() {
        return Err(Problem::SplitBlock { tensor: format!("{encoding:?}"), row });
    }
    // Whole rows, so whole blocks, each of which knows itself alone.
    let at_once = PART.div_ceil(row.max(1)) * row.max(1);
    let parts = values.par_chunks(at_once).map(|part| quantise_part(part, encoding));
    Ok(parts.collect::<std::result::Result<Vec<_>, Problem>>()?.concat())
}

/// Weights that one processor quantises at once.
const PART: usize = 1 << 16;

fn quantise_part(values: &[f32], encoding: Encoding) -> std::result::Result<Vec<u8>, Problem> {
    if encoding == Encoding::Blocks(BlockFormat::NF4) {
        return match values.iter().find(|x| !x.is_finite()) {
            Some(&value) => Err(Problem::NotFinite { encoding, value }),
            None => Ok(nf4::quantise(values)),
        };
    }
    Tensor::from_slice(values, values.len(), &Device::Cpu)
        .and_then(|tensor| QTensor::quantize(&tensor, encoding.ggml()))
        .and_then(|quantised| Ok(quantised.data()?.into_owned()))
        .map_err(|cause| Problem::Candle { cause })
}

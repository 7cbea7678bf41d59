//! Weights by Hugging Face's names, whatever holds them.

use crate::Result;
use crate::io::gguf::{Encoding, GgufFile, StoredTensor};
use crate::io::{self, HfFolder};
use candle_core::Tensor;
use std::path::Path;

#[derive(Clone, Copy)]
pub(super) enum WeightSource<'a> {
    Gguf(&'a GgufFile),
    Folder(&'a HfFolder),
}

impl WeightSource<'_> {
    /// Whether a weight has these dims, by the header.
    pub(super) fn check(&self, name: &str, dims: &[usize]) -> Result<()> {
        let (path, shape) = self.shape(name)?;
        if shape == dims {
            return Ok(());
        }
        let (path, tensor) = (path.to_owned(), name.to_owned());
        let (expected, got) = (dims.to_vec(), shape.to_vec());
        Err(io::Error::WeightShape { path, tensor, expected, got }.into())
    }

    /// How a weight is stored, by the header.
    pub(super) fn encoding(&self, name: &str) -> Result<Encoding> {
        Ok(match self {
            WeightSource::Gguf(file) => file.weight_info(name)?.encoding,
            WeightSource::Folder(folder) => Encoding::Dense(folder.weight_dtype(name)?),
        })
    }

    /// What a weight takes in the file, by the header.
    pub(super) fn len_bytes(&self, name: &str) -> Result<usize> {
        Ok(match self {
            WeightSource::Gguf(file) => file.weight_info(name)?.len_bytes,
            WeightSource::Folder(folder) => folder.weight_len_bytes(name)?,
        })
    }

    pub(super) fn read(&self, name: &str) -> Result<StoredTensor> {
        Ok(match self {
            WeightSource::Gguf(file) => file.weight(name)?,
            WeightSource::Folder(folder) => folder.weight(name)?,
        })
    }

    pub(super) fn dequantise(&self, name: &str, stored: &StoredTensor) -> Result<Tensor> {
        stored.dequantize().or_else(|problem| {
            let path = self.shape(name)?.0.to_owned();
            Err(io::Error::Gguf { path, problem }.into())
        })
    }

    fn shape(&self, name: &str) -> io::Result<(&Path, &[usize])> {
        match self {
            WeightSource::Gguf(file) => Ok((file.path(), file.weight_shape(name)?)),
            WeightSource::Folder(folder) => folder.weight_shape(name),
        }
    }
}

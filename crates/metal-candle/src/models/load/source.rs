//! Weights by Hugging Face's names, whatever holds them.

use crate::Result;
use crate::io::gguf::{GgufFile, StoredTensor};
use crate::io::{self, HfFolder};
use candle_core::Tensor;
use std::path::Path;

#[derive(Clone, Copy)]
pub(super) enum WeightSource<'a> {
    Gguf(&'a GgufFile),
    Folder(&'a HfFolder),
}

impl WeightSource<'_> {
    /// One weight, if it has these dims; its shape is looked at before anything is read.
    pub(super) fn read(&self, name: &str, dims: &[usize]) -> Result<StoredTensor> {
        let (path, shape) = self.shape(name)?;
        if shape != dims {
            return Err(io::Error::WeightShape {
                path: path.to_owned(),
                tensor: name.to_owned(),
                expected: dims.to_vec(),
                got: shape.to_vec(),
            }
            .into());
        }
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

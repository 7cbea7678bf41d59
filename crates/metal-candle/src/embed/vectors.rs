//! What an encoder makes of texts.

use crate::io::gguf::{Encoding, StoredTensor};
use crate::io::hf::SafetensorsWriter;
use crate::io::{self, Error};
use crate::{DType, Result};
use std::path::Path;

/// Vectors, one for each text, in the order of the texts.
#[derive(Clone, Debug, PartialEq)]
pub struct Embeddings {
    dimension: usize,
    values: Vec<f32>,
    cut: usize,
}

impl Embeddings {
    pub(super) fn new(dimension: usize, values: Vec<f32>, cut: usize) -> Embeddings {
        Embeddings { dimension, values, cut }
    }

    /// Elements of a vector.
    pub fn dimension(&self) -> usize {
        self.dimension
    }

    /// Vectors.
    pub fn len(&self) -> usize {
        self.values.len() / self.dimension
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The vector of a text.
    ///
    /// # Panics
    /// Where there is no such text.
    pub fn row(&self, text: usize) -> &[f32] {
        &self.values[text * self.dimension..(text + 1) * self.dimension]
    }

    /// Every vector.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        self.values.chunks_exact(self.dimension)
    }

    /// One vector after the other.
    pub fn into_vec(self) -> Vec<f32> {
        self.values
    }

    /// Texts that were longer than the model reads.
    pub fn cut(&self) -> usize {
        self.cut
    }

    /// Writes a safetensors file with one tensor, `embeddings: f32 [texts, dimension]`, in one step.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let (name, shape) = ("embeddings", [self.len(), self.dimension]);
        let mut writer = SafetensorsWriter::default();
        writer.tensor(name, &shape, DType::F32);
        writer.write(path, |_| -> io::Result<StoredTensor> {
            let stored = StoredTensor::encode(&self.values, &shape, Encoding::Dense(DType::F32));
            stored.map_err(|problem| Error::Gguf { path: path.to_owned(), problem })
        })?;
        Ok(())
    }
}

//! Writing a GGUF file: a header, then one tensor after the other, never all of them in memory.

use std::io::Write;
use std::path::Path;

use super::{Encoding, GgufFile, StoredTensor};
use crate::io::{Error, Result, file};

const DEFAULT_ALIGNMENT: u64 = 32;
const VERSION: u32 = 3;

/// The header of a GGUF file to be.
#[derive(Clone, Debug)]
pub struct GgufWriter {
    /// Keys and values as they stand in the file.
    metadata: Vec<u8>,
    keys: u64,
    alignment_bytes: u64,
    tensors: Vec<Planned>,
}

/// A tensor that is still to be written.
#[derive(Clone, Debug)]
struct Planned {
    name: String,
    shape: Vec<usize>,
    encoding: Encoding,
    len_bytes: usize,
}

impl Default for GgufWriter {
    fn default() -> Self {
        Self { metadata: Vec::new(), keys: 0, alignment_bytes: DEFAULT_ALIGNMENT, tensors: vec![] }
    }
}

impl GgufWriter {
    /// A file with all the metadata of another one, byte for byte, and no tensors yet.
    pub fn like(file: &GgufFile) -> Self {
        // No truncation: the metadata lie within the map.
        let range = file.metadata_bytes.start as usize..file.metadata_bytes.end as usize;
        let metadata = file.map.slice(range).to_vec();
        let (keys, alignment_bytes) = (file.metadata.len() as u64, file.alignment_bytes);
        Self { metadata, keys, alignment_bytes, tensors: Vec::new() }
    }

    /// Adds a string.
    pub fn str(&mut self, key: &str, value: &str) {
        self.key(key, 8);
        string(&mut self.metadata, value);
    }

    /// Adds an unsigned integer.
    pub fn u32(&mut self, key: &str, value: u32) {
        self.key(key, 4);
        self.metadata.extend(value.to_le_bytes());
    }

    /// Adds a float.
    pub fn f32(&mut self, key: &str, value: f32) {
        self.key(key, 6);
        self.metadata.extend(value.to_le_bytes());
    }

    fn key(&mut self, key: &str, kind: u32) {
        string(&mut self.metadata, key);
        self.metadata.extend(kind.to_le_bytes());
        self.keys += 1;
    }

    /// Announces a tensor: its name, its shape (slowest dim first) and how it will be stored.
    ///
    /// # Panics
    /// Where a block would span two rows.
    pub fn tensor(&mut self, name: &str, shape: &[usize], encoding: Encoding) {
        let (row, rows) = shape.split_last().map_or((1, &[][..]), |(&row, rows)| (row, rows));
        let row_bytes = encoding.row_bytes(row);
        let row_bytes = row_bytes.expect("metal-candle bug: a block that spans two rows");
        let len_bytes = rows.iter().product::<usize>() * row_bytes;
        let (name, shape) = (name.to_owned(), shape.to_vec());
        self.tensors.push(Planned { name, shape, encoding, len_bytes });
    }

    /// Writes the file in one step; `data` is asked for the tensors in the order in which they were
    /// announced.
    ///
    /// # Errors
    /// Those of `data`, and [`Error::File`].
    ///
    /// # Panics
    /// Where a tensor is not as it was announced, or is in NF4, which GGUF files do not have.
    pub fn write<E: From<Error>>(
        &self,
        path: &Path,
        mut data: impl FnMut(usize) -> std::result::Result<StoredTensor, E>,
    ) -> std::result::Result<(), E> {
        file::write_atomic_with(path, |to| {
            let mut at = 0;
            self.put(to, path, &mut at, &self.header())?;
            for (i, planned) in self.tensors.iter().enumerate() {
                let StoredTensor { encoding, shape, bytes } = data(i)?;
                let is_so = (encoding, &shape, bytes.len())
                    == (planned.encoding, &planned.shape, planned.len_bytes);
                assert!(is_so, "metal-candle bug: {} is not as announced", planned.name);
                self.put(to, path, &mut at, &bytes)?;
            }
            Ok(())
        })
    }

    /// Writes bytes, and zeros up to the next multiple of the alignment.
    fn put(&self, to: &mut dyn Write, path: &Path, at: &mut u64, bytes: &[u8]) -> Result<()> {
        let end = *at + bytes.len() as u64;
        *at = end.next_multiple_of(self.alignment_bytes);
        let zeros = vec![0; (*at - end) as usize];
        to.write_all(bytes).and_then(|()| to.write_all(&zeros)).map_err(Error::file(path))
    }

    fn header(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(VERSION.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend(self.keys.to_le_bytes());
        out.extend(&self.metadata);
        let mut offset: u64 = 0;
        for tensor in &self.tensors {
            string(&mut out, &tensor.name);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            // Fastest dim first.
            tensor.shape.iter().rev().for_each(|dim| out.extend((*dim as u64).to_le_bytes()));
            out.extend(tensor.encoding.id().to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset = (offset + tensor.len_bytes as u64).next_multiple_of(self.alignment_bytes);
        }
        out
    }
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

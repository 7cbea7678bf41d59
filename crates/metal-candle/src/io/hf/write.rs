//! Writing a safetensors file: a header, then one tensor after the other, never all of them in
//! memory.

use std::path::Path;

use metal_candle_graph::DType;
use serde_json::{Map, Value, json};

use crate::io::gguf::{Encoding, StoredTensor};
use crate::io::{Error, Result, file};

/// The header of a safetensors file to be.
#[derive(Clone, Debug, Default)]
pub(crate) struct SafetensorsWriter {
    tensors: Vec<(String, Vec<usize>, DType)>,
    header: Map<String, Value>,
    len_bytes: usize,
}

impl SafetensorsWriter {
    /// Announces a tensor of f32, f16 or bf16.
    pub(crate) fn tensor(&mut self, name: &str, shape: &[usize], dtype: DType) {
        let start = self.len_bytes;
        self.len_bytes += shape.iter().product::<usize>() * dtype.size_bytes();
        let dtype_name = match dtype {
            DType::F16 => "F16",
            DType::BF16 => "BF16",
            DType::F32 => "F32",
            other => panic!("metal-candle bug: a weight of {other:?}"),
        };
        let offsets = [start, self.len_bytes];
        let entry = json!({ "dtype": dtype_name, "shape": shape, "data_offsets": offsets });
        self.header.insert(name.to_owned(), entry);
        self.tensors.push((name.to_owned(), shape.to_vec(), dtype));
    }

    /// Bytes of all tensors.
    pub(crate) fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Writes the file in one step; `data` is asked for the tensors in the order in which they were
    /// announced.
    pub(crate) fn write<E: From<Error>>(
        &self,
        path: &Path,
        mut data: impl FnMut(&str) -> std::result::Result<StoredTensor, E>,
    ) -> std::result::Result<(), E> {
        file::write_atomic_with(path, |to| {
            let mut put =
                |bytes: &[u8]| -> Result<()> { to.write_all(bytes).map_err(Error::file(path)) };
            put(&self.header())?;
            for (name, shape, dtype) in &self.tensors {
                let stored = data(name)?;
                let is_so = stored.encoding == Encoding::Dense(*dtype) && stored.shape == *shape;
                assert!(is_so, "metal-candle bug: {name} is not as announced");
                put(&stored.bytes)?;
            }
            Ok(())
        })
    }

    fn header(&self) -> Vec<u8> {
        let mut header = Map::new();
        // transformers refuses a file that does not say which framework it is for.
        header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
        header.extend(self.header.clone());
        let mut json = Value::Object(header).to_string().into_bytes();
        // Tensors begin at a multiple of 8.
        json.resize(json.len().next_multiple_of(8), b' ');
        [&(json.len() as u64).to_le_bytes(), json.as_slice()].concat()
    }
}

//! What the tests share: a GGUF writer, vectors, the real model.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// A file of `tests/data`.
pub(crate) fn vectors<T: DeserializeOwned>(name: &str) -> T {
    let path = data_folder().join(name);
    metal_candle::io::file::read_json(&path).unwrap()
}

pub(crate) fn data_folder() -> PathBuf {
    crate::testbed::file("data")
}

/// SmolLM2-135M-Instruct, if this machine has it; in CI it must.
pub(crate) fn smollm2(test: &str) -> Option<PathBuf> {
    real("SmolLM2-135M-Instruct.Q4_1.gguf", test)
}

/// The file or folder of a real model, likewise.
pub(crate) fn real(name: &str, test: &str) -> Option<PathBuf> {
    let cache = || std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
    let models = std::env::var_os("METAL_CANDLE_MODELS")
        .map(PathBuf::from)
        .or_else(|| Some(cache().or_else(home)?.join("metal-candle/models")))?;
    let path = models.join(name);
    if !path.exists() {
        assert!(std::env::var_os("CI").is_none(), "no {}", path.display());
        eprintln!("SKIPPED {test}: no {}: run `cargo xtask test` first", path.display());
        return None;
    }
    Some(path)
}

/// A metadata value to write.
#[derive(Clone)]
pub(crate) enum Meta {
    U32(u32),
    F32(f32),
    Bool(bool),
    Str(String),
    Strs(Vec<String>),
    I32s(Vec<i32>),
    /// Type id and bytes, as they are.
    Raw(u32, Vec<u8>),
}

/// A GGUF file being written, byte for byte, so that a test can break any of it.
#[derive(Clone, Default)]
pub(crate) struct GgufBuilder {
    pub(crate) metadata: Vec<(String, Meta)>,
    /// Name, dims fastest first, type id, offset in the data if not the next free one.
    pub(crate) tensors: Vec<(String, Vec<u64>, u32, Option<u64>)>,
    pub(crate) data: Vec<u8>,
}

impl GgufBuilder {
    pub(crate) fn meta(mut self, key: &str, value: Meta) -> Self {
        self.metadata.retain(|(k, _)| k != key);
        self.metadata.push((key.to_owned(), value));
        self
    }

    /// A tensor of `shape` (slowest dim first) at the next aligned place of the data.
    pub(crate) fn tensor(mut self, name: &str, shape: &[u64], type_id: u32, bytes: &[u8]) -> Self {
        self.data.resize(self.data.len().next_multiple_of(32), 0);
        let dims = shape.iter().rev().copied().collect();
        self.tensors.push((name.to_owned(), dims, type_id, Some(self.data.len() as u64)));
        self.data.extend_from_slice(bytes);
        self
    }

    pub(crate) fn f32_tensor(self, name: &str, shape: &[u64], values: &[f32]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.tensor(name, shape, 0, &bytes)
    }

    pub(crate) fn header(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            string(&mut out, key);
            write_meta(&mut out, value);
        }
        for (name, dims, type_id, offset) in &self.tensors {
            string(&mut out, name);
            out.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
            out.extend(type_id.to_le_bytes());
            out.extend(offset.unwrap_or(0).to_le_bytes());
        }
        out
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = self.header();
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend_from_slice(&self.data);
        out
    }

    pub(crate) fn write(&self, folder: &Path) -> PathBuf {
        let path = folder.join("test.gguf");
        std::fs::write(&path, self.bytes()).unwrap();
        path
    }
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn write_meta(out: &mut Vec<u8>, value: &Meta) {
    let array = |out: &mut Vec<u8>, kind: u32, len: usize| {
        out.extend(9u32.to_le_bytes());
        out.extend(kind.to_le_bytes());
        out.extend((len as u64).to_le_bytes());
    };
    match value {
        Meta::U32(v) => {
            out.extend(4u32.to_le_bytes());
            out.extend(v.to_le_bytes());
        }
        Meta::F32(v) => {
            out.extend(6u32.to_le_bytes());
            out.extend(v.to_le_bytes());
        }
        Meta::Bool(v) => {
            out.extend(7u32.to_le_bytes());
            out.push((*v).into());
        }
        Meta::Str(v) => {
            out.extend(8u32.to_le_bytes());
            string(out, v);
        }
        Meta::Strs(values) => {
            array(out, 8, values.len());
            values.iter().for_each(|v| string(out, v));
        }
        Meta::I32s(values) => {
            array(out, 5, values.len());
            values.iter().for_each(|v| out.extend(v.to_le_bytes()));
        }
        Meta::Raw(kind, bytes) => {
            out.extend(kind.to_le_bytes());
            out.extend(bytes);
        }
    }
}

//! One safetensors file: its header in memory, its tensors mapped.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use metal_candle_graph::DType;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use super::Problem;
use crate::io::bytes::{Bytes, MappedBytes};
use crate::io::gguf::{Encoding, StoredTensor};
use crate::io::{Error, Result};

/// As the safetensors crate has it.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// The header's own length, before it.
const PREFIX_BYTES: u64 = 8;

#[derive(Debug)]
pub(super) struct Shard {
    path: PathBuf,
    header: Metadata,
    /// From where the tensors begin.
    data: MappedBytes,
}

impl Shard {
    /// Reads and checks the header; its offsets are then within the file, without hole or overlap.
    pub(super) fn open(path: PathBuf) -> Result<Self> {
        let mut file = File::open(&path).map_err(Error::file(&path))?;
        let len = file.metadata().map_err(Error::file(&path))?.len();
        let mut prefix = [0; PREFIX_BYTES as usize];
        let fail = |problem| Err(Error::Model { path: path.clone(), problem });
        if len < PREFIX_BYTES {
            return fail(Problem::TruncatedHeader { needed: PREFIX_BYTES, len });
        }
        file.read_exact(&mut prefix).map_err(Error::file(&path))?;
        let header_bytes = u64::from_le_bytes(prefix);
        if header_bytes > MAX_HEADER_BYTES {
            return fail(Problem::HeaderSize { got: header_bytes, limit: MAX_HEADER_BYTES });
        }
        let data_bytes = PREFIX_BYTES + header_bytes;
        if data_bytes > len {
            return fail(Problem::TruncatedHeader { needed: data_bytes, len });
        }
        let mut json = vec![0; header_bytes as usize];
        file.read_exact(&mut json).map_err(Error::file(&path))?;
        // Deserialising checks that offsets follow on one another and agree with dtype and shape.
        let header: Metadata = match serde_json::from_slice(&json) {
            Ok(header) => header,
            Err(cause) => return fail(Problem::Header { cause }),
        };
        let needed = data_bytes.saturating_add(header.data_len() as u64);
        if needed != len {
            let tensor = header.offset_keys().pop().unwrap_or_default();
            return fail(Problem::Length { tensor, needed, len });
        }
        let too_long = |_| Error::file(&path)(std::io::ErrorKind::FileTooLarge.into());
        let len = usize::try_from(len).map_err(too_long)?;
        let map = MappedBytes::map(&file, len).map_err(Error::file(&path))?;
        Ok(Self { data: map.slice(data_bytes as usize..len), path, header })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn names(&self) -> impl Iterator<Item = String> {
        self.header.offset_keys().into_iter()
    }

    pub(super) fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.info(name)?.shape)
    }

    pub(super) fn dtype(&self, name: &str) -> Result<DType> {
        match self.stored_dtype(name)? {
            Dtype::F32 => Ok(DType::F32),
            Dtype::F16 => Ok(DType::F16),
            Dtype::BF16 => Ok(DType::BF16),
            other => {
                let (tensor, dtype) = (name.to_owned(), other.to_string());
                Err(self.error(Problem::DType { tensor, dtype }))
            }
        }
    }

    pub(super) fn len_bytes(&self, name: &str) -> Result<usize> {
        let (start, end) = self.info(name)?.data_offsets;
        Ok(end - start)
    }

    pub(super) fn read(&self, name: &str) -> Result<StoredTensor> {
        let (info, dtype) = (self.info(name)?, self.dtype(name)?);
        let bytes = self.bytes(name)?;
        Ok(StoredTensor { encoding: Encoding::Dense(dtype), shape: info.shape.clone(), bytes })
    }

    /// Of any dtype.
    pub(super) fn bytes(&self, name: &str) -> Result<Bytes> {
        let (start, end) = self.info(name)?.data_offsets;
        Ok(Bytes::Mapped(self.data.slice(start..end)))
    }

    pub(super) fn stored_dtype(&self, name: &str) -> Result<Dtype> {
        Ok(self.info(name)?.dtype)
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        let no_tensor = || self.error(Problem::NoTensor { tensor: name.to_owned() });
        self.header.info(name).ok_or_else(no_tensor)
    }

    fn error(&self, problem: Problem) -> Error {
        Error::Model { path: self.path.clone(), problem }
    }
}

//! GGUF model files: metadata, tensors by range, and the names that Hugging Face gives them.
//!
//! The header is read here rather than by `candle_core::quantized::gguf_file::Content`: that
//! reader divides by a hostile `general.alignment` of zero, loses the order of the tensors, lets a
//! byte array of the file's size grow 32-fold, and refuses the whole file for one tensor of a type
//! it does not know. Values, block types and dequantisation are Candle's.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3.

mod decoder;
mod header;
pub mod lora;
mod names;
mod problem;
mod rope;
mod stored;
mod write;

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use candle_core::quantized::GgmlDType;
pub use candle_core::quantized::gguf_file::Value;
use metal_candle_graph::{BlockFormat, DType};

pub use self::names::{gguf_name, hf_name};
pub use self::problem::Problem;
pub use self::stored::StoredTensor;
pub use self::write::GgufWriter;
use super::bytes::{Bytes, MappedBytes};
use super::{Error, Result};

/// How the bytes of a stored tensor spell its elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// One little-endian element after the other.
    Dense(DType),
    /// Quantised blocks along the last dim.
    Blocks(BlockFormat),
}

/// Where a tensor lies in the file. Checked against the file's length when it is opened.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// The name in the file, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Row-major, slowest dim first (a GGUF lists them the other way round).
    pub shape: Vec<usize>,
    /// How its bytes are to be read.
    pub encoding: Encoding,
    /// From the start of the file.
    pub offset_bytes: u64,
    /// Length in the file.
    pub len_bytes: usize,
}

/// An open GGUF file: its header in memory, its tensors mapped.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    map: MappedBytes,
    metadata: HashMap<String, Value>,
    /// Where the metadata lie in the file, from its start.
    metadata_bytes: Range<u64>,
    alignment_bytes: u64,
    tensors: Vec<TensorInfo>,
    index: HashMap<String, usize>,
}

impl GgufFile {
    /// Reads and checks the header, and maps the file: no tensor is read before it is used. See
    /// [`MappedBytes`] for what must not happen to a mapped file.
    ///
    /// # Errors
    /// [`Error::File`]; [`Error::Gguf`] for whatever contradicts the format or the file's length.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let mut file = File::open(&path).map_err(Error::file(&path))?;
        let len = file.metadata().map_err(Error::file(&path))?.len();
        let header = header::read(&mut file, len)
            .map_err(|problem| Error::Gguf { path: path.clone(), problem })?;
        // The header's offsets have been held against this length.
        let too_long = |_| Error::file(&path)(std::io::ErrorKind::FileTooLarge.into());
        let len = usize::try_from(len).map_err(too_long)?;
        let map = MappedBytes::map(&file, len).map_err(Error::file(&path))?;
        let index = header.tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        Ok(Self {
            path,
            map,
            metadata: header.metadata,
            metadata_bytes: header.metadata_bytes,
            alignment_bytes: header.alignment_bytes,
            tensors: header.tensors,
            index,
        })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Every key and value of the header.
    pub fn metadata(&self) -> &HashMap<String, Value> {
        &self.metadata
    }

    /// The tensors in the order of the file.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// One tensor's place, by its name in the file.
    ///
    /// # Errors
    /// [`Problem::NoTensor`].
    pub fn tensor(&self, name: &str) -> Result<&TensorInfo> {
        match self.index.get(name) {
            Some(&i) => Ok(&self.tensors[i]),
            None => Err(self.error(Problem::NoTensor { name: name.to_owned() })),
        }
    }

    /// Whether the file has a tensor of this name.
    pub fn has_tensor(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// One tensor's bytes, where they lie in the file, by its name there.
    ///
    /// # Errors
    /// [`Problem::NoTensor`].
    pub fn tensor_bytes(&self, name: &str) -> Result<StoredTensor> {
        let info = self.tensor(name)?;
        // No truncation: the tensor ends within the map.
        let start = info.offset_bytes as usize;
        let bytes = Bytes::Mapped(self.map.slice(start..start + info.len_bytes));
        Ok(StoredTensor { encoding: info.encoding, shape: info.shape.clone(), bytes })
    }

    /// One tensor as `f32` on the CPU, by its name in the file.
    ///
    /// # Errors
    /// As [`Self::tensor_bytes`].
    pub fn dequantize(&self, name: &str) -> Result<Tensor> {
        self.tensor_bytes(name)?.dequantize().map_err(|problem| self.error(problem))
    }

    /// An unsigned integer of any width that fits.
    ///
    /// # Errors
    /// [`Problem::NoKey`], [`Problem::ValueType`].
    pub fn u32(&self, key: &str) -> Result<u32> {
        self.required(key, "an integer of 32 bits", as_u32)
    }

    /// A float of either width.
    ///
    /// # Errors
    /// [`Problem::NoKey`], [`Problem::ValueType`].
    pub fn f64(&self, key: &str) -> Result<f64> {
        self.required(key, "a float", as_f64)
    }

    /// A string.
    ///
    /// # Errors
    /// [`Problem::NoKey`], [`Problem::ValueType`].
    pub fn str(&self, key: &str) -> Result<&str> {
        self.required(key, "a string", as_str)
    }

    /// An array of strings.
    ///
    /// # Errors
    /// [`Problem::NoKey`], [`Problem::ValueType`].
    pub fn strings(&self, key: &str) -> Result<Vec<&str>> {
        self.required(key, "an array of strings", |value| array(value, as_str))
    }

    /// An array of integers.
    ///
    /// # Errors
    /// [`Problem::NoKey`], [`Problem::ValueType`].
    pub fn u32s(&self, key: &str) -> Result<Vec<u32>> {
        self.required(key, "an array of integers", |value| array(value, as_u32))
    }

    /// As [`Self::u32`], where the key may be absent.
    ///
    /// # Errors
    /// [`Problem::ValueType`].
    pub fn u32_opt(&self, key: &str) -> Result<Option<u32>> {
        self.optional(key, "an integer of 32 bits", as_u32)
    }

    /// As [`Self::f64`], where the key may be absent.
    ///
    /// # Errors
    /// [`Problem::ValueType`].
    pub fn f64_opt(&self, key: &str) -> Result<Option<f64>> {
        self.optional(key, "a float", as_f64)
    }

    /// A boolean, where the key may be absent.
    ///
    /// # Errors
    /// [`Problem::ValueType`].
    pub fn bool_opt(&self, key: &str) -> Result<Option<bool>> {
        self.optional(key, "a boolean", |value| value.to_bool().ok())
    }

    /// As [`Self::str`], where the key may be absent.
    ///
    /// # Errors
    /// [`Problem::ValueType`].
    pub fn str_opt(&self, key: &str) -> Result<Option<&str>> {
        self.optional(key, "a string", as_str)
    }

    fn required<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<T> {
        self.optional(key, expected, read)?
            .ok_or_else(|| self.error(Problem::NoKey { key: key.to_owned() }))
    }

    fn optional<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| {
            self.error(Problem::ValueType {
                key: key.to_owned(),
                expected,
                got: header::describe(value),
            })
        })
    }

    fn error(&self, problem: Problem) -> Error {
        Error::Gguf { path: self.path.clone(), problem }
    }
}

impl Encoding {
    /// The id in a GGUF file, Candle's name and ours, for every type that can be read. NF4 is in none.
    const TABLE: [(u32, GgmlDType, Encoding); 15] = [
        (0, GgmlDType::F32, Encoding::Dense(DType::F32)),
        (1, GgmlDType::F16, Encoding::Dense(DType::F16)),
        (30, GgmlDType::BF16, Encoding::Dense(DType::BF16)),
        (2, GgmlDType::Q4_0, Encoding::Blocks(BlockFormat::Q4_0)),
        (3, GgmlDType::Q4_1, Encoding::Blocks(BlockFormat::Q4_1)),
        (6, GgmlDType::Q5_0, Encoding::Blocks(BlockFormat::Q5_0)),
        (7, GgmlDType::Q5_1, Encoding::Blocks(BlockFormat::Q5_1)),
        (8, GgmlDType::Q8_0, Encoding::Blocks(BlockFormat::Q8_0)),
        (9, GgmlDType::Q8_1, Encoding::Blocks(BlockFormat::Q8_1)),
        (10, GgmlDType::Q2K, Encoding::Blocks(BlockFormat::Q2K)),
        (11, GgmlDType::Q3K, Encoding::Blocks(BlockFormat::Q3K)),
        (12, GgmlDType::Q4K, Encoding::Blocks(BlockFormat::Q4K)),
        (13, GgmlDType::Q5K, Encoding::Blocks(BlockFormat::Q5K)),
        (14, GgmlDType::Q6K, Encoding::Blocks(BlockFormat::Q6K)),
        (15, GgmlDType::Q8K, Encoding::Blocks(BlockFormat::Q8K)),
    ];

    /// Bytes of one row of `len` elements, or `None` where a block would span two rows.
    pub fn row_bytes(self, len: usize) -> Option<usize> {
        match self {
            Encoding::Dense(dtype) => len.checked_mul(dtype.size_bytes()),
            Encoding::Blocks(format) => format.bytes_for(len),
        }
    }

    fn from_id(id: u32) -> Option<Self> {
        Self::TABLE.iter().find(|(i, ..)| *i == id).map(|&(.., encoding)| encoding)
    }

    fn ggml(self) -> GgmlDType {
        self.row().1
    }

    fn id(self) -> u32 {
        self.row().0
    }

    fn row(self) -> (u32, GgmlDType, Encoding) {
        let row = Self::TABLE.iter().find(|(.., encoding)| *encoding == self);
        *row.expect("metal-candle bug: an encoding that no GGUF type id leads to")
    }
}

fn as_u32(value: &Value) -> Option<u32> {
    match *value {
        Value::U8(v) => Some(v.into()),
        Value::U16(v) => Some(v.into()),
        Value::U32(v) => Some(v),
        Value::U64(v) => v.try_into().ok(),
        Value::I8(v) => v.try_into().ok(),
        Value::I16(v) => v.try_into().ok(),
        Value::I32(v) => v.try_into().ok(),
        Value::I64(v) => v.try_into().ok(),
        Value::F32(_) | Value::F64(_) | Value::Bool(_) | Value::String(_) | Value::Array(_) => None,
    }
}

fn as_f64(value: &Value) -> Option<f64> {
    match *value {
        Value::F32(v) => Some(v.into()),
        Value::F64(v) => Some(v),
        _ => None,
    }
}

fn as_str(value: &Value) -> Option<&str> {
    value.to_string().ok().map(String::as_str)
}

fn array<'a, T>(value: &'a Value, read: impl Fn(&'a Value) -> Option<T>) -> Option<Vec<T>> {
    value.to_vec().ok()?.iter().map(read).collect()
}

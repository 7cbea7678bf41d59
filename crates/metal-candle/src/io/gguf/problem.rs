//! What can be wrong with a GGUF file.

use super::Encoding;
use metal_candle_graph::BlockFormat;

/// What is wrong with a GGUF file; offsets count bytes from its start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum Problem {
    #[error("not a GGUF file: it begins with {magic:02x?} instead of \"GGUF\"")]
    Magic { magic: [u8; 4] },
    #[error("GGUF version {got}: expected 2 or 3 in little-endian order")]
    Version { got: u32 },
    #[error(
        "the file ends too early: {needed} bytes wanted at offset {at}, {left} left; \
         is the download complete?"
    )]
    Truncated { at: u64, needed: u64, left: u64 },
    #[error("reading at offset {at}: {cause}")]
    Read { at: u64, cause: std::io::Error },
    #[error("{key}: unknown value type {got} at offset {at}")]
    UnknownValueType { key: String, got: u32, at: u64 },
    #[error("{key}: an array of arrays, which no reader of GGUF supports")]
    NestedArray { key: String },
    #[error("the name at offset {at} has {len} bytes: expected at most {limit}, all printable")]
    Name { at: u64, len: usize, limit: usize },
    #[error("{key}: the header's metadata has more than {limit} values")]
    TooManyValues { key: String, limit: u32 },
    #[error("two {what}s are called {name:?}")]
    Duplicate { what: &'static str, name: String },
    #[error("general.alignment is {got}: expected a power of two")]
    Alignment { got: u32 },
    #[error("tensor {tensor:?} has {rank} dims: expected at most 4")]
    Rank { tensor: String, rank: u32 },
    #[error("tensor {tensor:?} of shape {shape:?} has no elements")]
    Empty { tensor: String, shape: Vec<usize> },
    #[error("tensor {tensor:?} of shape {shape:?} is larger than can be addressed")]
    Overflow { tensor: String, shape: Vec<usize> },
    #[error("tensor {tensor:?} has type id {id}, which is not supported")]
    TensorType { tensor: String, id: u32 },
    #[error("tensor {tensor:?}: rows of {row} elements do not divide into whole blocks")]
    SplitBlock { tensor: String, row: usize },
    #[error("tensor {tensor:?} ends at offset {end}, the file at {len}; is the download complete?")]
    PastEnd { tensor: String, end: u64, len: u64 },
    #[error("the file has no tensor {name:?}")]
    NoTensor { name: String },
    #[error("the metadata has no key {key:?}")]
    NoKey { key: String },
    #[error("{key}: expected {expected}, got {got}")]
    ValueType { key: String, expected: &'static str, got: String },
    #[error("{rows} rows do not split into {heads} heads of an even width")]
    Heads { rows: usize, heads: usize },
    #[error("no floats can be written as {encoding:?}")]
    Quantise { encoding: Encoding },
    #[error("it is in blocks of {stored:?}: expected floats")]
    InBlocks { stored: BlockFormat },
    #[error("rows of {row} weights: expected a multiple of the {block} of a block")]
    RowOfBlocks { row: usize, block: usize },
    #[error("{value} cannot be written as {encoding:?}: expected a finite number")]
    NotFinite { encoding: Encoding, value: f32 },
    #[error("{encoding:?} of shape {shape:?}: expected {expected} bytes, got {got}")]
    StoredLength { encoding: Encoding, shape: Vec<usize>, expected: usize, got: usize },
    #[error("architecture {got:?}: expected one of {known:?}")]
    Architecture { got: String, known: Vec<&'static str> },
    #[error("{what} is {value}, which is not supported")]
    Unsupported { what: String, value: String },
    #[error("{what} is {got}: expected {expected}")]
    Inconsistent { what: &'static str, got: String, expected: String },
    #[error("{name:?} is no decoder weight: expected a name such as {example:?}")]
    WeightName { name: String, example: &'static str },
    #[error("{cause}")]
    Candle { cause: candle_core::Error },
}

//! The header of a GGUF file. No number in it is believed before it was held against the file.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io::{BufReader, Read};
use std::ops::Range;

use candle_core::quantized::gguf_file::Value;

use super::{Encoding, Problem, TensorInfo};

type Result<T> = std::result::Result<T, Problem>;

/// More than any real header has (a vocabulary of 256k tokens with its merges is under a million)
/// and few enough that a file of bytes cannot blow up to a multiple of its size in memory.
const MAX_VALUES: u32 = 1 << 24;
/// The shortest entry: a name's length, rank, type id, offset.
const MIN_TENSOR: u64 = 8 + 4 + 4 + 8;
/// The shortest entry: a key's length, a type id, one byte.
const MIN_KEY: u64 = 8 + 4 + 1;
const MAX_RANK: u32 = 4;
/// ggml gives tensors 63 bytes; keys are as long in practice, though they might be longer.
const MAX_NAME_BYTES: usize = 1024;
const DEFAULT_ALIGNMENT: u32 = 32;

pub(super) struct Header {
    pub(super) metadata: HashMap<String, Value>,
    /// Where they lie in the file.
    pub(super) metadata_bytes: Range<u64>,
    pub(super) alignment_bytes: u64,
    pub(super) tensors: Vec<TensorInfo>,
}

/// Reads the header from the start of a file of `len` bytes.
pub(super) fn read(file: impl Read, len: u64) -> Result<Header> {
    let mut reader = Reader { inner: BufReader::new(file), at: 0, len, values: MAX_VALUES };
    let magic = reader.take()?;
    if magic != *b"GGUF" {
        return Err(Problem::Magic { magic });
    }
    let version = reader.u32()?;
    if !(2..=3).contains(&version) {
        return Err(Problem::Version { got: version });
    }
    let (tensor_count, key_count) = (reader.u64()?, reader.u64()?);
    let least = |count: u64, bytes: u64| count.saturating_mul(bytes);
    reader.expect(least(tensor_count, MIN_TENSOR).saturating_add(least(key_count, MIN_KEY)))?;
    let start = reader.at;
    let metadata = read_metadata(&mut reader, key_count)?;
    let metadata_bytes = start..reader.at;
    let mut tensors = read_tensors(&mut reader, tensor_count)?;
    let alignment_bytes = alignment(&metadata)?;
    let data_start = reader.at.next_multiple_of(alignment_bytes);
    for tensor in &mut tensors {
        place(tensor, data_start, len)?;
    }
    Ok(Header { metadata, metadata_bytes, alignment_bytes, tensors })
}

/// A value in words, shortened: it goes into error messages.
pub(super) fn describe(value: &Value) -> String {
    match value {
        Value::Array(values) => format!("an array of {} values", values.len()),
        Value::String(text) => {
            format!("the string {:?}", text.chars().take(40).collect::<String>())
        }
        other => format!("{other:?}"),
    }
}

fn read_metadata(reader: &mut Reader<impl Read>, count: u64) -> Result<HashMap<String, Value>> {
    let mut metadata = HashMap::new();
    for _ in 0..count {
        let key = reader.name()?;
        let kind = reader.u32()?;
        let value = reader.value(&key, kind)?;
        match metadata.entry(key) {
            Entry::Occupied(entry) => {
                return Err(Problem::Duplicate { what: "metadata key", name: entry.key().clone() });
            }
            Entry::Vacant(entry) => entry.insert(value),
        };
    }
    Ok(metadata)
}

/// The tensors with their offsets still relative to the start of the data.
fn read_tensors(reader: &mut Reader<impl Read>, count: u64) -> Result<Vec<TensorInfo>> {
    let mut tensors = Vec::new();
    let mut seen = std::collections::HashSet::new();
    for _ in 0..count {
        let tensor = read_tensor(reader)?;
        if !seen.insert(tensor.name.clone()) {
            return Err(Problem::Duplicate { what: "tensor", name: tensor.name });
        }
        tensors.push(tensor);
    }
    Ok(tensors)
}

fn read_tensor(reader: &mut Reader<impl Read>) -> Result<TensorInfo> {
    let name = reader.name()?;
    let rank = reader.u32()?;
    if rank > MAX_RANK {
        return Err(Problem::Rank { tensor: name, rank });
    }
    let mut shape = Vec::with_capacity(rank as usize);
    for _ in 0..rank {
        // A dim that does not fit in memory overflows the size below.
        shape.push(usize::try_from(reader.u64()?).unwrap_or(usize::MAX));
    }
    shape.reverse();
    let id = reader.u32()?;
    let offset_bytes = reader.u64()?;
    let Some(encoding) = Encoding::from_id(id) else {
        return Err(Problem::TensorType { tensor: name, id });
    };
    let len_bytes = len_bytes(&name, &shape, encoding)?;
    Ok(TensorInfo { name, shape, encoding, offset_bytes, len_bytes })
}

fn len_bytes(tensor: &str, shape: &[usize], encoding: Encoding) -> Result<usize> {
    let name = || tensor.to_owned();
    if shape.contains(&0) {
        return Err(Problem::Empty { tensor: name(), shape: shape.to_vec() });
    }
    let overflow = || Problem::Overflow { tensor: name(), shape: shape.to_vec() };
    // The element count has to fit too: it is what `Shape::elem_count` multiplies unchecked.
    shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim)).ok_or_else(overflow)?;
    let (row, rows) = shape.split_last().map_or((1, &[][..]), |(&row, rows)| (row, rows));
    let row_bytes = encoding.row_bytes(row).ok_or_else(|| match encoding {
        Encoding::Dense(_) => overflow(),
        Encoding::Blocks(_) => Problem::SplitBlock { tensor: name(), row },
    })?;
    rows.iter().try_fold(row_bytes, |n, &dim| n.checked_mul(dim)).ok_or_else(overflow)
}

fn alignment(metadata: &HashMap<String, Value>) -> Result<u64> {
    let alignment = match metadata.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(value) => super::as_u32(value).ok_or_else(|| Problem::ValueType {
            key: "general.alignment".to_owned(),
            expected: "an integer of 32 bits",
            got: describe(value),
        })?,
    };
    if alignment.is_power_of_two() {
        Ok(alignment.into())
    } else {
        Err(Problem::Alignment { got: alignment })
    }
}

/// Makes the tensor's offset absolute, and checks that the tensor ends within the file.
fn place(tensor: &mut TensorInfo, data_start: u64, len: u64) -> Result<()> {
    let start = data_start.checked_add(tensor.offset_bytes);
    let end = start.and_then(|start| start.checked_add(tensor.len_bytes as u64));
    match (start, end) {
        (Some(start), Some(end)) if end <= len => {
            tensor.offset_bytes = start;
            Ok(())
        }
        _ => {
            Err(Problem::PastEnd { tensor: tensor.name.clone(), end: end.unwrap_or(u64::MAX), len })
        }
    }
}

/// The fewest bytes that a value of this kind takes; of a string, its length.
fn least_bytes(kind: u32) -> u64 {
    match kind {
        2 | 3 => 2,
        4..=6 => 4,
        8 | 10..=12 => 8,
        _ => 1,
    }
}

struct Reader<R> {
    inner: BufReader<R>,
    at: u64,
    len: u64,
    /// Metadata values that may still come.
    values: u32,
}

impl<R: Read> Reader<R> {
    /// The next `n` bytes exist, so that `n` bytes may be allocated.
    fn expect(&self, n: u64) -> Result<()> {
        let left = self.len - self.at;
        if n <= left { Ok(()) } else { Err(Problem::Truncated { at: self.at, needed: n, left }) }
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        let needed = bytes.len() as u64;
        self.expect(needed)?;
        self.inner.read_exact(bytes).map_err(|cause| Problem::Read { at: self.at, cause })?;
        self.at += needed;
        Ok(())
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    /// A string that names something, and so goes into messages.
    fn name(&mut self) -> Result<String> {
        let at = self.at;
        let name = self.string()?;
        if name.len() > MAX_NAME_BYTES || name.chars().any(char::is_control) {
            return Err(Problem::Name { at, len: name.len(), limit: MAX_NAME_BYTES });
        }
        Ok(name)
    }

    /// Trailing NULs are dropped and invalid UTF-8 is replaced: both occur in real files, in
    /// descriptions that nothing depends on.
    fn string(&mut self) -> Result<String> {
        let len = self.u64()?;
        self.expect(len)?;
        // No truncation: `expect` has compared it with the length of a file that fits in memory
        // where `usize` is narrower than `u64` only if the file does.
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        self.fill(&mut bytes)?;
        while bytes.last() == Some(&0) {
            bytes.pop();
        }
        Ok(String::from_utf8(bytes)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
    }

    fn value(&mut self, key: &str, kind: u32) -> Result<Value> {
        const ARRAY: u32 = 9;
        if kind != ARRAY {
            return self.scalar(key, kind);
        }
        let kind = self.u32()?;
        if kind == ARRAY {
            return Err(Problem::NestedArray { key: key.to_owned() });
        }
        let len = self.u64()?;
        // A length beyond the file, or beyond the limit, is refused at once: then room may be made.
        self.expect(len.saturating_mul(least_bytes(kind)))?;
        if len > u64::from(self.values) {
            return Err(Problem::TooManyValues { key: key.to_owned(), limit: MAX_VALUES });
        }
        let mut values = Vec::with_capacity(len as usize);
        for _ in 0..len {
            values.push(self.scalar(key, kind)?);
        }
        Ok(Value::Array(values))
    }

    fn scalar(&mut self, key: &str, kind: u32) -> Result<Value> {
        self.values = self
            .values
            .checked_sub(1)
            .ok_or_else(|| Problem::TooManyValues { key: key.to_owned(), limit: MAX_VALUES })?;
        Ok(match kind {
            0 => Value::U8(u8::from_le_bytes(self.take()?)),
            1 => Value::I8(i8::from_le_bytes(self.take()?)),
            2 => Value::U16(u16::from_le_bytes(self.take()?)),
            3 => Value::I16(i16::from_le_bytes(self.take()?)),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(i32::from_le_bytes(self.take()?)),
            6 => Value::F32(f32::from_le_bytes(self.take()?)),
            7 => Value::Bool(self.take::<1>()? != [0]),
            8 => Value::String(self.string()?),
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.take()?)),
            12 => Value::F64(f64::from_le_bytes(self.take()?)),
            got => {
                return Err(Problem::UnknownValueType { key: key.to_owned(), got, at: self.at });
            }
        })
    }
}

//! Files in memory as they lie on disk: pages come when they are first read, and go when memory is short.

use crate::element::{Data, Element};
use half::{bf16, f16};
use memmap2::{Mmap, MmapOptions};
use metal_candle_graph::DType;
use std::fs::File;
use std::ops::{Deref, Range};
use std::sync::Arc;
use std::{fmt, io};

/// A part of a file that is mapped for reading. A handle: cloning it copies nothing, and the last one unmaps.
///
/// The file must stay as it is while it is mapped. Replacing it (by a rename, as this program writes files, and as
/// downloads do) is harmless: the old one lives on until it is let go. If another program overwrites it in place its
/// values change; if one cuts it short, reading what is gone ends the process.
#[derive(Clone)]
pub struct MappedBytes {
    map: Arc<Mmap>,
    range: Range<usize>,
}

impl MappedBytes {
    /// Maps the first `len` bytes.
    ///
    /// # Errors
    /// What the operating system says; also where the file is shorter, as reading beyond its end would end the
    /// process.
    pub fn map(file: &File, len: usize) -> io::Result<MappedBytes> {
        let got = file.metadata()?.len();
        if got < len as u64 {
            let message = format!("the file has {got} bytes: expected {len}");
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
        }
        // SAFETY: the map is read only, and within the file as it is now. That nobody changes the file while it is
        // mapped is the user's part, said above: no system offers more. Whatever bytes there are, they are a value
        // of every element type.
        let map = unsafe { MmapOptions::new().len(len).map(file)? };
        Ok(MappedBytes { map: Arc::new(map), range: 0..len })
    }

    /// A part of these bytes.
    ///
    /// # Panics
    /// Where the range is not within them, as slices do.
    pub fn slice(&self, range: Range<usize>) -> MappedBytes {
        assert!(range.start <= range.end && range.end <= self.len(), "{range:?} of {}", self.len());
        let start = self.range.start;
        let range = start + range.start..start + range.end;
        MappedBytes { map: Arc::clone(&self.map), range }
    }
}

impl Deref for MappedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }
}

impl fmt::Debug for MappedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MappedBytes({})", self.len())
    }
}

/// Elements of a mapped file: whole ones, at an address that their type may have.
pub(crate) struct Mapped {
    bytes: MappedBytes,
    dtype: DType,
}

impl Mapped {
    /// The bytes back where they are no such elements in the machine's order.
    pub(crate) fn new(bytes: MappedBytes, dtype: DType) -> Result<Mapped, MappedBytes> {
        let size = dtype.size_bytes();
        let whole = bytes.len().is_multiple_of(size) && bytes.as_ptr().addr().is_multiple_of(size);
        // Files are little-endian.
        if whole && cfg!(target_endian = "little") {
            Ok(Mapped { bytes, dtype })
        } else {
            Err(bytes)
        }
    }

    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len() / self.dtype.size_bytes()
    }

    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.bytes.as_ptr()
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    #[cfg(feature = "metal")]
    pub(crate) fn file(&self) -> &MappedBytes {
        &self.bytes
    }

    pub(crate) fn to_data(&self) -> Data {
        copy(&self.bytes, self.dtype)
    }
}

/// Little-endian elements, copied; bytes that are no whole element are left out.
pub(crate) fn copy(bytes: &[u8], dtype: DType) -> Data {
    fn all<T: Element, const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> T) -> Data {
        Data::new(bytes.as_chunks::<N>().0.iter().map(|b| read(*b)).collect::<Vec<T>>())
    }
    match dtype {
        DType::U8 => Data::new(bytes.to_vec()),
        DType::U32 => all(bytes, u32::from_le_bytes),
        DType::I64 => all(bytes, i64::from_le_bytes),
        DType::BF16 => all(bytes, bf16::from_le_bytes),
        DType::F16 => all(bytes, f16::from_le_bytes),
        DType::F32 => all(bytes, f32::from_le_bytes),
        DType::F64 => all(bytes, f64::from_le_bytes),
    }
}

//! What a file holds, read or mapped.

use std::ops::Deref;

pub use metal_candle_runtime::MappedBytes;

/// Bytes in memory of their own, or in a file that is mapped.
#[derive(Clone, Debug)]
pub enum Bytes {
    /// In memory of their own.
    Owned(Vec<u8>),
    /// Where they lie in a file: nothing is read before it is used, and nothing is copied.
    Mapped(MappedBytes),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Owned(bytes) => bytes,
            Bytes::Mapped(bytes) => bytes,
        }
    }
}

impl PartialEq for Bytes {
    fn eq(&self, other: &Bytes) -> bool {
        **self == **other
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Bytes {
        Bytes::Owned(bytes)
    }
}

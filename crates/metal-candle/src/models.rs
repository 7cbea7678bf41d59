//! Models, written on [`LazyTensor`](crate::LazyTensor).

mod decoder;
pub mod fuse;
mod load;

pub use decoder::{CacheInput, Decoder, DecoderLayer};
pub use load::{BaseWeights, LoadedModel, load, load_decoder, load_gguf};

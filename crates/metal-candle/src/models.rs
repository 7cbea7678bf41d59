//! Models, written on [`LazyTensor`](crate::LazyTensor).

mod decoder;
mod load;

pub use decoder::{CacheInput, Decoder, DecoderLayer, PaddedRows};
pub use load::{BaseWeights, LoadedModel, load, load_decoder, load_gguf, load_outline};

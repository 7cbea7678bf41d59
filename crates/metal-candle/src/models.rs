//! Models, written on [`LazyTensor`](crate::LazyTensor).

mod decoder;
mod fingerprint;
mod finite;
pub mod fuse;
mod load;

pub use decoder::{CacheInput, Decoder, DecoderLayer, PackedInput, PaddedRows};
pub use load::{
    BaseWeights, LoadedModel, load, load_decoder, load_gguf, load_outline, random_decoder,
};

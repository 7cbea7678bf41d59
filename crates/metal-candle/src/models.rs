//! Models, written on [`LazyTensor`](crate::LazyTensor).

mod decoder;
mod encoder;
mod fingerprint;
mod finite;
pub mod fuse;
mod load;

pub use decoder::{CacheInput, Decoder, DecoderLayer, PackedInput, PaddedRows};
pub use encoder::{Encoder, EncoderLayer};
pub use load::{
    BaseWeights, LoadedModel, load, load_decoder, load_encoder, load_gguf, load_outline,
    random_decoder,
};

//! Files in and out: models, tokenizers, chat templates, training data, adapters.
//!
//! ```text
//! gguf ─────── a model file: metadata, tensors, names as in Hugging Face
//! hf ───────── a model folder: config.json and safetensors, whole or in shards
//! sentence ─── what sentence-transformers writes beside an encoder
//! config ───── the shapes of decoders and encoders, as plain data
//! generation ─ how a model's makers mean it to be run
//! tokenizer ── text <-> ids, from tokenizer.json or from a GGUF's metadata
//! chat ─────── messages -> text, by the model's own Jinja template
//! data ─────── rows of JSONL or CSV -> token sequences -> padded batches
//! adapter ──── LoRA adapters in any tool's format: peft, mlx, gguf::lora
//! nf4 ──────── floats in blocks of NF4, which bitsandbytes writes too
//! file ─────── reading, and writing without ever leaving half a file
//! bytes ────── what a file holds, read or mapped
//! ```
//!
//! Everything here is plain data (bytes, vectors, [`candle_core::Tensor`]) and knows no [lazy
//! tensor](crate). Every input is taken to be hostile: a header is checked against the file's
//! length before anything is allocated, and whatever is wrong comes back as an [`Error`] that
//! names the file and carries the values.

pub mod adapter;
pub mod bytes;
pub mod chat;
pub mod config;
pub mod data;
mod error;
pub mod file;
mod generation;
pub mod gguf;
pub mod hf;
pub mod mlx;
mod nf4;
pub mod peft;
mod sentence;
pub mod tokenizer;

pub use adapter::AdapterFormat;
pub use bytes::Bytes;
pub use chat::{ChatTemplate, Message};
pub use config::{Activation, DecoderConfig, EncoderConfig, RopeLayout, RopeScaling};
pub use error::{Error, Result};
pub use generation::GenerationConfig;
pub use gguf::GgufFile;
pub use hf::{HfFolder, HfWeights};
pub use peft::{LoraConfig, PeftAdapter};
pub use sentence::{EmbeddingConfig, Pooling, SentenceFolder};
pub use tokenizer::Tokenizer;

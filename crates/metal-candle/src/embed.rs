//! Embeddings: texts in, vectors out, near each other where the texts mean the same.
//!
//! ```text
//! model ─── an encoder with its tokenizer: what a user calls
//! vectors ─ what it gives back
//! batch ─── texts of like lengths together, so that little is padded
//! pool ──── from the vectors of tokens to one of a text
//! ```

mod batch;
mod model;
mod pool;
mod vectors;

pub use crate::io::{EmbeddingConfig, Pooling};
pub use model::EmbeddingModel;
pub use pool::{cls_pool, mean_pool, normalize};
pub use vectors::Embeddings;

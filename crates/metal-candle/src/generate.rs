//! Generation: a prompt in, tokens out, one plan per token.

mod cache;
mod generator;
mod sampling;

pub use cache::KVCache;
pub use generator::{Finish, Generated, Generator, GeneratorConfig, StreamToken};
pub use sampling::{SamplingStrategy, sample_token};

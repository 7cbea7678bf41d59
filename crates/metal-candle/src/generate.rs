//! Generation: a prompt in, tokens out, one plan per token.
//!
//! ```text
//! generator ─ the loop around the decode step, blocking or awaited
//! batch ───── the same for several prompts at once
//! step ────── what one step computes
//! session ─── the cache from one turn of a conversation to the next
//! run ─────── what one generation knows: logits in, tokens and text out
//! sampling ── from logits to a token
//! logits ──── penalties and biases before, log-probabilities after
//! stop ────── stop strings, also across tokens
//! cache ───── keys and values of the tokens so far
//! ```

mod batch;
mod cache;
mod config;
mod generator;
mod logits;
mod run;
mod sampling;
mod session;
mod step;
mod stop;
mod stream;

pub use cache::KVCache;
pub use config::{Finish, Generated, GeneratorConfig, StreamToken};
pub use generator::Generator;
pub use logits::LogProbs;
pub use sampling::{Sampling, SamplingStrategy, sample_token};
pub use session::Session;
pub use step::DecodeShape;
pub use stream::TokenStream;

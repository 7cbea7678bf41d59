//! Files in and out, against what the Python libraries make of the same files, and against files
//! that are broken on purpose.
//!
//! The vectors in `data/` are made by `reference/files.py`. Tests of the real SmolLM2-135M look
//! for it where `cargo xtask quickstart` keeps it, or in `METAL_CANDLE_MODELS`, and say so when
//! they skip.

mod chat;
mod columns;
mod data;
mod file;
mod gguf;
mod gguf_decoder;
mod peft;
mod support;
#[path = "../support/testbed.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod testbed;
mod tokenizer;

//! Layers: what a model is made of. They know shapes and weights, no device and no file.

mod adapter;
mod layers;
mod lora;
mod rope;
mod weight;

pub use crate::io::LoraConfig as LoRAAdapterConfig;
pub use adapter::{AdapterRegistry, ApplyAdapter, LoRAAdapter};
pub use layers::{Embedding, LayerNorm, Linear, RmsNorm, Rotary, Rotation};
pub use lora::{LoRADropout, LoRALayer};
pub use weight::Weight;

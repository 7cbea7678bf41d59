//! Fine-tune and run language models on your own machine: lazy tensors that are differentiated, fused and
//! planned as a whole, and what stands on them.
//!
//! ```text
//! lazy ─────── LazyTensor: record, evaluate        transform ─ grad, compile
//! nn, models ─ layers and models                   io ──────── files
//! train ────── the training step and its loop      generate ── text out
//!                                                   embed ───── vectors of texts
//! ```
//!
//! Tensors begin with [`LazyTensor`], [`grad`] and [`compile`]:
//!
//! ```
//! use metal_candle::{DType, Device, LazyTensor, grad};
//!
//! let x = LazyTensor::randn(&[4, 8], DType::F32, 0, &Device::Cpu)?;
//! let w = LazyTensor::randn(&[8, 2], DType::F32, 1, &Device::Cpu)?;
//! let loss = x.matmul(&w)?.sqr()?.mean_all()?;
//! let gradient = grad(&loss, &[&w])?.remove(0);
//! assert_eq!(gradient.dims(), w.dims()); // nothing has been computed yet
//! let values = LazyTensor::eval_all(&[&loss, &gradient])?; // forward and backward as one plan
//! # assert_eq!(values.len(), 2);
//! # Ok::<(), metal_candle::Error>(())
//! ```
//!
//! Language models begin with [`models::load`], [`train::Trainer`] and [`generate::Generator`]; vectors of texts with
//! [`embed::EmbeddingModel`]. `README.md` in the repository fine-tunes a model from Rust, and `ARCHITECTURE.md` has the whole
//! picture.
#![warn(missing_docs)]

pub mod embed;
mod error;
mod fnv;
pub mod generate;
pub mod io;
mod lazy;
pub mod models;
pub mod nn;
pub mod train;
mod transform;

pub use error::{Error, ErrorKind, Result};
pub use lazy::{Attention, CrossEntropy, Dim, LazyTensor};
pub use metal_candle_compiler::{self as plan, Plan};
pub use metal_candle_graph::{self as graph, BlockFormat, ComputationGraph, DType, Operation};
pub use metal_candle_runtime::{
    AsyncGraphExecutor, Device, Element, Memory, Pending, Rendezvous, Timing, Workspace, World,
    WorldError, allow_tf32,
};
pub use transform::{Compiled, InputSource, Outline, Recording, compile, grad, value_and_grad};

#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct ReadmeDoctests;

//! From a [`ComputationGraph`](metal_candle_graph::ComputationGraph) to a [`Plan`]: what runs, in which
//! order, and where every byte lives.
//!
//! ```text
//! graph ─ passes ─ region (what is fused) ─ lower (kernels and library calls) ─ siblings ─ memory ─ Plan
//! ```
//!
//! A GPU wants its kernels as source text: [`render`].
//!
//! This crate knows no device: it reads a [`Target`] (plain data) and writes a [`Plan`] (plain data).

mod analysis;
mod concat;
mod cost;
mod emit;
mod error;
mod finish;
mod gemm;
pub mod kernel;
mod layout;
mod library;
mod low_rank;
mod lower;
mod memory;
mod operands;
mod plan;
mod print;
mod region;
pub mod render;
mod schedule;
mod siblings;
mod target;

pub use error::{Error, Result};
pub use layout::Layout;
pub use library::LibraryCall;
pub use plan::{Operand, OutputSource, Plan, PlanInput, PlanOutput, Slot, Step, Work, plan};
pub use print::Bytes;
pub use target::Target;

//! Apple's GPUs, on top of Candle's device.
//!
//! ```text
//! executable ─ a plan's commands in one command buffer, whose completion handler gives the results
//! command ──── a launch of a kernel, or a product, with its buffers
//! product ──── Candle's GEMM and GEMV; a plain kernel for what they do not take
//! library ──── rendered text, compiled once and kept
//! memory ───── memory that both processors see
//! gpu ──────── a device and its queue
//! ```
//!
//! Candle keeps its own queue to itself, so plans have one of theirs on the same device. A run first waits for what Candle
//! has asked for, if an input is Candle's; its results are there when Candle sees them.
//!
//! No machine of Apple's is needed to test `product` and `library`: they are plain data, and tests of every system.

#[cfg(feature = "metal")]
mod command;
#[cfg(feature = "metal")]
mod executable;
#[cfg(feature = "metal")]
mod gpu;
mod library;
#[cfg(feature = "metal")]
mod memory;
mod product;

#[cfg(feature = "metal")]
pub(crate) use executable::MetalExecutable;
#[cfg(feature = "metal")]
pub(crate) use gpu::Gpu;

//! NVIDIA GPUs, on top of Candle's device.
//!
//! ```text
//! executable ─ a plan's steps as commands, run at once or replayed as a graph
//! command ──── a launch of a kernel, or a product
//! product ──── cuBLASLt, and a plain kernel for what it does not take
//! compile ──── rendered text to machine code, kept on disk
//! marks ────── what a step takes
//! memory ───── device memory, and host memory that the device reads
//! gpu ──────── a device: context, stream, libraries
//! ```
//!
//! Everything runs on one stream per device, in the order in which it was asked for.

mod command;
mod compile;
mod executable;
mod gpu;
mod marks;
mod memory;
mod product;

pub(crate) use executable::CudaExecutable;
pub(crate) use gpu::Gpu;

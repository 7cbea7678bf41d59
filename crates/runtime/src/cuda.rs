//! NVIDIA GPUs, on top of Candle's device.
//!
//! ```text
//! executable ─ a plan made ready, and a run of it
//! flight ───── a run that need not be over
//! bind ─────── where a run's memory lies
//! staging ──── small values, which travel together
//! graph ────── a run recorded, to be replayed
//! command ──── a plan's steps: launches of kernels, and products
//! join ─────── which kernels are launched as one
//! product ──── products by cuBLASLt
//! compile ──── rendered text to machine code, kept on disk
//! marks ────── what a step takes
//! memory ───── device memory, and host memory that the device reads
//! nccl ─────── sums over ranks
//! gpu ──────── a device: context, stream, libraries
//! ```
//!
//! Everything runs on one stream per device, in the order in which it was asked for.

mod bind;
mod command;
mod compile;
mod executable;
mod flight;
mod gpu;
mod graph;
mod join;
mod marks;
mod memory;
mod nccl;
mod product;
mod staging;

pub(crate) use executable::CudaExecutable;
pub(crate) use gpu::Gpu;
pub(crate) use nccl::Nccl;

//! Runs plans: buffers, kernels and the asynchronous executor. All `unsafe` code of the workspace is in this crate.
//!
//! ```text
//! Plan ─ verify ─ Executable (programs, arena) ─ AsyncGraphExecutor ─┬─ run ──── results
//!                     ▲                                              └─ submit ─ Pending ─ wait / .await
//!                 PlanCache
//! ```
//!
//! [`Buffer`]s go in and come out; Candle tensors become buffers, and buffers tensors, without a copy, and so
//! do [`MappedBytes`] of a file become buffers.

mod arena;
#[cfg(any(feature = "cuda", feature = "metal", test))]
mod blas;
mod buffer;
mod cache;
mod candle;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod device;
mod element;
mod error;
mod executable;
mod executor;
#[cfg(any(feature = "cuda", feature = "metal", test))]
mod hazards;
mod in_flight;
mod inputs;
mod mapped;
#[cfg(any(test, feature = "metal"))]
mod metal;
mod pages;
#[cfg(any(test, feature = "cuda", feature = "metal"))]
mod parts;
mod pending;
#[cfg(any(feature = "cuda", feature = "metal"))]
mod places;
mod prefetch;
mod run_memories;
mod spares;
mod team;
mod verify;
mod workspaces;
mod world;

pub use buffer::Buffer;
pub use cache::PlanCache;
pub use candle::{dtype_from_candle, dtype_to_candle};
pub use device::{Device, Memory, allow_tf32};
pub use element::Element;
pub use error::{Error, PlanFault, Result};
pub use executable::{Executable, Timing};
pub use executor::AsyncGraphExecutor;
pub use in_flight::InFlight;
pub use mapped::MappedBytes;
pub use pending::Pending;
pub use prefetch::prefetch;
pub use workspaces::Workspace;
pub use world::{Rendezvous, World, WorldError};

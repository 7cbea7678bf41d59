//! What is to be computed: the operations, the arena that holds them, and the rewrites on it.
//!
//! ```text
//! operation ─ the vocabulary          infer ─ shapes and dtypes, errors
//! graph ───── the interned arena      autodiff ─ graph to graph
//! composite ─ ops with a meaning      pass ── simplify, expand
//! oracle ──── what every op means, in f64
//! ```
//!
//! This crate knows no backend: no device, buffer, file or `unsafe`.

pub mod autodiff;
pub mod builder;
pub mod composite;
mod dtype;
mod error;
mod graph;
mod infer;
mod operation;
pub mod oracle;
pub mod pass;
mod philox;
mod print;
mod scalar;
mod shape;

pub use composite::Composite;
pub use dtype::{BlockFormat, Class, DType};
pub use error::{Error, Result};
pub use graph::{ComputationGraph, Node, NodeId};
pub use infer::{broadcast_shapes, infer};
pub use operation::{
    ArgReduceOp, BinaryOp, Dims, Distribution, Operation, Permutation, ReduceOp, UnaryOp,
};
pub use philox::{philox4x32, random_f64};
pub use scalar::Scalar;
pub use shape::{MAX_RANK, Shape, TensorType};

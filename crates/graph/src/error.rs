//! What can be wrong with a graph. Every error carries the values that made it.

use crate::{DType, Shape, TensorType};

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("{op}: expected {expected} inputs, got {got}")]
    Arity { op: &'static str, expected: usize, got: usize },
    #[error("{op}: shapes {lhs} and {rhs} do not broadcast together")]
    Broadcast { op: &'static str, lhs: Shape, rhs: Shape },
    #[error("{op}: expected shape {expected}, got {got}")]
    Shape { op: &'static str, expected: Shape, got: Shape },
    #[error("{op}: expected a tensor of rank {expected}, got rank {got}")]
    Rank { op: &'static str, expected: &'static str, got: usize },
    #[error("{op}: dim {dim} is out of range for rank {rank}")]
    Dim { op: &'static str, dim: i64, rank: usize },
    #[error("{op}: dims {dims:?} name a dim twice or are no permutation of rank {rank}")]
    Dims { op: &'static str, dims: Vec<usize>, rank: usize },
    #[error("{op}: inner extents differ in {lhs} x {rhs}: expected [.., m, k] x [.., k, n]")]
    Dot { op: &'static str, lhs: Shape, rhs: Shape },
    #[error("{op}: cannot reshape {from} ({} elements) into {to} ({} elements)", from.len(), to.len())]
    Reshape { op: &'static str, from: Shape, to: Shape },
    #[error("{op}: expected dtype {expected}, got {got}")]
    DType { op: &'static str, expected: &'static str, got: DType },
    #[error("{op}: dtypes {lhs} and {rhs} differ: cast one of them with to_dtype")]
    DTypeMismatch { op: &'static str, lhs: DType, rhs: DType },
    #[error("{op}: range {start}..{end} is out of bounds for extent {extent} of dim {dim}")]
    Range { op: &'static str, dim: usize, start: usize, end: usize, extent: usize },
    #[error("{op}: reducing an empty dim (shape {shape}) has no value")]
    EmptyReduce { op: &'static str, shape: Shape },
    #[error("{op}: {what} must be {expected}, got {got}")]
    Attribute { op: &'static str, what: &'static str, expected: &'static str, got: String },
    #[error("shape {dims:?} has more elements than can be addressed")]
    ShapeOverflow { dims: Vec<usize> },
    #[error("grad: expected a scalar loss of a float dtype, got {got}")]
    Loss { got: TensorType },
    #[error("grad: trainable {name} is not used by the loss")]
    Unused { name: String },
    #[error(
        "grad: trainable {name} reaches the loss only through {op}, which has no gradient; path: {path}"
    )]
    NotDifferentiable { name: String, op: String, path: String },
    #[error("grad: trainable {name} has dtype {dtype}; only floats have gradients")]
    IntegerTrainable { name: String, dtype: DType },
    #[error("{op}: index {index} is out of range for extent {extent} (at position {position})")]
    IndexOutOfRange { op: &'static str, index: i64, extent: usize, position: usize },
}

pub type Result<T> = std::result::Result<T, Error>;

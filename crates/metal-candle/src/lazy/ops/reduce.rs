//! Sums, means and extremes over dims, their positions, and running sums.

use super::Dim;
use crate::error::AtCaller;
use crate::{DType, LazyTensor, Result};
use metal_candle_graph::{ArgReduceOp, Class, Composite, Dims, Error, Operation, ReduceOp, Shape};

/// Declares the three methods of a reduction over any dims.
macro_rules! reduce {
    ($($(#[doc = $doc:literal])* $name:ident, $keepdim:ident, $all:ident = $op:expr,
        $numerics:literal, $errors:literal;)*) => {
        impl LazyTensor {
            $(
                $(#[doc = $doc])*
                ///
                /// # Shapes
                /// `dims` are gone from the result: `[2, 3, 4]` over `[0, -1]` gives `[3]`.
                ///
                /// # Numerics
                #[doc = $numerics]
                ///
                /// # Errors
                /// For a dim that is not there, or is there twice.
                #[doc = $errors]
                #[track_caller]
                pub fn $name(
                    &self,
                    dims: impl IntoIterator<Item = impl Into<Dim>>,
                ) -> Result<LazyTensor> {
                    let dims = self.dims_of(stringify!($name), dims)?;
                    self.reduce($op, &dims)?.without(&dims)
                }

                #[doc = concat!("[`LazyTensor::", stringify!($name), "`], `dims` kept as 1.")]
                ///
                /// # Errors
                #[doc = concat!("As [`LazyTensor::", stringify!($name), "`].")]
                #[track_caller]
                pub fn $keepdim(
                    &self,
                    dims: impl IntoIterator<Item = impl Into<Dim>>,
                ) -> Result<LazyTensor> {
                    let dims = self.dims_of(stringify!($name), dims)?;
                    self.reduce($op, &dims)
                }

                #[doc = concat!("[`LazyTensor::", stringify!($name), "`] over all dims: rank 0.")]
                ///
                /// # Errors
                #[doc = concat!("As [`LazyTensor::", stringify!($name), "`].")]
                #[track_caller]
                pub fn $all(&self) -> Result<LazyTensor> {
                    self.$name(0..self.rank())
                }
            )*
        }
    };
}

reduce! {
    #[doc = "The sum over `dims`; an empty one is 0."]
    sum, sum_keepdim, sum_all = Over::Op(ReduceOp::Sum),
        "Accumulates in f32 (f64 for f64, i64 for integers) and rounds or wraps once.", "";
    #[doc = "The mean over `dims`."]
    mean, mean_keepdim, mean_all = Over::Mean,
        "Accumulates in f32 (f64 for f64) and rounds once.",
        "For an integer dtype, and where there is nothing to take the mean of.";
    #[doc = "The largest over `dims`, NaN if one is; equal ones share the gradient."]
    max, max_keepdim, max_all = Over::Op(ReduceOp::Max), "Exact.",
        "Where there is nothing to choose from.";
    #[doc = "The smallest over `dims`, NaN if one is; equal ones share the gradient."]
    min, min_keepdim, min_all = Over::Op(ReduceOp::Min), "Exact.",
        "Where there is nothing to choose from.";
}

/// What is taken over dims.
#[derive(Clone, Copy)]
enum Over {
    Op(ReduceOp),
    Mean,
}

/// Declares the three methods of an operation along one dim that leaves one element of it.
macro_rules! along {
    ($($(#[doc = $doc:literal])* $name:ident, $keepdim:ident, $all:ident = $op:expr,
        $numerics:literal, $errors:literal;)*) => {
        impl LazyTensor {
            $(
                $(#[doc = $doc])*
                ///
                /// # Shapes
                /// `dim` is gone from the result: `[2, 3, 4]` along 1 gives `[2, 4]`.
                ///
                /// # Numerics
                #[doc = $numerics]
                ///
                /// # Errors
                #[doc = $errors]
                #[track_caller]
                pub fn $name(&self, dim: impl Into<Dim>) -> Result<LazyTensor> {
                    let dim = self.dim_of(stringify!($name), dim)?;
                    self.$keepdim(dim)?.without(&[dim])
                }

                #[doc = concat!("[`LazyTensor::", stringify!($name), "`], `dim` kept as 1.")]
                ///
                /// # Errors
                #[doc = concat!("As [`LazyTensor::", stringify!($name), "`].")]
                #[track_caller]
                pub fn $keepdim(&self, dim: impl Into<Dim>) -> Result<LazyTensor> {
                    let dim = self.dim_of(stringify!($name), dim)?;
                    let op: fn(usize) -> Operation = $op;
                    LazyTensor::record(op(dim), &[self])
                }

                #[doc = concat!("[`LazyTensor::", stringify!($name), "`] of all elements: rank 0.")]
                ///
                /// # Errors
                #[doc = concat!("As [`LazyTensor::", stringify!($name), "`].")]
                #[track_caller]
                pub fn $all(&self) -> Result<LazyTensor> {
                    self.flatten_all()?.$name(0usize)
                }
            )*
        }
    };
}

along! {
    #[doc = "The position of the largest along `dim`, the first on ties; NaN counts as largest."]
    argmax, argmax_keepdim, argmax_all =
        |dim| Operation::ArgReduce { op: ArgReduceOp::ArgMax, dim },
        "Exact: a u32, in row-major order; there is no gradient.",
        "For a dim that is not there, and where there is nothing to choose from.";
    #[doc = "The position of the smallest along `dim`, the first on ties; NaN counts as smallest."]
    argmin, argmin_keepdim, argmin_all =
        |dim| Operation::ArgReduce { op: ArgReduceOp::ArgMin, dim },
        "Exact: a u32, in row-major order; there is no gradient.",
        "For a dim that is not there, and where there is nothing to choose from.";
    #[doc = "`log Σ exp x` along `dim`, without overflow: `max + log Σ exp(x - max)`."]
    #[doc = "Of nothing it is -inf."]
    logsumexp, logsumexp_keepdim, logsumexp_all =
        |dim| Operation::Composite(Composite::LogSumExp { dim }),
        "Computed in f32 (f64 for f64) and rounded once.",
        "For a dim that is not there, and for an integer dtype.";
}

impl LazyTensor {
    /// The running sum along `dim`, each element included.
    ///
    /// # Shapes
    /// Any with that dim; the result has the same.
    ///
    /// # Numerics
    /// Accumulates in f32 (f64 for f64, i64 for integers).
    ///
    /// # Errors
    /// For a dim that is not there.
    #[track_caller]
    pub fn cumsum(&self, dim: impl Into<Dim>) -> Result<LazyTensor> {
        let dim = self.dim_of("cumsum", dim)?;
        LazyTensor::record(Operation::CumSum { dim, reverse: false }, &[self])
    }

    /// The sum of all ranks' tensors in this place, for a function that is compiled to run
    /// [within](crate::Compiled::within) a world; elsewhere the tensor itself. Differentiated, it is taken for a part of
    /// the sum of the ranks' losses.
    ///
    /// # Shapes
    /// Any, the same on each rank.
    ///
    /// # Numerics
    /// In its own dtype; the same bits on each rank.
    ///
    /// # Errors
    /// For a dtype that is neither f32 nor f64.
    #[track_caller]
    pub fn all_reduce(&self) -> Result<LazyTensor> {
        LazyTensor::record(Operation::AllReduce, &[self])
    }

    /// `dims` reduced to extent 1.
    #[track_caller]
    fn reduce(&self, over: Over, dims: &[usize]) -> Result<LazyTensor> {
        let Over::Op(op) = over else { return self.mean_over(dims) };
        let shape = self.ty().shape;
        // Over one element there is nothing to do.
        let dims = Dims::new(dims.iter().copied().filter(|d| shape[*d] != 1));
        if dims.is_empty() {
            return Ok(self.clone());
        }
        LazyTensor::record(Operation::Reduce { op, dims }, &[self])
    }

    #[track_caller]
    fn mean_over(&self, dims: &[usize]) -> Result<LazyTensor> {
        let (op, dtype, shape) = ("mean", self.dtype(), self.ty().shape);
        let n: usize = dims.iter().map(|d| shape[*d]).product();
        if !dtype.is_float() {
            return Err(Error::DType { op, expected: "a float", got: dtype }).at_caller();
        }
        if n == 0 {
            return Err(Error::EmptyReduce { op, shape }).at_caller();
        }
        // A sum may be beyond f16 whose mean is not.
        let wide = if dtype.class() == Class::F64 { DType::F64 } else { DType::F32 };
        let sum = self.to_dtype(wide)?.reduce(Over::Op(ReduceOp::Sum), dims)?;
        sum.affine(1.0 / n as f64, 0.0)?.to_dtype(dtype)
    }

    /// Without `dims`, which have extent 1.
    #[track_caller]
    fn without(&self, dims: &[usize]) -> Result<LazyTensor> {
        let kept = (0..self.rank()).filter(|d| !dims.contains(d));
        let kept: Vec<usize> = kept.map(|d| self.dims()[d]).collect();
        self.reshape_to(Shape::new(&kept).at_caller()?)
    }
}

//! Scalar functions of two arguments, and the choice between two.

use crate::error::AtCaller;
use crate::{LazyTensor, Result};
use metal_candle_graph::{BinaryOp, Operation, broadcast_shapes};

/// Declares the methods of scalar functions that give one dtype.
macro_rules! binary {
    ($numerics:literal { $($(#[doc = $doc:literal])* $name:ident = $op:ident,)* }) => {
        impl LazyTensor {
            $(
                $(#[doc = $doc])*
                ///
                /// # Shapes
                /// Any two that broadcast together (NumPy's rule); the result has the common one.
                ///
                /// # Numerics
                #[doc = $numerics]
                ///
                /// # Errors
                /// Where the shapes do not broadcast together, and where dtypes or devices differ.
                #[track_caller]
                pub fn $name(&self, rhs: &LazyTensor) -> Result<LazyTensor> {
                    self.binary(BinaryOp::$op, rhs)
                }
            )*
        }
    };
}

binary! { "bf16 and f16 are computed in f32 and rounded once; integers wrap." {
    #[doc = "`a + b`"]
    add = Add,
    #[doc = "`a - b`"]
    sub = Sub,
    #[doc = "`a · b`"]
    mul = Mul,
    #[doc = "`a / b`; integers truncate towards 0, and a division by 0 gives 0."]
    div = Div,
    #[doc = "`aᵇ`; for integers, a negative exponent gives 0 unless the base is 1 or -1."]
    pow = Pow,
    #[doc = "The larger one, NaN if either is; equal ones share the gradient."]
    maximum = Maximum,
    #[doc = "The smaller one, NaN if either is; equal ones share the gradient."]
    minimum = Minimum,
}}

binary! { "Exact. u8, 0 or 1; there is no gradient." {
    #[doc = "`a = b`; NaN equals nothing."]
    eq = Eq,
    #[doc = "`a ≠ b`; NaN differs from everything."]
    ne = Ne,
    #[doc = "`a < b`"]
    lt = Lt,
    #[doc = "`a ≤ b`"]
    le = Le,
    #[doc = "`a > b`"]
    gt = Gt,
    #[doc = "`a ≥ b`"]
    ge = Ge,
}}

impl LazyTensor {
    #[track_caller]
    pub(super) fn binary(&self, op: BinaryOp, rhs: &LazyTensor) -> Result<LazyTensor> {
        let [a, b] = self.broadcast_pair(op.as_str(), rhs)?;
        LazyTensor::record(Operation::Binary(op), &[&a, &b])
    }

    /// `a` where this condition is not 0, `b` where it is.
    ///
    /// What is not chosen leaks nothing, no NaN and no gradient either.
    ///
    /// # Shapes
    /// Any three that broadcast together; the result has the common one.
    ///
    /// # Errors
    /// Where the shapes do not broadcast together, the condition is not u8, or a and b differ in
    /// dtype.
    #[track_caller]
    pub fn where_cond(&self, a: &LazyTensor, b: &LazyTensor) -> Result<LazyTensor> {
        let op = "where_cond";
        let common = broadcast_shapes(op, &a.ty().shape, &b.ty().shape).at_caller()?;
        let common = broadcast_shapes(op, &self.ty().shape, &common).at_caller()?;
        let cond = self.broadcast_for(op, common)?;
        let (a, b) = (a.broadcast_for(op, common)?, b.broadcast_for(op, common)?);
        LazyTensor::record(Operation::Select, &[&cond, &a, &b])
    }
}

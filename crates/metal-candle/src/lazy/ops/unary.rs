//! Scalar functions of one argument.

use crate::{LazyTensor, Result};
use metal_candle_graph::{Operation, UnaryOp};

/// Declares the methods of scalar functions that have one domain.
macro_rules! unary {
    ($domain:literal { $($(#[doc = $doc:literal])* $name:ident = $op:ident,)* }) => {
        impl LazyTensor {
            $(
                $(#[doc = $doc])*
                ///
                /// # Shapes
                /// Any; the result has the same.
                ///
                /// # Numerics
                /// bf16 and f16 are computed in f32 and rounded once.
                ///
                /// # Errors
                #[doc = $domain]
                #[track_caller]
                pub fn $name(&self) -> Result<LazyTensor> {
                    LazyTensor::record(Operation::Unary(UnaryOp::$op), &[self])
                }
            )*
        }
    };
}

unary! { "Never: every dtype has it. Integers wrap." {
    #[doc = "`-x`"]
    neg = Neg,
    #[doc = "`|x|`; the gradient at 0 is 0."]
    abs = Abs,
    #[doc = "-1, 0 or 1; NaN stays NaN. The gradient is 0."]
    sign = Sign,
    #[doc = "`x²`"]
    sqr = Sqr,
    #[doc = "`max(x, 0)`; NaN stays NaN, and the gradient at 0 is 0."]
    relu = Relu,
    #[doc = "The largest integer that is at most x. The gradient is 0."]
    floor = Floor,
    #[doc = "The smallest integer that is at least x. The gradient is 0."]
    ceil = Ceil,
    #[doc = "The nearest integer, the even one of two, as IEEE 754 and PyTorch. The gradient is 0."]
    round = Round,
}}

unary! { "For an integer dtype." {
    #[doc = "`1 / x`"]
    recip = Recip,
    #[doc = "`√x`; NaN below 0."]
    sqrt = Sqrt,
    #[doc = "`1 / √x`"]
    rsqrt = Rsqrt,
    #[doc = "`eˣ`"]
    exp = Exp,
    #[doc = "The natural logarithm; NaN below 0."]
    log = Log,
    #[doc = "`log(1 + x)`, exact near 0."]
    log1p = Log1p,
    #[doc = "`eˣ - 1`, exact near 0."]
    expm1 = Expm1,
    #[doc = "The sine, of radians."]
    sin = Sin,
    #[doc = "The cosine, of radians."]
    cos = Cos,
    #[doc = "The hyperbolic tangent."]
    tanh = Tanh,
    #[doc = "The error function, `2 / √π · ∫₀ˣ exp(-t²) dt`."]
    erf = Erf,
    #[doc = "`1 / (1 + exp(-x))`"]
    sigmoid = Sigmoid,
    #[doc = "`x · sigmoid(x)` (Hendrycks & Gimpel 2016; swish)."]
    silu = Silu,
    #[doc = "`x · (1 + erf(x / √2)) / 2` (Hendrycks & Gimpel 2016); what Candle calls `gelu_erf`."]
    gelu = Gelu,
    #[doc = "`x · (1 + tanh(√(2 / π) · (x + 0.044715 x³))) / 2`, the same paper's approximation;"]
    #[doc = "what Candle calls `gelu`."]
    gelu_tanh = GeluTanh,
}}

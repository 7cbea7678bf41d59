//! The scalar functions on registers: one row of these tables for every row of the graph's.
//!
//! f32 goes through `math`, which compilers vectorise; f64 and what is rare through libm. Within 4 ulp, but for what the
//! formula itself cancels.

use crate::cpu::halves::{bf16_to_f32, f16_to_f32, round_to_bf16, round_to_f16};
use crate::cpu::kernel::tile::{Map1, Map2, TileFn, map1, map2};
use crate::cpu::math;
use crate::cpu::simd::MulAdd;
use metal_candle_graph::{BinaryOp, Class, DType, UnaryOp};
use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI};

/// Declares the function that finds a unary operation's loop for one class.
macro_rules! unary_table {
    ($name:ident: $ty:ty { $($variant:ident($x:ident) => $body:expr,)* } $($rest:tt)*) => {
        fn $name(op: UnaryOp) -> TileFn {
            match op {
                $(UnaryOp::$variant => {
                    struct F;
                    impl Map1<$ty, $ty> for F {
                        #[inline(always)]
                        fn apply<M: MulAdd>($x: $ty) -> $ty {
                            $body
                        }
                    }
                    map1::<$ty, $ty, F>()
                })*
                $($rest)*
            }
        }
    };
}

unary_table! { unary_f32: f32 {
    Neg(x) => -x,
    Abs(x) => x.abs(),
    Sign(x) => sign(x),
    Recip(x) => 1.0 / x,
    Sqr(x) => x * x,
    Sqrt(x) => x.sqrt(),
    Rsqrt(x) => 1.0 / x.sqrt(),
    Exp(x) => math::exp_f32::<M>(x),
    Log(x) => math::ln_f32::<M>(x),
    Log1p(x) => x.ln_1p(),
    Expm1(x) => x.exp_m1(),
    Sin(x) => x.sin(),
    Cos(x) => x.cos(),
    Tanh(x) => math::tanh_f32::<M>(x),
    Erf(x) => math::erf_f32::<M>(x),
    Sigmoid(x) => 1.0 / (1.0 + math::exp_f32::<M>(-x)),
    Relu(x) => if x < 0.0 { 0.0 } else { x },
    Silu(x) => x / (1.0 + math::exp_f32::<M>(-x)),
    Gelu(x) => gelu_f32::<M>(x),
    GeluTanh(x) => {
        let u = (FRAC_2_PI.sqrt() as f32) * (x + 0.044_715 * x * x * x);
        0.5 * x * (1.0 + math::tanh_f32::<M>(u))
    },
    Floor(x) => x.floor(),
    Ceil(x) => x.ceil(),
    Round(x) => x.round_ties_even(),
} }

unary_table! { unary_f64: f64 {
    Neg(x) => -x,
    Abs(x) => x.abs(),
    Sign(x) => if x > 0.0 { 1.0 } else if x < 0.0 { -1.0 } else { x },
    Recip(x) => 1.0 / x,
    Sqr(x) => x * x,
    Sqrt(x) => x.sqrt(),
    Rsqrt(x) => 1.0 / x.sqrt(),
    Exp(x) => x.exp(),
    Log(x) => x.ln(),
    Log1p(x) => x.ln_1p(),
    Expm1(x) => x.exp_m1(),
    Sin(x) => x.sin(),
    Cos(x) => x.cos(),
    Tanh(x) => x.tanh(),
    Erf(x) => libm::erf(x),
    Sigmoid(x) => 1.0 / (1.0 + (-x).exp()),
    Relu(x) => if x < 0.0 { 0.0 } else { x },
    Silu(x) => x / (1.0 + (-x).exp()),
    Gelu(x) => 0.5 * x * (1.0 + libm::erf(x * FRAC_1_SQRT_2)),
    GeluTanh(x) => 0.5 * x * (1.0 + (FRAC_2_PI.sqrt() * (x + 0.044_715 * x * x * x)).tanh()),
    Floor(x) => x.floor(),
    Ceil(x) => x.ceil(),
    Round(x) => x.round_ties_even(),
} }

unary_table! { unary_i64: i64 {
    Neg(x) => x.wrapping_neg(),
    Abs(x) => x.wrapping_abs(),
    Sign(x) => x.signum(),
    Sqr(x) => x.wrapping_mul(x),
    Relu(x) => x.max(0),
    Floor(x) => x,
    Ceil(x) => x,
    Round(x) => x,
}
    op => panic!("metal-candle bug: {op} of integers"),
}

#[inline(always)]
pub(super) fn gelu_f32<M: MulAdd>(x: f32) -> f32 {
    0.5 * x * (1.0 + math::erf_f32::<M>(x * std::f32::consts::FRAC_1_SQRT_2))
}

#[inline(always)]
fn sign(x: f32) -> f32 {
    if x > 0.0 {
        1.0
    } else if x < 0.0 {
        -1.0
    } else {
        x
    }
}

/// The loop of a unary operation on registers of a class.
pub(super) fn unary_of(op: UnaryOp, class: Class) -> TileFn {
    match class {
        Class::F32 => unary_f32(op),
        Class::F64 => unary_f64(op),
        Class::I64 => unary_i64(op),
    }
}

/// Declares the function that finds a binary operation's loop for one class of operands.
macro_rules! binary_table {
    ($name:ident: $ty:ty { $($variant:ident($a:ident, $b:ident) => $body:expr,)* }) => {
        fn $name(op: BinaryOp, one: [bool; 2]) -> TileFn {
            match op {
                $(BinaryOp::$variant => {
                    struct F;
                    impl Map2<$ty, $ty> for F {
                        #[inline(always)]
                        fn apply<M: MulAdd>($a: $ty, $b: $ty) -> $ty {
                            $body
                        }
                    }
                    map2::<$ty, $ty, F>(one)
                })*
                BinaryOp::Eq => compare!($ty, one, |a, b| a == b),
                BinaryOp::Ne => compare!($ty, one, |a, b| a != b),
                BinaryOp::Lt => compare!($ty, one, |a, b| a < b),
                BinaryOp::Le => compare!($ty, one, |a, b| a <= b),
                BinaryOp::Gt => compare!($ty, one, |a, b| a > b),
                BinaryOp::Ge => compare!($ty, one, |a, b| a >= b),
            }
        }
    };
}

macro_rules! compare {
    ($ty:ty, $one:expr, |$a:ident, $b:ident| $body:expr) => {{
        struct F;
        impl Map2<$ty, i64> for F {
            #[inline(always)]
            fn apply<M: MulAdd>($a: $ty, $b: $ty) -> i64 {
                i64::from($body)
            }
        }
        map2::<$ty, i64, F>($one)
    }};
}

/// NaN if either is: a comparison with NaN fails, and then the other one is taken.
macro_rules! extreme {
    ($a:ident $cmp:tt $b:ident) => {
        if $a $cmp $b || $a.is_nan() { $a } else { $b }
    };
}

binary_table! { binary_f32: f32 {
    Add(a, b) => a + b,
    Sub(a, b) => a - b,
    Mul(a, b) => a * b,
    Div(a, b) => a / b,
    Pow(a, b) => a.powf(b),
    Maximum(a, b) => extreme!(a > b),
    Minimum(a, b) => extreme!(a < b),
} }

binary_table! { binary_f64: f64 {
    Add(a, b) => a + b,
    Sub(a, b) => a - b,
    Mul(a, b) => a * b,
    Div(a, b) => a / b,
    Pow(a, b) => a.powf(b),
    Maximum(a, b) => extreme!(a > b),
    Minimum(a, b) => extreme!(a < b),
} }

binary_table! { binary_i64: i64 {
    Add(a, b) => a.wrapping_add(b),
    Sub(a, b) => a.wrapping_sub(b),
    Mul(a, b) => a.wrapping_mul(b),
    Div(a, b) => if b == 0 { 0 } else { a.wrapping_div(b) },
    Pow(a, b) => integer_power(a, b),
    Maximum(a, b) => a.max(b),
    Minimum(a, b) => a.min(b),
} }

/// Repeated multiplication, wrapping; a negative exponent gives 0 unless the base is 1 or -1.
fn integer_power(base: i64, exponent: i64) -> i64 {
    if exponent < 0 {
        return match base {
            1 => 1,
            -1 => 1 - 2 * (exponent & 1),
            _ => 0,
        };
    }
    let (mut power, mut square, mut rest) = (1i64, base, exponent);
    while rest > 0 {
        if rest & 1 == 1 {
            power = power.wrapping_mul(square);
        }
        square = square.wrapping_mul(square);
        rest >>= 1;
    }
    power
}

/// The loop of a binary operation on operands of a class.
pub(super) fn binary_of(op: BinaryOp, class: Class, one: [bool; 2]) -> TileFn {
    match class {
        Class::F32 => binary_f32(op, one),
        Class::F64 => binary_f64(op, one),
        Class::I64 => binary_i64(op, one),
    }
}

/// The value in bf16, as an f32.
#[inline(always)]
fn rounded(x: f32) -> f32 {
    bf16_to_f32(round_to_bf16(x))
}

macro_rules! convert {
    (|$x:ident: $from:ty| -> $to:ty { $body:expr }) => {{
        struct F;
        impl Map1<$from, $to> for F {
            #[inline(always)]
            fn apply<M: MulAdd>($x: $from) -> $to {
                $body
            }
        }
        map1::<$from, $to, F>()
    }};
}

/// The loop of a cast from one dtype to another, on their registers.
pub(super) fn cast_of(from: DType, to: DType) -> TileFn {
    use DType::*;
    match (from.class(), to) {
        (Class::F32, F32) => convert!(|x: f32| -> f32 { x }),
        (Class::F32, BF16) => convert!(|x: f32| -> f32 { rounded(x) }),
        (Class::F32, F16) => convert!(|x: f32| -> f32 { f16_to_f32(round_to_f16(x)) }),
        (Class::F32, F64) => convert!(|x: f32| -> f64 { f64::from(x) }),
        (Class::F32, U8) => convert!(|x: f32| -> i64 { i64::from(x as u8) }),
        (Class::F32, U32) => convert!(|x: f32| -> i64 { i64::from(x as u32) }),
        (Class::F32, I64) => convert!(|x: f32| -> i64 { x as i64 }),
        (Class::F64, F32) => convert!(|x: f64| -> f32 { x as f32 }),
        (Class::F64, BF16) => convert!(|x: f64| -> f32 { rounded(x as f32) }),
        (Class::F64, F16) => convert!(|x: f64| -> f32 { f16_to_f32(round_to_f16(x as f32)) }),
        (Class::F64, F64) => convert!(|x: f64| -> f64 { x }),
        (Class::F64, U8) => convert!(|x: f64| -> i64 { i64::from(x as u8) }),
        (Class::F64, U32) => convert!(|x: f64| -> i64 { i64::from(x as u32) }),
        (Class::F64, I64) => convert!(|x: f64| -> i64 { x as i64 }),
        (Class::I64, F32) => convert!(|x: i64| -> f32 { x as f32 }),
        (Class::I64, BF16) => convert!(|x: i64| -> f32 { rounded(x as f32) }),
        (Class::I64, F16) => convert!(|x: i64| -> f32 { f16_to_f32(round_to_f16(x as f32)) }),
        (Class::I64, F64) => convert!(|x: i64| -> f64 { x as f64 }),
        (Class::I64, U8) => convert!(|x: i64| -> i64 { i64::from(x as u8) }),
        (Class::I64, U32) => convert!(|x: i64| -> i64 { i64::from(x as u32) }),
        (Class::I64, I64) => convert!(|x: i64| -> i64 { x }),
    }
}

//! What the kernels ask of an element type: the type it is computed in, and the way there and back.

use crate::cpu::gemm::Multiply;
use crate::cpu::{math, scratch};
use crate::element::Element;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::fmt::Debug;
use std::ops::{Add, AddAssign, Mul, MulAssign, Neg, Sub};

/// An element type and its accumulator: f32 for bf16, f16 and f32; f64; i64 for integers.
pub(crate) trait Number: Element + PartialOrd {
    type Acc: Accumulator;

    fn widen(self) -> Self::Acc;

    /// Rounds to nearest even; integers wrap.
    fn narrow(acc: Self::Acc) -> Self;

    fn widen_all(from: &[Self], to: &mut [Self::Acc]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.widen();
        }
    }

    fn narrow_all(from: &[Self::Acc], to: &mut [Self]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = Self::narrow(*from);
        }
    }

    /// Lets `f` change `elements` as accumulators; they are rounded once, when it is done.
    fn accumulate(elements: &mut [Self], f: impl FnOnce(&mut [Self::Acc])) {
        scratch::with(elements.len(), |acc: &mut [Self::Acc]| {
            Self::widen_all(elements, acc);
            f(acc);
            Self::narrow_all(acc, elements);
        });
    }
}

/// What sums are kept in.
pub(crate) trait Accumulator: Number<Acc = Self> + scratch::Pod {
    const ZERO: Self;
    /// Integers wrap.
    fn plus(self, other: Self) -> Self;
    fn is_nan(self) -> bool;
}

/// The floats that arithmetic is done in: `f32` and `f64`.
pub(crate) trait Real:
    Accumulator
    + Multiply
    + Debug
    + Add<Output = Self>
    + AddAssign
    + Sub<Output = Self>
    + Mul<Output = Self>
    + MulAssign
    + Neg<Output = Self>
    + std::ops::Div<Output = Self>
{
    const NEG_INFINITY: Self;
    fn from_f64(value: f64) -> Self;
    fn to_f64(self) -> f64;
    fn from_f32_all(from: &[f32], to: &mut [Self]);
    /// The row itself, if it is one of f32.
    fn as_f32(row: &[Self]) -> Option<&[f32]>;
    fn as_f32_mut(row: &mut [Self]) -> Option<&mut [f32]>;
    fn exp(self) -> Self;
    fn ln(self) -> Self;
    /// The largest element, NaN if any is; `NEG_INFINITY` of none.
    fn max_of(row: &[Self]) -> Self;
    /// `row[i] = exp(row[i] - shift)`; gives the sum.
    fn exp_all(row: &mut [Self], shift: Self) -> Self;
    fn dot(a: &[Self], b: &[Self]) -> Self;
    /// `to += scale · from`
    fn axpy(to: &mut [Self], scale: Self, from: &[Self]);
    fn scale_all(row: &mut [Self], by: Self);
    /// `ds = p (dp - delta)`, where `ds` holds dp, and delta is `Σ p dp`.
    fn softmax_vjp(p: &[Self], ds: &mut [Self], delta: Self);
}

/// A float element, computed in [`Real`].
pub(crate) trait Float: Number<Acc: Real> + Multiply + scratch::Pod {}

macro_rules! integer {
    ($($ty:ty),*) => {$(
        impl Number for $ty {
            type Acc = i64;
            fn widen(self) -> i64 {
                self as i64
            }
            fn narrow(acc: i64) -> $ty {
                acc as $ty
            }
        }
    )*};
}
integer!(u8, u32);

impl Number for i64 {
    type Acc = i64;
    fn widen(self) -> i64 {
        self
    }
    fn narrow(acc: i64) -> i64 {
        acc
    }
    fn accumulate(elements: &mut [i64], f: impl FnOnce(&mut [i64])) {
        f(elements);
    }
}

impl Accumulator for i64 {
    const ZERO: i64 = 0;
    fn plus(self, other: i64) -> i64 {
        self.wrapping_add(other)
    }
    fn is_nan(self) -> bool {
        false
    }
}

macro_rules! half {
    ($($ty:ty: $widen_all:path, |$from:ident, $to:ident| $narrow_all:expr;)*) => {$(
        impl Number for $ty {
            type Acc = f32;
            fn widen(self) -> f32 {
                self.to_f32()
            }
            fn narrow(acc: f32) -> $ty {
                <$ty>::from_f32(acc)
            }
            fn widen_all(from: &[$ty], to: &mut [f32]) {
                $widen_all(from, to);
            }
            fn narrow_all($from: &[f32], $to: &mut [$ty]) {
                $narrow_all
            }
        }
        impl Float for $ty {}
    )*};
}
half! {
    bf16: math::widen_all_bf16, |from, to| math::narrow_all_bf16(from, to);
    f16: HalfFloatSliceExt::convert_to_f32_slice, |from, to| to.convert_from_f32_slice(from);
}

macro_rules! real {
    ($ty:ident, |$row:ident| $as_f32:expr, $max_of:path, $exp_all:path, $dot:path, $axpy:path, $scale_all:path,
     $softmax_vjp:path) => {
        impl Number for $ty {
            type Acc = $ty;
            fn widen(self) -> $ty {
                self
            }
            fn narrow(acc: $ty) -> $ty {
                acc
            }
            fn widen_all(from: &[$ty], to: &mut [$ty]) {
                to.copy_from_slice(from);
            }
            fn narrow_all(from: &[$ty], to: &mut [$ty]) {
                to.copy_from_slice(from);
            }
            fn accumulate(elements: &mut [$ty], f: impl FnOnce(&mut [$ty])) {
                f(elements);
            }
        }
        impl Float for $ty {}
        impl Accumulator for $ty {
            const ZERO: $ty = 0.0;
            fn plus(self, other: $ty) -> $ty {
                self + other
            }
            fn is_nan(self) -> bool {
                self.is_nan()
            }
        }
        impl Real for $ty {
            const NEG_INFINITY: $ty = $ty::NEG_INFINITY;
            fn from_f64(value: f64) -> $ty {
                value as $ty
            }
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
            fn from_f32_all(from: &[f32], to: &mut [$ty]) {
                for (to, from) in to.iter_mut().zip(from) {
                    *to = $ty::from(*from);
                }
            }
            fn as_f32($row: &[$ty]) -> Option<&[f32]> {
                $as_f32
            }
            fn as_f32_mut($row: &mut [$ty]) -> Option<&mut [f32]> {
                $as_f32
            }
            fn exp(self) -> $ty {
                self.exp()
            }
            fn ln(self) -> $ty {
                self.ln()
            }
            fn max_of(row: &[$ty]) -> $ty {
                $max_of(row)
            }
            fn exp_all(row: &mut [$ty], shift: $ty) -> $ty {
                $exp_all(row, shift)
            }
            fn dot(a: &[$ty], b: &[$ty]) -> $ty {
                $dot(a, b)
            }
            fn axpy(to: &mut [$ty], scale: $ty, from: &[$ty]) {
                $axpy(to, scale, from)
            }
            fn scale_all(row: &mut [$ty], by: $ty) {
                $scale_all(row, by)
            }
            fn softmax_vjp(p: &[$ty], ds: &mut [$ty], delta: $ty) {
                $softmax_vjp(p, ds, delta)
            }
        }
    };
}
real!(
    f32,
    |row| Some(row),
    math::max_of_f32,
    math::exp_all_f32,
    math::dot_f32,
    math::axpy_f32,
    math::scale_all_f32,
    math::softmax_vjp_f32
);
real!(
    f64,
    |_row| None,
    math::max_of_f64,
    math::exp_all_f64,
    math::dot_f64,
    math::axpy_f64,
    math::scale_all_f64,
    math::softmax_vjp_f64
);

/// Runs `$body` with `$T` the Rust type of a dtype.
macro_rules! for_number {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            metal_candle_graph::DType::U8 => { type $T = u8; $body }
            metal_candle_graph::DType::U32 => { type $T = u32; $body }
            metal_candle_graph::DType::I64 => { type $T = i64; $body }
            dtype => $crate::cpu::number::for_float!(dtype, $T => $body),
        }
    };
}

/// Runs `$body` with `$T` the Rust type of a float dtype.
macro_rules! for_float {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            metal_candle_graph::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            metal_candle_graph::DType::F16 => {
                type $T = half::f16;
                $body
            }
            metal_candle_graph::DType::F32 => {
                type $T = f32;
                $body
            }
            metal_candle_graph::DType::F64 => {
                type $T = f64;
                $body
            }
            other => panic!("metal-candle bug: expected a float, got {other}"),
        }
    };
}

/// Runs `$body` with `$T` the Rust type of an index dtype.
macro_rules! for_index {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            metal_candle_graph::DType::U8 => {
                type $T = u8;
                $body
            }
            metal_candle_graph::DType::U32 => {
                type $T = u32;
                $body
            }
            metal_candle_graph::DType::I64 => {
                type $T = i64;
                $body
            }
            other => panic!("metal-candle bug: expected an index, got {other}"),
        }
    };
}

pub(crate) use {for_float, for_index, for_number};

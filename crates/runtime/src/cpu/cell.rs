//! Elements as loops over vectors read and write them: conversions that the compiler makes instructions of.

use crate::cpu::halves::{bf16_to_f32, f16_to_f32, round_to_bf16, round_to_f16};
use half::{bf16, f16};

/// An element and its register.
pub(super) trait Cell: Copy {
    type Register: Copy;
    fn to_register(self) -> Self::Register;
    fn of_register(register: Self::Register) -> Self;
}

macro_rules! cells {
    ($($ty:ty: $register:ty, |$x:ident| $widen:expr, |$y:ident| $narrow:expr;)*) => {$(
        impl Cell for $ty {
            type Register = $register;
            #[inline(always)]
            fn to_register(self) -> $register {
                let $x = self;
                $widen
            }
            #[inline(always)]
            fn of_register($y: $register) -> $ty {
                $narrow
            }
        }
    )*};
}
cells! {
    u8: i64, |x| i64::from(x), |x| x as u8;
    u32: i64, |x| i64::from(x), |x| x as u32;
    i64: i64, |x| x, |x| x;
    bf16: f32, |x| bf16_to_f32(x), |x| round_to_bf16(x);
    f16: f32, |x| f16_to_f32(x), |x| round_to_f16(x);
    f32: f32, |x| x, |x| x;
    f64: f64, |x| x, |x| x;
}

//! Between memory and registers: operands of any dtype and stride, widened to and narrowed from the class of
//! their register (f32, f64 or i64).

use crate::cpu::cell::Cell;
use crate::cpu::simd::widest;
use half::{bf16, f16};
use metal_candle_graph::{Class, DType};
use std::mem::MaybeUninit;

/// `out[i] = widen(from[i · stride])` for `n` elements.
pub(super) type LoadFn = unsafe fn(*mut u8, *const u8, isize, usize);
/// `to[i · stride] = narrow(from[i])` for `n` elements.
pub(super) type StoreFn = unsafe fn(*mut u8, isize, *const u8, usize);

/// The bytes of a register of `dtype`.
pub(super) const fn register_bytes(dtype: DType) -> usize {
    match dtype.class() {
        Class::F32 => 4,
        Class::F64 | Class::I64 => 8,
    }
}

#[inline(always)]
unsafe fn load_body<T: Cell>(out: *mut u8, from: *const u8, stride: isize, n: usize) {
    let from = from.cast::<T>();
    // SAFETY: the caller gives room for `n` registers, aligned for them, that nothing else touches.
    let out = unsafe { std::slice::from_raw_parts_mut(out.cast::<MaybeUninit<T::Register>>(), n) };
    match stride {
        // SAFETY: the caller has `n` elements from `from` on.
        1 => unsafe {
            let from = std::slice::from_raw_parts(from, n);
            for (out, x) in out.iter_mut().zip(from) {
                out.write(x.to_register());
            }
        },
        0 if n > 0 => {
            // SAFETY: the caller has one element.
            let x = unsafe { *from }.to_register();
            for out in out {
                out.write(x);
            }
        }
        stride => {
            for (i, out) in out.iter_mut().enumerate() {
                // SAFETY: the caller has `n` elements at this distance.
                out.write(unsafe { *from.offset(i as isize * stride) }.to_register());
            }
        }
    }
}

#[inline(always)]
unsafe fn store_body<T: Cell>(to: *mut u8, stride: isize, from: *const u8, n: usize) {
    let to = to.cast::<T>();
    // SAFETY: the caller has `n` registers, and nobody writes them meanwhile.
    let from = unsafe { std::slice::from_raw_parts(from.cast::<T::Register>(), n) };
    if stride == 1 {
        // SAFETY: the caller gives `n` elements that nothing else touches.
        let to = unsafe { std::slice::from_raw_parts_mut(to.cast::<MaybeUninit<T>>(), n) };
        for (to, x) in to.iter_mut().zip(from) {
            to.write(T::of_register(*x));
        }
    } else {
        for (i, x) in from.iter().enumerate() {
            // SAFETY: the caller gives `n` elements at this distance.
            unsafe { to.offset(i as isize * stride).write(T::of_register(*x)) };
        }
    }
}

fn load<T: Cell>() -> LoadFn {
    widest!([T: Cell] load_body<T>(out: *mut u8, from: *const u8, stride: isize, n: usize))
}

fn store<T: Cell>() -> StoreFn {
    widest!([T: Cell] store_body<T>(to: *mut u8, stride: isize, from: *const u8, n: usize))
}

pub(super) fn load_of(dtype: DType) -> LoadFn {
    match dtype {
        DType::U8 => load::<u8>(),
        DType::U32 => load::<u32>(),
        DType::I64 => load::<i64>(),
        DType::BF16 => load::<bf16>(),
        DType::F16 => load::<f16>(),
        DType::F32 => load::<f32>(),
        DType::F64 => load::<f64>(),
    }
}

pub(super) fn store_of(dtype: DType) -> StoreFn {
    match dtype {
        DType::U8 => store::<u8>(),
        DType::U32 => store::<u32>(),
        DType::I64 => store::<i64>(),
        DType::BF16 => store::<bf16>(),
        DType::F16 => store::<f16>(),
        DType::F32 => store::<f32>(),
        DType::F64 => store::<f64>(),
    }
}

//! Reductions of tiles. Sums are kept in lanes, the same number on every machine: their order is part of the value.

use crate::cpu::simd::widest;
use metal_candle_graph::{Class, ReduceOp};

/// Partial results of a reduction along a row.
pub(super) const LANES: usize = 32;

/// `acc = acc op from[..]`: into [`LANES`] lanes along a row, or register by register across rows.
pub(super) type FoldFn = unsafe fn(*mut u8, *const u8, usize);

/// How one reduction is done.
#[derive(Clone, Copy)]
pub(super) struct Reducer {
    /// Sets `n` registers to what changes nothing.
    pub(super) clear: unsafe fn(*mut u8, usize),
    /// `acc[i % LANES] op= from[i]`
    pub(super) along: FoldFn,
    /// `acc[i] op= from[i]`
    pub(super) across: FoldFn,
    /// One register of [`LANES`].
    pub(super) join: unsafe fn(*mut u8, *const u8),
}

trait Fold<T> {
    const IDENTITY: T;
    fn fold(acc: T, x: T) -> T;
}

unsafe fn clear<T: Copy, F: Fold<T>>(acc: *mut u8, n: usize) {
    for i in 0..n {
        // SAFETY: the caller gives room for `n` registers.
        unsafe { acc.cast::<T>().add(i).write(F::IDENTITY) };
    }
}

#[inline(always)]
unsafe fn along_body<T: Copy, F: Fold<T>>(acc: *mut u8, from: *const u8, n: usize) {
    let acc = acc.cast::<[T; LANES]>();
    // SAFETY: the caller gives `LANES` registers that are ours alone, and `n` that nobody writes.
    let (mut lanes, from) = unsafe { (*acc, std::slice::from_raw_parts(from.cast::<T>(), n)) };
    let (chunks, rest) = from.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = F::fold(lanes[i], chunk[i]);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = F::fold(*lane, *x);
    }
    // SAFETY: as above.
    unsafe { *acc = lanes };
}

#[inline(always)]
unsafe fn across_body<T: Copy, F: Fold<T>>(acc: *mut u8, from: *const u8, n: usize) {
    // SAFETY: the caller gives `n` registers that are ours alone, and `n` that nobody writes.
    let (acc, from) = unsafe {
        let acc = std::slice::from_raw_parts_mut(acc.cast::<T>(), n);
        (acc, std::slice::from_raw_parts(from.cast::<T>(), n))
    };
    for (acc, x) in acc.iter_mut().zip(from) {
        *acc = F::fold(*acc, *x);
    }
}

unsafe fn join<T: Copy, F: Fold<T>>(out: *mut u8, lanes: *const u8) {
    // SAFETY: the caller gives `LANES` registers, and room for one.
    let mut lanes = unsafe { *lanes.cast::<[T; LANES]>() };
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = F::fold(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    // SAFETY: as above.
    unsafe { out.cast::<T>().write(lanes[0]) };
}

fn reducer<T: Copy, F: Fold<T>>() -> Reducer {
    Reducer {
        clear: clear::<T, F>,
        along: widest!([T: Copy, F: Fold<T>] along_body<T, F>(acc: *mut u8, from: *const u8, n: usize)),
        across: widest!([T: Copy, F: Fold<T>] across_body<T, F>(acc: *mut u8, from: *const u8, n: usize)),
        join: join::<T, F>,
    }
}

struct Sum;
struct Max;
struct Min;

macro_rules! folds {
    ($($ty:ty: $zero:expr, $low:expr, $high:expr, |$a:ident, $x:ident| $sum:expr, $max:expr, $min:expr;)*) => {$(
        impl Fold<$ty> for Sum {
            const IDENTITY: $ty = $zero;
            #[inline(always)]
            fn fold($a: $ty, $x: $ty) -> $ty {
                $sum
            }
        }
        impl Fold<$ty> for Max {
            const IDENTITY: $ty = $low;
            #[inline(always)]
            fn fold($a: $ty, $x: $ty) -> $ty {
                $max
            }
        }
        impl Fold<$ty> for Min {
            const IDENTITY: $ty = $high;
            #[inline(always)]
            fn fold($a: $ty, $x: $ty) -> $ty {
                $min
            }
        }
    )*};
}

// A NaN on either side stays: every comparison with it fails.
folds! {
    f32: 0.0, f32::NEG_INFINITY, f32::INFINITY, |a, x| a + x,
        if x > a || x.is_nan() { x } else { a }, if x < a || x.is_nan() { x } else { a };
    f64: 0.0, f64::NEG_INFINITY, f64::INFINITY, |a, x| a + x,
        if x > a || x.is_nan() { x } else { a }, if x < a || x.is_nan() { x } else { a };
    i64: 0, i64::MIN, i64::MAX, |a, x| a.wrapping_add(x), a.max(x), a.min(x);
}

pub(super) fn reducer_of(op: ReduceOp, class: Class) -> Reducer {
    match (class, op) {
        (Class::F32, ReduceOp::Sum) => reducer::<f32, Sum>(),
        (Class::F32, ReduceOp::Max) => reducer::<f32, Max>(),
        (Class::F32, ReduceOp::Min) => reducer::<f32, Min>(),
        (Class::F64, ReduceOp::Sum) => reducer::<f64, Sum>(),
        (Class::F64, ReduceOp::Max) => reducer::<f64, Max>(),
        (Class::F64, ReduceOp::Min) => reducer::<f64, Min>(),
        (Class::I64, ReduceOp::Sum) => reducer::<i64, Sum>(),
        (Class::I64, ReduceOp::Max) => reducer::<i64, Max>(),
        (Class::I64, ReduceOp::Min) => reducer::<i64, Min>(),
    }
}

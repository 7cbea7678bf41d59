//! Reductions of tiles. Sums are kept in lanes, the same number on every machine: their order is part of the value.

use crate::cpu::simd::widest;
use metal_candle_graph::{Class, ReduceOp};

/// Partial results of a reduction along a row.
pub(super) const LANES: usize = 32;

/// `acc = acc op from[..]`: into [`LANES`] lanes along a row, or register by register across rows.
pub(super) type FoldFn = unsafe fn(*mut u8, *const u8, usize);

/// `acc[i % LANES] += a[i] * b[i]`, each product rounded before it is added.
pub(super) type DotFn = unsafe fn(*mut u8, [*const u8; 2], usize);

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

    /// [`Fold::fold`] of every chunk, lane by lane.
    #[inline(always)]
    fn fold_chunks(lanes: [T; LANES], chunks: &[[T; LANES]]) -> [T; LANES]
    where
        T: Copy,
        Self: Sized,
    {
        fold_each::<T, Self>(lanes, chunks)
    }
}

#[inline(always)]
fn fold_each<T: Copy, F: Fold<T>>(mut lanes: [T; LANES], chunks: &[[T; LANES]]) -> [T; LANES] {
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = F::fold(lanes[i], chunk[i]);
        }
    }
    lanes
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
    lanes = F::fold_chunks(lanes, chunks);
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = F::fold(*lane, *x);
    }
    // SAFETY: as above.
    unsafe { *acc = lanes };
}

#[inline(always)]
unsafe fn dot_body(acc: *mut u8, from: [*const u8; 2], n: usize) {
    let acc = acc.cast::<[f32; LANES]>();
    // SAFETY: the caller gives `LANES` registers that are ours alone, and twice `n` that nobody writes.
    let (mut lanes, [a, b]) =
        unsafe { (*acc, from.map(|from| std::slice::from_raw_parts(from.cast::<f32>(), n))) };
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        let mut products = [0.0; LANES];
        for i in 0..LANES {
            products[i] = a[i] * b[i];
        }
        for i in 0..LANES {
            lanes[i] += products[i];
        }
    }
    for (lane, (a, b)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *lane += a * b;
    }
    // SAFETY: as above.
    unsafe { *acc = lanes };
}

/// The sum of products of f32 along a row.
pub(super) fn dot_f32() -> DotFn {
    widest!([] dot_body<>(acc: *mut u8, from: [*const u8; 2], n: usize))
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

#[inline(always)]
unsafe fn join_body<T: Copy, F: Fold<T>>(out: *mut u8, lanes: *const u8) {
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
        join: widest!([T: Copy, F: Fold<T>] join_body<T, F>(out: *mut u8, lanes: *const u8)),
    }
}

struct Sum;
struct Max;
struct Min;

macro_rules! extreme_of_integers {
    ($name:ident, $identity:expr, $of:ident) => {
        impl Fold<i64> for $name {
            const IDENTITY: i64 = $identity;
            #[inline(always)]
            fn fold(a: i64, x: i64) -> i64 {
                a.$of(x)
            }
        }
    };
}

/// `$name` takes x where it wins or is a NaN. So a NaN on either side stays: every comparison with it fails.
macro_rules! extreme_of_floats {
    ($name:ident, $ty:ident, $bits:ty, $identity:expr, $wins:tt) => {
        impl Fold<$ty> for $name {
            const IDENTITY: $ty = $identity;
            #[inline(always)]
            fn fold(a: $ty, x: $ty) -> $ty {
                if x $wins a || x.is_nan() { x } else { a }
            }
            #[inline(always)]
            fn fold_chunks(lanes: [$ty; LANES], chunks: &[[$ty; LANES]]) -> [$ty; LANES] {
                // As if there were no NaN, where the comparison is one instruction; their bits without the sign are
                // the largest.
                let (mut extremes, mut bits): ([$ty; LANES], [$bits; LANES]) = (lanes, [0; LANES]);
                for chunk in chunks {
                    for i in 0..LANES {
                        let x = chunk[i];
                        extremes[i] = if x $wins extremes[i] { x } else { extremes[i] };
                        bits[i] = bits[i].max(x.to_bits() << 1);
                    }
                }
                let largest = bits.iter().fold(0, |a, b| a.max(*b));
                if largest > $ty::INFINITY.to_bits() << 1 {
                    return fold_each::<$ty, Self>(lanes, chunks);
                }
                extremes
            }
        }
    };
}

macro_rules! sum {
    ($ty:ty, $zero:expr, |$a:ident, $x:ident| $sum:expr) => {
        impl Fold<$ty> for Sum {
            const IDENTITY: $ty = $zero;
            #[inline(always)]
            fn fold($a: $ty, $x: $ty) -> $ty {
                $sum
            }
        }
    };
}

sum!(f32, 0.0, |a, x| a + x);
sum!(f64, 0.0, |a, x| a + x);
sum!(i64, 0, |a, x| a.wrapping_add(x));
extreme_of_floats!(Max, f32, u32, f32::NEG_INFINITY, >);
extreme_of_floats!(Min, f32, u32, f32::INFINITY, <);
extreme_of_floats!(Max, f64, u64, f64::NEG_INFINITY, >);
extreme_of_floats!(Min, f64, u64, f64::INFINITY, <);
extreme_of_integers!(Max, i64::MIN, max);
extreme_of_integers!(Min, i64::MAX, min);

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

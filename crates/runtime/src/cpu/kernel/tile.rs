//! Loops over tiles of registers, for any scalar function.

use crate::cpu::simd::{MulAdd, prefetch, widest};
use metal_candle_graph::Class;
use std::mem::MaybeUninit;

/// `out[i] = f(ins[0][i], ..)` for `n` registers. An operand that is one for all is read once.
///
/// Unsafe to call: every pointer leads to its `n` registers (or one), initialised but for `out`, which nothing else
/// overlaps.
pub(super) type TileFn = unsafe fn(*mut u8, [*const u8; 3], usize);

/// `out[i] = f(ins[0][i], ins[1][i])` for `n` registers of f32, asking for as many bytes at each of two places meanwhile.
///
/// Unsafe to call as [`TileFn`]; what is asked for may lie anywhere.
pub(super) type AheadFn = unsafe fn(*mut u8, [*const u8; 2], [*const u8; 2], usize);

/// A function of one register.
pub(super) trait Map1<A, B> {
    fn apply<M: MulAdd>(x: A) -> B;
}

/// A function of two registers of one class.
pub(super) trait Map2<A, B> {
    fn apply<M: MulAdd>(a: A, b: A) -> B;
}

/// A function of three f32.
pub(super) trait Map3 {
    fn apply(a: f32, b: f32, c: f32) -> f32;
}

unsafe fn out<'a, T>(out: *mut u8, n: usize) -> &'a mut [MaybeUninit<T>] {
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(out.cast(), n) }
}

unsafe fn tile<'a, T>(from: *const u8, n: usize) -> &'a [T] {
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(from.cast(), n) }
}

#[inline(always)]
unsafe fn map1_body<A: Copy, B, F: Map1<A, B>, M: MulAdd>(
    to: *mut u8,
    ins: [*const u8; 3],
    n: usize,
) {
    // SAFETY: the caller's promise.
    let (to, x) = unsafe { (out::<B>(to, n), tile::<A>(ins[0], n)) };
    for (to, x) in to.iter_mut().zip(x) {
        to.write(F::apply::<M>(*x));
    }
}

/// An operand that is one for all.
#[derive(Clone, Copy)]
struct One;
/// An operand with a register for each result.
#[derive(Clone, Copy)]
struct Each;

trait Extent: Copy {
    const ONE: bool;
}
impl Extent for One {
    const ONE: bool = true;
}
impl Extent for Each {
    const ONE: bool = false;
}

#[inline(always)]
unsafe fn map2_body<T: Copy, B: Copy, F: Map2<T, B>, X: Extent, Y: Extent, M: MulAdd>(
    to: *mut u8,
    ins: [*const u8; 3],
    n: usize,
) {
    let len = |one: bool| if one { 1 } else { n };
    // SAFETY: the caller's promise.
    let (to, a, b) = unsafe {
        (out::<B>(to, n), tile::<T>(ins[0], len(X::ONE)), tile::<T>(ins[1], len(Y::ONE)))
    };
    match (X::ONE, Y::ONE) {
        (false, false) => {
            for (to, (a, b)) in to.iter_mut().zip(a.iter().zip(b)) {
                to.write(F::apply::<M>(*a, *b));
            }
        }
        (false, true) => {
            let b = b[0];
            for (to, a) in to.iter_mut().zip(a) {
                to.write(F::apply::<M>(*a, b));
            }
        }
        (true, false) => {
            let a = a[0];
            for (to, b) in to.iter_mut().zip(b) {
                to.write(F::apply::<M>(a, *b));
            }
        }
        (true, true) => {
            let (a, b) = (a[0], b[0]);
            let y = F::apply::<M>(a, b);
            for to in to {
                to.write(y);
            }
        }
    }
}

#[inline(always)]
unsafe fn map2_ahead_body<F: Map2<f32, f32>, Y: Extent, M: MulAdd>(
    to: *mut u8,
    ins: [*const u8; 2],
    ahead: [*const u8; 2],
    n: usize,
) {
    /// Registers between which memory is asked for: few lines at a time, and enough of them for a loop over vectors.
    const PART: usize = 64;
    /// Registers in a cache line.
    const LINE: usize = 16;
    for part in 0..n / PART {
        for line in 0..PART / LINE {
            for ahead in ahead {
                let register = part * PART + line * LINE;
                prefetch(ahead.wrapping_add(register * size_of::<f32>()));
            }
        }
        // SAFETY: the caller's promise, of some of the registers.
        unsafe { map2_part::<F, Y, M>(to, ins, part * PART, PART) };
    }
    // SAFETY: as above.
    unsafe { map2_part::<F, Y, M>(to, ins, n / PART * PART, n % PART) };
}

/// `len` registers from `start` on.
#[inline(always)]
unsafe fn map2_part<F: Map2<f32, f32>, Y: Extent, M: MulAdd>(
    to: *mut u8,
    [a, b]: [*const u8; 2],
    start: usize,
    len: usize,
) {
    let at = start * size_of::<f32>();
    let b = if Y::ONE { b } else { b.wrapping_add(at) };
    let ins = [a.wrapping_add(at), b, std::ptr::null()];
    // SAFETY: the caller's promise.
    unsafe { map2_body::<f32, f32, F, Each, Y, M>(to.wrapping_add(at), ins, len) };
}

#[inline(always)]
unsafe fn map3_body<F: Map3, X: Extent, Y: Extent, Z: Extent>(
    to: *mut u8,
    ins: [*const u8; 3],
    n: usize,
) {
    let len = |one: bool| if one { 1 } else { n };
    // SAFETY: the caller's promise.
    let (to, a) = unsafe { (out::<f32>(to, n), tile::<f32>(ins[0], len(X::ONE))) };
    // SAFETY: the caller's promise.
    let (b, c) = unsafe { (tile::<f32>(ins[1], len(Y::ONE)), tile::<f32>(ins[2], len(Z::ONE))) };
    // By iterators: an index would leave the last vectors to a loop over scalars.
    macro_rules! each {
        ($each:expr, |$x:pat_param| $($of:expr),*) => {
            for (to, $x) in to.iter_mut().zip($each) {
                to.write(F::apply($($of),*));
            }
        };
    }
    match (X::ONE, Y::ONE, Z::ONE) {
        (false, false, false) => each!(a.iter().zip(b).zip(c), |((a, b), c)| *a, *b, *c),
        (false, false, true) => each!(a.iter().zip(b), |(a, b)| *a, *b, c[0]),
        (false, true, false) => each!(a.iter().zip(c), |(a, c)| *a, b[0], *c),
        (false, true, true) => each!(a, |a| *a, b[0], c[0]),
        (true, false, false) => each!(b.iter().zip(c), |(b, c)| a[0], *b, *c),
        (true, false, true) => each!(b, |b| a[0], *b, c[0]),
        (true, true, _) => panic!("metal-candle bug: a pair computes what is one for all"),
    }
}

#[inline(always)]
unsafe fn select_body<T: Copy, C: Extent, X: Extent, Y: Extent>(
    to: *mut u8,
    ins: [*const u8; 3],
    n: usize,
) {
    let len = |one: bool| if one { 1 } else { n };
    // SAFETY: the caller's promise.
    let (to, c) = unsafe { (out::<T>(to, n), tile::<i64>(ins[0], len(C::ONE))) };
    // SAFETY: the caller's promise.
    let (a, b) = unsafe { (tile::<T>(ins[1], len(X::ONE)), tile::<T>(ins[2], len(Y::ONE))) };
    for (i, to) in to.iter_mut().enumerate() {
        let c = if C::ONE { c[0] } else { c[i] };
        let (a, b) = (if X::ONE { a[0] } else { a[i] }, if Y::ONE { b[0] } else { b[i] });
        to.write(if c != 0 { a } else { b });
    }
}

#[inline(always)]
unsafe fn splat_body<T: Copy>(to: *mut u8, ins: [*const u8; 3], n: usize) {
    // SAFETY: the caller's promise.
    let (to, x) = unsafe { (out::<T>(to, n), *ins[0].cast::<T>()) };
    for to in to {
        to.write(x);
    }
}

pub(super) fn map1<A: Copy, B, F: Map1<A, B>>() -> TileFn {
    widest!([A: Copy, B, F: Map1<A, B>] map1_body<A, B, F; M>(to: *mut u8, ins: [*const u8; 3], n: usize))
}

fn map2_of<T: Copy, B: Copy, F: Map2<T, B>, X: Extent, Y: Extent>() -> TileFn {
    widest!([T: Copy, B: Copy, F: Map2<T, B>, X: Extent, Y: Extent]
        map2_body<T, B, F, X, Y; M>(to: *mut u8, ins: [*const u8; 3], n: usize))
}

/// `one` says which operands are one for all.
pub(super) fn map2<T: Copy, B: Copy, F: Map2<T, B>>(one: [bool; 2]) -> TileFn {
    match one {
        [false, false] => map2_of::<T, B, F, Each, Each>(),
        [false, true] => map2_of::<T, B, F, Each, One>(),
        [true, false] => map2_of::<T, B, F, One, Each>(),
        [true, true] => map2_of::<T, B, F, One, One>(),
    }
}

fn map2_ahead_of<F: Map2<f32, f32>, Y: Extent>() -> AheadFn {
    widest!([F: Map2<f32, f32>, Y: Extent]
        map2_ahead_body<F, Y; M>(to: *mut u8, ins: [*const u8; 2], ahead: [*const u8; 2], n: usize))
}

/// [`map2_of_each`] of f32, asking for memory ahead.
pub(super) fn map2_ahead<F: Map2<f32, f32>>(second_is_one: bool) -> AheadFn {
    match second_is_one {
        false => map2_ahead_of::<F, Each>(),
        true => map2_ahead_of::<F, One>(),
    }
}

/// [`map2`] whose first operand has a register for each result.
pub(super) fn map2_of_each<T: Copy, B: Copy, F: Map2<T, B>>(second_is_one: bool) -> TileFn {
    match second_is_one {
        false => map2_of::<T, B, F, Each, Each>(),
        true => map2_of::<T, B, F, Each, One>(),
    }
}

fn map3_of<F: Map3, X: Extent, Y: Extent, Z: Extent>() -> TileFn {
    widest!([F: Map3, X: Extent, Y: Extent, Z: Extent]
        map3_body<F, X, Y, Z>(to: *mut u8, ins: [*const u8; 3], n: usize))
}

/// `one` says which operands are one for all: at most one of the first two.
pub(super) fn map3<F: Map3>(one: [bool; 3]) -> TileFn {
    match one {
        [false, false, false] => map3_of::<F, Each, Each, Each>(),
        [false, false, true] => map3_of::<F, Each, Each, One>(),
        [false, true, false] => map3_of::<F, Each, One, Each>(),
        [false, true, true] => map3_of::<F, Each, One, One>(),
        [true, false, false] => map3_of::<F, One, Each, Each>(),
        [true, false, true] => map3_of::<F, One, Each, One>(),
        [true, true, _] => panic!("metal-candle bug: a pair computes what is one for all"),
    }
}

fn select_of_3<T: Copy, C: Extent, X: Extent, Y: Extent>() -> TileFn {
    widest!([T: Copy, C: Extent, X: Extent, Y: Extent]
        select_body<T, C, X, Y>(to: *mut u8, ins: [*const u8; 3], n: usize))
}

fn select_of_2<T: Copy, C: Extent, X: Extent>(one: bool) -> TileFn {
    if one { select_of_3::<T, C, X, One>() } else { select_of_3::<T, C, X, Each>() }
}

fn select<T: Copy>([c, x, y]: [bool; 3]) -> TileFn {
    match (c, x) {
        (false, false) => select_of_2::<T, Each, Each>(y),
        (false, true) => select_of_2::<T, Each, One>(y),
        (true, false) => select_of_2::<T, One, Each>(y),
        (true, true) => select_of_2::<T, One, One>(y),
    }
}

/// `cond != 0 ? a : b`; `one` says which operands are one for all.
pub(super) fn select_of(class: Class, one: [bool; 3]) -> TileFn {
    match class {
        Class::F32 => select::<f32>(one),
        Class::F64 => select::<f64>(one),
        Class::I64 => select::<i64>(one),
    }
}

fn splat<T: Copy>() -> TileFn {
    widest!([T: Copy] splat_body<T>(to: *mut u8, ins: [*const u8; 3], n: usize))
}

/// Repeats one register.
pub(super) fn splat_of(class: Class) -> TileFn {
    match class {
        Class::F32 => splat::<f32>(),
        Class::F64 => splat::<f64>(),
        Class::I64 => splat::<i64>(),
    }
}

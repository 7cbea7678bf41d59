//! Rows of blocks times a vector: integer dot products, as llama.cpp makes them.
//!
//! The vector is rounded to eight bits, every 32 elements by a scale of their own; the weights are taken as they are.
//! Relative to the largest of those elements, its rounding error is at most 1/254.

use super::format::{Format, LEN};
use super::isa::{Isa, for_isa};
use crate::cpu::simd::multiversion;
use std::cell::Cell;

/// Vectors in eight bits.
#[derive(Default)]
pub(super) struct Rounded {
    parts: Vec<RoundedPart>,
    /// Of one vector.
    len: usize,
}

/// 32 elements: `q · scale`.
#[derive(Clone, Copy)]
pub(super) struct RoundedPart {
    pub(super) q: [i8; LEN],
    /// The scale, and `Σ q · scale`.
    pub(super) scale_and_sum: [f32; 2],
    /// The sum of each half.
    sums: [f32; 2],
}

/// `y[i] = Σ row i · x`, of as many rows as there are results.
pub(super) type DotFn = unsafe fn(&[u8], &[RoundedPart], &mut [f32]);

thread_local! {
    static KEPT: Cell<Rounded> = Cell::default();
}

multiversion! {
    fn round(x: &[[f32; LEN]], to: &mut [RoundedPart]) {
        x.iter().zip(to).for_each(|(x, to)| to.set(x));
    }
}

impl Rounded {
    /// Gives `f` the rows of `x`, whose length is a multiple of 32, rounded in memory that the thread keeps.
    pub(super) fn with<R>(x: &[f32], cols: usize, f: impl FnOnce(&Rounded) -> R) -> R {
        let mut rounded = KEPT.take();
        rounded.len = cols / LEN;
        let (x, _) = x.as_chunks();
        rounded.parts.resize(x.len(), RoundedPart::ZERO);
        round(x, &mut rounded.parts);
        let result = f(&rounded);
        KEPT.set(rounded);
        result
    }

    pub(super) fn rows(&self) -> impl Iterator<Item = &[RoundedPart]> {
        self.parts.chunks_exact(self.len.max(1))
    }
}

impl RoundedPart {
    const ZERO: RoundedPart = RoundedPart { q: [0; LEN], scale_and_sum: [0.0; 2], sums: [0.0; 2] };

    #[inline(always)]
    fn set(&mut self, x: &[f32; LEN]) {
        // As integers, magnitudes are in order, and a NaN is the largest.
        let most = x.iter().fold(0, |most: u32, x| most.max(x.to_bits() & 0x7fff_ffff));
        let scale = f32::from_bits(most) / 127.0;
        let by = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        let q: [i32; LEN] = std::array::from_fn(|i| nearest(x[i] * by));
        self.q = q.map(|q| q as i8);
        let sums = [&q[..LEN / 2], &q[LEN / 2..]].map(|q| q.iter().sum::<i32>());
        self.sums = sums.map(|sum| sum as f32 * scale);
        self.scale_and_sum = [scale, (sums[0] + sums[1]) as f32 * scale];
    }
}

/// The nearest integer of eight bits, half to even; 0 of NaN. In steps that vectors have, unlike a cast.
#[inline(always)]
fn nearest(x: f32) -> i32 {
    // Where f32 are a unit apart, and their last bits the integer.
    const UNITS: f32 = 12_582_912.0;
    const LEAST: f32 = UNITS - 128.0;
    const MOST: f32 = UNITS + 127.0;
    let sum = x + UNITS;
    let sum = if sum.is_nan() { UNITS } else { sum };
    let sum = if sum < LEAST { LEAST } else { sum };
    let sum = if sum > MOST { MOST } else { sum };
    sum.to_bits().wrapping_sub(UNITS.to_bits()).cast_signed()
}

/// Running sums. They are kept in lanes, the same number on every machine: their order is part of the value.
struct Sums<I: Isa> {
    products: I::Sums,
    shifts: f32,
}

impl<I: Isa> Sums<I> {
    #[inline(always)]
    fn zero() -> Sums<I> {
        Sums { products: I::sums([0.0; LEN / 4]), shifts: 0.0 }
    }

    /// Adds part `index` of a row.
    #[inline(always)]
    fn add<F: Format>(&mut self, row: &[u8], index: usize, x: &RoundedPart) {
        let at = index / F::PARTS * F::BLOCK_BYTES;
        let part = F::part::<I>(&row[at..at + F::BLOCK_BYTES], index % F::PARTS);
        let [x_scale, x_sum] = x.scale_and_sum;
        let scale = part.scale.map(|scale| scale * x_scale);
        self.products = match F::WIDE {
            true => I::add::<true>(self.products, scale, &part.q, &x.q),
            false => I::add::<false>(self.products, scale, &part.q, &x.q),
        };
        self.shifts += if F::HALVES {
            part.shift[0] * x.sums[0] + part.shift[1] * x.sums[1]
        } else {
            part.shift[0] * x_sum
        };
    }
}

#[inline(always)]
unsafe fn dot_body<F: Format, I: Isa>(row: &[u8], x: &[RoundedPart], y: &mut f32) {
    // Two chains of additions, neither of which waits for the other.
    let (mut even, mut odd) = (Sums::<I>::zero(), Sums::<I>::zero());
    let (pairs, last) = x.as_chunks::<2>();
    for (i, [first, second]) in pairs.iter().enumerate() {
        even.add::<F>(row, 2 * i, first);
        odd.add::<F>(row, 2 * i + 1, second);
    }
    if let [last] = last {
        even.add::<F>(row, 2 * pairs.len(), last);
    }
    let (mut sums, odd_sums) = (I::array(even.products), I::array(odd.products));
    for (sum, odd) in sums.iter_mut().zip(odd_sums) {
        *sum += odd;
    }
    let mut half = sums.len() / 2;
    while half > 0 {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
        half /= 2;
    }
    *y = sums[0] + (even.shifts + odd.shifts);
}

#[inline(always)]
unsafe fn dots_body<F: Format, I: Isa>(rows: &[u8], x: &[RoundedPart], y: &mut [f32]) {
    let len = rows.len() / y.len().max(1);
    for (i, y) in y.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { dot_body::<F, I>(&rows[i * len..(i + 1) * len], x, y) };
    }
}

/// The loop for `Q4_1`.
pub(super) fn dot_q4_1() -> DotFn {
    #[cfg(target_arch = "x86_64")]
    if let Some(pairs) = super::vnni::for_q4_1() {
        return pairs;
    }
    dot::<super::format::Q4_1>()
}

pub(super) fn dot<F: Format>() -> DotFn {
    for_isa!(F, dots_body(rows: &[u8], x: &[RoundedPart], y: &mut [f32]))
}

#[cfg(test)]
mod tests {
    use super::super::format::{Q4_0, Q4_1, Q4K, Q5K, Q6K, Q8_0};
    use super::super::isa::Portable;
    use super::*;

    /// `halves` are where f16 lie in a block.
    fn check<F: Format>(name: &str, halves: &[usize]) {
        let mut state = 11u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 16
        };
        for blocks in 0..9 {
            let len = blocks * F::PARTS * LEN;
            let x: Vec<f32> = (0..len).map(|_| random() as f32 / 1e4 - 3.0).collect();
            let mut row: Vec<u8> = (0..blocks * F::BLOCK_BYTES).map(|_| random() as u8).collect();
            for block in row.chunks_exact_mut(F::BLOCK_BYTES) {
                for at in halves {
                    // About 1, of either sign; sometimes subnormal; no NaN.
                    let exponent = if random() % 8 == 0 { 0 } else { 0x38 };
                    block[at + 1] = block[at + 1] & 0x83 | exponent;
                }
            }
            Rounded::with(&x, len, |rounded| {
                for x in rounded.rows() {
                    let (mut expected, mut got) = (0.0f32, 0.0f32);
                    // SAFETY: the first needs no instruction set; the second was chosen for this processor.
                    unsafe {
                        dot_body::<F, Portable>(&row, x, &mut expected);
                        dot::<F>()(&row, x, std::slice::from_mut(&mut got));
                    }
                    assert_eq!(got.to_bits(), expected.to_bits(), "{name}, {blocks} blocks");
                }
            });
        }
    }

    #[test]
    fn rounding_is_that_of_a_cast() {
        let extremes = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, 1e-45, 1e-40, 0.0];
        let part = |i: usize, j: usize| match extremes.get(i) {
            Some(extreme) if j.is_multiple_of(3) => *extreme,
            _ => (i * 131 + j * 37) as f32 % 61.0 / 7.0 - 4.0,
        };
        let mut x: Vec<f32> = (0..12 * LEN).map(|i| part(i / LEN, i % LEN)).collect();
        // Halves, which go to the even neighbour.
        x.extend((0..LEN).map(|i| if i == 0 { 127.0 } else { i as f32 - 16.5 }));
        x.extend([-1e-40; LEN]);
        Rounded::with(&x, x.len(), |rounded| {
            for (x, part) in x.as_chunks::<LEN>().0.iter().zip(&rounded.parts) {
                let magnitude = x.iter().fold(0.0f32, |most, x| {
                    if x.abs() > most || x.is_nan() { x.abs() } else { most }
                });
                let scale = magnitude / 127.0;
                let by = if scale == 0.0 { 0.0 } else { 1.0 / scale };
                let q = x.map(|x| ((x * by + 12_582_912.0) - 12_582_912.0) as i8);
                assert_eq!(part.q, q, "{x:?}");
                let sum = |q: &[i8]| q.iter().map(|q| i32::from(*q)).sum::<i32>() as f32 * scale;
                let expected = [scale, sum(&q), sum(&q[..LEN / 2]), sum(&q[LEN / 2..])];
                let [[scale, all], [first, second]] = [part.scale_and_sum, part.sums];
                for (got, expected) in [scale, all, first, second].into_iter().zip(expected) {
                    assert!(got == expected || got.is_nan() && expected.is_nan(), "{x:?}");
                }
            }
        });
    }

    #[test]
    fn this_processors_loop_gives_the_bits_of_the_portable_one() {
        check::<Q4_0>("Q4_0", &[0]);
        check::<Q4_1>("Q4_1", &[0, 2]);
        check::<Q8_0>("Q8_0", &[0]);
        check::<Q4K>("Q4_K", &[0, 2]);
        check::<Q5K>("Q5_K", &[0, 2]);
        check::<Q6K>("Q6_K", &[208]);
    }
}

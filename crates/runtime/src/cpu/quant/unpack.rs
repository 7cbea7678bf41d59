//! The common block formats, unpacked by code that compilers vectorise; the others go through Candle.
//!
//! Beside them stands what they replace: [`GgmlType::to_float`], by which the tests know them.
//!
//! [`GgmlType::to_float`]: candle_core::quantized::GgmlType::to_float

use crate::cpu::simd::widest;
use half::f16;
use metal_candle_graph::BlockFormat;

/// Weights of one block of every format here.
const LEN: usize = 32;

/// `to = blocks`. As many blocks as weights.
pub(super) type UnpackFn = unsafe fn(&[u8], &mut [f32]);
/// `*y = Σ block · x` of one row, with the sum of every 32 elements of x at hand.
pub(super) type DotFn = unsafe fn(&[u8], &[f32], &[f32], &mut f32);

/// A format whose weights are `scale · q + shift`.
trait Format {
    const BYTES: usize;
    /// `(scale, shift, q)`
    fn unpack(block: &[u8]) -> (f32, f32, [f32; LEN]);
}

struct Q4_0;
struct Q4_1;
struct Q8_0;

#[inline(always)]
fn half(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// The low nibbles, then the high ones.
#[inline(always)]
fn nibbles(bytes: &[u8]) -> [f32; LEN] {
    let mut q = [0.0; LEN];
    let (low, high) = q.split_at_mut(LEN / 2);
    for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
        *low = f32::from(byte & 15);
        *high = f32::from(byte >> 4);
    }
    q
}

impl Format for Q4_0 {
    const BYTES: usize = 18;
    #[inline(always)]
    fn unpack(block: &[u8]) -> (f32, f32, [f32; LEN]) {
        let scale = half(block);
        (scale, -8.0 * scale, nibbles(&block[2..]))
    }
}

impl Format for Q4_1 {
    const BYTES: usize = 20;
    #[inline(always)]
    fn unpack(block: &[u8]) -> (f32, f32, [f32; LEN]) {
        (half(block), half(&block[2..]), nibbles(&block[4..]))
    }
}

impl Format for Q8_0 {
    const BYTES: usize = 34;
    #[inline(always)]
    fn unpack(block: &[u8]) -> (f32, f32, [f32; LEN]) {
        let mut q = [0.0; LEN];
        for (q, byte) in q.iter_mut().zip(&block[2..]) {
            *q = f32::from(byte.cast_signed());
        }
        (half(block), 0.0, q)
    }
}

#[inline(always)]
unsafe fn unpack_body<F: Format>(blocks: &[u8], to: &mut [f32]) {
    for (block, to) in blocks.chunks_exact(F::BYTES).zip(to.chunks_exact_mut(LEN)) {
        let (scale, shift, q) = F::unpack(block);
        for (to, q) in to.iter_mut().zip(q) {
            *to = scale * q + shift;
        }
    }
}

/// Sums are kept in lanes, the same number on every machine: their order is part of the value.
#[inline(always)]
unsafe fn dot_body<F: Format>(blocks: &[u8], x: &[f32], sums: &[f32], y: &mut f32) {
    let mut lanes = [0f32; LEN];
    let mut shifts = 0.0;
    let rows = x.as_chunks::<LEN>().0;
    for ((block, x), sum) in blocks.chunks_exact(F::BYTES).zip(rows).zip(sums) {
        let (scale, shift, q) = F::unpack(block);
        for i in 0..LEN {
            lanes[i] += scale * (q[i] * x[i]);
        }
        shifts += shift * sum;
    }
    let mut half = LEN / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    *y = lanes[0] + shifts;
}

fn unpack<F: Format>() -> UnpackFn {
    widest!([F: Format] unpack_body<F>(blocks: &[u8], to: &mut [f32]))
}

fn dot<F: Format>() -> DotFn {
    widest!([F: Format] dot_body<F>(blocks: &[u8], x: &[f32], sums: &[f32], y: &mut f32))
}

/// The loops of a format that has them: weights to f32, and a row times a vector.
pub(super) fn loops(format: BlockFormat) -> Option<(UnpackFn, DotFn)> {
    match format {
        BlockFormat::Q4_0 => Some((unpack::<Q4_0>(), dot::<Q4_0>())),
        BlockFormat::Q4_1 => Some((unpack::<Q4_1>(), dot::<Q4_1>())),
        BlockFormat::Q8_0 => Some((unpack::<Q8_0>(), dot::<Q8_0>())),
        BlockFormat::Q5_0
        | BlockFormat::Q5_1
        | BlockFormat::Q8_1
        | BlockFormat::Q2K
        | BlockFormat::Q3K
        | BlockFormat::Q4K
        | BlockFormat::Q5K
        | BlockFormat::Q6K
        | BlockFormat::Q8K => None,
    }
}

/// The sum of every 32 elements.
pub(super) fn block_sums(x: &[f32], sums: &mut [f32]) {
    for (x, sum) in x.chunks(LEN).zip(sums) {
        *sum = x.iter().sum();
    }
}

/// How many sums a row of `cols` has.
pub(super) const fn sums_len(cols: usize) -> usize {
    cols.div_ceil(LEN)
}

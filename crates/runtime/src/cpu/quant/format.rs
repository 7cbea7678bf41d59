//! The block formats of which most models are made, as what they have in common: 32 weights at a time are
//! `scale · q + shift`, with unsigned q.
//!
//! The layouts are llama.cpp's (`ggml-common.h`). Beside them stands what they are tested against: Candle's
//! [`GgmlType::to_float`], which also serves the formats that are not here.
//!
//! [`GgmlType::to_float`]: candle_core::quantized::GgmlType::to_float

use super::isa::Isa;

/// Weights of a part.
pub(super) const LEN: usize = 32;

/// 32 weights. Each half has a scale and a shift of its own, which only `Q6_K` makes use of.
pub(super) struct Part {
    pub(super) q: [u8; LEN],
    pub(super) scale: [f32; 2],
    pub(super) shift: [f32; 2],
}

impl Part {
    #[inline(always)]
    fn of(q: [u8; LEN], scale: f32, shift: f32) -> Part {
        Part { q, scale: [scale; 2], shift: [shift; 2] }
    }
}

/// A block format.
pub(super) trait Format {
    const BLOCK_BYTES: usize;
    /// Parts of a block.
    const PARTS: usize;
    /// Whether the halves of a part differ in scale and shift.
    const HALVES: bool = false;
    /// Whether a q may be 128 or more.
    const WIDE: bool = false;
    /// What every shift is, in scales; 0 where they differ.
    const OFFSET: i32 = 0;
    fn part<I: Isa>(block: &[u8], index: usize) -> Part;
}

pub(super) struct Q4_0;
pub(super) struct Q4_1;
pub(super) struct Q8_0;
pub(super) struct Q4K;
pub(super) struct Q5K;
pub(super) struct Q6K;

#[inline(always)]
fn half<I: Isa>(block: &[u8], at: usize) -> f32 {
    I::half(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// The low nibbles of 16 bytes, then the high ones.
#[inline(always)]
fn nibbles(bytes: &[u8]) -> [u8; LEN] {
    let bytes: &[u8; LEN / 2] = bytes.try_into().expect("metal-candle bug: half a part of nibbles");
    let mut q = [0; LEN];
    for i in 0..LEN / 2 {
        q[i] = bytes[i] & 15;
        q[i + LEN / 2] = bytes[i] >> 4;
    }
    q
}

impl Format for Q4_0 {
    const BLOCK_BYTES: usize = 18;
    const PARTS: usize = 1;
    const OFFSET: i32 = -8;
    #[inline(always)]
    fn part<I: Isa>(block: &[u8], _: usize) -> Part {
        let scale = half::<I>(block, 0);
        Part::of(nibbles(&block[2..]), scale, Self::OFFSET as f32 * scale)
    }
}

impl Format for Q4_1 {
    const BLOCK_BYTES: usize = 20;
    const PARTS: usize = 1;
    #[inline(always)]
    fn part<I: Isa>(block: &[u8], _: usize) -> Part {
        Part::of(nibbles(&block[4..]), half::<I>(block, 0), half::<I>(block, 2))
    }
}

impl Format for Q8_0 {
    const BLOCK_BYTES: usize = 34;
    const PARTS: usize = 1;
    const WIDE: bool = true;
    const OFFSET: i32 = -128;
    #[inline(always)]
    fn part<I: Isa>(block: &[u8], _: usize) -> Part {
        let scale = half::<I>(block, 0);
        let mut q = [0; LEN];
        for (q, byte) in q.iter_mut().zip(&block[2..]) {
            // Adds 128, modulo 256.
            *q = byte ^ 0x80;
        }
        Part::of(q, scale, Self::OFFSET as f32 * scale)
    }
}

/// Scale and minimum of a part, six bits each, of the twelve bytes that hold eight of them.
#[inline(always)]
fn scale_and_min(bytes: &[u8], index: usize) -> (u8, u8) {
    if index < 4 {
        (bytes[index] & 63, bytes[index + 4] & 63)
    } else {
        let (low, high) = (bytes[index + 4], [bytes[index - 4] >> 6, bytes[index] >> 6]);
        (low & 15 | high[0] << 4, low >> 4 | high[1] << 4)
    }
}

/// The low or the high nibbles of 32 bytes.
#[inline(always)]
fn nibbles_of(bytes: &[u8], high: bool) -> [u8; LEN] {
    let bytes: &[u8; LEN] = bytes.try_into().expect("metal-candle bug: a part of nibbles");
    let shift = if high { 4 } else { 0 };
    std::array::from_fn(|i| bytes[i] >> shift & 15)
}

impl Format for Q4K {
    const BLOCK_BYTES: usize = 144;
    const PARTS: usize = 8;
    #[inline(always)]
    fn part<I: Isa>(block: &[u8], index: usize) -> Part {
        let (scale, min) = scale_and_min(&block[4..16], index);
        let start = 16 + index / 2 * LEN;
        let q = nibbles_of(&block[start..start + LEN], index % 2 == 1);
        let (scale, min) =
            (half::<I>(block, 0) * f32::from(scale), half::<I>(block, 2) * f32::from(min));
        Part::of(q, scale, -min)
    }
}

impl Format for Q5K {
    const BLOCK_BYTES: usize = 176;
    const PARTS: usize = 8;
    #[inline(always)]
    fn part<I: Isa>(block: &[u8], index: usize) -> Part {
        let (scale, min) = scale_and_min(&block[4..16], index);
        let start = 48 + index / 2 * LEN;
        let mut q = nibbles_of(&block[start..start + LEN], index % 2 == 1);
        for (q, high) in q.iter_mut().zip(&block[16..48]) {
            *q |= (high >> index & 1) << 4;
        }
        let (scale, min) =
            (half::<I>(block, 0) * f32::from(scale), half::<I>(block, 2) * f32::from(min));
        Part::of(q, scale, -min)
    }
}

impl Format for Q6K {
    const BLOCK_BYTES: usize = 210;
    const PARTS: usize = 8;
    const HALVES: bool = true;
    const OFFSET: i32 = -32;
    #[inline(always)]
    fn part<I: Isa>(block: &[u8], index: usize) -> Part {
        // Two halves of a block, each of four parts: the low nibbles of 64 bytes, then the high ones.
        let (side, quarter) = (index / 4, index % 4);
        let low = side * 64 + quarter % 2 * LEN;
        let high = 128 + side * LEN;
        let mut q = nibbles_of(&block[low..low + LEN], quarter >= 2);
        for (q, high) in q.iter_mut().zip(&block[high..high + LEN]) {
            *q |= (high >> (2 * quarter) & 3) << 4;
        }
        let d = half::<I>(block, 208);
        let at = 192 + side * 8 + quarter * 2;
        let scale = [0, 1].map(|i| d * f32::from(block[at + i].cast_signed()));
        Part { q, scale, shift: scale.map(|scale| Self::OFFSET as f32 * scale) }
    }
}

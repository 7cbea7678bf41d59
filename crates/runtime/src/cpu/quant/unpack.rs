//! Blocks as f32.

use super::Dot;
use super::dot::{dot, dot_q4_1};
use super::format::{Format, LEN, Q4_0, Q4_1, Q4K, Q5K, Q6K, Q8_0};
use super::isa::{Isa, for_isa};
use super::nf4;
use metal_candle_graph::BlockFormat;

/// `to = blocks`, from part `first` on, which counts 32 weights.
pub(super) type UnpackFn = unsafe fn(&[u8], usize, &mut [f32]);

#[inline(always)]
unsafe fn unpack_body<F: Format, I: Isa>(row: &[u8], first: usize, to: &mut [f32]) {
    for (i, to) in to.as_chunks_mut::<LEN>().0.iter_mut().enumerate() {
        let at = (first + i) / F::PARTS * F::BLOCK_BYTES;
        let part = F::part::<I>(&row[at..at + F::BLOCK_BYTES], (first + i) % F::PARTS);
        for (half, to) in to.as_chunks_mut::<{ LEN / 2 }>().0.iter_mut().enumerate() {
            let (scale, shift) = (part.scale[half], part.shift[half]);
            for (j, to) in to.iter_mut().enumerate() {
                *to = scale * f32::from(part.q[half * LEN / 2 + j]) + shift;
            }
        }
    }
}

fn unpack<F: Format>() -> UnpackFn {
    for_isa!(F, unpack_body(row: &[u8], first: usize, to: &mut [f32]))
}

/// The loops of a format that has them.
pub(super) fn loops(format: BlockFormat) -> Option<(UnpackFn, Dot)> {
    let (unpack, dot) = match format {
        BlockFormat::Q4_0 => (unpack::<Q4_0>(), dot::<Q4_0>()),
        BlockFormat::Q4_1 => (unpack::<Q4_1>(), dot_q4_1()),
        BlockFormat::Q8_0 => (unpack::<Q8_0>(), dot::<Q8_0>()),
        BlockFormat::Q4K => (unpack::<Q4K>(), dot::<Q4K>()),
        BlockFormat::Q5K => (unpack::<Q5K>(), dot::<Q5K>()),
        BlockFormat::Q6K => (unpack::<Q6K>(), dot::<Q6K>()),
        BlockFormat::NF4 => {
            let (unpack, dot) = nf4::loops();
            return Some((unpack, Dot::Exact(dot)));
        }
        BlockFormat::Q5_0
        | BlockFormat::Q5_1
        | BlockFormat::Q8_1
        | BlockFormat::Q2K
        | BlockFormat::Q3K
        | BlockFormat::Q8K => return None,
    };
    Some((unpack, Dot::Rounded(dot)))
}

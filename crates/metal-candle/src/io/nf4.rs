//! NF4: floats into blocks and back. The format is [`BlockFormat::NF4`]; the numbers are bitsandbytes'.

use metal_candle_graph::BlockFormat;

/// Weights of a block.
pub(super) const LEN: usize = BlockFormat::NF4.block_len();
/// Bytes of a block.
pub(super) const BYTES: usize = BlockFormat::NF4.block_bytes();

/// Halfway between the values, each of which goes to the lower one.
const BOUNDS: [f32; 15] = {
    let (values, mut bounds, mut i) = (BlockFormat::NF4_VALUES, [0.0; 15], 0);
    while i < bounds.len() {
        bounds[i] = (values[i] + values[i + 1]) / 2.0;
        i += 1;
    }
    bounds
};

/// Whole blocks of finite numbers, each of which becomes the nearest of its block's sixteen.
pub(super) fn quantise(values: &[f32]) -> Vec<u8> {
    let (blocks, []) = values.as_chunks::<LEN>() else {
        panic!("metal-candle bug: {} numbers in blocks of {LEN}", values.len())
    };
    let mut bytes = Vec::with_capacity(blocks.len() * BYTES);
    for block in blocks {
        let largest = block.iter().fold(0f32, |max, x| max.max(x.abs()));
        // As bitsandbytes has it, to the bit.
        let by = 1.0 / largest.max(1e-38);
        let code = |x: f32| BOUNDS.iter().map(|bound| u8::from(x * by > *bound)).sum::<u8>();
        bytes.extend(largest.to_le_bytes());
        bytes.extend(block.as_chunks().0.iter().map(|[a, b]| code(*a) << 4 | code(*b)));
    }
    bytes
}

/// What whole blocks mean.
pub(super) fn dequantise(blocks: &[u8]) -> Vec<f32> {
    let (blocks, _) = blocks.as_chunks::<BYTES>();
    let mut values = Vec::with_capacity(blocks.len() * LEN);
    for block in blocks {
        let (largest, codes) = block.split_first_chunk().expect("metal-candle bug: a block");
        let largest = f32::from_le_bytes(*largest);
        let value = |code: u8| largest * BlockFormat::NF4_VALUES[usize::from(code)];
        values.extend(codes.iter().flat_map(|pair| [pair >> 4, pair & 15]).map(value));
    }
    values
}

//! Quantised products. One format is enough to judge the operation; that each of GGUF's is read right is judged
//! against Candle's reader, in the runtime. NF4, which Candle does not read, is read here.

use super::{Value, flat, unflat};
use crate::{BlockFormat, Node, Operation};

pub(super) fn apply(node: &Node, x: &[&Value]) -> Vec<f64> {
    match node.op {
        Operation::Dequantize { format, .. } => read(format, &x[0].data),
        Operation::QuantDot { format, rows, cols, transposed } => {
            let w = read(format, &x[1].data);
            let (shape, from) = (*node.shape(), x[0].ty.shape);
            let last = shape.rank() - 1;
            let element = |i: usize| {
                let mut index = unflat(&shape, i);
                let to = index[last];
                let product = |p: usize| {
                    index[last] = p;
                    let weight = if transposed { w[p * cols + to] } else { w[to * cols + p] };
                    x[0].data[flat(&from, &index)] * weight
                };
                (0..if transposed { rows } else { cols }).map(product).sum()
            };
            (0..shape.len()).map(element).collect()
        }
        op => panic!("metal-candle bug: {op} reads no blocks"),
    }
}

fn read(format: BlockFormat, bytes: &[f64]) -> Vec<f64> {
    let block = match format {
        BlockFormat::Q8_0 => q8_0,
        BlockFormat::NF4 => nf4,
        _ => panic!("the oracle reads Q8_0 and NF4 only, and no {format:?}"),
    };
    bytes.chunks_exact(format.block_bytes()).flat_map(block).collect()
}

/// A little-endian f16 scale and 32 signed bytes.
fn q8_0(block: &[f64]) -> Vec<f64> {
    let scale = half(block[0] as u16 | (block[1] as u16) << 8);
    block[2..].iter().map(|q| scale * f64::from(*q as u8 as i8)).collect()
}

/// A little-endian f32 and 32 pairs of codes, the high bits first.
fn nf4(block: &[f64]) -> Vec<f64> {
    let largest = f32::from_le_bytes(std::array::from_fn(|i| block[i] as u8));
    let weight = |code: u8| f64::from(largest * BlockFormat::NF4_VALUES[usize::from(code)]);
    block[4..].iter().flat_map(|pair| [*pair as u8 >> 4, *pair as u8 & 15]).map(weight).collect()
}

/// IEEE 754 binary16.
fn half(bits: u16) -> f64 {
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    let (exponent, mantissa) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023));
    sign * match exponent {
        0 => mantissa * 2f64.powi(-24),
        31 if mantissa == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        e => (1.0 + mantissa / 1024.0) * 2f64.powi(e - 15),
    }
}

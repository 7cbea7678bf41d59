//! Quantised products. One format is enough to judge the operation; that each format is read right is judged
//! against Candle's reader, in the runtime.

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

/// Q8_0: a little-endian f16 scale and 32 signed bytes.
fn read(format: BlockFormat, bytes: &[f64]) -> Vec<f64> {
    assert_eq!(format, BlockFormat::Q8_0, "the oracle reads Q8_0 only");
    let block = |block: &[f64]| -> Vec<f64> {
        let scale = half(block[0] as u16 | (block[1] as u16) << 8);
        block[2..].iter().map(|q| scale * f64::from(*q as u8 as i8)).collect()
    };
    bytes.chunks_exact(format.block_bytes()).flat_map(block).collect()
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

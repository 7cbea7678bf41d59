//! GGUF blocks against Candle, which PyTorch knows nothing of.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use metal_candle::{BlockFormat, LazyTensor, grad};

const ROWS: usize = 5;
const COLS: usize = 512;

/// Candle's name, where Candle can both quantise and dequantise.
fn candle(format: BlockFormat) -> Option<GgmlDType> {
    match format {
        BlockFormat::Q4_0 => Some(GgmlDType::Q4_0),
        BlockFormat::Q4_1 => Some(GgmlDType::Q4_1),
        BlockFormat::Q5_0 => Some(GgmlDType::Q5_0),
        BlockFormat::Q5_1 => Some(GgmlDType::Q5_1),
        BlockFormat::Q8_0 => Some(GgmlDType::Q8_0),
        // Made for activations: Candle only ever writes it.
        BlockFormat::Q8_1 => None,
        BlockFormat::Q2K => Some(GgmlDType::Q2K),
        BlockFormat::Q3K => Some(GgmlDType::Q3K),
        BlockFormat::Q4K => Some(GgmlDType::Q4K),
        BlockFormat::Q5K => Some(GgmlDType::Q5K),
        BlockFormat::Q6K => Some(GgmlDType::Q6K),
        BlockFormat::Q8K => Some(GgmlDType::Q8K),
    }
}

/// The blocks of a random matrix, and the same weights in f32.
fn weight(format: BlockFormat) -> Option<(LazyTensor, Tensor)> {
    let w =
        LazyTensor::randn(&[ROWS, COLS], metal_candle::DType::F32, 1, &metal_candle::Device::Cpu);
    let quantised = QTensor::quantize(&w.unwrap().eval().unwrap(), candle(format)?).unwrap();
    let bytes = quantised.data().unwrap().to_vec();
    let len = bytes.len();
    let blocks = LazyTensor::from_vec(bytes, &[len], &metal_candle::Device::Cpu).unwrap();
    Some((blocks, quantised.dequantize(&Device::Cpu).unwrap()))
}

fn values(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn check_close(format: BlockFormat, got: &Tensor, expected: &Tensor, tolerance: f64) {
    assert_eq!(got.dims(), expected.dims(), "{format:?}");
    for (got, expected) in values(got).iter().zip(values(expected)) {
        assert!((got - expected).abs() <= tolerance, "{format:?}: {got}, expected {expected}");
    }
}

#[test]
fn blocks_are_dequantised_to_the_bit() {
    for format in BlockFormat::ALL {
        let Some((blocks, expected)) = weight(format) else { continue };
        let got = blocks.dequantize(format, ROWS, COLS).unwrap().eval().unwrap();
        check_close(format, &got, &expected, 0.0);
    }
}

#[test]
fn a_quantised_product_and_its_gradient_are_those_of_the_f32_weight() {
    for format in BlockFormat::ALL {
        let Some((blocks, expected)) = weight(format) else { continue };
        for (name, dtype, tolerance) in [("f32", DType::F32, 2e-4), ("bf16", DType::BF16, 0.5)] {
            let device = metal_candle::Device::Cpu;
            let x = LazyTensor::randn(&[2, 3, COLS], super::call::dtype(name), 2, &device).unwrap();
            let x = x.to_owned_copy().unwrap();
            let y = x.quant_matmul(&blocks, format, ROWS, COLS).unwrap();
            let g = grad(&y.sqr().unwrap().sum_all().unwrap(), &[&x]).unwrap();
            let got = LazyTensor::eval_all(&[&y, &g[0]]).unwrap();
            assert_eq!(got[0].dtype(), dtype);
            let dense = x.eval().unwrap().to_dtype(DType::F32).unwrap();
            let y = dense.broadcast_matmul(&expected.t().unwrap()).unwrap();
            check_close(format, &got[0], &y, tolerance);
            let dx = (y.broadcast_matmul(&expected).unwrap() * 2.0).unwrap();
            check_close(format, &got[1], &dx, 100.0 * tolerance);
        }
    }
}

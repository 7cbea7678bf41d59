//! GGUF blocks against Candle, which PyTorch knows nothing of; NF4 against our own reading of it, which `tests/weights`
//! holds against bitsandbytes'.

use crate::testbed::{computes, device};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use metal_candle::io::gguf::{Encoding, StoredTensor};
use metal_candle::{BlockFormat, CrossEntropy, LazyTensor, grad};

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
        // None of GGUF's.
        BlockFormat::NF4 => None,
    }
}

/// The blocks of a random matrix, and the same weights in f32.
fn weight(format: BlockFormat) -> Option<(LazyTensor, Tensor)> {
    let w =
        LazyTensor::randn(&[ROWS, COLS], metal_candle::DType::F32, 1, &metal_candle::Device::Cpu);
    let w = w.unwrap().eval().unwrap();
    if format == BlockFormat::NF4 {
        let values = w.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let stored = StoredTensor::encode(&values, &[ROWS, COLS], Encoding::Blocks(format));
        let stored = stored.unwrap();
        let blocks = LazyTensor::from_vec(stored.bytes.to_vec(), &[stored.bytes.len()], device());
        return Some((blocks.unwrap(), stored.dequantize().unwrap()));
    }
    // Candle quantises on the CPU.
    let quantised = QTensor::quantize(&w, candle(format)?).unwrap();
    let bytes = quantised.data().unwrap().to_vec();
    let len = bytes.len();
    let blocks = LazyTensor::from_vec(bytes, &[len], device()).unwrap();
    Some((blocks, quantised.dequantize(&Device::Cpu).unwrap()))
}

fn values(x: &Tensor) -> Vec<f64> {
    x.to_device(&Device::Cpu)
        .unwrap()
        .to_dtype(DType::F64)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
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

/// Elements that are exact in eight bits and in bf16: multiples of 1/128 up to 127/128, which each 32 of them reach.
fn exact(rows: usize) -> Tensor {
    let element = |i: usize| if i.is_multiple_of(32) { 127 } else { (i * 7919 % 255) as i64 - 127 };
    let data: Vec<f32> = (0..rows * COLS).map(|i| element(i) as f32 / 128.0).collect();
    Tensor::from_vec(data, (rows, COLS), &Device::Cpu).unwrap()
}

/// On the device that the tests run on.
fn leaf(x: &Tensor) -> LazyTensor {
    LazyTensor::from_tensor(x).unwrap().to_device(device()).unwrap()
}

/// `|got - expected|` within a part of what the products' magnitudes add up to.
fn check_product(what: &str, got: &Tensor, a: &Tensor, b: &Tensor, part: f64) {
    let wide = |x: &Tensor| x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
    let (a, b) = (wide(a), wide(b));
    let expected = values(&a.matmul(&b).unwrap());
    let magnitude = values(&a.abs().unwrap().matmul(&b.abs().unwrap()).unwrap());
    for ((got, expected), magnitude) in values(got).iter().zip(expected).zip(magnitude) {
        let near = (got - expected).abs() <= part * magnitude;
        assert!(near, "{what}: {got}, expected {expected} within {part} of {magnitude}");
    }
}

#[test]
fn a_quantised_product_and_its_gradient_are_those_of_the_f32_weight() {
    // Few rows are multiplied in integers, which are exact here, or as they are; many so, too, or by bf16, as the processor has it.
    for format in BlockFormat::ALL {
        use BlockFormat::{NF4, Q4_0, Q4_1, Q4K, Q5K, Q6K, Q8_0};
        let Some((blocks, weight)) = weight(format) else { continue };
        let by_blocks = [NF4, Q4_0, Q4_1, Q8_0, Q4K, Q5K, Q6K].contains(&format);
        let few = if by_blocks { 1e-6 } else { 1.0 / 256.0 };
        for (rows, dtype, part) in [
            (1, DType::F32, few),
            (3, DType::F32, few),
            (40, DType::F32, 1.0 / 256.0),
            (1, DType::BF16, 1.0 / 128.0),
            (40, DType::BF16, 1.0 / 128.0),
            (3, DType::F64, 1e-12),
            (40, DType::F64, 1e-12),
        ] {
            if dtype == DType::F64 && !computes(metal_candle::DType::F64) {
                continue;
            }
            let what = format!("{format:?}, {rows} rows of {dtype:?}");
            let x = leaf(&exact(rows).to_dtype(dtype).unwrap());
            let y = x.quant_matmul(&blocks, format, ROWS, COLS).unwrap();
            let g = grad(&y.sqr().unwrap().sum_all().unwrap(), &[&x]).unwrap();
            let got = LazyTensor::eval_all(&[&y, &g[0]]).unwrap();
            assert_eq!(got[0].dtype(), dtype);
            let dense = exact(rows);
            check_product(&what, &got[0], &dense, &weight.t().unwrap(), part);
            let dy = (&got[0].to_dtype(DType::F32).unwrap() * 2.0).unwrap();
            let part = if dtype == DType::F64 { 1e-6 } else { 1.0 / 64.0 };
            check_product(&format!("{what}, gradient"), &got[1], &dy, &weight, part);
        }
    }
}

/// `f32[ROWS, COLS]` blocks are classes; the loss and the gradient are those of the weights in f32.
#[test]
fn a_loss_over_quantised_classes_is_that_of_the_f32_weight() {
    let labels = [0i64, 4, -100, 2, 1, 3, 3];
    let labels = LazyTensor::from_slice(&labels, &[7], device()).unwrap();
    for format in BlockFormat::ALL {
        let Some((blocks, weight)) = weight(format) else { continue };
        let x = leaf(&exact(7)).affine(0.125, 0.0).unwrap();
        for smoothing in [0.0, 0.1] {
            let options = CrossEntropy::new().label_smoothing(smoothing);
            let weight = leaf(&weight);
            let run = |loss: LazyTensor| {
                let g = grad(&loss, &[&x]).unwrap();
                let got = LazyTensor::eval_all(&[&loss, &g[0]]).unwrap();
                got.iter().flat_map(values).collect::<Vec<f64>>()
            };
            let got = run(x.quant_linear_cross_entropy(&blocks, format, &labels, options).unwrap());
            let want = run(x.linear_cross_entropy(&weight, &labels, options).unwrap());
            let what = format!("{format:?}, smoothing {smoothing}");
            assert!((got[0] - want[0]).abs() <= 1e-2, "{what}: {}, expected {}", got[0], want[0]);
            let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
            let apart: Vec<f64> = got.iter().zip(&want).skip(1).map(|(a, b)| a - b).collect();
            assert!(norm(&apart) <= 1e-2 * norm(&want[1..]), "{what}: the gradient is another");
        }
    }
}

#[test]
fn blocks_that_are_no_whole_classes_are_refused() {
    let x = leaf(&exact(2));
    let labels = LazyTensor::from_slice(&[0i64, 1], &[2], device()).unwrap();
    let blocks = LazyTensor::from_vec(vec![0u8; 545], &[545], device()).unwrap();
    let loss =
        x.quant_linear_cross_entropy(&blocks, BlockFormat::Q8_0, &labels, CrossEntropy::new());
    let message = loss.unwrap_err().to_string();
    assert!(message.contains("545 bytes of Q8_0 for 512 features"), "{message}");
}

//! What the first metal-candle got wrong, each as the law that it broke.

#[path = "regressions/adapters.rs"]
mod adapters;
#[path = "regressions/graph.rs"]
mod graph;
#[path = "regressions/inference.rs"]
mod inference;
#[path = "io/support.rs"]
#[allow(dead_code, reason = "only the GGUF writer is used here")]
mod support;
#[path = "regressions/tiny.rs"]
mod tiny;
#[path = "regressions/training.rs"]
mod training;

use metal_candle::{DType, Device, LazyTensor};

/// Random numbers in memory of their own.
fn randn(dims: &[usize], seed: u64) -> LazyTensor {
    LazyTensor::randn(dims, DType::F32, seed, &Device::Cpu).unwrap().to_owned_copy().unwrap()
}

fn tensor(values: &[f32], dims: &[usize]) -> LazyTensor {
    LazyTensor::from_slice(values, dims, &Device::Cpu).unwrap()
}

fn vec(x: &LazyTensor) -> Vec<f32> {
    x.to_vec().unwrap()
}

#[track_caller]
fn assert_near(got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= tolerance * (1.0 + want.abs()), "{i}: {got} is not {want}");
    }
}

//! What the first metal-candle got wrong, each as the law that it broke.

#[path = "regressions/adapters.rs"]
mod adapters;
#[path = "regressions/embeddings.rs"]
mod embeddings;
#[path = "regressions/graph.rs"]
mod graph;
#[path = "regressions/inference.rs"]
mod inference;
#[path = "io/support.rs"]
#[allow(dead_code, reason = "only the GGUF writer is used here")]
mod support;
#[path = "support/testbed.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod testbed;
#[path = "regressions/tiny.rs"]
mod tiny;
#[path = "regressions/training.rs"]
mod training;

use crate::testbed::device;
use metal_candle::{DType, LazyTensor};

/// Random numbers in memory of their own.
fn randn(dims: &[usize], seed: u64) -> LazyTensor {
    LazyTensor::randn(dims, DType::F32, seed, device()).unwrap().to_owned_copy().unwrap()
}

fn tensor(values: &[f32], dims: &[usize]) -> LazyTensor {
    LazyTensor::from_slice(values, dims, device()).unwrap()
}

fn vec(x: &LazyTensor) -> Vec<f32> {
    x.to_vec().unwrap()
}

#[track_caller]
fn assert_near(got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len());
    let slack = testbed::slack_of(DType::F32, want.iter().copied().map(f64::from)) as f32;
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!(
            (got - want).abs() <= tolerance * (1.0 + want.abs()) + slack,
            "{i}: {got} is not {want}"
        );
    }
}

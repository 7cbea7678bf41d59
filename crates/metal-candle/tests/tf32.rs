//! Products in TF32, where they are allowed: a test of its own, for the choice is the process's.

#[path = "support/testbed.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod testbed;

use metal_candle::{Device, LazyTensor, allow_tf32};
use testbed::device;

/// A product of factors that TF32 cannot hold, and the largest error of it relative to what is exact.
fn error(n: usize) -> f64 {
    // 1 + 2^-12 and 1: the product of a row and a column is n (1 + 2^-12).
    let x = 1.0 + 1.0 / 4096.0;
    let square = |x: f64| LazyTensor::from_vec(vec![x as f32; n * n], &[n, n], device()).unwrap();
    let (a, b) = (square(x), square(1.0));
    let got = a.matmul(&b).unwrap().to_vec::<f32>().unwrap();
    let want = n as f64 * x;
    got.iter().map(|got| (f64::from(*got) - want).abs() / want).fold(0.0, f64::max)
}

#[test]
fn f32_products_are_exact_unless_tf32_is_allowed() {
    assert!(error(256) < 1e-6);
    allow_tf32(true);
    let rounded = error(512);
    allow_tf32(false);
    assert!(error(1024) < 1e-6);
    match device() {
        Device::Cuda(_) => assert!(rounded > 1e-5, "{rounded}: not in TF32"),
        _ => assert!(rounded < 1e-6, "{rounded}"),
    }
}

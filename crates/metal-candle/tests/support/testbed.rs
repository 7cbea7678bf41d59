//! What the tests run on: the device that `METAL_CANDLE_TEST_DEVICE` names (`cpu` if it names none), and the files of
//! the checkout, which is at `METAL_CANDLE_TEST_DATA` if not where the tests were built.

use metal_candle::models::{BaseWeights, Decoder, load_decoder};
use metal_candle::{DType, Device};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// # Panics
/// If this build or this machine lacks the device that was asked for: a test that is not run must not pass.
pub(crate) fn device() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(|| {
        let Ok(name) = std::env::var("METAL_CANDLE_TEST_DEVICE") else { return Device::Cpu };
        let device = Device::parse(&name).and_then(|device| device.check().map(|()| device));
        device.unwrap_or_else(|e| panic!("METAL_CANDLE_TEST_DEVICE: {e}"))
    })
}

/// A decoder on it.
pub(crate) fn decoder(path: &Path, base: BaseWeights) -> Decoder {
    load_decoder(path, base, device()).unwrap()
}

/// Whether the tests run on the CPU; if not, says why `test` is left out.
pub(crate) fn is_on_cpu(test: &str, why: &str) -> bool {
    let is_cpu = *device() == Device::Cpu;
    if !is_cpu {
        eprintln!("SKIPPED {test} on {}: {why}", device());
    }
    is_cpu
}

/// Whether the device computes in this dtype; if not, says so.
pub(crate) fn computes(dtype: DType) -> bool {
    let computes = !(matches!(device(), Device::Metal(_)) && dtype == DType::F64);
    if !computes {
        eprintln!("SKIPPED {dtype} on {}: Metal has no numbers of 64 bits", device());
    }
    computes
}

/// How much further off than on the CPU a result of this dtype may be on the device that the tests run on.
pub(crate) fn slack_of_device(dtype: DType) -> f64 {
    if *device() == Device::Cpu { 0.0 } else { slack_of_gpu(dtype) }
}

/// The same on a GPU, as a part of the largest value that is expected: it adds in another order, and its exponentials and
/// the like differ in their last bits.
pub(crate) fn slack_of_gpu(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-12,
        DType::F32 => 1e-5,
        DType::F16 => 1e-3,
        DType::BF16 => 8e-3,
        DType::U8 | DType::U32 | DType::I64 => 0.0,
    }
}

/// [`slack_of_device`] for these values.
pub(crate) fn slack_of(dtype: DType, want: impl IntoIterator<Item = f64>) -> f64 {
    slack_of_device(dtype) * largest(want)
}

/// The largest magnitude that is finite.
pub(crate) fn largest(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().map(f64::abs).filter(|x| x.is_finite()).fold(0.0, f64::max)
}

/// A file or folder of the checkout.
pub(crate) fn checkout(path: &str) -> PathBuf {
    // Every crate lies two folders deep in it.
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    std::env::var_os("METAL_CANDLE_TEST_DATA").map_or(built, PathBuf::from).join(path)
}

/// A file or folder of this crate's `tests`.
pub(crate) fn file(path: &str) -> PathBuf {
    checkout("crates/metal-candle/tests").join(path)
}

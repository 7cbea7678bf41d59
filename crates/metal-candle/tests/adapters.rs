//! Adapters that move between tools: what PEFT, mlx-lm and gguf-py wrote for a tiny Llama, against
//! the logits of PEFT, mlx-lm and llama.cpp, through vectors that `reference/adapters.py` makes.

#[path = "adapters/formats.rs"]
mod formats;
#[path = "adapters/fuse.rs"]
mod fuse;
#[path = "adapters/refused.rs"]
mod refused;
#[path = "adapters/registry.rs"]
mod registry;
#[path = "support/testbed.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod testbed;

use crate::testbed::device;
use candle_core::{Device as CandleDevice, Tensor};
use metal_candle::LazyTensor;
use metal_candle::io::PeftAdapter;
use metal_candle::models::{BaseWeights, Decoder, load_decoder};
use metal_candle::nn::LoRAAdapter;
use std::collections::HashMap;
use std::path::PathBuf;

fn data(name: &str) -> PathBuf {
    testbed::file("data").join(name)
}

fn vectors(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(data(name), &CandleDevice::Cpu).unwrap()
}

fn decoder() -> Decoder {
    load_decoder(&data("models/llama"), BaseWeights::F32, device()).unwrap()
}

fn prompt() -> Vec<u32> {
    let ids = vectors("models/logits.safetensors")["ids"].to_vec1::<i32>().unwrap();
    ids.into_iter().map(|id| id as u32).collect()
}

/// `[t, vocabulary]`, row by row.
fn logits(decoder: &Decoder, adapter: Option<&LoRAAdapter>) -> Vec<f32> {
    let ids = prompt();
    let ids = LazyTensor::from_slice(&ids, &[1, ids.len()], device()).unwrap();
    let hidden = decoder.hidden(&ids, adapter).unwrap();
    decoder.logits(&hidden).unwrap().to_vec().unwrap()
}

/// The largest difference, in parts of the largest logit.
fn error(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    let scale = expected.iter().fold(0f32, |max, x| max.max(x.abs()));
    let errors = got.iter().zip(expected).map(|(a, b)| (a - b).abs() / scale);
    errors.fold(0f32, |max, x| if x > max || x.is_nan() { x } else { max })
}

/// What the adapter adds to each weight is what counts, whatever it is called.
#[track_caller]
fn assert_same(got: &PeftAdapter, expected: &PeftAdapter) {
    assert_eq!(got.modules, expected.modules);
    let scales = |adapter: &PeftAdapter| -> Vec<(String, usize, f64)> {
        let targets = adapter.targets().unwrap().into_iter();
        targets.map(|target| (target.module, target.rank, target.scale)).collect()
    };
    assert_eq!(scales(got), scales(expected));
}

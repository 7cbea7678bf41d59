//! A real model: SmolLM2-135M-Instruct against transformers and PEFT, through vectors that
//! `reference/smollm.py` makes.
//!
//! The model's file comes with `cargo xtask quickstart`; `cargo xtask test` fetches it, too. Where it is missing the
//! tests say so and pass, unless `CI` is set.

#[path = "io/support.rs"]
#[allow(dead_code, reason = "only the model's path is used here")]
mod support;

use candle_core::{Device as CandleDevice, Tensor};
use metal_candle::generate::{Generator, GeneratorConfig};
use metal_candle::io::LoraConfig;
use metal_candle::io::data::Batch;
use metal_candle::io::peft::TargetModules;
use metal_candle::models::{BaseWeights, LoadedModel, load_gguf};
use metal_candle::nn::LoRAAdapter;
use metal_candle::train::{AdamWConfig, TrainStep};
use metal_candle::{Device, LazyTensor};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// Steps of a training test; `METAL_CANDLE_STEPS` asks for another number, 20 at most.
const STEPS: usize = 4;

fn load(base: BaseWeights) -> Option<LoadedModel> {
    Some(load_gguf(&support::smollm2("smollm")?, base, &Device::Cpu).unwrap())
}

fn vectors() -> HashMap<String, Tensor> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/smollm.safetensors");
    candle_core::safetensors::load(path, &CandleDevice::Cpu).unwrap()
}

fn integers(t: &Tensor) -> Vec<i64> {
    let t = t.to_dtype(candle_core::DType::I64).unwrap();
    t.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn logits_equal_transformers() {
    let Some(model) = load(BaseWeights::F32) else { return };
    let vectors = vectors();
    for i in 0..3 {
        let ids: Vec<u32> =
            integers(&vectors[&format!("prompt{i}.ids")]).iter().map(|id| *id as u32).collect();
        let t = ids.len();
        let ids = LazyTensor::from_vec(ids, &[1, t], &Device::Cpu).unwrap();
        let hidden = model.decoder.hidden(&ids, None).unwrap();
        let logits = model.decoder.logits(&hidden).unwrap().squeeze(0).unwrap();
        let best: Vec<u32> = logits.argmax(-1).unwrap().to_vec().unwrap();
        let best: Vec<i64> = best.into_iter().map(i64::from).collect();
        assert_eq!(best, integers(&vectors[&format!("prompt{i}.best")]), "prompt {i}");

        let last: Vec<f32> = logits.narrow(0, t - 1, 1).unwrap().to_vec().unwrap();
        let expected: Vec<f32> = vectors[&format!("prompt{i}.logits")].to_vec1().unwrap();
        // Against the largest logit: near 0 a logit is a difference of much larger numbers.
        let scale = expected.iter().fold(0f32, |a, b| a.max(b.abs()));
        for (at, (got, expected)) in last.iter().step_by(16).zip(&expected).enumerate() {
            let error = (got - expected).abs() / scale;
            assert!(error < 1e-3, "prompt {i}, logit {at}: {got}, expected {expected}");
        }
    }
}

#[test]
fn greedy_tokens_equal_transformers() {
    let Some(model) = load(BaseWeights::F32) else { return };
    let vectors = vectors();
    let prompt = integers(&vectors["prompt0.ids"]).iter().map(|id| *id as u32).collect::<Vec<_>>();
    let prompt = model.tokenizer.decode(&prompt, false).unwrap();
    let generator = Generator::new(Arc::new(model.decoder), Arc::new(model.tokenizer)).unwrap();
    let expected = integers(&vectors["greedy"]);
    let config = GeneratorConfig { max_tokens: expected.len(), ..GeneratorConfig::default() };
    let mut streamed = String::new();
    let out = generator.generate(&prompt, &config, |token| streamed += &token.text).unwrap();
    // Ours ends at the end token, which theirs was told to write over.
    let ids: Vec<i64> = out.ids.iter().map(|id| i64::from(*id)).collect();
    assert_eq!(ids, expected[..ids.len()]);
    assert!(ids.len() >= 8, "only {} tokens", ids.len());
    assert_eq!(streamed, out.text);
    assert!(!out.text.is_empty());
}

#[test]
fn training_follows_peft_on_q_and_v() {
    follow_peft(BaseWeights::F32, targets(&["q_proj", "v_proj"]), "losses.qv", 1e-3);
}

#[test]
fn training_follows_peft_on_all_linear_layers() {
    follow_peft(BaseWeights::F32, TargetModules::AllLinear, "losses.all", 1e-3);
}

#[test]
fn training_on_a_quantised_base_follows_peft_on_the_dequantised_one() {
    follow_peft(BaseWeights::AsStored, targets(&["q_proj", "v_proj"]), "losses.qv", 1e-2);
}

fn targets(names: &[&str]) -> TargetModules {
    TargetModules::Names(names.iter().map(ToString::to_string).collect())
}

/// Trains from PEFT's initial adapter on PEFT's batches, and compares the losses.
fn follow_peft(base: BaseWeights, target_modules: TargetModules, losses: &str, tolerance: f64) {
    let Some(model) = load(base) else { return };
    let vectors = vectors();
    let config = LoraConfig { lora_alpha: 16.0, target_modules, ..LoraConfig::default() };
    let adapter = LoRAAdapter::new(config, model.decoder.modules(), 0, &Device::Cpu).unwrap();
    let optimizer = AdamWConfig::default();
    let decoder = Arc::new(model.decoder);
    let mut step = TrainStep::new(decoder, adapter, optimizer, 1.0, 0, &Device::Cpu).unwrap();
    let ids = integers(&vectors["train.ids"]);
    let expected: Vec<f64> = vectors[losses].to_vec1().unwrap();
    let steps = std::env::var("METAL_CANDLE_STEPS").map_or(STEPS, |n| n.parse().unwrap());
    for (i, (ids, expected)) in ids.chunks(4 * 256).zip(&expected).take(steps).enumerate() {
        let metrics = step.run(&batch(ids), 1e-4).unwrap();
        let error = (f64::from(metrics.loss) - expected).abs() / expected;
        println!("step {i}: {:.6}, PEFT {expected:.6}, relative error {error:.1e}", metrics.loss);
        assert!(error < tolerance, "step {i}: loss {}, PEFT's {expected}", metrics.loss);
        assert!(metrics.applied);
    }
    assert_eq!(step.updates(), steps);
}

/// Four rows; every token is trained but the last of a row, whose successor is not there.
fn batch(ids: &[i64]) -> Batch {
    let (batch, seq) = (4, 256);
    let mut labels = Vec::with_capacity(ids.len());
    for row in ids.chunks(seq) {
        labels.extend(&row[1..]);
        labels.push(-100);
    }
    let ids = ids.iter().map(|id| *id as u32).collect();
    Batch { ids, labels, batch, seq, trained: batch * (seq - 1), documents: None }
}

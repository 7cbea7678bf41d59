//! A real model: SmolLM2-135M-Instruct against transformers and PEFT, through vectors that
//! `reference/smollm.py` makes.
//!
//! The model's file comes with `cargo xtask quickstart`; `cargo xtask test` fetches it, too. Where it is missing the
//! tests say so and pass, unless `CI` is set.

#[path = "io/support.rs"]
#[allow(dead_code, reason = "only the model's path is used here")]
mod support;
#[path = "support/testbed.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod testbed;

use crate::testbed::device;
use candle_core::{Device as CandleDevice, Tensor};
use metal_candle::LazyTensor;
use metal_candle::generate::{Generator, GeneratorConfig};
use metal_candle::io::LoraConfig;
use metal_candle::io::data::Batch;
use metal_candle::io::peft::TargetModules;
use metal_candle::models::{BaseWeights, LoadedModel, load_gguf};
use metal_candle::nn::LoRAAdapter;
use metal_candle::train::{AdamWConfig, TrainStep};
use std::collections::HashMap;
use std::sync::Arc;

/// Prompts in the vectors.
const PROMPTS: usize = 5;
/// Steps of a training test; `METAL_CANDLE_STEPS` asks for another number, 20 at most.
const STEPS: usize = 4;

fn load(base: BaseWeights) -> Option<LoadedModel> {
    Some(load_gguf(&support::smollm2("smollm")?, base, device()).unwrap())
}

fn vectors() -> HashMap<String, Tensor> {
    let path = testbed::file("data/smollm.safetensors");
    candle_core::safetensors::load(path, &CandleDevice::Cpu).unwrap()
}

fn integers(t: &Tensor) -> Vec<i64> {
    let t = t.to_dtype(candle_core::DType::I64).unwrap();
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn prompt(vectors: &HashMap<String, Tensor>, i: usize) -> Vec<u32> {
    integers(&vectors[&format!("prompt{i}.ids")]).iter().map(|id| *id as u32).collect()
}

/// `[t, vocabulary]`
fn logits(model: &LoadedModel, ids: Vec<u32>) -> LazyTensor {
    let dims = [1, ids.len()];
    let ids = LazyTensor::from_vec(ids, &dims, device()).unwrap();
    let hidden = model.decoder.hidden(&ids, None).unwrap();
    model.decoder.logits(&hidden).unwrap().squeeze(0).unwrap()
}

#[test]
fn logits_equal_transformers() {
    let Some(model) = load(BaseWeights::F32) else { return };
    let vectors = vectors();
    for i in 0..PROMPTS {
        let ids = prompt(&vectors, i);
        let t = ids.len();
        let logits = logits(&model, ids);
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
    let tokenizer = Arc::new(model.tokenizer);
    let generator = Generator::new(Arc::new(model.decoder), Arc::clone(&tokenizer));
    for i in 0..PROMPTS {
        let text = tokenizer.decode(&prompt(&vectors, i), false).unwrap();
        let expected = integers(&vectors[&format!("prompt{i}.greedy")]);
        assert_eq!(expected.len(), 64);
        // The end token is forbidden here as it was there, so that no text ends early.
        let (max_tokens, min_tokens) = (expected.len(), expected.len());
        let config = GeneratorConfig { max_tokens, min_tokens, ..GeneratorConfig::default() };
        let mut streamed = String::new();
        let out = generator.generate(&text, &config, |token| streamed += &token.text).unwrap();
        let ids: Vec<i64> = out.ids.iter().map(|id| i64::from(*id)).collect();
        assert_eq!(ids, expected, "prompt {i}");
        assert_eq!(streamed, out.text);
    }
}

/// bf16 keeps 8 bits, and 30 layers of rounding move a logit by a few hundredths of the largest one: in
/// transformers, where everything is rounded, by 2.5e-2 on the first prompt.
#[test]
fn logits_of_a_bf16_base_are_closer_to_f32_than_those_of_transformers() {
    let Some(model) = load(BaseWeights::BF16) else { return };
    let vectors = vectors();
    let values = |name: String| vectors[&name].to_vec1::<f32>().unwrap();
    for i in 0..2 {
        let ids = prompt(&vectors, i);
        let t = ids.len();
        let last = logits(&model, ids).narrow(0, t - 1, 1).unwrap().to_vec::<f32>().unwrap();
        let got: Vec<f32> = last.into_iter().step_by(16).collect();
        let exact = values(format!("prompt{i}.logits"));
        let theirs = values(format!("prompt{i}.logits.bf16"));
        let scale = exact.iter().fold(0f32, |a, b| a.max(b.abs()));
        let distance = |a: &[f32], b: &[f32]| {
            a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max) / scale
        };
        let (ours, between) = (distance(&got, &exact), distance(&got, &theirs));
        let other = distance(&theirs, &exact);
        println!("prompt {i}: to f32 {ours:.1e}, theirs {other:.1e}, between them {between:.1e}");
        assert!(ours < other, "prompt {i}: {ours}, theirs {other}");
        assert!(between < 4e-2, "prompt {i}: {between}");
    }
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

#[test]
fn training_on_a_bf16_base_follows_peft_on_f32() {
    follow_peft(BaseWeights::BF16, targets(&["q_proj", "v_proj"]), "losses.qv", 1e-2);
}

fn targets(names: &[&str]) -> TargetModules {
    TargetModules::Names(names.iter().map(ToString::to_string).collect())
}

/// Trains from PEFT's initial adapter on PEFT's batches, and compares the losses.
fn follow_peft(base: BaseWeights, target_modules: TargetModules, losses: &str, tolerance: f64) {
    let Some(model) = load(base) else { return };
    let vectors = vectors();
    let config = LoraConfig { lora_alpha: 16.0, target_modules, ..LoraConfig::default() };
    let adapter = LoRAAdapter::new(config, model.decoder.modules(), 0, device()).unwrap();
    let optimizer = AdamWConfig::default();
    let decoder = Arc::new(model.decoder);
    let mut step = TrainStep::new(decoder, adapter, optimizer, 1.0, 0).unwrap();
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

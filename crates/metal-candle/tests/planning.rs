//! What is planned from headers alone is what runs, byte for byte.

#[path = "io/support.rs"]
#[allow(dead_code, reason = "only the GGUF writer is used here")]
mod support;
#[path = "support/testbed.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod testbed;
#[path = "regressions/tiny.rs"]
#[allow(dead_code, reason = "only the model is used here")]
mod tiny;

use crate::testbed::device;
use metal_candle::generate::{DecodeShape, Generator};
use metal_candle::io::LoraConfig;
use metal_candle::io::data::{Batch, Documents, Example};
use metal_candle::io::peft::TargetModules;
use metal_candle::models::{BaseWeights, Decoder, load_decoder, load_outline};
use metal_candle::nn::LoRAAdapter;
use metal_candle::plan::{OutputSource, PlanOutput};
use metal_candle::train::{AdamWConfig, StepShape, TrainStep, Trainer, TrainingConfig};
use metal_candle::{DType, Device, ErrorKind, InputSource, LazyTensor};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use tiny::Tiny;

const BASE: BaseWeights = BaseWeights::AsStored;

fn adapter(decoder: &Decoder) -> LoRAAdapter {
    let config = LoraConfig {
        r: 3,
        lora_alpha: 6.0,
        lora_dropout: 0.1,
        target_modules: TargetModules::AllLinear,
        ..LoraConfig::default()
    };
    LoRAAdapter::new(config, decoder.modules(), 1, device()).unwrap()
}

fn real(path: &Path) -> Arc<Decoder> {
    Arc::new(load_decoder(path, BASE, device()).unwrap())
}

fn outlined(path: &Path) -> Arc<Decoder> {
    Arc::new(load_outline(path, BASE, device()).unwrap())
}

/// A batch of 2 x 16 tokens; packed, of two documents a row.
fn batch(packed: bool) -> Batch {
    let ids: Vec<u32> = (0..32).map(|i| i % 90).collect();
    let labels = ids.iter().map(|id| i64::from(*id)).collect();
    let documents = packed.then(|| Documents {
        segments: (0..32).map(|i| 1 + i % 16 / 8).collect(),
        positions: (0..32).map(|i| i % 8).collect(),
    });
    Batch { ids, labels, batch: 2, seq: 16, trained: 32, documents }
}

/// One of the committed folders, by its name.
fn folder(case: &str) -> std::path::PathBuf {
    support::data_folder().join("models").join(case)
}

#[test]
fn a_training_step_planned_from_headers_is_the_one_that_runs() {
    let scratch = tempfile::tempdir().unwrap();
    let gguf = Tiny::new().write(scratch.path());
    let optimizer = AdamWConfig::default();
    for path in [gguf, folder("llama"), folder("qwen3"), folder("mistral")] {
        for (accumulated, packed) in [(1, false), (3, false), (1, true), (2, true)] {
            let shape = StepShape { batch: 2, seq: 16, accumulated, packed };
            let decoder = outlined(&path);
            let lora = adapter(&decoder);
            let outline = TrainStep::outline(decoder, &lora, optimizer, 1.0, shape).unwrap();

            let decoder = real(&path);
            let lora = adapter(&decoder);
            let mut step = TrainStep::new(decoder, lora, optimizer, 1.0, 7).unwrap();
            let plan = step.plan(shape).unwrap();
            assert_eq!(outline.plan, plan, "{}", path.display());
            assert_eq!(outline.plan.to_string(), plan.to_string());

            // And it is what is allocated.
            assert_eq!(step.allocated_arena_bytes(), 0);
            step.run_accumulated(&vec![batch(packed); accumulated], 1e-3).unwrap();
            assert_eq!(step.allocated_arena_bytes(), outline.plan.arena_bytes);
            assert!(outline.plan.arena_bytes > 0);
        }
    }
}

#[test]
fn a_training_steps_state_and_whether_it_was_applied_are_updated_in_place() {
    // So the next step can be asked for before the host has seen anything of this one.
    for device in [Device::Cpu, Device::Cuda(0), Device::Metal(0)] {
        let decoder = Arc::new(load_outline(&folder("llama"), BASE, &device).unwrap());
        let lora = LoraConfig { target_modules: TargetModules::AllLinear, ..LoraConfig::default() };
        let lora = LoRAAdapter::new(lora, decoder.modules(), 1, &device).unwrap();
        for accumulated in [1, 2] {
            let shape = StepShape { batch: 2, seq: 16, accumulated, packed: false };
            let (decoder, optimizer) = (Arc::clone(&decoder), AdamWConfig::default());
            let plan = TrainStep::outline(decoder, &lora, optimizer, 1.0, shape).unwrap().plan;
            let state = 3 * lora.parameters().len() + 1;
            assert_eq!(plan.outputs.len(), 3 + state);
            let in_place = |output: &PlanOutput| matches!(output.source, OutputSource::Donated(_));
            let (answer, state) = plan.outputs[3..].split_last().unwrap();
            assert!(in_place(answer), "{device}: {:?}", plan.outputs);
            // On Metal, whose runs are waited for, a moment may come in memory of its own.
            let all = matches!(device, Device::Metal(_)) || state.iter().all(in_place);
            assert!(all, "{device}: {:?}", plan.outputs);
            assert!(!plan.outputs[..3].iter().any(in_place), "{device}: {:?}", plan.outputs);
        }
    }
}

#[test]
fn weights_are_outlined_as_they_would_be_held() {
    let scratch = tempfile::tempdir().unwrap();
    let gguf = Tiny::new().write(scratch.path());
    let shape = DecodeShape { batch: 1, tokens: 1, capacity: 64 };
    for path in [gguf, support::data_folder().join("adapters/base.gguf"), folder("llama")] {
        for base in [BASE, BaseWeights::F32, BaseWeights::BF16, BaseWeights::F16] {
            let real = load_decoder(&path, base, device()).unwrap();
            let outlined = load_outline(&path, base, device()).unwrap();
            let planned = Generator::outline(Arc::new(outlined), shape).unwrap();
            let run = Generator::outline(Arc::new(real), shape).unwrap();
            assert_eq!(planned, run, "{} as {base:?}", path.display());
        }
    }
}

#[test]
fn a_decode_step_planned_from_headers_is_the_one_that_runs() {
    for (batch, tokens) in [(1, 1), (1, 32), (3, 1), (3, 32)] {
        let shape = DecodeShape { batch, tokens, capacity: 64 };
        let path = folder("qwen2");
        let planned = Generator::outline(outlined(&path), shape).unwrap();
        let run = Generator::outline(real(&path), shape).unwrap();
        assert_eq!(planned, run);
    }
}

#[test]
fn the_trainer_plans_the_largest_batch_of_the_data_or_of_the_settings() {
    for packing in [false, true] {
        plans_the_largest_batch(packing);
    }
}

fn plans_the_largest_batch(packing: bool) {
    let path = folder("llama");
    let sizes = TrainingConfig { batch_size: 2, max_seq_length: 96, ..TrainingConfig::default() };
    let config = TrainingConfig { packing, ..sizes };
    let examples: Vec<Example> =
        [5, 40, 9].map(|n| Example { ids: vec![1; n], trained: vec![true; n] }).to_vec();
    let (decoder, model) = (outlined(&path), real(&path));
    let lora = adapter(&model);
    let plan = |train| Trainer::outline(Arc::clone(&decoder), &lora, &config, train).unwrap().plan;
    let trainer = Trainer::new(model, lora.clone(), config.clone()).unwrap();
    assert_eq!(plan(Some(&examples[..])), trainer.plan(&examples).unwrap());
    assert!(plan(None).arena_bytes > plan(Some(&examples[..])).arena_bytes);
}

#[test]
fn every_input_of_a_plan_is_an_argument_or_a_named_weight() {
    let decoder = outlined(&folder("llama"));
    let shape = DecodeShape { batch: 1, tokens: 1, capacity: 64 };
    let outline = Generator::outline(Arc::clone(&decoder), shape).unwrap();
    assert_eq!(outline.inputs.len(), outline.plan.inputs.len());
    let named = |name: &str| {
        outline.inputs.iter().filter(|i| **i == InputSource::Captured(Some(name.into()))).count()
    };
    for name in ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "rope.cos"] {
        assert_eq!(named(name), 1, "{name} in {:?}", outline.inputs);
    }
    assert!(!outline.inputs.contains(&InputSource::Captured(None)));
}

#[test]
fn a_placeholder_is_planned_and_never_run() {
    let x = LazyTensor::placeholder(&[2, 3], DType::F32, device()).unwrap();
    let y = x.exp().unwrap().sum_all().unwrap();
    assert_eq!(LazyTensor::plan(&[&y]).unwrap().inputs.len(), 1);
    let error = y.eval().unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::PlaceholderValue { .. }), "{error}");
    let f = metal_candle::compile(move |a: &[LazyTensor]| Ok(vec![a[0].add(&x)?]));
    let a = LazyTensor::ones(&[2, 3], DType::F32, device()).unwrap();
    let error = f.call(vec![a]).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::PlaceholderValue { .. }), "{error}");
}

/// A folder of Llama 2 70B's config, its weights a file with a header and a hole.
fn huge(folder: &Path) -> u64 {
    let (hidden, inner, layers, kv, vocab) = (8192u64, 28672u64, 80, 1024u64, 32000u64);
    let config = format!(
        r#"{{"model_type": "llama", "hidden_size": {hidden}, "intermediate_size": {inner},
        "num_hidden_layers": {layers}, "num_attention_heads": 64, "num_key_value_heads": 8,
        "vocab_size": {vocab}, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}}"#
    );
    std::fs::write(folder.join("config.json"), config).unwrap();
    let mut at = 0;
    let mut header = String::from("{");
    let mut tensor = |name: &str, dims: &[u64]| {
        let end = at + 2 * dims.iter().product::<u64>();
        let comma = if at == 0 { "" } else { "," };
        let entry = r#"{"dtype":"BF16","shape":"#;
        write!(header, "{comma}\"{name}.weight\":{entry}{dims:?},\"data_offsets\":[{at},{end}]}}")
            .unwrap();
        at = end;
    };
    tensor("model.embed_tokens", &[vocab, hidden]);
    tensor("lm_head", &[vocab, hidden]);
    tensor("model.norm", &[hidden]);
    for i in 0..layers {
        let mut module = |name: &str, dims: &[u64]| {
            tensor(&format!("model.layers.{i}.{name}"), dims);
        };
        module("input_layernorm", &[hidden]);
        module("post_attention_layernorm", &[hidden]);
        module("self_attn.q_proj", &[hidden, hidden]);
        module("self_attn.k_proj", &[kv, hidden]);
        module("self_attn.v_proj", &[kv, hidden]);
        module("self_attn.o_proj", &[hidden, hidden]);
        module("mlp.gate_proj", &[inner, hidden]);
        module("mlp.up_proj", &[inner, hidden]);
        module("mlp.down_proj", &[hidden, inner]);
    }
    header.push('}');
    let mut file = std::fs::File::create(folder.join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + at).unwrap();
    at
}

#[test]
fn a_model_of_140_gigabytes_is_planned_by_its_headers() {
    let folder = tempfile::tempdir().unwrap();
    let stored = huge(folder.path());
    assert!(stored > 137_000_000_000);
    let decoder = outlined(folder.path());
    let shape = DecodeShape { batch: 1, tokens: 1, capacity: 4096 };
    let plan = Generator::outline(decoder, shape).unwrap().plan;
    // bf16 is held as f32.
    assert!(plan.peak_bytes() as u64 > 2 * stored);
    // The system says it where it has this file.
    if std::path::Path::new("/proc/self/status").exists() {
        let kib = Device::Cpu.memory().unwrap().peak_bytes >> 10;
        assert!(kib < 1 << 20, "{kib} KiB were in memory");
    }
}

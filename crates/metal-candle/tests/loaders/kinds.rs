//! Every kind of file that is read, whole and then broken.

use super::{alone, damage, load};
use crate::testbed::device;
use crate::tiny::Tiny;
use metal_candle::io::data::{Dataset, Example};
use metal_candle::io::gguf::GgufFile;
use metal_candle::io::{PeftAdapter, Tokenizer, adapter};
use metal_candle::models::{BaseWeights, load_decoder, load_gguf};
use metal_candle::nn::LoRAAdapter;
use metal_candle::train::{Trainer, TrainingConfig};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;

fn data(name: &str) -> PathBuf {
    crate::support::data_folder().join(name)
}

/// A copy of these files of `tests/data`.
fn copy(folder: &str, names: &[&str]) -> TempDir {
    let copy = TempDir::new().unwrap();
    for name in names {
        fs::copy(data(folder).join(name), copy.path().join(name)).unwrap();
    }
    copy
}

/// The whole file loads; broken ones do, or are refused.
fn check(path: &Path, cases: u32, loader: impl Fn() -> Result<(), String>) {
    let _alone = alone();
    let whole = fs::read(path).unwrap();
    assert_eq!(load(path, &loader), None, "the whole file is refused");
    let refused = std::cell::Cell::new(0);
    damage::each(&whole, cases, |bytes| {
        fs::write(path, bytes).unwrap();
        refused.set(refused.get() + usize::from(load(path, &loader).is_some()));
    });
    println!("{}: {} refused", path.display(), refused.get());
    assert!(refused.get() > 0, "no broken file was refused");
}

fn said(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn loads(folder: &Path) -> Result<(), String> {
    load_decoder(folder, BaseWeights::BF16, device()).map(drop).map_err(said)
}

#[test]
fn a_broken_model_safetensors_is_read_or_refused() {
    let folder = copy("models/llama", &["config.json", "model.safetensors"]);
    check(&folder.path().join("model.safetensors"), 200, || loads(folder.path()));
}

#[test]
fn a_broken_config_json_is_read_or_refused() {
    for model in ["llama", "llama_yarn", "llama_llama3", "qwen3", "mistral"] {
        let folder = copy(&format!("models/{model}"), &["config.json"]);
        let weights = match model {
            "qwen3" | "mistral" => model,
            _ => "llama",
        };
        let weights = data("models").join(weights).join("model.safetensors");
        fs::copy(weights, folder.path().join("model.safetensors")).unwrap();
        let config = folder.path().join("config.json");
        check(&config, 60, || match loads(folder.path()) {
            // A config may ask for what the weights are not: then they are named.
            Err(message) if message.contains("model.safetensors") => {
                Err(format!("{message} {}", config.display()))
            }
            Err(message) if message.contains("no tensor") => {
                Err(format!("{message} {}", config.display()))
            }
            other => other,
        });
    }
}

#[test]
fn a_broken_index_of_shards_is_read_or_refused() {
    let folder = copy("models/llama", &["config.json"]);
    let shard = folder.path().join("model-00001-of-00001.safetensors");
    fs::copy(data("models/llama/model.safetensors"), &shard).unwrap();
    let tensors = candle_core::safetensors::load(&shard, &candle_core::Device::Cpu).unwrap();
    let map: serde_json::Map<String, serde_json::Value> =
        tensors.keys().map(|k| (k.clone(), "model-00001-of-00001.safetensors".into())).collect();
    let index = folder.path().join("model.safetensors.index.json");
    fs::write(&index, serde_json::json!({"metadata": {}, "weight_map": map}).to_string()).unwrap();
    check(&index, 150, || match loads(folder.path()) {
        // The shard, or the folder, that lacks what the index says.
        Err(message) if message.contains(&folder.path().display().to_string()) => {
            Err(format!("{message} {}", index.display()))
        }
        other => other,
    });
}

#[test]
fn a_broken_gguf_is_read_or_refused() {
    let folder = TempDir::new().unwrap();
    let path = Tiny::new().write(folder.path());
    for base in [BaseWeights::AsStored, BaseWeights::F16] {
        check(&path, 200, || load_gguf(&path, base, device()).map(drop).map_err(said));
        Tiny::new().write(folder.path());
    }
}

#[test]
fn a_gguf_of_any_blocks_is_read_or_refused() {
    let folder = TempDir::new().unwrap();
    let builder = crate::support::GgufBuilder::default()
        .tensor("blk.0.attn_q.weight", &[2, 256], 12, &[7; 288])
        .tensor("blk.0.attn_k.weight", &[4, 32], 2, &[7; 72])
        .f32_tensor("output_norm.weight", &[8], &[1.0; 8]);
    let path = builder.write(folder.path());
    check(&path, 400, || {
        let file = GgufFile::open(&path).map_err(said)?;
        for tensor in file.tensors() {
            file.dequantize(&tensor.name).map_err(said)?;
        }
        Ok(())
    });
}

/// Loads it and puts a text through it and back.
fn tokenizes(path: &Path) -> Result<(), String> {
    let tokenizer = Tokenizer::from_file(path).map_err(said)?;
    let encoding = tokenizer.encode_spans("ab <eos> b\u{e4}a", true).map_err(said)?;
    tokenizer.decode(&encoding.ids, false).map_err(said)?;
    tokenizer.decode(&[0, 1, 2, 3, 4, u32::MAX], true).map_err(said)?;
    Ok(())
}

const TOKENIZER: &str = r#"{"version":"1.0","truncation":null,"padding":null,"normalizer":null,
 "added_tokens":[{"id":3,"content":"<eos>","single_word":false,"lstrip":false,"rstrip":false,
 "normalized":false,"special":true}],"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,
 "trim_offsets":true,"use_regex":true},"post_processor":null,"decoder":{"type":"ByteLevel",
 "add_prefix_space":true,"trim_offsets":true,"use_regex":true},"model":{"type":"BPE","dropout":null,
 "unk_token":null,"fuse_unk":false,"vocab":{"a":0,"b":1,"ab":2,"<eos>":3},"merges":["a b"]}}"#;
const TOKENIZER_CONFIG: &str = r#"{"eos_token":{"content":"<eos>"},"bos_token":null,
 "pad_token":"<eos>","chat_template":"{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"}"#;

#[test]
fn a_broken_tokenizer_is_read_or_refused() {
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        let folder = TempDir::new().unwrap();
        fs::write(folder.path().join("tokenizer.json"), TOKENIZER).unwrap();
        fs::write(folder.path().join("tokenizer_config.json"), TOKENIZER_CONFIG).unwrap();
        let path = folder.path().join("tokenizer.json");
        check(&folder.path().join(name), 300, || tokenizes(&path));
    }
}

#[test]
fn a_broken_adapter_is_read_or_refused() {
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let folder = copy("peft_adapter", &["adapter_config.json", "adapter_model.safetensors"]);
        let base = PeftAdapter::load(folder.path()).unwrap().modules;
        let base = base.into_iter().map(|(name, p)| (name, [p.outputs, p.inputs])).collect();
        let path = folder.path().join(name);
        check(&path, 300, || {
            let adapter = adapter::load(folder.path(), None).map_err(|error| {
                // Two files make an adapter: where they contradict each other the folder is named.
                let of_both = error.to_string().contains(&folder.path().display().to_string());
                if of_both { format!("{error} {}", path.display()) } else { error.to_string() }
            })?;
            let named = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
            adapter.check_base(&base).map_err(|problem| named(&problem))?;
            LoRAAdapter::from_peft(adapter, device()).map(drop).map_err(said)
        });
    }
}

#[test]
fn broken_training_data_is_read_or_refused() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("train.jsonl");
    let rows = concat!(
        r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#,
        "\n",
        r#"{"prompt": "a", "completion": "b"}"#,
        "\n\n",
        r#"{"text": "ab \u00e4", "n": [1, 2.5]}"#,
        "\n",
    );
    fs::write(&path, rows).unwrap();
    check(&path, 400, || Dataset::open(folder.path()).map(drop).map_err(said));
}

#[test]
fn a_broken_checkpoint_is_read_or_refused() {
    let folder = TempDir::new().unwrap();
    let decoder = Arc::new(Tiny::new().decoder());
    let rows = [Example { ids: vec![1, 2, 3, 4], trained: vec![true; 4] }];
    let run = || {
        let config = TrainingConfig {
            iters: 1,
            batch_size: 1,
            max_seq_length: 32,
            adapter_path: Some(folder.path().to_owned()),
            resume: true,
            ..TrainingConfig::default()
        };
        let adapter = crate::tiny::adapter(&["self_attn.q_proj"]);
        let mut trainer = Trainer::new(Arc::clone(&decoder), adapter, config).map_err(said)?;
        trainer.train(&rows, &[], drop).map(drop).map_err(said)
    };
    run().unwrap();
    let path = folder.path().join("training_state.safetensors");
    check(&path, 150, run);
}

//! An adapter that cannot be applied is refused, and the reason given.

use super::{data, decoder};
use crate::testbed::device;

use metal_candle::io::peft::Problem;
use metal_candle::io::{AdapterFormat, DecoderConfig, Error, PeftAdapter, adapter, file};
use metal_candle::models::{BaseWeights, load_decoder};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use tempfile::TempDir;

/// The reason, which must contain `parts`.
#[track_caller]
fn refused<T>(result: metal_candle::io::Result<T>, parts: &[&str]) {
    let error = result.err().expect("an error").to_string();
    for part in parts {
        assert!(error.contains(part), "{part:?} is not in {error:?}");
    }
}

fn copy(folder: &str) -> TempDir {
    let copied = TempDir::new().unwrap();
    for entry in fs::read_dir(data(folder)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, copied.path().join(path.file_name().unwrap())).unwrap();
    }
    copied
}

/// A copy whose configuration has these values.
fn with(folder: &str, values: &[(&str, Value)]) -> TempDir {
    let copied = copy(folder);
    let path = copied.path().join("adapter_config.json");
    let mut config: Value = file::read_json(&path).unwrap();
    for (key, value) in values {
        config[*key] = value.clone();
    }
    fs::write(path, config.to_string()).unwrap();
    copied
}

#[test]
fn modules_without_loading_are_those_of_the_loaded_model() {
    for case in ["llama", "llama_bias", "mistral", "qwen2", "qwen3"] {
        let folder = data(&format!("models/{case}"));
        let decoder = load_decoder(&folder, BaseWeights::F32, device()).unwrap();
        let loaded = decoder.modules().map(|(name, dims)| (name.to_owned(), dims)).collect();
        assert_eq!(decoder.config.modules(), loaded, "{case}");
    }
}

#[test]
fn an_adapter_for_another_base_is_refused_with_what_differs() {
    let base = decoder().config;
    let wider = DecoderConfig { intermediate_size: 64, ..base.clone() };
    let deeper = DecoderConfig { num_layers: 3, ..base.clone() };
    let shallower = DecoderConfig { num_layers: 1, ..base.clone() };
    let other = DecoderConfig { architecture: "qwen2".into(), ..base.clone() };
    for path in ["adapters/peft", "adapters/mlx", "adapters/lora.gguf"].map(data) {
        adapter::load(&path, Some(&base)).unwrap();
        refused(adapter::load(&path, Some(&wider)), &["mlp.down_proj", "[32, 48]", "[32, 64]"]);
        refused(adapter::load(&path, Some(&shallower)), &["model.layers.1.", "another"]);
    }
    // It says for whom it is, where it knows.
    refused(adapter::load(data("adapters/peft"), Some(&wider)), &["\"tiny-llama\""]);
    let all = PeftAdapter {
        config: Default::default(),
        ..adapter::load(data("adapters/peft"), None).unwrap()
    };
    assert!(matches!(all.check_base(&deeper.modules()), Err(Problem::Missing { .. })));
    let parts = ["architecture \"llama\"", "\"qwen2\""];
    refused(adapter::load(data("adapters/lora.gguf"), Some(&other)), &parts);
    // 48 rows of q would split into 3 heads, and mean something else.
    let heads = DecoderConfig { num_heads: 5, ..base };
    refused(adapter::load(data("adapters/lora.gguf"), Some(&heads)), &["5 heads", "another base"]);
}

#[test]
fn kinds_that_are_no_lora_are_named() {
    let load = |folder: &TempDir| adapter::load(folder.path(), None);
    for kind in ["IA3", "LOHA", "PREFIX_TUNING", "ADALORA"] {
        refused(load(&with("adapters/peft", &[("peft_type", json!(kind))])), &[kind, "\"LORA\""]);
    }
    refused(load(&with("adapters/peft", &[("use_dora", json!(true))])), &["use_dora", "DoRA"]);
    for kind in ["dora", "full"] {
        let folder = with("adapters/mlx", &[("fine_tune_type", json!(kind))]);
        refused(load(&folder), &["fine_tune_type", kind, "\"lora\""]);
    }
    let parameters = json!({"rank": 4, "alpha": 16, "dropout": 0.0});
    let folder = with("adapters/mlx", &[("lora_parameters", parameters)]);
    refused(load(&folder), &["lora_parameters.scale", "absent"]);
    let parameters = json!({"rank": 5, "scale": 1.0, "dropout": 0.0});
    let folder = with("adapters/mlx", &[("lora_parameters", parameters)]);
    refused(load(&folder), &["adapters.safetensors", "rank 4", "5"]);
}

#[test]
fn a_path_without_an_adapter_says_what_was_expected() {
    let folder = TempDir::new().unwrap();
    let load = |path: &Path| adapter::load(path, None);
    refused(load(&folder.path().join("gone")), &["gone"]);
    refused(load(folder.path()), &["adapter_model.safetensors", "adapters.safetensors", "GGUF"]);
    fs::write(folder.path().join("adapter_model.bin"), "").unwrap();
    refused(load(folder.path()), &["adapter_model.bin", "safetensors"]);
    let text = folder.path().join("text.gguf");
    fs::write(&text, "this is not an adapter at all").unwrap();
    refused(load(&text), &["text.gguf", "not a GGUF file"]);
}

#[test]
fn a_gguf_that_is_no_lora_adapter_is_refused() {
    let base = decoder().config;
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.gguf");
    let whole = fs::read(data("adapters/lora.gguf")).unwrap();
    // One string for another of the same length.
    let swap = |from: &str, to: &str| {
        let mut bytes = whole.clone();
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
        fs::write(&path, bytes).unwrap();
        adapter::load(&path, Some(&base))
    };
    swap("llama", "llama").unwrap();
    refused(swap("adapter", "a_model"), &["general.type", "\"a_model\"", "\"adapter\""]);
    refused(swap("lora", "dora"), &["adapter.type", "\"dora\""]);
    refused(swap("q.weight.lora_a", "q.weight.lora_c"), &["lora_c", "lora_a"]);
    refused(swap("q.weight.lora_a", "z.weight.lora_a"), &["attn_z", "no linear module"]);
    for len in (0..whole.len()).step_by(97) {
        fs::write(&path, &whole[..len]).unwrap();
        assert!(matches!(adapter::load(&path, Some(&base)), Err(Error::Gguf { .. })), "{len}");
    }
    let needs_base = adapter::load(data("adapters/lora.gguf"), None);
    refused(needs_base, &["permutes", "base"]);
}

#[test]
fn what_cannot_be_written_leaves_nothing_behind() {
    let (folder, base) = (TempDir::new().unwrap(), decoder().config);
    let adapter = || adapter::load(data("adapters/peft"), None).unwrap();
    let path = folder.path().join("out");
    let save = |adapter: &PeftAdapter, format| adapter::save(adapter, &path, format, Some(&base));
    let mut nothing = adapter();
    nothing.config.lora_alpha = 0.0;
    refused(save(&nothing, AdapterFormat::Gguf), &["alpha 0"]);
    let mut broken = adapter();
    broken.modules.values_mut().next().unwrap().a.pop();
    for format in [AdapterFormat::Peft, AdapterFormat::Mlx, AdapterFormat::Gguf] {
        assert!(save(&broken, format).is_err());
    }
    assert!(matches!(
        adapter::save(&adapter(), &path, AdapterFormat::Gguf, None),
        Err(Error::Adapter { problem: Problem::NeedsBase, .. })
    ));
    let files = |path: &Path| fs::read_dir(path).map_or(0, |entries| entries.count());
    assert_eq!(files(&path), 0);
    save(&adapter(), AdapterFormat::Peft).unwrap();
    // Its configuration would be overwritten, and the adapter lost.
    refused(save(&adapter(), AdapterFormat::Mlx), &["adapter_model.safetensors", "another folder"]);
    assert_eq!(adapter::load(&path, Some(&base)).unwrap(), adapter());
}

//! A fused model computes what its base computes with the adapter on.

use super::{data, decoder, error, logits, vectors};
use crate::testbed::device;
use metal_candle::io::gguf::{Encoding, GgufFile, GgufWriter, StoredTensor};
use metal_candle::io::{AdapterFormat, DecoderConfig, adapter};
use metal_candle::models::fuse::{Fused, fuse_to_folder, fuse_to_gguf};
use metal_candle::models::{BaseWeights, Decoder, load, load_decoder};
use metal_candle::nn::LoRAAdapter;
use metal_candle::{BlockFormat, DType};
use std::fs;
use std::path::Path;
use tempfile::TempDir;

fn load_f32(path: &Path) -> Decoder {
    load_decoder(path, BaseWeights::F32, device()).unwrap()
}

/// The logits of `path` with the adapter on.
fn adapted(path: &Path, adapter: &str) -> Vec<f32> {
    let decoder = load_f32(path);
    let adapter = LoRAAdapter::load(data(adapter), &decoder.config, device()).unwrap();
    logits(&decoder, Some(&adapter))
}

fn fused_logits(path: &Path) -> Vec<f32> {
    logits(&load_f32(path), None)
}

#[test]
fn a_fused_folder_is_the_base_with_its_adapter() {
    for (path, name) in [("adapters/peft", "peft"), ("adapters/mlx", "mlx")] {
        let folder = TempDir::new().unwrap();
        let to = folder.path().join("fused");
        let fused = fuse_to_folder(&data("models/llama"), &data(path), &to, None).unwrap();
        assert_eq!(fused.fused, if name == "peft" { 14 } else { 3 });
        let expected: Vec<f32> = vectors("adapters/logits.safetensors")[name]
            .flatten_all()
            .and_then(|t| t.to_vec1())
            .unwrap();
        let error = error(&fused_logits(&to), &expected);
        println!("{name}: relative error {error:.1e}");
        assert!(error < 1e-4, "{name}: relative error {error:.1e}");
        let config = |folder: &Path| fs::read(folder.join("config.json")).unwrap();
        assert_eq!(config(&to), config(&data("models/llama")));
    }
}

#[test]
fn shards_and_dtypes_stay_and_other_files_come_along() {
    let folder = TempDir::new().unwrap();
    let (base, to) = (folder.path().join("base"), folder.path().join("fused"));
    fs::create_dir(&base).unwrap();
    // Two shards, one of them bf16; what is none of ours; what is left behind.
    let (mut map, mut shards) = (serde_json::Map::new(), [vec![], vec![]]);
    for (name, tensor) in vectors("models/llama/model.safetensors") {
        let at = usize::from(name.contains("layers.1."));
        let dtype = [candle_core::DType::F32, candle_core::DType::BF16][at];
        map.insert(name.clone(), format!("part-{at}.safetensors").into());
        shards[at].push((name, tensor.to_dtype(dtype).unwrap()));
    }
    for (at, shard) in shards.into_iter().enumerate() {
        let shard = shard.into_iter().collect();
        candle_core::safetensors::save(&shard, base.join(format!("part-{at}.safetensors")))
            .unwrap();
    }
    let index = serde_json::json!({ "weight_map": map });
    fs::write(base.join("model.safetensors.index.json"), index.to_string()).unwrap();
    fs::copy(data("models/llama/config.json"), base.join("config.json")).unwrap();
    fs::write(base.join("merges.txt"), "a b\n").unwrap();
    fs::write(base.join("pytorch_model.bin"), "old").unwrap();

    let fused = fuse_to_folder(&base, &data("adapters/peft"), &to, None).unwrap();
    assert_eq!(fused, Fused { fused: 14, tensors: map.len() });
    let mut names: Vec<_> = fs::read_dir(&to).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    let expected = [
        "config.json",
        "merges.txt",
        "model.safetensors.index.json",
        "part-0.safetensors",
        "part-1.safetensors",
    ];
    assert_eq!(names, expected);
    let read = |folder: &Path, at: usize| {
        let path = folder.join(format!("part-{at}.safetensors"));
        candle_core::safetensors::load(path, &candle_core::Device::Cpu).unwrap()
    };
    let part = read(&to, 1);
    assert!(part.values().all(|tensor| tensor.dtype() == candle_core::DType::BF16));
    let norm = "model.layers.1.input_layernorm.weight";
    let bits = |t: &candle_core::Tensor| {
        t.to_dtype(candle_core::DType::F32).unwrap().to_vec1::<f32>().unwrap()
    };
    assert_eq!(bits(&part[norm]), bits(&read(&base, 1)[norm]));
    // bf16 keeps 8 bits.
    let error = error(&fused_logits(&to), &adapted(&base, "adapters/peft"));
    assert!(error < 3e-2, "relative error {error:.1e}");

    // All weights in f32: nothing is rounded, and the config says so.
    let wide = folder.path().join("wide");
    fuse_to_folder(&base, &data("adapters/peft"), &wide, Some(DType::F32)).unwrap();
    let error = super::error(&fused_logits(&wide), &adapted(&base, "adapters/peft"));
    assert!(error < 1e-5, "relative error {error:.1e}");
    assert!(fs::read_to_string(wide.join("config.json")).unwrap().contains("\"float32\""));
}

/// The base with the linear weights of its layers quantised, where their rows allow it.
fn quantised(path: &Path, format: BlockFormat) {
    let base = GgufFile::open(data("adapters/base.gguf")).unwrap();
    let mut writer = GgufWriter::like(&base);
    let encoding = Encoding::Blocks(format);
    let stored: Vec<StoredTensor> = base
        .tensors()
        .iter()
        .map(|tensor| {
            let stored = base.tensor_bytes(&tensor.name).unwrap();
            let rows_fit = encoding.row_bytes(tensor.shape[tensor.shape.len() - 1]).is_some();
            if tensor.shape.len() < 2 || !tensor.name.starts_with("blk.") || !rows_fit {
                return stored;
            }
            let values = stored.dequantize().unwrap().flatten_all().unwrap().to_vec1().unwrap();
            StoredTensor::encode(&values, &tensor.shape, encoding).unwrap()
        })
        .collect();
    for (tensor, stored) in base.tensors().iter().zip(&stored) {
        writer.tensor(&tensor.name, &tensor.shape, stored.encoding);
    }
    writer.write(path, |i| Ok::<_, metal_candle::io::Error>(stored[i].clone())).unwrap();
}

#[test]
fn a_fused_gguf_is_the_base_with_its_adapter() {
    let folder = TempDir::new().unwrap();
    let to = folder.path().join("fused.gguf");
    let base = data("adapters/base.gguf");
    for path in ["adapters/lora.gguf", "adapters/peft", "adapters/mlx"] {
        fuse_to_gguf(&base, &data(path), &to, None).unwrap();
        let error = error(&fused_logits(&to), &adapted(&base, path));
        println!("{path}: relative error {error:.1e}");
        assert!(error < 1e-5, "{path}: relative error {error:.1e}");
    }
}

#[test]
fn a_fused_gguf_keeps_what_the_adapter_does_not_touch() {
    let folder = TempDir::new().unwrap();
    let (base, to) = (folder.path().join("base.gguf"), folder.path().join("fused.gguf"));
    quantised(&base, BlockFormat::Q4_1);
    let fused = fuse_to_gguf(&base, &data("adapters/mlx"), &to, None).unwrap();
    assert_eq!(fused.fused, 3);
    let (base, to) = (GgufFile::open(&base).unwrap(), GgufFile::open(&to).unwrap());
    assert_eq!(base.metadata().len(), to.metadata().len());
    for (key, value) in base.metadata() {
        assert_eq!(format!("{value:?}"), format!("{:?}", to.metadata()[key]), "{key}");
    }
    let mut changed = Vec::new();
    for (before, after) in base.tensors().iter().zip(to.tensors()) {
        assert_eq!((&before.name, &before.shape), (&after.name, &after.shape));
        assert_eq!(before.encoding, after.encoding);
        if base.tensor_bytes(&before.name).unwrap() != to.tensor_bytes(&after.name).unwrap() {
            changed.push(before.name.as_str());
        }
    }
    changed.sort_unstable();
    assert_eq!(changed, ["blk.1.attn_q.weight", "blk.1.attn_v.weight", "blk.1.ffn_down.weight"]);
}

#[test]
fn a_quantised_base_is_quantised_again_or_kept_exact() {
    let folder = TempDir::new().unwrap();
    let wide = folder.path().join("wide.gguf");
    let (base, to) = (folder.path().join("base.gguf"), folder.path().join("fused.gguf"));
    for format in [BlockFormat::Q8_0, BlockFormat::Q4_1] {
        quantised(&base, format);
        let expected = adapted(&base, "adapters/peft");
        let fuse = |to: &Path, float| {
            fuse_to_gguf(&base, &data("adapters/peft"), to, float).unwrap();
            error(&fused_logits(to), &expected)
        };
        let half = fuse(&to, Some(DType::F16));
        let (again, exact) = (fuse(&to, None), fuse(&wide, Some(DType::F32)));
        println!("{format:?}: {again:.1e}, f32 {exact:.1e}, f16 {half:.1e}");
        assert!(exact < 1e-5, "{format:?}, f32: {exact:.1e}");
        assert!(half < 5e-3, "{format:?}, f16: {half:.1e}");
        // Random weights make much of an error; 4 bits say little of these logits.
        assert!(again < 0.1 || format == BlockFormat::Q4_1, "{format:?}: {again:.1e}");
        let (to, wide) = (GgufFile::open(&to).unwrap(), GgufFile::open(&wide).unwrap());
        for tensor in to.tensors() {
            let stored = to.tensor_bytes(&tensor.name).unwrap();
            let exact = wide.dequantize(&tensor.name).unwrap();
            let exact: Vec<f32> = exact.flatten_all().unwrap().to_vec1().unwrap();
            let again = StoredTensor::encode(&exact, &tensor.shape, tensor.encoding).unwrap();
            // What is not merged was never f32 and may round otherwise; it is compared elsewhere.
            let merged = wide.tensor(&tensor.name).unwrap().encoding != tensor.encoding;
            assert!(!merged || stored == again, "{}", tensor.name);
        }
    }
}

#[test]
fn a_gguf_fused_into_a_folder_brings_config_and_tokenizer() {
    let folder = TempDir::new().unwrap();
    let to = folder.path().join("fused");
    let base = data("adapters/base.gguf");
    fuse_to_folder(&base, &data("adapters/lora.gguf"), &to, None).unwrap();
    let open = |path: &Path| load(path, BaseWeights::F32, device()).unwrap();
    let (before, after) = (open(&base), open(&to));
    // A GGUF file holds it as f32.
    let config = DecoderConfig { rms_norm_eps: 1e-5, ..before.decoder.config };
    assert_eq!(after.decoder.config, config);
    let error = error(&logits(&after.decoder, None), &adapted(&base, "adapters/lora.gguf"));
    assert!(error < 1e-5, "relative error {error:.1e}");
    let ids = before.tokenizer.encode("Hello, world<end>", false).unwrap();
    assert_eq!(after.tokenizer.encode("Hello, world<end>", false).unwrap(), ids);
    assert_eq!(after.tokenizer.special().eos, Some(95));
}

#[test]
fn what_cannot_be_fused_is_refused_and_leaves_nothing() {
    let folder = TempDir::new().unwrap();
    let (llama, peft) = (data("models/llama"), data("adapters/peft"));
    let at = |name: &str| folder.path().join(name);
    let refused = |result: metal_candle::Result<Fused>, parts: &[&str]| {
        let error = result.unwrap_err().to_string();
        parts.iter().for_each(|part| assert!(error.contains(part), "{part:?} is not in {error:?}"));
    };
    refused(fuse_to_gguf(&llama, &peft, &at("a.gguf"), None), &["convert_hf_to_gguf.py"]);
    refused(fuse_to_folder(&data("models/qwen3"), &peft, &at("b"), None), &["tiny-llama"]);
    fuse_to_folder(&llama, &peft, &at("c"), None).unwrap();
    refused(fuse_to_folder(&llama, &peft, &at("c"), None), &["config.json", "another folder"]);
    let mut infinite = adapter::load(&peft, None).unwrap();
    infinite.modules.get_mut("model.layers.1.mlp.up_proj").unwrap().b[3] = f32::INFINITY;
    adapter::save(&infinite, at("infinite"), AdapterFormat::Peft, None).unwrap();
    let base = data("adapters/base.gguf");
    let parts = ["model.layers.1.mlp.up_proj.weight"];
    refused(fuse_to_gguf(&base, &at("infinite"), &at("d.gguf"), None), &parts);
    refused(fuse_to_folder(&llama, &at("infinite"), &at("e"), None), &parts);
    let left = |path: &Path| fs::read_dir(path).map_or(0, Iterator::count);
    assert_eq!((left(&at("b")), left(&at("e"))), (0, 0));
    assert!(!at("a.gguf").exists() && !at("d.gguf").exists());
    assert_eq!(logits(&decoder(), None), fused_logits(&llama));
}

#[test]
fn every_encoding_is_written_as_it_is_read() {
    let values: Vec<f32> = (0..512).map(|i| (i as f32 * 0.37).sin()).collect();
    let formats = [
        (Encoding::Dense(DType::F32), 0.0),
        (Encoding::Dense(DType::F16), 1e-3),
        (Encoding::Dense(DType::BF16), 8e-3),
        (Encoding::Blocks(BlockFormat::Q4_0), 0.15),
        (Encoding::Blocks(BlockFormat::Q4_1), 0.1),
        (Encoding::Blocks(BlockFormat::Q5_0), 0.08),
        (Encoding::Blocks(BlockFormat::Q5_1), 0.05),
        (Encoding::Blocks(BlockFormat::Q8_0), 0.01),
        (Encoding::Blocks(BlockFormat::Q2K), 0.5),
        (Encoding::Blocks(BlockFormat::Q3K), 0.25),
        (Encoding::Blocks(BlockFormat::Q4K), 0.1),
        (Encoding::Blocks(BlockFormat::Q5K), 0.05),
        (Encoding::Blocks(BlockFormat::Q6K), 0.05),
        (Encoding::Blocks(BlockFormat::Q8K), 0.01),
    ];
    for (encoding, tolerance) in formats {
        let stored = StoredTensor::encode(&values, &[2, 256], encoding).unwrap();
        let read: Vec<f32> = stored.dequantize().unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let error = error(&read, &values);
        assert!(error <= tolerance, "{encoding:?}: {error}");
    }
    let short = StoredTensor::encode(&values, &[32, 16], Encoding::Blocks(BlockFormat::Q8_0));
    assert!(short.unwrap_err().to_string().contains("16 elements"));
}

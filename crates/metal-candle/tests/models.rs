//! Tiny models of every family, in Hugging Face folders, against transformers through vectors that
//! `reference/models.py` makes; and folders that are not whole.

#[path = "support/testbed.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod testbed;

use crate::testbed::device;
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device as CandleDevice, Tensor, safetensors::save};
use metal_candle::io::gguf::gguf_name;
use metal_candle::models::{BaseWeights, CacheInput, Decoder, load, load_decoder};
use metal_candle::{LazyTensor, compile};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const VOCABULARY: usize = 96;

type Tensors = HashMap<String, Tensor>;

fn data(name: &str) -> PathBuf {
    testbed::file("data/models").join(name)
}

fn read(path: &Path) -> Tensors {
    candle_core::safetensors::load(path, &CandleDevice::Cpu).unwrap()
}

fn vectors() -> Tensors {
    read(&data("logits.safetensors"))
}

fn ids(t: &Tensor) -> Vec<u32> {
    t.to_vec1::<i32>().unwrap().into_iter().map(|id| id as u32).collect()
}

/// A copy of a case's folder that may be spoilt. One without weights takes llama's.
fn copy(case: &str) -> TempDir {
    let folder = TempDir::new().unwrap();
    let weights = Some(data(case).join("model.safetensors")).filter(|path| path.exists());
    let weights = weights.unwrap_or_else(|| data("llama/model.safetensors"));
    fs::copy(weights, folder.path().join("model.safetensors")).unwrap();
    fs::copy(data(case).join("config.json"), folder.path().join("config.json")).unwrap();
    folder
}

fn decoder(folder: &Path) -> metal_candle::Result<Decoder> {
    load_decoder(folder, BaseWeights::default(), device())
}

/// `[t, vocabulary]`, row by row.
fn logits(decoder: &Decoder, ids: &[u32]) -> Vec<f32> {
    let ids = LazyTensor::from_slice(ids, &[1, ids.len()], device()).unwrap();
    let hidden = decoder.hidden(&ids, None).unwrap();
    decoder.logits(&hidden).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn argmax(row: &[f32]) -> u32 {
    let best = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
    best.unwrap() as u32
}

/// Holds a case's decoder against transformers: logits at every prompt position, and the tokens
/// that follow it without a cache and with one.
fn check(case: &str, decoder: &Decoder) {
    let vectors = vectors();
    let prompt = ids(&vectors["ids"]);
    let expected = vectors[&format!("{case}.logits")].flatten_all().unwrap();
    let expected = expected.to_vec1::<f32>().unwrap();
    let got = logits(decoder, &prompt);
    assert_eq!(got.len(), expected.len());
    // Against the largest logit: near 0 a logit is a difference of much larger numbers.
    let scale = expected.iter().fold(0f32, |max, x| max.max(x.abs()));
    let error = got.iter().zip(&expected).map(|(a, b)| (a - b).abs() / scale);
    let error = error.fold(0f32, |max, x| if x > max || x.is_nan() { x } else { max });
    println!("{case}: relative error {error:.1e}");
    assert!(error < 1e-4, "{case}: relative error {error:.1e}");

    let greedy = ids(&vectors[&format!("{case}.greedy")]);
    assert_eq!(uncached(decoder, &prompt, greedy.len()), greedy, "{case}, uncached");
    assert_eq!(cached(decoder, &prompt, greedy.len()), greedy, "{case}, cached");
}

fn uncached(decoder: &Decoder, prompt: &[u32], tokens: usize) -> Vec<u32> {
    let mut row = prompt.to_vec();
    for _ in 0..tokens {
        let logits = logits(decoder, &row);
        row.push(argmax(&logits[logits.len() - VOCABULARY..]));
    }
    row.split_off(prompt.len())
}

/// The prompt in two chunks, then one token at a time.
fn cached(decoder: &Decoder, prompt: &[u32], tokens: usize) -> Vec<u32> {
    let (model, layers) = (decoder.clone(), decoder.config.num_layers);
    let step = compile(move |args: &[LazyTensor]| {
        let (keys, values) = args[2..].split_at(layers);
        let cache = CacheInput { keys, values, position: &args[1] };
        let (hidden, keys, values) = model.hidden_cached(&args[0], cache, None)?;
        Ok([vec![model.logits(&hidden)?.flatten_all()?], keys, values].concat())
    });
    let dims = [1, 64, decoder.config.num_kv_heads, decoder.config.head_dim];
    let zeros = vec![0f32; dims.iter().product()];
    let zeros = LazyTensor::from_vec(zeros, &dims, device()).unwrap();
    let mut cache = vec![zeros; 2 * layers];
    let (mut position, mut out) = (0, Vec::new());
    let mut see = |ids: &[u32]| {
        let new = LazyTensor::from_slice(ids, &[1, ids.len()], device()).unwrap();
        let at = LazyTensor::from_vec(vec![position as i64], &[], device()).unwrap();
        let mut results = step.call([vec![new, at], cache.clone()].concat()).unwrap();
        cache = results.split_off(1);
        position += ids.len();
        let logits = results[0].to_vec1::<f32>().unwrap();
        argmax(&logits[logits.len() - VOCABULARY..])
    };
    let (first, rest) = prompt.split_at(prompt.len() / 3);
    see(first);
    let mut next = see(rest);
    while out.len() < tokens {
        out.push(next);
        next = see(&[next]);
    }
    out
}

macro_rules! equal_transformers {
    ($($case:ident)*) => {$(
        #[test]
        fn $case() {
            let case = stringify!($case);
            check(case, &decoder(copy(case).path()).unwrap());
        }
    )*};
}

equal_transformers! {
    llama llama_bias llama_linear llama_llama3 llama_yarn llama_yarn_mscale mistral qwen2 qwen3
}

/// Llama's weights as llama.cpp's converter writes them, with more metadata.
fn llama_gguf(path: &Path, more: &[(&str, Value)]) {
    let tensors = read(&data("llama/model.safetensors")).into_iter().map(|(name, tensor)| {
        let heads = match name.split('.').nth(4) {
            Some("q_proj") => 2,
            Some("k_proj") => 1,
            _ => return (gguf_name(&name).unwrap(), tensor),
        };
        // Neighbours are pairs there: row s · d/2 + i of a head becomes row 2i + s.
        let (rows, cols) = tensor.dims2().unwrap();
        let halves = tensor.reshape((heads, 2, rows / heads / 2, cols)).unwrap();
        let pairs = halves.transpose(1, 2).unwrap().contiguous().unwrap();
        (gguf_name(&name).unwrap(), pairs.reshape((rows, cols)).unwrap())
    });
    let stored = |t: Tensor| QTensor::quantize(&t, GgmlDType::F32).unwrap();
    let tensors: Vec<_> = tensors.map(|(name, tensor)| (name, stored(tensor))).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut metadata = vec![
        ("general.architecture", Value::String("llama".into())),
        ("llama.block_count", Value::U32(2)),
        ("llama.context_length", Value::U32(128)),
        ("llama.embedding_length", Value::U32(32)),
        ("llama.feed_forward_length", Value::U32(48)),
        ("llama.attention.head_count", Value::U32(2)),
        ("llama.attention.head_count_kv", Value::U32(1)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
    ];
    metadata.extend_from_slice(more);
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    gguf_file::write(&mut fs::File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

#[test]
fn a_gguf_equals_transformers_too() {
    let scaling = |kind: &str, factor: f32| {
        vec![
            ("llama.rope.scaling.type", Value::String(kind.into())),
            ("llama.rope.scaling.factor", Value::F32(factor)),
            ("llama.rope.scaling.original_context_length", Value::U32(32)),
        ]
    };
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("model.gguf");
    for (case, more) in [
        ("llama", vec![]),
        ("llama_linear", scaling("linear", 3.0)),
        ("llama_yarn", scaling("yarn", 4.0)),
    ] {
        llama_gguf(&path, &more);
        check(case, &decoder(&path).unwrap());
    }
}

#[test]
fn the_tokenizer_beside_the_weights_is_loaded() {
    let folder = copy("llama");
    let vocab: serde_json::Map<String, serde_json::Value> =
        (0..VOCABULARY).map(|id| (format!("t{id}"), id.into())).collect();
    let tokenizer = serde_json::json!({
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": { "type": "WhitespaceSplit" },
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "t0" },
    });
    fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = r#"{"eos_token": "t2", "chat_template": "{{ messages[0].content }}"}"#;
    fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
    let model = load(folder.path(), BaseWeights::default(), device()).unwrap();
    assert_eq!(model.tokenizer.encode("t5 t95 t7", false).unwrap(), [5, 95, 7]);
    assert_eq!(model.tokenizer.special().eos, Some(2));
    assert!(model.tokenizer.chat_template().is_some());
    check("llama", &model.decoder);
}

/// Splits a folder's weights in two shards and an index.
fn shard(folder: &Path) {
    let whole = folder.join("model.safetensors");
    let tensors = read(&whole);
    let names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let mut shards = [Tensors::new(), Tensors::new()];
    let mut weight_map = serde_json::Map::new();
    for (name, tensor) in tensors {
        let at = usize::from(name.contains("layers.1."));
        weight_map.insert(name.clone(), names[at].into());
        shards[at].insert(name, tensor);
    }
    for (shard, name) in shards.iter().zip(names) {
        save(shard, folder.join(name)).unwrap();
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": weight_map });
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    fs::remove_file(whole).unwrap();
}

#[test]
fn shards_equal_the_single_file() {
    let folder = copy("qwen3");
    let prompt = ids(&vectors()["ids"]);
    let whole = logits(&decoder(folder.path()).unwrap(), &prompt);
    shard(folder.path());
    assert_eq!(logits(&decoder(folder.path()).unwrap(), &prompt), whole);
}

#[test]
fn half_precision_weights_equal_the_same_numbers_in_f32() {
    let prompt = ids(&vectors()["ids"]);
    for dtype in [DType::F16, DType::BF16] {
        let folder = copy("llama");
        let path = folder.path().join("model.safetensors");
        let cast = |tensors: Tensors, dtype: DType| -> Tensors {
            let cast = |(name, t): (String, Tensor)| (name, t.to_dtype(dtype).unwrap());
            tensors.into_iter().map(cast).collect()
        };
        save(&cast(read(&path), dtype), &path).unwrap();
        let half = logits(&decoder(folder.path()).unwrap(), &prompt);
        save(&cast(read(&path), DType::F32), &path).unwrap();
        assert_eq!(logits(&decoder(folder.path()).unwrap(), &prompt), half, "{dtype:?}");
    }
}

/// The message has every part.
fn refused(folder: &Path, parts: &[&str]) {
    let message = decoder(folder).unwrap_err().to_string();
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

#[test]
fn a_missing_shard_or_tensor_is_named() {
    let folder = copy("qwen2");
    shard(folder.path());
    let index = folder.path().join("model.safetensors.index.json");
    let text = fs::read_to_string(&index).unwrap();
    let second = folder.path().join("model-00002-of-00002.safetensors");
    let mut tensors = read(&second);
    tensors.remove("model.layers.1.mlp.up_proj.weight").unwrap();
    save(&tensors, &second).unwrap();
    let tensor = "no tensor \"model.layers.1.mlp.up_proj.weight\"";
    refused(folder.path(), &["model-00002-of-00002.safetensors", tensor]);
    fs::remove_file(&second).unwrap();
    refused(folder.path(), &["model-00002-of-00002.safetensors: no such file", "model.layers.1."]);
    fs::write(&index, text.replace("model-00002", "../model-00002")).unwrap();
    refused(folder.path(), &["index.json", "expected a file in the same folder"]);
    fs::remove_file(&index).unwrap();
    refused(folder.path(), &["no model.safetensors and no model.safetensors.index.json"]);

    let folder = copy("qwen2");
    let path = folder.path().join("model.safetensors");
    let mut tensors = read(&path);
    tensors.remove("model.norm.weight").unwrap();
    save(&tensors, &path).unwrap();
    refused(folder.path(), &["no tensor \"model.norm.weight\""]);
}

#[test]
fn a_file_cut_short_is_refused_before_its_tensors_are_read() {
    let folder = copy("llama");
    let path = folder.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    for (len, part) in [
        (bytes.len() - 1, "tensor \"model.norm.weight\" ends"),
        (1000, "its header alone"),
        (8, "its header alone"),
        (7, "its header alone 8"),
        (0, "its header alone 8"),
    ] {
        fs::write(&path, &bytes[..len]).unwrap();
        refused(folder.path(), &["model.safetensors", part]);
    }
    fs::write(&path, [&u64::MAX.to_le_bytes(), &bytes[8..]].concat()).unwrap();
    refused(folder.path(), &["expected at most 100000000"]);
    fs::write(&path, [&bytes[..9], &bytes[10..], b" "].concat()).unwrap();
    refused(folder.path(), &["not a safetensors header"]);
}

#[test]
fn a_weight_of_another_shape_or_dtype_is_named() {
    let folder = copy("llama");
    let path = folder.path().join("model.safetensors");
    let whole = read(&path);
    let name = "model.layers.0.self_attn.k_proj.weight";
    let replaced = |tensor: Tensor| {
        let mut tensors = whole.clone();
        tensors.insert(name.to_string(), tensor).unwrap();
        save(&tensors, &path).unwrap();
    };
    replaced(whole[name].t().unwrap().contiguous().unwrap());
    refused(folder.path(), &["model.safetensors", name, "[32, 16]: expected [16, 32]"]);
    replaced(whole[name].to_dtype(DType::F64).unwrap());
    refused(folder.path(), &["model.safetensors", name, "F64: expected F32, F16 or BF16"]);
}

#[test]
fn a_config_that_would_compute_another_model_is_refused() {
    let change = |case: &str, key: &str, value: serde_json::Value, parts: &[&str]| {
        let folder = copy(case);
        let path = folder.path().join("config.json");
        let mut config: serde_json::Value =
            serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config[key] = value;
        fs::write(&path, config.to_string()).unwrap();
        refused(folder.path(), &[&["config.json"], parts].concat());
    };
    let scaling = |kind: &str| serde_json::json!({ "rope_type": kind, "factor": 2.0 });
    let known = "expected one of [\"llama\", \"mistral\", \"qwen2\", \"qwen3\"]";
    change("llama", "model_type", "mamba".into(), &["\"mamba\"", known]);
    change("llama", "hidden_act", "gelu".into(), &["hidden_act is \"gelu\"", "\"silu\""]);
    change("llama", "mlp_bias", true.into(), &["mlp_bias is true"]);
    change("llama", "num_hidden_layers", 0.into(), &["num_hidden_layers is 0"]);
    change("llama", "num_hidden_layers", (-1).into(), &["-1"]);
    change("llama", "max_position_embeddings", (1u64 << 40).into(), &["max_position_embeddings"]);
    change("llama", "head_dim", 15.into(), &["head_dim is 15", "even"]);
    change("llama", "num_attention_heads", 3.into(), &["hidden_size is 32", "multiple"]);
    change("qwen2", "num_key_value_heads", 3.into(), &["divisor of the 4"]);
    change("qwen2", "use_sliding_window", true.into(), &["true for 1 of the 2 layers"]);
    change("llama", "rope_scaling", scaling("dynamic"), &["rope_type is \"dynamic\""]);
    change("llama", "rope_scaling", scaling("llama3"), &["llama3 rope scaling needs low_freq"]);
    change("llama", "partial_rotary_factor", 0.5.into(), &["partial_rotary_factor is 0.5"]);
    change("llama", "quantization_config", scaling(""), &["quantization_config"]);
}

#[test]
fn a_config_without_a_size_is_refused() {
    let folder = copy("llama");
    fs::write(folder.path().join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
    refused(folder.path(), &["config.json", "missing field `vocab_size`"]);
    fs::remove_file(folder.path().join("config.json")).unwrap();
    refused(folder.path(), &["config.json"]);
}

#[test]
fn a_window_of_every_layer_is_carried_out() {
    let folder = copy("qwen2");
    let path = folder.path().join("config.json");
    let config = fs::read_to_string(&path).unwrap();
    let config = config.replace("\"use_sliding_window\": false", "\"use_sliding_window\": true");
    fs::write(&path, config.replace("\"max_window_layers\": 1", "\"max_window_layers\": 0"))
        .unwrap();
    assert_eq!(decoder(folder.path()).unwrap().config.sliding_window, Some(4));
    fs::write(&path, config.replace("\"max_window_layers\": 1", "\"max_window_layers\": 2"))
        .unwrap();
    assert_eq!(decoder(folder.path()).unwrap().config.sliding_window, None);
}

#[test]
fn what_is_no_model_says_what_is() {
    let folder = TempDir::new().unwrap();
    let message =
        |path: &Path| load(path, BaseWeights::default(), device()).unwrap_err().to_string();
    let nothing = message(&folder.path().join("meta-llama/Llama-3.2-1B"));
    assert!(
        nothing.contains("no such file or folder: expected a GGUF file, or a folder"),
        "{nothing}"
    );
    let empty = message(folder.path());
    assert!(empty.contains("tokenizer.json"), "{empty}");
    let file = message(&data("llama/model.safetensors"));
    assert!(file.contains("not a GGUF file"), "{file}");
}

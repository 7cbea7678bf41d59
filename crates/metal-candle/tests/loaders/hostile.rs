//! Headers that lie, and models whose parts do not fit one another: exactly what is said.

use super::{alone, load};
use crate::support::{GgufBuilder, Meta};
use crate::testbed::device;
use crate::tiny::Tiny;

use metal_candle::generate::{Generator, GeneratorConfig};
use metal_candle::io::data::Example;
use metal_candle::io::gguf::GgufFile;
use metal_candle::models::{BaseWeights, load_decoder, load_gguf};
use metal_candle::train::{Trainer, TrainingConfig};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use tempfile::TempDir;

/// A model folder whose safetensors file has this header, or these first bytes, and 64 bytes of data.
fn safetensors(prefix: Option<u64>, header: &str) -> (TempDir, std::path::PathBuf) {
    let folder = TempDir::new().unwrap();
    let config = crate::support::data_folder().join("models/llama/config.json");
    fs::copy(config, folder.path().join("config.json")).unwrap();
    let path = folder.path().join("model.safetensors");
    let len = prefix.unwrap_or(header.len() as u64);
    fs::write(&path, [&len.to_le_bytes(), header.as_bytes(), &[0; 64]].concat()).unwrap();
    (folder, path)
}

/// What is said after the file's name.
#[track_caller]
fn refused(path: &Path, loader: impl FnOnce() -> metal_candle::Result<()>) -> String {
    let message = load(path, || loader().map_err(|e| e.to_string())).expect("it was read");
    let name = format!("{}: ", path.display());
    message.strip_prefix(&name).unwrap_or_else(|| panic!("{message}")).to_owned()
}

#[test]
fn a_safetensors_header_that_lies_is_refused() {
    let _alone = alone();
    let a = r#""a":{"dtype":"F32","shape":[4,4],"data_offsets":[0,64]}"#;
    let entry = |shape: &str, from: &str, to: &str| {
        format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[{from},{to}]}}}}"#)
    };
    for (prefix, header, said) in [
        (
            Some(1 << 63),
            "{}".to_owned(),
            "the header has 9223372036854775808 bytes: expected at most",
        ),
        (
            Some(u64::MAX),
            "{}".to_owned(),
            "the header has 18446744073709551615 bytes: expected at most",
        ),
        (Some(90_000_000), "{}".to_owned(), "the file has 74 bytes, its header alone 90000008"),
        (None, "[".repeat(100_000), "not a safetensors header: "),
        (None, entry("[4294967296,4294967296,4]", "0", "64"), "not a safetensors header: "),
        (None, entry("[4,4]", "0", "18446744073709551615"), "not a safetensors header: "),
        (None, entry("[4,4]", "64", "0"), "not a safetensors header: "),
        (None, entry("[4,8]", "0", "128"), "the file has 130 bytes: expected 194, where"),
        (None, entry("[4,2]", "0", "32"), "the file has "),
        (None, format!("{{{a},{}}}", a.replace("\"a\"", "\"b\"")), "not a safetensors header: "),
    ] {
        let (folder, path) = safetensors(prefix, &header);
        let got =
            refused(&path, || load_decoder(folder.path(), BaseWeights::F32, device()).map(drop));
        assert!(got.starts_with(said), "{got}, expected {said}");
    }
}

#[test]
fn a_gguf_header_that_lies_is_refused() {
    let _alone = alone();
    let array = |kind: u32, len: u64| [&kind.to_le_bytes()[..], &len.to_le_bytes()].concat();
    let with = |meta: Meta| GgufBuilder::default().meta("key", meta).bytes();
    let tensor = |dims: &[u64]| GgufBuilder::default().tensor("a", dims, 0, &[0; 64]).bytes();
    // The two counts stand after magic and version.
    let counts = |tensors: u64, keys: u64| {
        [b"GGUF\x03\0\0\0", &tensors.to_le_bytes()[..], &keys.to_le_bytes()[..]].concat()
    };
    let nested = array(9, 1).repeat(10_000);
    for (bytes, said) in [
        (counts(u64::MAX, 0), "the file ends"),
        (counts(0, 1 << 63), "the file ends"),
        (counts(1 << 61, 1 << 61), "the file ends"),
        (with(Meta::Raw(8, (1u64 << 63).to_le_bytes().to_vec())), "the file ends"),
        (with(Meta::Raw(9, array(0, 1 << 63))), "the file ends"),
        (with(Meta::Raw(9, array(8, u64::MAX))), "the file ends"),
        (with(Meta::Raw(9, array(12, 1 << 40))), "the file ends"),
        (with(Meta::Raw(9, nested)), "key: an array of arrays"),
        (tensor(&[1 << 32, 1 << 32]), "tensor \"a\" of shape [4294967296, 4294967296] is larger"),
        (tensor(&[u64::MAX]), "tensor \"a\" of shape [18446744073709551615] is larger"),
        (tensor(&[1 << 40]), "tensor \"a\" ends at offset 439804651"),
    ] {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("model.gguf");
        fs::write(&path, bytes).unwrap();
        let got = refused(&path, || Ok(GgufFile::open(&path).map(drop)?));
        assert!(got.starts_with(said), "{got}, expected {said}");
    }
}

/// Every byte of an array becomes a value, and no more than that.
#[test]
fn an_array_of_bytes_grows_by_the_size_of_a_value_and_no_more() {
    let _alone = alone();
    let len = 1u64 << 20;
    let mut bytes = 0u32.to_le_bytes().to_vec();
    bytes.extend(len.to_le_bytes());
    bytes.resize(bytes.len() + len as usize, 7);
    let folder = TempDir::new().unwrap();
    let path = GgufBuilder::default().meta("bytes", Meta::Raw(9, bytes)).write(folder.path());
    assert_eq!(load(&path, || GgufFile::open(&path).map(drop).map_err(|e| e.to_string())), None);
}

#[test]
fn a_tokenizer_that_is_larger_than_the_embedding_is_refused() {
    let _alone = alone();
    let folder = TempDir::new().unwrap();
    let mut tiny = Tiny::new();
    let (dims, values) = tiny.weights.get_mut("model.embed_tokens.weight").unwrap();
    dims[0] -= 1;
    values.truncate(dims[0] * dims[1]);
    let path = tiny.write(folder.path());
    let got = refused(&path, || load_gguf(&path, BaseWeights::F32, device()).map(drop));
    let said = "tokenizer: token \"<end>\" has id 95, but the model has 95 tokens: \
                is it another model's tokenizer?";
    assert_eq!(got, said);
}

#[test]
fn an_unknown_architecture_is_refused_with_those_that_are_known() {
    let _alone = alone();
    let folder = TempDir::new().unwrap();
    let path = GgufBuilder::default()
        .meta("general.architecture", Meta::Str("mamba".into()))
        .write(folder.path());
    let got = refused(&path, || load_gguf(&path, BaseWeights::F32, device()).map(drop));
    assert_eq!(got, "architecture \"mamba\": expected one of [\"llama\", \"qwen2\", \"qwen3\"]");

    let path = folder.path().join("config.json");
    fs::write(&path, r#"{"model_type": "mamba"}"#).unwrap();
    let got = refused(&path, || load_decoder(folder.path(), BaseWeights::F32, device()).map(drop));
    let said = "model_type is \"mamba\": expected one of \
                [\"llama\", \"mistral\", \"qwen2\", \"qwen3\"]";
    assert_eq!(got, said);
}

#[test]
fn a_missing_shard_is_refused_with_the_tensor_that_it_should_hold() {
    let _alone = alone();
    let folder = TempDir::new().unwrap();
    let config = crate::support::data_folder().join("models/llama/config.json");
    fs::copy(config, folder.path().join("config.json")).unwrap();
    let index = r#"{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}"#;
    fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    let error = load_decoder(folder.path(), BaseWeights::F32, device()).unwrap_err();
    let shard = folder.path().join("model-00001-of-00002.safetensors");
    let said = "no such file, but the index puts tensor \"model.norm.weight\" there; \
                is the download complete?";
    assert_eq!(error.to_string(), format!("{}: {said}", shard.display()));
}

/// Found when the first result is not finite: to look at every weight while loading would read them all.
#[test]
fn a_weight_that_is_not_finite_is_named_at_the_first_step() {
    let _alone = alone();
    for (name, value, base) in [
        ("model.layers.1.mlp.up_proj.weight", f32::NAN, BaseWeights::F32),
        ("model.layers.0.input_layernorm.weight", f32::INFINITY, BaseWeights::BF16),
        ("model.embed_tokens.weight", f32::NAN, BaseWeights::BF16),
    ] {
        let folder = TempDir::new().unwrap();
        let mut tiny = Tiny::new();
        tiny.weights.get_mut(name).unwrap().1.fill(value);
        let model = load_gguf(&tiny.write(folder.path()), base, device()).unwrap();
        let said = format!("the weight {name} has a NaN or an infinity: ");
        let starts = |error: metal_candle::Error| {
            assert!(error.to_string().starts_with(&said), "{error}");
        };
        starts(model.decoder.check_weights().unwrap_err());
        let (decoder, tokenizer) = (Arc::new(model.decoder), Arc::new(model.tokenizer));
        let adapter = crate::tiny::adapter(&["self_attn.q_proj"]);
        let config = TrainingConfig { iters: 3, batch_size: 1, ..TrainingConfig::default() };
        let mut trainer = Trainer::new(Arc::clone(&decoder), adapter, config).unwrap();
        let rows = [Example { ids: vec![1, 2, 3, 4], trained: vec![true; 4] }];
        starts(trainer.train(&rows, &[], drop).unwrap_err());
        let generator = Generator::new(decoder, tokenizer);
        starts(generator.generate("abc", &GeneratorConfig::default(), |_| ()).unwrap_err());
    }
    Tiny::new().decoder().check_weights().unwrap();
}

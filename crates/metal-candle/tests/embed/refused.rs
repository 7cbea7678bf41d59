//! Folders that are not whole, or that this library does not compute: each error says where and what.

use crate::testbed::{self, device};
use crate::{copy, edit, load};
use metal_candle::embed::EmbeddingModel;
use metal_candle::io::EmbeddingConfig;
use metal_candle::models::BaseWeights;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

/// The message has every part.
#[track_caller]
fn refused(folder: &Path, parts: &[&str]) {
    let message = load(folder, BaseWeights::default()).unwrap_err().to_string();
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

/// What the tiny folder says with one of its files changed.
#[track_caller]
fn changed(file: &str, change: impl FnOnce(&mut Value), parts: &[&str]) {
    let folder = copy("bert");
    edit(folder.path(), file, change);
    refused(folder.path(), &[&[file], parts].concat());
}

#[test]
fn a_file_that_is_missing_is_named() {
    for file in
        ["config.json", "tokenizer.json", "1_Pooling/config.json", "sentence_bert_config.json"]
    {
        let folder = copy("bert");
        fs::remove_file(folder.path().join(file)).unwrap();
        match file {
            // What it says has defaults.
            "sentence_bert_config.json" => _ = load(folder.path(), BaseWeights::F32).unwrap(),
            file => refused(folder.path(), &[file]),
        }
    }
    let folder = copy("bert");
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    fs::write(folder.path().join("pytorch_model.bin"), b"pickled").unwrap();
    refused(folder.path(), &["no model.safetensors", "pytorch_model.bin is not read"]);
    refused(&folder.path().join("gone"), &["gone: expected the folder of an encoder"]);
    refused(&folder.path().join("config.json"), &["expected the folder of an encoder"]);
}

#[test]
fn an_encoder_that_would_be_another_one_is_refused() {
    let config = |key: &'static str, value: Value, parts: &[&str]| {
        changed("config.json", |json| json[key] = value, parts);
    };
    config("model_type", "mpnet".into(), &["\"mpnet\"", "\"bert\"", "MPNet"]);
    config("model_type", Value::Null, &["model_type is \"\""]);
    config("hidden_act", "silu".into(), &["hidden_act is \"silu\"", "\"gelu\""]);
    config("position_embedding_type", "relative_key".into(), &["\"relative_key\"", "\"absolute\""]);
    config("is_decoder", true.into(), &["is_decoder is true"]);
    config("num_attention_heads", 5.into(), &["hidden_size is 32", "a multiple of the 5 heads"]);
    config("num_hidden_layers", 0.into(), &["num_hidden_layers is 0"]);
    config("max_position_embeddings", 0.into(), &["max_position_embeddings is 0"]);
    let folder = copy("roberta");
    edit(folder.path(), "config.json", |json| json["pad_token_id"] = 40.into());
    refused(folder.path(), &["config.json", "pad_token_id is 40"]);
}

#[test]
fn modules_and_poolings_of_other_kinds_are_refused() {
    let modules = "modules.json";
    let more = |json: &mut Value| {
        let dense = json!({"path": "3_Dense", "type": "sentence_transformers.models.Dense"});
        json.as_array_mut().unwrap().push(dense);
    };
    changed(modules, more, &["module 3 is", "models.Dense", "expected a Transformer"]);
    changed(modules, |json| json.as_array_mut().unwrap().reverse(), &["module 0", "Normalize"]);
    changed(modules, |json| json.as_array_mut().unwrap().truncate(1), &["module 1", "missing"]);
    let outside = |json: &mut Value| json[1]["path"] = "../1_Pooling".into();
    changed(modules, outside, &["module 1", "\"../1_Pooling\"", "a folder in this one"]);

    let pooling = "1_Pooling/config.json";
    let max = |json: &mut Value| json["pooling_mode"] = "max".into();
    changed(pooling, max, &["pooling_mode is [\"max\"]", "mean or cls"]);
    let both = |json: &mut Value| json["pooling_mode"] = json!(["mean", "cls"]);
    changed(pooling, both, &["[\"mean\", \"cls\"]"]);
    let other = |json: &mut Value| json["embedding_dimension"] = 64.into();
    changed(pooling, other, &["word_embedding_dimension is 64", "hidden_size, 32"]);
    let prompts = "config_sentence_transformers.json";
    let unknown = |json: &mut Value| json["default_prompt_name"] = "passage".into();
    changed(prompts, unknown, &["default_prompt_name is \"passage\""]);
}

#[test]
fn a_tokenizer_or_a_length_that_does_not_fit_is_refused() {
    let small = |json: &mut Value| json["vocab_size"] = 50.into();
    let folder = copy("bert");
    edit(folder.path(), "config.json", small);
    refused(folder.path(), &["tokenizer.json", "the model has 50 tokens"]);
    let length = |limit: usize| {
        let folder = copy("bert");
        let limit = json!({ "max_seq_length": limit }).to_string();
        fs::write(folder.path().join("sentence_bert_config.json"), limit).unwrap();
        folder
    };
    refused(length(2).path(), &["tokenizer.json", "2 tokens at most", "the 2 that are added"]);
    refused(length(0).path(), &["max_seq_length is 0"]);
    // More than there are positions for.
    let model = load(length(4000).path(), BaseWeights::default()).unwrap();
    assert_eq!(model.config().max_seq_length, 40);
    let got = model.encode(&["cat ".repeat(100)]).unwrap();
    assert!(got.row(0).iter().all(|x| x.is_finite()));
    let config = EmbeddingConfig { max_seq_length: 41, ..model.config().clone() };
    let file = testbed::file("data/embed/bert/tokenizer.json");
    let tokenizer = metal_candle::io::Tokenizer::from_file(file).unwrap();
    let error = EmbeddingModel::new(model.encoder().clone(), tokenizer, config).unwrap_err();
    assert!(error.to_string().contains("texts of 41 tokens: the encoder has positions for 40"));
    assert_eq!(model.encoder().device(), device());
}

//! Encoders in folders of sentence-transformers against it, through vectors that `reference/embed.py` makes; and folders
//! that are not whole.

#[path = "embed/quantised.rs"]
mod quantised;
#[path = "embed/refused.rs"]
mod refused;
#[path = "io/support.rs"]
#[allow(dead_code, reason = "only the model's path is used here")]
mod support;
#[path = "support/testbed.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod testbed;

use crate::testbed::device;
use candle_core::{Device as CandleDevice, Tensor, safetensors::save};
use metal_candle::embed::{EmbeddingModel, Embeddings, Pooling};
use metal_candle::io::Tokenizer;
use metal_candle::models::BaseWeights;
use metal_candle::{BlockFormat, DType};
use serde::Deserialize;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

#[derive(Deserialize)]
struct Vectors {
    texts: Vec<String>,
    bert: Vec<Vec<f32>>,
    cls: Vec<Vec<f32>>,
    roberta: Vec<Vec<f32>>,
}

fn vectors() -> Vectors {
    support::vectors("embed/vectors.json")
}

fn data(name: &str) -> PathBuf {
    testbed::file("data/embed").join(name)
}

fn load(folder: &Path, base: BaseWeights) -> metal_candle::Result<EmbeddingModel> {
    EmbeddingModel::load(folder, base, device())
}

fn bert() -> EmbeddingModel {
    load(&data("bert"), BaseWeights::default()).unwrap()
}

/// A copy of a case's folder that may be spoilt.
fn copy(case: &str) -> TempDir {
    let to = TempDir::new().unwrap();
    copy_into(&data(case), to.path());
    to
}

fn copy_into(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        match entry.path().is_dir() {
            true => copy_into(&entry.path(), &to),
            false => _ = fs::copy(entry.path(), to).unwrap(),
        }
    }
}

/// Changes a JSON file of a folder.
fn edit(folder: &Path, name: &str, change: impl FnOnce(&mut serde_json::Value)) {
    let path = folder.join(name);
    let mut json = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    fs::write(path, json.to_string()).unwrap();
}

#[track_caller]
fn assert_rows(got: &Embeddings, want: &[Vec<f32>], tolerance: f32) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.rows().zip(want).enumerate() {
        assert_eq!(got.len(), want.len());
        let error = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let slack = testbed::slack_of(DType::F32, want.iter().map(|x| f64::from(*x))) as f32;
        assert!(error <= tolerance + slack, "text {i}: off by {error}: {got:?}, not {want:?}");
    }
}

#[test]
fn vectors_equal_sentence_transformers() {
    let Vectors { texts, bert: want, .. } = vectors();
    let model = bert();
    assert_eq!(model.dimension(), 32);
    let config = model.config();
    assert!(config.normalize && config.pooling == Pooling::Mean && config.max_seq_length == 24);
    let got = model.encode(&texts).unwrap();
    assert_rows(&got, &want, 1e-5);
    assert_eq!(got.cut(), 1);
}

#[test]
fn the_first_token_s_vector_equals_sentence_transformers() {
    let Vectors { texts, cls: want, .. } = vectors();
    let folder = copy("bert");
    // As it was written before version 5.
    let pooling = r#"{"word_embedding_dimension": 32, "pooling_mode_cls_token": true,
        "pooling_mode_mean_tokens": false, "pooling_mode_max_tokens": false}"#;
    fs::write(folder.path().join("1_Pooling/config.json"), pooling).unwrap();
    edit(folder.path(), "modules.json", |json| {
        json.as_array_mut().unwrap().truncate(2);
        json[0]["type"] = "sentence_transformers.models.Transformer".into();
        json[1]["type"] = "sentence_transformers.models.Pooling".into();
    });
    let model = load(folder.path(), BaseWeights::default()).unwrap();
    assert!(!model.config().normalize && model.config().pooling == Pooling::Cls);
    assert_rows(&model.encode(&texts).unwrap(), &want, 1e-5);
}

#[test]
fn an_encoder_of_transformers_alone_gives_the_mean_and_roberta_s_positions_begin_after_its_padding()
{
    let Vectors { texts, roberta: want, .. } = vectors();
    let model = load(&data("roberta"), BaseWeights::default()).unwrap();
    assert_eq!(model.encoder().config.position_offset, 1);
    assert!(!model.config().normalize && model.config().pooling == Pooling::Mean);
    assert_rows(&model.encode(&texts).unwrap(), &want, 1e-5);
}

#[test]
fn names_may_have_a_prefix_and_norms_the_names_of_tensorflow() {
    let Vectors { texts, bert: want, .. } = vectors();
    let folder = copy("bert");
    let path = folder.path().join("model.safetensors");
    let renamed = |(name, tensor): (String, Tensor)| {
        let name = name.replace("LayerNorm.weight", "LayerNorm.gamma");
        (format!("bert.{}", name.replace("LayerNorm.bias", "LayerNorm.beta")), tensor)
    };
    let tensors = candle_core::safetensors::load(&path, &CandleDevice::Cpu).unwrap();
    let tensors: HashMap<String, Tensor> = tensors.into_iter().map(renamed).collect();
    save(&tensors, &path).unwrap();
    let model = load(folder.path(), BaseWeights::default()).unwrap();
    assert_rows(&model.encode(&texts).unwrap(), &want, 1e-5);
}

#[test]
fn vectors_do_not_depend_on_the_batch_nor_on_the_order() {
    let Vectors { texts, bert: want, .. } = vectors();
    let many: Vec<String> = (0..60).map(|i| texts[i * 3 % texts.len()].clone()).collect();
    let wanted: Vec<Vec<f32>> = (0..60).map(|i| want[i * 3 % texts.len()].clone()).collect();
    let mut told = 0;
    let got = bert().encode_with(&many, |texts| told += texts).unwrap();
    assert_rows(&got, &wanted, 1e-5);
    assert_eq!(told, 60);
    for batch_size in [0, 1, 5] {
        let model = bert().with_batch_size(batch_size);
        assert_rows(&model.encode(&texts).unwrap(), &want, 1e-5);
    }
    assert!(bert().encode::<&str>(&[]).unwrap().is_empty());
}

#[test]
fn a_text_is_cut_before_the_token_that_ends_it() {
    let model = bert();
    // 22 words of a token each stand between the two that are added.
    let [short, long] = [22, 30].map(|words| "cat ".repeat(words));
    let got = model.encode(&[short, long]).unwrap();
    assert_eq!(got.cut(), 1);
    assert_rows(&got, &[got.row(1).to_vec(), got.row(0).to_vec()], 1e-6);
}

#[test]
fn a_default_prompt_stands_before_every_text() {
    let folder = copy("bert");
    edit(folder.path(), "config_sentence_transformers.json", |json| {
        json["prompts"]["query"] = "the river ".into();
        json["default_prompt_name"] = "query".into();
    });
    let prompted = load(folder.path(), BaseWeights::default()).unwrap();
    let got = prompted.encode(&["cat sat", "dog"]).unwrap();
    let want = bert().encode(&["the river cat sat", "the river dog"]).unwrap();
    assert_eq!(got, want);
}

#[test]
fn lower_case_is_made_where_the_folder_says_so() {
    let folder = copy("bert");
    edit(folder.path(), "tokenizer.json", |json| json["normalizer"]["lowercase"] = false.into());
    let texts = ["THE Cat", "the cat"];
    let cased = load(folder.path(), BaseWeights::default()).unwrap().encode(&texts).unwrap();
    assert_ne!(cased.row(0), cased.row(1));
    edit(folder.path(), "sentence_bert_config.json", |json| json["do_lower_case"] = true.into());
    let lower = load(folder.path(), BaseWeights::default()).unwrap().encode(&texts).unwrap();
    assert_rows(&lower, &[cased.row(1).to_vec(), cased.row(1).to_vec()], 1e-6);
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn weights_of_fewer_bits_are_held_joined_too() {
    let Vectors { texts, bert: want, .. } = vectors();
    let blocks = BaseWeights::Quantised { format: BlockFormat::Q8_0, rest: DType::F32 };
    let mut joined = Vec::new();
    for base in [BaseWeights::BF16, BaseWeights::F16, blocks] {
        let got = load(&data("bert"), base).unwrap().encode(&texts).unwrap();
        for (got, want) in got.rows().zip(&want) {
            let cosine = cosine(got, want);
            assert!((0.999..1.000_001).contains(&cosine), "{base:?}: {cosine}");
        }
        joined.push(got.into_vec());
    }
    let rounded = load(&data("bert"), BaseWeights::BF16).unwrap().with_activations(DType::BF16);
    for (got, want) in rounded.encode(&texts).unwrap().rows().zip(&want) {
        let cosine = cosine(got, want);
        assert!(cosine > 0.995, "all in bf16: {cosine}");
    }
    // They are not f32 after all.
    assert!(joined[0] != joined[1] && joined[1] != joined[2]);
}

#[test]
fn padding_and_truncation_of_a_tokenizer_s_file_are_left_out() {
    let path = data("roberta/tokenizer.json");
    let json: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert!(json["truncation"].is_object() && json["padding"].is_object());
    let tokenizer = Tokenizer::from_file(path).unwrap();
    assert_eq!(tokenizer.encode("cat", true).unwrap().len(), 3);
    assert_eq!(tokenizer.encode(&"cat ".repeat(50), true).unwrap().len(), 52);
}

#[derive(Deserialize)]
struct Real {
    texts: Vec<String>,
    vectors: Vec<Vec<f32>>,
}

#[test]
fn all_minilm_l6_v2_equals_sentence_transformers() {
    let test = "all_minilm_l6_v2_equals_sentence_transformers";
    let Some(folder) = support::real("all-MiniLM-L6-v2", test) else { return };
    let Real { texts, vectors } = support::vectors("embed/minilm.json");
    let model = load(&folder, BaseWeights::default()).unwrap();
    assert_eq!(model.config().max_seq_length, 256);
    let got = model.encode(&texts).unwrap();
    assert_rows(&got, &vectors, 1e-5);
    for (got, want) in got.rows().zip(&vectors) {
        let cosine = cosine(got, want);
        println!("cosine {cosine}");
        assert!(cosine > 0.99999, "{cosine}");
    }
    let halved = load(&folder, BaseWeights::BF16).unwrap().encode(&texts).unwrap();
    for (got, want) in halved.rows().zip(&vectors) {
        let cosine = cosine(got, want);
        println!("cosine in bf16 {cosine}");
        assert!(cosine > 0.999, "{cosine}");
    }
}

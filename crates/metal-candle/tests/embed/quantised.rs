//! Encoders whose linear layers are quantised as they are loaded, against the same in f32.

use crate::support;
use crate::{Real, Vectors, cosine, data, load, vectors};
use metal_candle::embed::{EmbeddingModel, Embeddings};
use metal_candle::models::BaseWeights;
use metal_candle::{BlockFormat, DType};
use std::path::Path;

fn quantised(format: BlockFormat) -> BaseWeights {
    BaseWeights::Quantised { format, rest: DType::F32 }
}

/// The least and the mean cosine of vectors with those in f32.
fn cosines(got: &Embeddings, want: &[Vec<f32>]) -> [f64; 2] {
    assert_eq!(got.len(), want.len());
    let all: Vec<f64> = got.rows().zip(want).map(|(got, want)| cosine(got, want)).collect();
    [all.iter().copied().fold(1.0, f64::min), all.iter().sum::<f64>() / all.len() as f64]
}

#[test]
fn vectors_of_quantised_weights_point_where_those_in_f32_do() {
    let Vectors { texts, bert, roberta, .. } = vectors();
    // Of random weights, which lose more than trained ones do.
    let formats =
        [(BlockFormat::Q8_0, 0.9995), (BlockFormat::Q4_1, 0.96), (BlockFormat::Q4_0, 0.94)];
    for (case, want) in [("bert", &bert), ("roberta", &roberta)] {
        for (format, least) in formats {
            let model = load(&data(case), quantised(format)).unwrap();
            let got = model.encode(&texts).unwrap();
            let [min, mean] = cosines(&got, want);
            assert!(min >= least && mean < 1.0, "{case} {format:?}: {min}, {mean}");
            // What lies between the products may be rounded, too.
            let rounded = model.with_activations(DType::BF16).encode(&texts).unwrap();
            let [min, _] = cosines(&rounded, want);
            assert!(min >= least - 0.005, "{case} {format:?} in bf16: {min}");
        }
    }
}

/// As `[tables, linear]`.
fn held(model: &EmbeddingModel) -> [String; 2] {
    let recording = format!("{:?}", model.encoder());
    let count = |what: &str| recording.matches(what).count().to_string();
    [count("Dense("), count("Quantised {")]
}

#[test]
fn linear_layers_are_quantised_and_tables_and_norms_are_not() {
    // The words; query, key and value as one, and three more, in each of two layers.
    let model = load(&data("bert"), quantised(BlockFormat::Q4_0)).unwrap();
    assert_eq!(held(&model), ["1", "8"]);
    let model = load(&data("bert"), BaseWeights::F32).unwrap();
    assert_eq!(held(&model), ["9", "0"]);
}

#[track_caller]
fn refused(folder: &Path, base: BaseWeights, parts: &[&str]) {
    let message = load(folder, base).unwrap_err().to_string();
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

#[test]
fn an_encoder_that_fits_no_blocks_is_refused_by_name() {
    let query = "encoder.layer.0.attention.self.query.weight";
    let rows = ["model.safetensors", query, "NF4", "rows of 32 weights", "the 64 of a block"];
    refused(&data("bert"), quantised(BlockFormat::NF4), &rows);
    let rest = BaseWeights::Quantised { format: BlockFormat::Q8_0, rest: DType::I64 };
    refused(&data("bert"), rest, &["i64"]);
}

#[test]
fn all_minilm_l6_v2_is_near_itself_in_blocks() {
    let test = "all_minilm_l6_v2_is_near_itself_in_blocks";
    let Some(folder) = support::real("all-MiniLM-L6-v2", test) else { return };
    let Real { texts, vectors } = support::vectors("embed/minilm.json");
    let formats = [
        (BlockFormat::Q8_0, 0.999),
        (BlockFormat::Q4_1, 0.96),
        (BlockFormat::Q4_0, 0.95),
        (BlockFormat::NF4, 0.95),
    ];
    for (format, least) in formats {
        let got = load(&folder, quantised(format)).unwrap().encode(&texts).unwrap();
        let [min, mean] = cosines(&got, &vectors);
        println!("{format:?}: cosine {min} at least, {mean} on average");
        assert!(min >= least, "{format:?}: {min}");
    }
}

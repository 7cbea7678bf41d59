//! Embeddings: the attention mask was passed as token types, and padding changed the vector.

use super::assert_near;
use crate::testbed::{self, device};
use candle_core::{Device as CandleDevice, Tensor};
use metal_candle::LazyTensor;
use metal_candle::embed::{EmbeddingModel, mean_pool};
use metal_candle::models::{BaseWeights, Encoder, load_encoder};

const IDS: [u32; 6] = [2, 5, 7, 8, 9, 3];

fn encoder() -> Encoder {
    load_encoder(&testbed::file("data/embed/bert"), BaseWeights::F32, device()).unwrap()
}

/// The mean of a row's tokens, of which the first `tokens` are some.
fn pooled(encoder: &Encoder, ids: &[u32], tokens: usize) -> Vec<f32> {
    let dims = [1, ids.len()];
    let mask: Vec<u8> = (0..ids.len()).map(|i| u8::from(i < tokens)).collect();
    let ids = LazyTensor::from_slice(ids, &dims, device()).unwrap();
    let mask = LazyTensor::from_slice(&mask, &dims, device()).unwrap();
    let hidden = encoder.hidden(&ids, Some(&mask)).unwrap();
    mean_pool(&hidden, Some(&mask)).unwrap().to_vec().unwrap()
}

#[test]
fn padding_does_not_change_the_vector() {
    let encoder = encoder();
    let alone = pooled(&encoder, &IDS, IDS.len());
    let ids = LazyTensor::from_slice(&IDS, &[1, IDS.len()], device()).unwrap();
    let unmasked = mean_pool(&encoder.hidden(&ids, None).unwrap(), None).unwrap();
    assert_near(&unmasked.to_vec::<f32>().unwrap(), &alone, 1e-6);
    // Whatever stands there, and however much of it.
    for (padding, len) in [(0, 7), (0, 40), (31, 16)] {
        let mut padded = IDS.to_vec();
        padded.resize(len, padding);
        assert_near(&pooled(&encoder, &padded, IDS.len()), &alone, 1e-5);
    }
    // It would, if it were seen.
    let mut seen = IDS.to_vec();
    seen.resize(16, 0);
    let seen = pooled(&encoder, &seen, 16);
    assert!(alone.iter().zip(&seen).any(|(a, b)| (a - b).abs() > 0.1));
}

#[test]
fn a_text_beside_a_longer_one_has_the_vector_that_it_has_alone() {
    let folder = testbed::file("data/embed/bert");
    let model = EmbeddingModel::load(&folder, BaseWeights::F32, device()).unwrap();
    let (short, long) = ("a cat", "the red dog sits on a green mat, walking");
    let both = model.encode(&[short, long]).unwrap();
    for (i, text) in [short, long].into_iter().enumerate() {
        assert_near(both.row(i), model.encode(&[text]).unwrap().row(0), 1e-5);
    }
}

/// The vectors of the second token type are in the file and must not be seen, with a mask nor without.
#[test]
fn every_token_of_a_text_is_of_type_zero() {
    let folder = tempfile::tempdir().unwrap();
    let from = testbed::file("data/embed/bert");
    std::fs::copy(from.join("config.json"), folder.path().join("config.json")).unwrap();
    let path = folder.path().join("model.safetensors");
    let load = || load_encoder(folder.path(), BaseWeights::F32, device()).unwrap();
    let name = "embeddings.token_type_embeddings.weight";
    let mut tensors =
        candle_core::safetensors::load(from.join("model.safetensors"), &CandleDevice::Cpu).unwrap();
    let types = tensors[name].clone();
    let other = (Tensor::ones((1, 32), candle_core::DType::F32, &CandleDevice::Cpu).unwrap() * 9.0)
        .unwrap();
    let mut with = |first: &Tensor, second: &Tensor| {
        let both = Tensor::cat(&[first, second], 0).unwrap();
        tensors.insert(name.to_owned(), both);
        candle_core::safetensors::save(&tensors, &path).unwrap();
        pooled(&load(), &IDS, 4)
    };
    let (first, second) = (types.narrow(0, 0, 1).unwrap(), types.narrow(0, 1, 1).unwrap());
    let want = pooled(&encoder(), &IDS, 4);
    assert_near(&with(&first, &other), &want, 1e-6);
    let changed = with(&other, &second);
    assert!(want.iter().zip(&changed).any(|(a, b)| (a - b).abs() > 0.1));
}

//! How the frozen weights are held: mapped where the file has them as they are asked for, else in the
//! dtype that is.

#[path = "weights/nf4.rs"]
mod nf4;
#[path = "weights/prepacked.rs"]
mod prepacked;
#[path = "support/random_model.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod random_model;
#[path = "support/testbed.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod testbed;

use crate::testbed::{decoder, device};
use candle_core::{DType as CandleDType, Device as CandleDevice};
use metal_candle::io::data::Batch;
use metal_candle::io::peft::TargetModules;
use metal_candle::io::{Bytes, HfFolder, LoraConfig};
use metal_candle::models::{BaseWeights, Decoder, load_decoder};
use metal_candle::nn::LoRAAdapter;
use metal_candle::train::{AdamWConfig, TrainStep};
use metal_candle::{DType, LazyTensor};
use random_model::model;
use std::fs;
use std::sync::Arc;
use tempfile::TempDir;

const TOKENS: [u32; 8] = [3, 141, 59, 26, 5, 358, 97, 9];

fn logits(decoder: &Decoder) -> Vec<f32> {
    let ids = LazyTensor::from_slice(&TOKENS, &[1, TOKENS.len()], device()).unwrap();
    let hidden = decoder.hidden(&ids, None).unwrap();
    let logits = decoder.logits(&hidden).unwrap();
    assert_eq!(logits.dtype(), DType::F32);
    logits.to_vec().unwrap()
}

/// The largest difference, as a part of the largest value.
fn distance(got: &[f32], want: &[f32]) -> f32 {
    let scale = want.iter().fold(0f32, |a, b| a.max(b.abs()));
    got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max) / scale
}

#[test]
fn a_mapped_weight_has_the_bytes_of_the_file_at_an_address_of_the_map() {
    let folder = model(CandleDType::F32, CandleDType::F32);
    let name = "model.layers.1.mlp.up_proj.weight";
    let open = HfFolder::open(folder.path()).unwrap();
    let [one, again] = [(); 2].map(|()| open.weights().weight(name).unwrap());
    assert!(matches!(one.bytes, Bytes::Mapped(_)));
    assert_eq!(one.bytes.as_ptr(), again.bytes.as_ptr());
    let read =
        candle_core::safetensors::load(folder.path().join("model.safetensors"), &CandleDevice::Cpu);
    let want: Vec<f32> = read.unwrap()[name].flatten_all().unwrap().to_vec1().unwrap();
    let dims = one.shape.clone();
    let mapped = LazyTensor::from_bytes(one.bytes, DType::F32, &dims, device()).unwrap();
    // The file may go: who has mapped it still has it.
    drop((open, again));
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    assert_eq!(mapped.is_mapped(), *device() == metal_candle::Device::Cpu);
    assert_eq!(mapped.to_vec::<f32>().unwrap(), want);
    let doubled: Vec<f32> = mapped.affine(2.0, 0.0).unwrap().to_vec().unwrap();
    assert_eq!(doubled, want.iter().map(|x| 2.0 * x).collect::<Vec<_>>());
    // What is donated is written, so it is copied first.
    assert!(!mapped.to_owned_copy().unwrap().is_mapped());
}

#[test]
fn bytes_of_another_length_or_alignment_are_refused_or_copied() {
    let refused = LazyTensor::from_bytes(vec![0; 9].into(), DType::F32, &[2], device());
    let error = refused.unwrap_err().to_string();
    assert!(error.contains("2 elements of f32") && error.contains("got 2"), "{error}");
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("bytes");
    fs::write(&path, [0u8, 0, 0, 128, 63, 0, 0, 0, 64]).unwrap();
    let file = fs::File::open(&path).unwrap();
    let bytes = metal_candle::io::bytes::MappedBytes::map(&file, 9).unwrap();
    let bytes = Bytes::Mapped(bytes.slice(1..9));
    let x = LazyTensor::from_bytes(bytes, DType::F32, &[2], device()).unwrap();
    assert!(!x.is_mapped());
    assert_eq!(x.to_vec::<f32>().unwrap(), [1.0, 2.0]);
    let beyond = metal_candle::io::bytes::MappedBytes::map(&file, 10).unwrap_err();
    assert!(beyond.to_string().contains("9 bytes: expected 10"), "{beyond}");
}

/// On the same numbers, so that only the products' rounding differs.
#[test]
fn a_half_precision_base_computes_what_its_numbers_mean_in_f32() {
    for (dtype, base, tolerance) in
        [(CandleDType::BF16, BaseWeights::BF16, 2e-2), (CandleDType::F16, BaseWeights::F16, 2e-3)]
    {
        let (folder, wide) = (model(dtype, dtype), model(dtype, CandleDType::F32));
        let exact = logits(&decoder(wide.path(), BaseWeights::F32));
        // Widened on loading: the same bits.
        assert_eq!(logits(&decoder(folder.path(), BaseWeights::F32)), exact);
        let half = logits(&decoder(folder.path(), base));
        let error = distance(&half, &exact);
        assert!(error < tolerance, "{dtype:?}: {error}");
        assert_ne!(half, exact, "{dtype:?} is not used");
        // Narrowed on loading, or taken as it lies there.
        assert_eq!(half, logits(&decoder(wide.path(), base)));
    }
}

#[test]
fn an_adapter_trains_on_a_half_precision_base_as_on_f32() {
    let losses = |base: BaseWeights| {
        let folder = model(CandleDType::BF16, CandleDType::BF16);
        let decoder = decoder(folder.path(), base);
        let config =
            LoraConfig { target_modules: TargetModules::AllLinear, ..LoraConfig::default() };
        let adapter = LoRAAdapter::new(config, decoder.modules(), 0, device()).unwrap();
        assert!(adapter.parameters().iter().all(|p| p.dtype() == DType::F32));
        let optimizer = AdamWConfig::default();
        let decoder = Arc::new(decoder);
        let mut step = TrainStep::new(decoder, adapter, optimizer, 1.0, 0).unwrap();
        let labels = TOKENS.iter().skip(1).map(|id| i64::from(*id)).chain([-100]).collect();
        let batch =
            Batch { ids: TOKENS.to_vec(), labels, batch: 1, seq: 8, trained: 7, documents: None };
        let losses = (0..6).map(|_| step.run(&batch, 2e-2).unwrap().loss);
        losses.collect::<Vec<f32>>()
    };
    let exact = losses(BaseWeights::F32);
    let half = losses(BaseWeights::BF16);
    assert!(half[5] < 0.8 * half[0], "{half:?}");
    assert!(distance(&half, &exact) < 2e-2, "{half:?}, in f32 {exact:?}");
}

#[test]
fn a_number_that_f16_does_not_hold_is_named_with_its_tensor() {
    let folder = model(CandleDType::F32, CandleDType::F32);
    let path = folder.path().join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &CandleDevice::Cpu).unwrap();
    let name = "model.layers.0.mlp.down_proj.weight";
    let large = tensors[name].affine(0.0, 1e6).unwrap();
    tensors.insert(name.into(), large);
    candle_core::safetensors::save(&tensors, &path).unwrap();
    let error = load_decoder(folder.path(), BaseWeights::F16, device()).unwrap_err();
    let expected = format!(
        "{}: tensor {name:?} has the number 1e6, which f16 does not hold: load it as bf16",
        path.display()
    );
    assert_eq!(error.to_string(), expected);
    load_decoder(folder.path(), BaseWeights::BF16, device()).unwrap();
}

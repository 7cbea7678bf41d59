//! Adapters: what was trained reached neither the model nor a file that another program reads.

use super::tiny::{MODULES, Tiny, VOCAB, adapter, logits};
use super::vec;
use crate::testbed::device;

use metal_candle::io::data::Batch;
use metal_candle::io::{AdapterFormat, adapter as files};
use metal_candle::models::fuse::{fuse_to_folder, fuse_to_gguf};
use metal_candle::models::{BaseWeights, load_decoder};
use metal_candle::nn::{AdapterRegistry, ApplyAdapter, LoRAAdapter};
use metal_candle::train::{AdamWConfig, TrainStep};
use std::sync::Arc;

const TOKENS: [u32; 6] = [5, 40, 7, 7, 90, 13];

/// An adapter on every module after three steps.
fn trained() -> LoRAAdapter {
    let decoder = Arc::new(Tiny::new().decoder());
    let lora = adapter(&MODULES.map(|(name, _)| name));
    let optimizer = AdamWConfig::default();
    let mut step = TrainStep::new(decoder, lora, optimizer, 1.0, 0).unwrap();
    let labels = vec![40, 7, 7, 90, 13, -100];
    let batch =
        Batch { ids: TOKENS.to_vec(), labels, batch: 1, seq: 6, trained: 5, documents: None };
    for _ in 0..3 {
        assert!(step.run(&batch, 1e-2).unwrap().applied);
    }
    step.adapter().unwrap()
}

#[test]
fn what_was_trained_is_what_every_format_loads() {
    let (decoder, trained) = (Tiny::new().decoder(), trained());
    let want = logits(&decoder, &TOKENS, Some(&trained));
    assert_ne!(want, logits(&decoder, &TOKENS, None));
    assert_ne!(want, logits(&decoder, &TOKENS, Some(&adapter(&MODULES.map(|m| m.0)))));
    let folder = tempfile::tempdir().unwrap();
    for format in [AdapterFormat::Peft, AdapterFormat::Mlx, AdapterFormat::Gguf] {
        let path = folder.path().join(format!("{format:?}"));
        files::save(&trained.to_peft().unwrap(), &path, format, Some(&decoder.config)).unwrap();
        let loaded = LoRAAdapter::load(&path, &decoder.config, device()).unwrap();
        for (kept, loaded) in trained.parameters().iter().zip(loaded.parameters()) {
            assert_eq!(vec(kept), vec(&loaded), "{format}");
        }
        assert_eq!(logits(&decoder, &TOKENS, Some(&loaded)), want, "{format}");
    }
}

/// 1.x had a `merge_weights` that nothing could load.
#[test]
fn a_fused_model_needs_no_adapter() {
    let (tiny, trained) = (Tiny::new(), trained());
    let want = logits(&tiny.decoder(), &TOKENS, Some(&trained));
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let base = tiny.write(folder.path());
    trained.save(at("adapter")).unwrap();
    fuse_to_gguf(&base, &at("adapter"), &at("fused.gguf"), None).unwrap();
    let fused = load_decoder(&at("fused.gguf"), BaseWeights::F32, device()).unwrap();
    super::assert_near(&logits(&fused, &TOKENS, None), &want, 1e-4);
    // A qwen2 without biases has no config.json; nothing is written that would load as another.
    let error = fuse_to_folder(&base, &at("adapter"), &at("fused"), None).unwrap_err().to_string();
    assert!(error.contains("config.json") && error.contains("--export-gguf"), "{error}");
    assert!(!at("fused/config.json").exists() && !at("fused/model.safetensors").exists());
}

/// The registry of 1.x kept adapters, but no model ever saw the one that was active.
#[test]
fn the_active_adapter_is_the_one_that_the_model_uses() {
    let mut decoder = Tiny::new().decoder();
    let plain = logits(&decoder, &TOKENS, None);
    let mut registry = AdapterRegistry::default();
    let names = ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"];
    for name in names {
        registry.add_adapter(name, adapter(&[name]));
    }
    let mut seen = vec![plain.clone()];
    for name in names {
        registry.activate(name, &mut decoder).unwrap();
        let got = logits(&decoder, &TOKENS, decoder.adapter());
        assert_eq!(got.len(), TOKENS.len() * VOCAB);
        assert_eq!(got, logits(&decoder, &TOKENS, Some(&adapter(&[name]))));
        assert!(!seen.contains(&got), "{name} changes nothing");
        seen.push(got);
    }
    registry.deactivate(&mut decoder);
    assert_eq!(logits(&decoder, &TOKENS, decoder.adapter()), plain);
}

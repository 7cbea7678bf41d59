//! Several adapters over one base.

use super::{data, decoder, logits};
use crate::testbed::device;

use metal_candle::generate::{Generator, GeneratorConfig};
use metal_candle::models::{BaseWeights, load};
use metal_candle::nn::{AdapterRegistry, ApplyAdapter, LoRAAdapter};
use std::sync::Arc;

#[test]
fn swapping_changes_the_logits_and_back_gives_the_same_bits() {
    let mut model = decoder();
    let mut registry = AdapterRegistry::default();
    for (name, path) in [("peft", "adapters/peft"), ("mlx", "adapters/mlx")] {
        let adapter = LoRAAdapter::load(data(path), &model.config, device()).unwrap();
        assert!(registry.add_adapter(name, adapter).is_none());
    }
    assert_eq!(registry.list_adapters(), ["mlx", "peft"]);
    let plain = logits(&model, None);
    let mut activated = |name: &str| {
        registry.activate(name, &mut model).unwrap();
        assert_eq!(registry.active_adapter(), Some(name));
        logits(&model, model.adapter())
    };
    let (first, second, again) = (activated("peft"), activated("mlx"), activated("peft"));
    assert_eq!(first, again);
    assert!(first != second && first != plain && second != plain);
    registry.deactivate(&mut model);
    assert_eq!(registry.active_adapter(), None);
    assert!(!model.has_adapter());
    assert_eq!(logits(&model, model.adapter()), plain);
    assert!(registry.unload_adapter("mlx").is_some());
    let error = registry.activate("mlx", &mut model).unwrap_err().to_string();
    assert!(error.contains("mlx") && error.contains("peft"), "{error}");
}

#[test]
fn a_generator_swaps_adapters_without_loading_its_base_again() {
    let base = data("adapters/base.gguf");
    let model = load(&base, BaseWeights::F32, device()).unwrap();
    let config = model.decoder.config.clone();
    let (decoder, tokenizer) = (Arc::new(model.decoder), Arc::new(model.tokenizer));
    let mut generator = Generator::new(decoder.clone(), tokenizer.clone());
    let mut registry = AdapterRegistry::default();
    for (name, path) in [("peft", "adapters/peft"), ("mlx", "adapters/mlx")] {
        let adapter = LoRAAdapter::load(data(path), &config, device()).unwrap();
        registry.add_adapter(name, adapter);
    }
    let settings = GeneratorConfig { max_tokens: 12, ..GeneratorConfig::default() };
    let generate = |generator: &Generator| generator.generate("Hello", &settings, |_| {}).unwrap();
    let plain = generate(&generator).ids;
    let mut with = |name: &str, generator: &mut Generator| {
        registry.activate(name, generator).unwrap();
        let ids = generate(generator).ids;
        // What a generator that never had another adapter says.
        let mut fresh = decoder.as_ref().clone();
        fresh.apply_adapter(generator.adapter().unwrap().clone()).unwrap();
        let fresh = Generator::new(Arc::new(fresh), tokenizer.clone());
        assert_eq!(generate(&fresh).ids, ids, "{name}");
        ids
    };
    let peft = with("peft", &mut generator);
    let mlx = with("mlx", &mut generator);
    assert!(peft != plain && mlx != plain && peft != mlx);
    assert_eq!(with("peft", &mut generator), peft);
    registry.deactivate(&mut generator);
    assert_eq!(generate(&generator).ids, plain);
    // An adapter that does not fit leaves everything as it was.
    let other = LoRAAdapter::from_peft(
        metal_candle::io::PeftAdapter::load(data("peft_adapter")).unwrap(),
        device(),
    );
    registry.add_adapter("other", other.unwrap());
    assert!(registry.activate("other", &mut generator).is_err());
    assert_eq!(generate(&generator).ids, plain);
    assert_eq!(registry.active_adapter(), None);
}

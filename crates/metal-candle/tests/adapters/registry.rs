//! Several adapters over one base.

use super::{data, decoder, logits};
use metal_candle::Device;
use metal_candle::nn::{AdapterRegistry, ApplyAdapter, LoRAAdapter};

#[test]
fn swapping_changes_the_logits_and_back_gives_the_same_bits() {
    let mut model = decoder();
    let mut registry = AdapterRegistry::default();
    for (name, path) in [("peft", "adapters/peft"), ("mlx", "adapters/mlx")] {
        let adapter = LoRAAdapter::load(data(path), &model.config, &Device::Cpu).unwrap();
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

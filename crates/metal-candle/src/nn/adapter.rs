//! A whole adapter: one LoRA branch for each adapted layer, and a registry to switch between several.

use super::{LoRADropout, LoRALayer};
use crate::error::ErrorKind;
use crate::io::peft::{LoraPair, PeftAdapter, Target};
use crate::io::{self, DecoderConfig, LoraConfig};
use crate::{Device, Error, LazyTensor, Result};
use std::collections::BTreeMap;
use std::path::Path;

/// The branches of one adapter by module path, in the order of their names.
#[derive(Clone, Debug)]
pub struct LoRAAdapter {
    /// What was adapted and how.
    pub config: LoraConfig,
    layers: BTreeMap<String, LoRALayer>,
}

impl LoRAAdapter {
    /// A fresh adapter for those of `modules` (path and `[out, in]`) that the config targets.
    ///
    /// # Errors
    /// Where the config targets none of them, or asks for what is not supported.
    pub fn new<'m>(
        config: LoraConfig,
        modules: impl IntoIterator<Item = (&'m str, [usize; 2])>,
        seed: u64,
        device: &Device,
    ) -> Result<LoRAAdapter> {
        let modules: Vec<(&str, [usize; 2])> = modules.into_iter().collect();
        let targets = config.targets(modules.iter().map(|(name, _)| *name));
        let mut targets = targets.map_err(ErrorKind::Adapter)?.into_iter().peekable();
        let mut layers = BTreeMap::new();
        // A layer draws from a stream of its own: another choice of targets leaves it as it is.
        for (stream, (module, dims)) in modules.into_iter().enumerate() {
            let is_next = |target: &Target| target.module == module;
            if let Some(target) = targets.next_if(is_next) {
                let layer = LoRALayer::new(dims, &target, seed, stream as u32, device)?;
                layers.insert(target.module, layer);
            }
        }
        Ok(LoRAAdapter { config, layers })
    }

    /// The adapter at this path, for a model of this shape: a folder of PEFT's or mlx-lm's, or a
    /// GGUF file for llama.cpp.
    ///
    /// # Errors
    /// Where there is no such adapter, or it is for another base.
    pub fn load(
        path: impl AsRef<Path>,
        base: &DecoderConfig,
        device: &Device,
    ) -> Result<LoRAAdapter> {
        LoRAAdapter::from_peft(io::adapter::load(path, Some(base))?, device)
    }

    /// Writes the adapter to a folder, as PEFT does.
    ///
    /// # Errors
    /// Where the folder cannot be written.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        Ok(self.to_peft()?.save(folder)?)
    }

    /// An adapter as it lies in a file.
    ///
    /// # Errors
    /// Where its configuration contradicts itself.
    pub fn from_peft(adapter: PeftAdapter, device: &Device) -> Result<LoRAAdapter> {
        let PeftAdapter { config, modules } = adapter;
        let targets = config.targets(modules.keys().map(String::as_str));
        let targets = targets.map_err(ErrorKind::Adapter)?;
        let scales: BTreeMap<&str, f64> =
            targets.iter().map(|target| (target.module.as_str(), target.scale)).collect();
        let mut layers = BTreeMap::new();
        for (module, pair) in modules {
            let Some(&scale) = scales.get(module.as_str()) else {
                return Err(ErrorKind::AdapterModule { module }.into());
            };
            let LoraPair { a, b, rank, inputs, outputs } = pair;
            let a = LazyTensor::from_vec(a, &[rank, inputs], device)?;
            let b = LazyTensor::from_vec(b, &[outputs, rank], device)?;
            layers.insert(module, LoRALayer { a, b, scale, dropout: None });
        }
        Ok(LoRAAdapter { config, layers })
    }

    /// The adapter as it lies in a file.
    ///
    /// # Errors
    /// Where a parameter cannot be computed.
    pub fn to_peft(&self) -> Result<PeftAdapter> {
        let pair = |layer: &LoRALayer| -> Result<LoraPair> {
            let ([rank, inputs], outputs) =
                ([layer.a.dims()[0], layer.a.dims()[1]], layer.b.dims()[0]);
            Ok(LoraPair { a: layer.a.to_vec()?, b: layer.b.to_vec()?, rank, inputs, outputs })
        };
        let modules = self.layers.iter().map(|(name, layer)| Ok((name.clone(), pair(layer)?)));
        Ok(PeftAdapter { config: self.config.clone(), modules: modules.collect::<Result<_>>()? })
    }

    /// This adapter with the dropout of its config, by `seed` (`i64[]`): as it is while training.
    #[must_use]
    pub fn with_dropout(mut self, seed: &LazyTensor) -> LoRAAdapter {
        let p = self.config.lora_dropout;
        if p > 0.0 {
            for (stream, layer) in self.layers.values_mut().enumerate() {
                let stream = stream as u32;
                layer.dropout = Some(LoRADropout { p, seed: seed.clone(), stream });
            }
        }
        self
    }

    /// The branch of the layer at this module path.
    pub fn layer(&self, module: &str) -> Option<&LoRALayer> {
        self.layers.get(module)
    }

    /// The branches by module path.
    pub fn layers(&self) -> impl ExactSizeIterator<Item = (&str, &LoRALayer)> {
        self.layers.iter().map(|(name, layer)| (name.as_str(), layer))
    }

    /// A and B of every branch, in the order of [`LoRAAdapter::layers`].
    pub fn parameters(&self) -> Vec<LazyTensor> {
        self.layers.values().flat_map(|l| [l.a.clone(), l.b.clone()]).collect()
    }

    /// This adapter with other values, in the order of [`LoRAAdapter::parameters`].
    ///
    /// # Errors
    /// Where there are more or fewer values than parameters.
    pub fn with_parameters(&self, values: &[LazyTensor]) -> Result<LoRAAdapter> {
        if values.len() != 2 * self.layers.len() {
            let (expected, got) = (2 * self.layers.len(), values.len());
            return Err(ErrorKind::Parameters { expected, got }.into());
        }
        let mut adapter = self.clone();
        for (layer, pair) in adapter.layers.values_mut().zip(values.chunks(2)) {
            (layer.a, layer.b) = (pair[0].clone(), pair[1].clone());
        }
        Ok(adapter)
    }

    /// How many numbers are trained.
    pub fn num_trainable_parameters(&self) -> usize {
        self.parameters().iter().map(|p| p.dims().iter().product::<usize>()).sum()
    }
}

/// Something that an adapter can be put on and taken off again, without touching its weights.
pub trait ApplyAdapter {
    /// Puts the adapter on; one that was there before is returned.
    ///
    /// # Errors
    /// Where a branch names a layer that is not there, or has another shape than its layer.
    fn apply_adapter(&mut self, adapter: LoRAAdapter) -> Result<Option<LoRAAdapter>>;
    /// Takes the adapter off.
    fn remove_adapter(&mut self) -> Option<LoRAAdapter>;
    /// The adapter that is on.
    fn adapter(&self) -> Option<&LoRAAdapter>;
    /// Whether one is on.
    fn has_adapter(&self) -> bool {
        self.adapter().is_some()
    }
}

/// Adapters by name, one of which may be active.
#[derive(Clone, Debug, Default)]
pub struct AdapterRegistry {
    adapters: BTreeMap<String, LoRAAdapter>,
    active: Option<String>,
}

impl AdapterRegistry {
    /// Keeps `adapter` under `name`; one of that name is replaced and returned.
    pub fn add_adapter(&mut self, name: &str, adapter: LoRAAdapter) -> Option<LoRAAdapter> {
        self.adapters.insert(name.to_string(), adapter)
    }

    /// Forgets the adapter of this name. A model that has it on keeps it until another is activated.
    pub fn unload_adapter(&mut self, name: &str) -> Option<LoRAAdapter> {
        if self.active.as_deref() == Some(name) {
            self.active = None;
        }
        self.adapters.remove(name)
    }

    /// Makes the adapter of this name the active one and puts it on `model`.
    ///
    /// # Errors
    /// Where there is none of this name, or it does not fit the model.
    pub fn activate(&mut self, name: &str, model: &mut impl ApplyAdapter) -> Result<()> {
        let adapter = self.adapters.get(name).ok_or_else(|| {
            let known = self.list_adapters().join(", ");
            Error::from(ErrorKind::UnknownAdapter { name: name.to_string(), known })
        })?;
        model.apply_adapter(adapter.clone())?;
        self.active = Some(name.to_string());
        Ok(())
    }

    /// Takes the active adapter off `model`.
    pub fn deactivate(&mut self, model: &mut impl ApplyAdapter) {
        model.remove_adapter();
        self.active = None;
    }

    /// The name of the active adapter.
    pub fn active_adapter(&self) -> Option<&str> {
        self.active.as_deref()
    }

    /// All names, sorted.
    pub fn list_adapters(&self) -> Vec<&str> {
        self.adapters.keys().map(String::as_str).collect()
    }
}

//! What `train` and `generate` share: the model to load.

use anyhow::{Context, Result};
use metal_candle::Device;
use metal_candle::models::{BaseWeights, LoadedModel, load};
use metal_candle::nn::{ApplyAdapter, LoRAAdapter};
use std::path::{Path, PathBuf};

/// The model to work on.
#[derive(clap::Args)]
pub(crate) struct ModelArgs {
    /// A GGUF file, or a Hugging Face folder: config.json, safetensors, tokenizer.json
    #[arg(long)]
    pub(crate) model: PathBuf,
    /// Hold the linear layers as f32 instead of as stored
    #[arg(long)]
    pub(crate) dequantize: bool,
}

impl ModelArgs {
    pub(crate) fn load(&self) -> Result<LoadedModel> {
        let base = if self.dequantize { BaseWeights::F32 } else { BaseWeights::AsStored };
        load(&self.model, base, &Device::Cpu)
            .with_context(|| format!("cannot load {}", self.model.display()))
    }

    /// The model with an adapter on it.
    pub(crate) fn load_with(&self, adapter: Option<&Path>) -> Result<LoadedModel> {
        let mut loaded = self.load()?;
        if let Some(path) = adapter {
            let adapter = LoRAAdapter::load(path, &loaded.decoder.config, &Device::Cpu)
                .with_context(|| format!("cannot load the adapter {}", path.display()))?;
            loaded.decoder.apply_adapter(adapter)?;
        }
        Ok(loaded)
    }

    /// The name under which an adapter remembers its base.
    pub(crate) fn name(&self) -> String {
        // A folder's name is no file's: what follows its last dot belongs to it.
        let name =
            if self.model.is_dir() { self.model.file_name() } else { self.model.file_stem() };
        name.unwrap_or_default().to_string_lossy().into_owned()
    }
}

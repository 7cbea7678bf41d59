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
    /// Hold the weights as f32 instead of in blocks; with --dtype, as that
    #[arg(long)]
    pub(crate) dequantize: bool,
    /// Hold the weights as this [default: blocks as they are stored, floats as f32]
    #[arg(long, value_enum)]
    pub(crate) dtype: Option<WeightType>,
}

/// What a weight may be held as.
#[derive(Clone, Copy, clap::ValueEnum)]
pub(crate) enum WeightType {
    F32,
    Bf16,
    F16,
}

impl ModelArgs {
    pub(crate) fn load(&self) -> Result<LoadedModel> {
        load(&self.model, self.base(), &Device::Cpu)
            .with_context(|| format!("cannot load {}", self.model.display()))
    }

    fn base(&self) -> BaseWeights {
        match (self.dtype, self.dequantize) {
            (None, false) => BaseWeights::AsStored,
            (None, true) | (Some(WeightType::F32), _) => BaseWeights::F32,
            (Some(WeightType::Bf16), _) => BaseWeights::BF16,
            (Some(WeightType::F16), _) => BaseWeights::F16,
        }
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

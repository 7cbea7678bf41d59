//! What the commands share: the model to load, from a path or from the hub.

use crate::device::DeviceArgs;
use crate::ui::note;
use anyhow::{Context, Result, bail};
use metal_candle::models::{BaseWeights, Decoder, LoadedModel, load};
use metal_candle::nn::{ApplyAdapter, LoRAAdapter};
use metal_candle::{BlockFormat, DType, Device};
use std::path::{Path, PathBuf};

/// Where a model is.
#[derive(clap::Args)]
pub(crate) struct ModelSource {
    /// A GGUF file, a Hugging Face folder (config.json, safetensors, tokenizer.json), or a name on
    /// the hub: owner/name, or owner/name:file.gguf
    #[arg(long)]
    model: String,
    /// The GGUF file of a folder or of a repository on the hub
    #[arg(long, value_name = "FILE")]
    gguf_file: Option<String>,
    /// Branch, tag or commit on the hub
    #[arg(long, default_value = "main")]
    revision: String,
}

/// The model to work on.
#[derive(clap::Args)]
pub(crate) struct ModelArgs {
    #[command(flatten)]
    source: ModelSource,
    /// Hold the weights as f32 instead of in blocks; with --dtype, as that
    #[arg(long)]
    dequantize: bool,
    /// Hold the weights as this [default: blocks as they are stored, floats as f32]
    #[arg(long, value_enum)]
    dtype: Option<WeightType>,
    /// Quantise the weights of the linear layers to this as they are loaded (nf4: as QLoRA does); the others
    /// are held as --dtype says
    #[arg(long, value_enum, conflicts_with = "dequantize", value_name = "FORMAT")]
    quantize: Option<Quantization>,
    /// Hold what lies between the products as this [default: f32; on a GPU that of --dtype]
    #[arg(long, value_enum)]
    activations: Option<WeightType>,
    #[command(flatten)]
    device: DeviceArgs,
}

/// How what a model remembers of a text is held.
#[derive(clap::Args)]
pub(crate) struct CacheArgs {
    /// Hold the keys and values of earlier tokens as this [default: that of --activations]
    #[arg(long, value_enum, value_name = "TYPE")]
    cache_type: Option<WeightType>,
}

impl CacheArgs {
    pub(crate) fn of(&self, decoder: Decoder) -> Decoder {
        match self.cache_type {
            Some(cache_type) => decoder.with_cache(cache_type.dtype()),
            None => decoder,
        }
    }
}

/// What a float may be held as.
#[derive(Clone, Copy, clap::ValueEnum)]
enum WeightType {
    F32,
    Bf16,
    F16,
}

impl WeightType {
    fn dtype(self) -> DType {
        match self {
            WeightType::F32 => DType::F32,
            WeightType::Bf16 => DType::BF16,
            WeightType::F16 => DType::F16,
        }
    }
}

/// What floats may be quantised to.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Quantization {
    /// 4.5 bits a weight, as bitsandbytes has them
    Nf4,
    /// 8.5 bits a weight
    #[value(name = "q8_0")]
    Q8_0,
    /// 5 bits a weight
    #[value(name = "q4_1")]
    Q4_1,
    /// 4.5 bits a weight
    #[value(name = "q4_0")]
    Q4_0,
}

impl Quantization {
    fn format(self) -> BlockFormat {
        match self {
            Quantization::Nf4 => BlockFormat::NF4,
            Quantization::Q8_0 => BlockFormat::Q8_0,
            Quantization::Q4_1 => BlockFormat::Q4_1,
            Quantization::Q4_0 => BlockFormat::Q4_0,
        }
    }
}

impl ModelSource {
    /// The file or folder, fetched if it is on the hub.
    pub(crate) fn path(&self) -> Result<PathBuf> {
        locate(&self.model, self.gguf_file.as_deref(), &self.revision)
    }

    /// As it was given.
    pub(crate) fn given(&self) -> &str {
        &self.model
    }

    /// The name under which an adapter remembers its base.
    pub(crate) fn name(&self) -> String {
        let path = Path::new(&self.model);
        if !path.exists() {
            return self.model.clone();
        }
        // A folder's name is no file's: what follows its last dot belongs to it.
        let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
        name.unwrap_or_default().to_string_lossy().into_owned()
    }
}

impl ModelArgs {
    pub(crate) fn load(&self) -> Result<LoadedModel> {
        // Before the model is fetched: a device that is not here should not take its time.
        self.load_on(&self.device.present()?)
    }

    /// [`ModelArgs::load`] on this device, whatever was asked for.
    pub(crate) fn load_on(&self, device: &Device) -> Result<LoadedModel> {
        let name = device.describe()?;
        let path = self.source.path()?;
        let mut loaded = load(&path, self.base(), device)
            .with_context(|| format!("cannot load {}", self.source.model))?;
        loaded.decoder = loaded.decoder.with_activations(self.activations(device));
        note!("device: {name}");
        Ok(loaded)
    }

    /// How its weights are held.
    pub(crate) fn base(&self) -> BaseWeights {
        if let Some(quantization) = self.quantize {
            let rest = self.dtype.map_or(DType::F32, WeightType::dtype);
            return BaseWeights::Quantised { format: quantization.format(), rest };
        }
        match (self.dtype, self.dequantize) {
            (None, false) => BaseWeights::AsStored,
            (None, true) | (Some(WeightType::F32), _) => BaseWeights::F32,
            (Some(WeightType::Bf16), _) => BaseWeights::BF16,
            (Some(WeightType::F16), _) => BaseWeights::F16,
        }
    }

    /// How what lies between its products is held. Memory traffic is what a GPU waits for.
    pub(crate) fn activations(&self, device: &Device) -> DType {
        let default = self.dtype.filter(|_| *device != Device::Cpu);
        self.activations.or(default).map_or(DType::F32, WeightType::dtype)
    }

    /// The model with an adapter on it.
    pub(crate) fn load_with(&self, adapter: Option<&Path>) -> Result<LoadedModel> {
        let mut loaded = self.load()?;
        if let Some(path) = adapter {
            let decoder = &loaded.decoder;
            let adapter = LoRAAdapter::load(path, &decoder.config, decoder.device())
                .with_context(|| format!("cannot load the adapter {}", path.display()))?;
            loaded.decoder.apply_adapter(adapter)?;
        }
        Ok(loaded)
    }

    pub(crate) fn device(&self) -> &DeviceArgs {
        &self.device
    }

    pub(crate) fn source(&self) -> &ModelSource {
        &self.source
    }

    /// As [`ModelSource::name`].
    pub(crate) fn name(&self) -> String {
        self.source.name()
    }
}

/// The file or folder of this name here, or else on the hub.
pub(crate) fn locate(name: &str, gguf_file: Option<&str>, revision: &str) -> Result<PathBuf> {
    let path = Path::new(name);
    if path.exists() {
        return match gguf_file {
            Some(file) if path.is_dir() => Ok(path.join(file)),
            _ => Ok(path.to_owned()),
        };
    }
    let (repository, file) = match name.split_once(':') {
        Some((repository, file)) => (repository, Some(file)),
        None => (name, gguf_file),
    };
    if !is_repository(repository) {
        bail!(
            "{name}: no such file or folder: expected a GGUF file, a folder with config.json, \
             tokenizer.json and model.safetensors, or a name on the Hugging Face hub: owner/name"
        );
    }
    fetch(repository, revision, file).with_context(|| format!("{name}: no such file or folder"))
}

#[cfg(feature = "hub")]
use crate::hub::fetch;

#[cfg(not(feature = "hub"))]
fn fetch(_: &str, _: &str, _: Option<&str>) -> Result<PathBuf> {
    bail!("this build does not look on the hub: build it with the feature `hub`")
}

/// Whether this can be a repository's name: `owner/name` of the letters that the hub allows.
fn is_repository(name: &str) -> bool {
    let is_part = |part: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !part.is_empty() && part.chars().all(allowed) && !part.starts_with(['.', '-'])
    };
    name.split_once('/').is_some_and(|(owner, name)| is_part(owner) && is_part(name))
}

#[cfg(test)]
mod tests {
    use super::is_repository;

    #[test]
    fn only_owner_and_name_make_a_repository() {
        for name in ["HuggingFaceTB/SmolLM2-135M-Instruct", "a/b.c_d-e", "TheBloke/x-GGUF"] {
            assert!(is_repository(name), "{name}");
        }
        for name in ["gpt2", "/a/b", "./a", "../a", "a/b/c", "a/", "~/a", "C:\\a", "a/b c", ""] {
            assert!(!is_repository(name), "{name}");
        }
    }
}

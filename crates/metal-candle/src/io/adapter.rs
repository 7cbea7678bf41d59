//! An adapter in any of the formats that are read and written; which one is told by its files.
//!
//! ```text
//! peft ─── a folder with adapter_config.json and adapter_model.safetensors
//! mlx ──── a folder with adapter_config.json and adapters.safetensors
//! gguf ─── one file, for llama.cpp's --lora
//! ```

use std::fmt;
use std::path::Path;

use serde_json::{Map, Value};

use super::gguf::lora;
use super::peft::{self, PeftAdapter, Problem};
use super::{DecoderConfig, Error, Result, file, mlx};

/// Whose format an adapter is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdapterFormat {
    /// Hugging Face's PEFT.
    Peft,
    /// Apple's mlx-lm.
    Mlx,
    /// llama.cpp.
    Gguf,
}

impl fmt::Display for AdapterFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            AdapterFormat::Peft => "PEFT",
            AdapterFormat::Mlx => "mlx-lm",
            AdapterFormat::Gguf => "llama.cpp",
        })
    }
}

impl AdapterFormat {
    /// The format of the adapter at this path.
    ///
    /// # Errors
    /// [`Error::File`] where nothing is there; [`Problem::NoAdapter`], [`Problem::Pickle`].
    pub fn detect(path: impl AsRef<Path>) -> Result<AdapterFormat> {
        let path = folder_of(path.as_ref());
        let has = |name: &str| path.join(name).exists();
        if std::fs::metadata(path).map_err(Error::file(path))?.is_file() {
            return Ok(AdapterFormat::Gguf);
        }
        match (has(peft::WEIGHTS), has(mlx::WEIGHTS)) {
            (true, false) => return Ok(AdapterFormat::Peft),
            (false, true) => return Ok(AdapterFormat::Mlx),
            // Both wrote here, and the configuration is of the last one.
            (true, true) => {
                let config: Map<String, Value> = file::read_json(&path.join(peft::CONFIG))?;
                let is_peft = config.contains_key("peft_type");
                return Ok(if is_peft { AdapterFormat::Peft } else { AdapterFormat::Mlx });
            }
            (false, false) => {}
        }
        let pickles = ["adapter_model.bin", "adapters.npz"];
        let problem = match pickles.into_iter().find(|name| has(name)) {
            Some(name) => Problem::Pickle { name },
            None => Problem::NoAdapter,
        };
        Err(Error::Adapter { path: path.to_owned(), problem })
    }
}

/// The file of an adapter's weights stands for the folder that they are in.
fn folder_of(path: &Path) -> &Path {
    let is_weights = path.ends_with(peft::WEIGHTS) || path.ends_with(mlx::WEIGHTS);
    match path.parent() {
        Some(folder) if is_weights && path.is_file() => match folder.as_os_str().is_empty() {
            true => Path::new("."),
            false => folder,
        },
        _ => path,
    }
}

/// Reads the adapter at this path. `base` is the model that it is for: a GGUF adapter for Llama
/// cannot be read without, and any adapter is held against it.
///
/// # Errors
/// As [`AdapterFormat::detect`], [`PeftAdapter::load`], [`mlx::load`], [`lora::load`] and
/// [`PeftAdapter::check_base`].
pub fn load(path: impl AsRef<Path>, base: Option<&DecoderConfig>) -> Result<PeftAdapter> {
    let path = folder_of(path.as_ref());
    let adapter = match AdapterFormat::detect(path)? {
        AdapterFormat::Peft => PeftAdapter::load(path)?,
        AdapterFormat::Mlx => mlx::load(path)?,
        AdapterFormat::Gguf => lora::load(path, base)?,
    };
    if let Some(base) = base {
        let wrong = |problem| Error::Adapter { path: path.to_owned(), problem };
        adapter.check_base(&base.modules()).map_err(wrong)?;
    }
    Ok(adapter)
}

/// Writes an adapter for `base` to this path: a folder, or a file for [`AdapterFormat::Gguf`].
///
/// # Errors
/// [`Error::File`]; [`Problem::Occupied`]; as [`mlx::save`] and [`lora::save`], where the format
/// cannot say what the adapter does.
pub fn save(
    adapter: &PeftAdapter,
    path: impl AsRef<Path>,
    format: AdapterFormat,
    base: Option<&DecoderConfig>,
) -> Result<()> {
    let path = path.as_ref();
    let failed = |problem| Err(Error::Adapter { path: path.to_owned(), problem });
    let other = match format {
        AdapterFormat::Peft => mlx::WEIGHTS,
        AdapterFormat::Mlx => peft::WEIGHTS,
        AdapterFormat::Gguf => {
            let Some(base) = base else { return failed(Problem::NeedsBase) };
            return lora::save(adapter, path, base);
        }
    };
    if path.join(other).exists() {
        return failed(Problem::Occupied { file: other });
    }
    match format {
        AdapterFormat::Mlx => mlx::save(adapter, path),
        AdapterFormat::Peft | AdapterFormat::Gguf => adapter.save(path),
    }
}

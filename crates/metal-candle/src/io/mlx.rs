//! LoRA adapters as mlx-lm keeps them: `adapter_config.json` and `adapters.safetensors`.
//!
//! Names and layout are those of mlx-lm 0.32 (<https://github.com/ml-explore/mlx-lm>): A is
//! `<module>.lora_a` `[in, r]`, B is `<module>.lora_b` `[r, out]`, and one absolute `scale` and one
//! `rank` hold for all modules.

use std::collections::BTreeSet;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::peft::pair::{self, Orientation, Side};
use super::peft::{CONFIG, LoraConfig, LoraPair, PeftAdapter, Problem};
use super::{Error, Result, file};

pub(crate) const WEIGHTS: &str = "adapters.safetensors";
const A: &str = ".lora_a";
const B: &str = ".lora_b";
const FORMAT: &str = "mlx-lm's format";

/// What of an `adapter_config.json` changes what the adapter computes.
#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    fine_tune_type: Option<String>,
    lora_parameters: Option<Parameters>,
    /// The base.
    #[serde(default)]
    model: Option<String>,
}

#[derive(Deserialize)]
struct Parameters {
    rank: usize,
    scale: Option<f64>,
    #[serde(default)]
    dropout: f64,
}

/// Reads a folder that mlx-lm or [`save`] wrote.
///
/// # Errors
/// [`Error::File`], [`Error::Json`]; [`Error::Adapter`] for DoRA and full fine-tunes, for tensors
/// that are no LoRA pairs, and for ranks that contradict the configuration.
pub fn load(folder: impl AsRef<Path>) -> Result<PeftAdapter> {
    let folder = folder.as_ref();
    let at = |name: &str| {
        let path = folder.join(name);
        move |problem| Error::Adapter { path: path.clone(), problem }
    };
    let config: Config = file::read_json(&folder.join(CONFIG))?;
    let (rank, scale, dropout) = parameters(&config).map_err(at(CONFIG))?;
    let bytes = file::read(&folder.join(WEIGHTS))?;
    let modules = pair::parse(&bytes, Orientation::InOut, parse_key).map_err(at(WEIGHTS))?;
    if let Some((module, pair)) = modules.iter().find(|(_, pair)| pair.rank != rank) {
        let (module, got) = (module.clone(), pair.rank);
        return Err(at(WEIGHTS)(Problem::Rank { module, expected: rank, got }));
    }
    let config = LoraConfig {
        base_model_name_or_path: config.model,
        lora_dropout: dropout,
        ..LoraConfig::describing(&modules, |_| scale)
    };
    config.check().map_err(at(CONFIG))?;
    Ok(PeftAdapter { config, modules })
}

/// Writes the folder so that mlx-lm loads it: the weights first, the configuration last, each file
/// in one step.
///
/// # Errors
/// [`Error::File`]; [`Problem::Varies`] where rank or scale are not the same for all modules.
pub fn save(adapter: &PeftAdapter, folder: impl AsRef<Path>) -> Result<()> {
    let folder = folder.as_ref();
    let weights = folder.join(WEIGHTS);
    let failed = |problem| Error::Adapter { path: weights.clone(), problem };
    let (rank, scale) = uniform(adapter).map_err(failed)?;
    let mut tensors = Vec::with_capacity(2 * adapter.modules.len());
    for (module, pair) in &adapter.modules {
        let LoraPair { a, b, rank, inputs, outputs } = pair;
        let a = pair::transpose(a, *rank, *inputs);
        let b = pair::transpose(b, *outputs, *rank);
        tensors.push((format!("{module}{A}"), [*inputs, *rank], a));
        tensors.push((format!("{module}{B}"), [*rank, *outputs], b));
    }
    let bytes = pair::serialize(tensors, None).map_err(failed)?;
    std::fs::create_dir_all(folder).map_err(Error::file(folder))?;
    file::write_atomic(&weights, &bytes)?;
    let config = serde_json::to_string_pretty(&config(adapter, rank, scale))
        .expect("metal-candle bug: a JSON object cannot be printed");
    file::write_atomic(&folder.join(CONFIG), config.as_bytes())
}

fn parameters(config: &Config) -> std::result::Result<(usize, f64, f64), Problem> {
    let option = |option: &str, got: String, expected| {
        Err(Problem::Option { option: option.to_owned(), got, expected })
    };
    match config.fine_tune_type.as_deref() {
        None | Some("lora") => {}
        Some(other) => {
            let expected = "\"lora\"; DoRA and full fine-tunes are not supported";
            return option("fine_tune_type", format!("{other:?}"), expected);
        }
    }
    let Some(Parameters { rank, scale, dropout }) = config.lora_parameters else {
        return option("lora_parameters", "absent".to_owned(), "an object with rank and scale");
    };
    // mlx-lm refuses it, too: old files say alpha instead, and meant something else by it.
    match scale {
        Some(scale) => Ok((rank, scale, dropout)),
        None => option("lora_parameters.scale", "absent".to_owned(), "a number"),
    }
}

fn parse_key(key: &str) -> std::result::Result<(&str, Side), Problem> {
    let refuse = |reason| Err(Problem::Key { key: key.to_owned(), reason });
    match (key.strip_suffix(A), key.strip_suffix(B)) {
        (Some(module), _) => Ok((module, Side::A)),
        (_, Some(module)) => Ok((module, Side::B)),
        _ if key.ends_with(".m") => refuse("DoRA is not supported"),
        _ => refuse("expected a name that ends with \".lora_a\" or \".lora_b\""),
    }
}

/// The rank and the scale of all modules.
fn uniform(adapter: &PeftAdapter) -> std::result::Result<(usize, f64), Problem> {
    let targets = adapter.targets()?;
    let first = &targets[0];
    for other in &targets {
        let varies = |what, first_value, other_value| Problem::Varies {
            what,
            first: first.module.clone(),
            first_value,
            other: other.module.clone(),
            other_value,
            format: FORMAT,
        };
        if other.rank != first.rank {
            return Err(varies("rank", first.rank as f64, other.rank as f64));
        }
        if other.scale != first.scale {
            return Err(varies("scale", first.scale, other.scale));
        }
    }
    Ok((first.rank, first.scale))
}

/// The keys are full names, which mlx-lm looks up in the whole model: short ones would mean the last
/// `num_layers` layers, and how many there are only the base knows.
fn config(adapter: &PeftAdapter, rank: usize, scale: f64) -> Map<String, Value> {
    let keys: Vec<&str> = adapter.modules.keys().map(String::as_str).collect();
    let layers: BTreeSet<&str> = keys.iter().filter_map(|key| key.split('.').nth(2)).collect();
    let mut config = Map::new();
    if let Some(base) = &adapter.config.base_model_name_or_path {
        config.insert("model".to_owned(), base.as_str().into());
    }
    config.insert("fine_tune_type".to_owned(), "lora".into());
    config.insert("num_layers".to_owned(), layers.len().into());
    let dropout = adapter.config.lora_dropout;
    let parameters = json!({ "rank": rank, "scale": scale, "dropout": dropout, "keys": keys });
    config.insert("lora_parameters".to_owned(), parameters);
    config
}

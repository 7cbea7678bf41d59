//! `adapter_model.safetensors`, and the folder that holds an adapter.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde_json::{Map, Value};

use super::pair::{self, Orientation, Side};
use super::{LoraConfig, LoraPair, Problem, Target};
use crate::io::{Error, Result, file};

pub(crate) const CONFIG: &str = "adapter_config.json";
pub(crate) const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT puts before the base's own names.
const PREFIX: &str = "base_model.model.";
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";

/// A LoRA adapter in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct PeftAdapter {
    /// How it is to be applied.
    pub config: LoraConfig,
    /// The pairs by the base's module names, such as `model.layers.0.self_attn.q_proj`.
    pub modules: BTreeMap<String, LoraPair>,
}

impl PeftAdapter {
    /// Reads a folder that PEFT or [`Self::save`] wrote.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Json`]; [`Error::Adapter`] for options that are not supported,
    /// for tensors that are no LoRA pairs, and for ranks that contradict the configuration.
    pub fn load(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let at = |name: &str| {
            let path = folder.join(name);
            move |problem| Error::Adapter { path: path.clone(), problem }
        };
        let json: Map<String, Value> = file::read_json(&folder.join(CONFIG))?;
        let config = LoraConfig::from_json(&json).map_err(at(CONFIG))?;
        let bytes = file::read(&folder.join(WEIGHTS))?;
        let modules = pair::parse(&bytes, Orientation::OutIn, parse_key).map_err(at(WEIGHTS))?;
        Ok(Self { config, modules })
    }

    /// Writes the folder so that PEFT loads it: the weights first, the configuration last, each
    /// file in one step.
    ///
    /// # Errors
    /// [`Error::File`]; [`Error::Adapter`] where a pair's lengths contradict its shape.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        std::fs::create_dir_all(folder).map_err(Error::file(folder))?;
        let weights = folder.join(WEIGHTS);
        let bytes = serialize(&self.modules)
            .map_err(|problem| Error::Adapter { path: weights.clone(), problem })?;
        file::write_atomic(&weights, &bytes)?;
        let config = serde_json::to_string_pretty(&self.config.to_json())
            .expect("metal-candle bug: a JSON object cannot be printed");
        file::write_atomic(&folder.join(CONFIG), config.as_bytes())
    }

    /// Holds the adapter against a base: its linear modules by full name, with `[out, in]`.
    ///
    /// # Errors
    /// [`Problem::Missing`], [`Problem::Unexpected`], [`Problem::BaseShape`], [`Problem::Rank`];
    /// as [`LoraConfig::targets`]. Within a [`Problem::OtherBase`] where the adapter names its base.
    pub fn check_base(
        &self,
        base: &BTreeMap<String, [usize; 2]>,
    ) -> std::result::Result<(), Problem> {
        self.fits(base).map_err(|problem| match &self.config.base_model_name_or_path {
            Some(base) if !base.is_empty() => {
                Problem::OtherBase { problem: Box::new(problem), base: base.clone() }
            }
            _ => problem,
        })
    }

    /// Rank and scale of each of its modules, in the order of their names.
    ///
    /// # Errors
    /// [`Problem::Unexpected`] for a module that the configuration does not choose;
    /// [`Problem::PairLength`]; as [`LoraConfig::targets`].
    pub fn targets(&self) -> std::result::Result<Vec<Target>, Problem> {
        self.modules.iter().try_for_each(|(module, pair)| pair.check(module))?;
        let targets = self.config.targets(self.modules.keys().map(String::as_str))?;
        if targets.len() == self.modules.len() {
            return Ok(targets);
        }
        let chosen = |name: &&String| targets.iter().any(|target| target.module == **name);
        let modules = self.modules.keys().filter(|name| !chosen(name)).cloned().collect();
        Err(Problem::Unexpected { modules })
    }

    fn fits(&self, base: &BTreeMap<String, [usize; 2]>) -> std::result::Result<(), Problem> {
        // First what the base lacks: of another depth or family, whatever the options say.
        let of_another = |name: &&String| !base.contains_key(*name);
        let unexpected: Vec<String> = self.modules.keys().filter(of_another).cloned().collect();
        if !unexpected.is_empty() {
            return Err(Problem::Unexpected { modules: unexpected });
        }
        let targets = self.config.targets(base.keys().map(String::as_str))?;
        let wanted: HashMap<&str, usize> =
            targets.iter().map(|target| (target.module.as_str(), target.rank)).collect();
        let unwanted = |name: &&String| !wanted.contains_key(name.as_str());
        let unexpected: Vec<String> = self.modules.keys().filter(unwanted).cloned().collect();
        if !unexpected.is_empty() {
            return Err(Problem::Unexpected { modules: unexpected });
        }
        let missing: Vec<String> = targets
            .iter()
            .filter(|target| !self.modules.contains_key(&target.module))
            .map(|target| target.module.clone())
            .collect();
        if !missing.is_empty() {
            return Err(Problem::Missing { modules: missing });
        }
        for (name, pair) in &self.modules {
            let (expected, got) = (base[name], [pair.outputs, pair.inputs]);
            if expected != got {
                return Err(Problem::BaseShape { module: name.clone(), expected, got });
            }
            let rank = wanted[name.as_str()];
            if rank != pair.rank {
                let (module, got) = (name.clone(), pair.rank);
                return Err(Problem::Rank { module, expected: rank, got });
            }
        }
        Ok(())
    }
}

/// The module's name, and which factor.
fn parse_key(key: &str) -> std::result::Result<(&str, Side), Problem> {
    let refuse = |reason| Err(Problem::Key { key: key.to_owned(), reason });
    let Some(name) = key.strip_prefix(PREFIX) else {
        return refuse(
            "expected a name that begins with \"base_model.model.\"; is it PEFT's file?",
        );
    };
    for (suffix, side) in [(A, Side::A), (B, Side::B)] {
        if let Some(module) = name.strip_suffix(suffix) {
            return Ok((module, side));
        }
    }
    if name.ends_with(".lora_embedding_A") || name.ends_with(".lora_embedding_B") {
        return refuse("adapters of embeddings are not supported");
    }
    if name.ends_with(".lora_magnitude_vector") || name.ends_with(".lora_magnitude_vector.weight") {
        return refuse("DoRA is not supported");
    }
    refuse("expected a name that ends with \".lora_A.weight\" or \".lora_B.weight\"")
}

fn serialize(modules: &BTreeMap<String, LoraPair>) -> std::result::Result<Vec<u8>, Problem> {
    let mut tensors = Vec::with_capacity(2 * modules.len());
    for (module, pair) in modules {
        let (a, b) = ([pair.rank, pair.inputs], [pair.outputs, pair.rank]);
        tensors.push((format!("{PREFIX}{module}{A}"), a, pair.a.clone()));
        tensors.push((format!("{PREFIX}{module}{B}"), b, pair.b.clone()));
    }
    // PEFT and transformers refuse a file that does not say which framework it is for.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    pair::serialize(tensors, Some(metadata))
}

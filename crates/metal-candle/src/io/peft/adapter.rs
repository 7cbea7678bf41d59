//! `adapter_model.safetensors`, and the folder that holds an adapter.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Map, Value};

use super::{LoraConfig, Problem};
use crate::io::{Error, Result, file};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT puts before the base's own names.
const PREFIX: &str = "base_model.model.";
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";

/// The two factors of one module's update, row-major: `y += scale · B · (A · x)`.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraPair {
    /// `[rank, inputs]`.
    pub a: Vec<f32>,
    /// `[outputs, rank]`.
    pub b: Vec<f32>,
    /// Rank.
    pub rank: usize,
    /// Columns of the base's weight.
    pub inputs: usize,
    /// Rows of the base's weight.
    pub outputs: usize,
}

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
        let modules = parse(&file::read(&folder.join(WEIGHTS))?).map_err(at(WEIGHTS))?;
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
    /// as [`LoraConfig::targets`].
    pub fn check_base(
        &self,
        base: &BTreeMap<String, [usize; 2]>,
    ) -> std::result::Result<(), Problem> {
        let targets = self.config.targets(base.keys().map(String::as_str))?;
        let missing: Vec<String> = targets
            .iter()
            .filter(|target| !self.modules.contains_key(&target.module))
            .map(|target| target.module.clone())
            .collect();
        let wanted: HashMap<&str, usize> =
            targets.iter().map(|target| (target.module.as_str(), target.rank)).collect();
        let unexpected: Vec<String> = self
            .modules
            .keys()
            .filter(|name| !wanted.contains_key(name.as_str()))
            .cloned()
            .collect();
        if !unexpected.is_empty() {
            return Err(Problem::Unexpected { modules: unexpected });
        }
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

type Tensor = (Vec<usize>, Vec<f32>);

/// One module while its two tensors are being collected.
#[derive(Default)]
struct Halves {
    a: Option<Tensor>,
    b: Option<Tensor>,
}

fn parse(bytes: &[u8]) -> std::result::Result<BTreeMap<String, LoraPair>, Problem> {
    let file = SafeTensors::deserialize(bytes).map_err(|cause| Problem::SafeTensors { cause })?;
    let mut halves: BTreeMap<String, Halves> = BTreeMap::new();
    for (key, view) in file.iter() {
        let (module, side) = parse_key(key)?;
        let halves = halves.entry(module.to_owned()).or_default();
        let half = if side == A { &mut halves.a } else { &mut halves.b };
        *half = Some((view.shape().to_vec(), to_f32(key, &view)?));
    }
    halves.into_iter().map(|(module, halves)| pair(module, halves)).collect()
}

/// The module's name, and [`A`] or [`B`].
fn parse_key(key: &str) -> std::result::Result<(&str, &'static str), Problem> {
    let refuse = |reason| Err(Problem::Key { key: key.to_owned(), reason });
    let Some(name) = key.strip_prefix(PREFIX) else {
        return refuse(
            "expected a name that begins with \"base_model.model.\"; is it PEFT's file?",
        );
    };
    for side in [A, B] {
        if let Some(module) = name.strip_suffix(side) {
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

fn pair(module: String, halves: Halves) -> std::result::Result<(String, LoraPair), Problem> {
    let lacks = |has, lacks| Problem::HalfPair { module: module.clone(), has, lacks };
    let (a, b) = match (halves.a, halves.b) {
        (Some(a), Some(b)) => (a, b),
        (Some(_), None) => return Err(lacks("lora_A", "lora_B")),
        (None, _) => return Err(lacks("lora_B", "lora_A")),
    };
    let ((a_shape, a), (b_shape, b)) = (a, b);
    match (&a_shape[..], &b_shape[..]) {
        (&[rank, inputs], &[outputs, same]) if rank == same && rank > 0 => {
            Ok((module, LoraPair { a, b, rank, inputs, outputs }))
        }
        _ => Err(Problem::PairShape { module, a: a_shape, b: b_shape }),
    }
}

fn to_f32(key: &str, view: &TensorView<'_>) -> std::result::Result<Vec<f32>, Problem> {
    fn read<const N: usize>(bytes: &[u8], convert: impl Fn([u8; N]) -> f32) -> Vec<f32> {
        bytes.as_chunks::<N>().0.iter().map(|&element| convert(element)).collect()
    }
    let bytes = view.data();
    Ok(match view.dtype() {
        Dtype::F32 => read(bytes, f32::from_le_bytes),
        Dtype::F64 => read(bytes, |element| f64::from_le_bytes(element) as f32),
        Dtype::F16 => read(bytes, |element| f16::from_le_bytes(element).to_f32()),
        Dtype::BF16 => read(bytes, |element| bf16::from_le_bytes(element).to_f32()),
        other => {
            return Err(Problem::DType { key: key.to_owned(), dtype: format!("{other:?}") });
        }
    })
}

fn serialize(modules: &BTreeMap<String, LoraPair>) -> std::result::Result<Vec<u8>, Problem> {
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::with_capacity(2 * modules.len());
    for (module, pair) in modules {
        let (a, b) = ([pair.rank, pair.inputs], [pair.outputs, pair.rank]);
        for (side, shape, values) in [(A, a, &pair.a), (B, b, &pair.b)] {
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            tensors.push((format!("{PREFIX}{module}{side}"), shape.to_vec(), bytes));
        }
    }
    let views = tensors
        .iter()
        .map(|(key, shape, bytes)| Ok((key, TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<std::result::Result<Vec<_>, _>>();
    // PEFT and transformers refuse a file that does not say which framework it is for.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    views
        .and_then(|views| safetensors::serialize(views, Some(metadata)))
        .map_err(|cause| Problem::SafeTensors { cause })
}

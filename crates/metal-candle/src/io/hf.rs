//! A Hugging Face model folder: `config.json`, and the weights in `model.safetensors` or in the
//! shards that `model.safetensors.index.json` lists; matrices in floats, or in bitsandbytes' NF4.
//!
//! Headers are read and checked against the files' lengths when the folder is opened; then the files
//! are mapped, so that weights are in memory once at most, and shared by all who run them. See
//! [`MappedBytes`](super::bytes::MappedBytes) for what must not happen to a mapped file.

mod bert;
mod bitsandbytes;
mod config;
mod config_json;
mod problem;
mod rope;
mod shard;
mod write;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use metal_candle_graph::{BlockFormat, DType};
use serde::Deserialize;

use self::bitsandbytes::Nf4;
pub(crate) use self::config_json::config_json;
pub use self::problem::Problem;
use self::shard::Shard;
pub(crate) use self::write::SafetensorsWriter;
use super::gguf::{Encoding, StoredTensor};
use super::{DecoderConfig, EncoderConfig, Error, Result, file};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// An open folder of a decoder: its config and the headers of its weights in memory, the weights mapped.
#[derive(Debug)]
pub struct HfFolder {
    config: DecoderConfig,
    weights: HfWeights,
}

impl HfFolder {
    /// Reads and checks `config.json` and the headers of the weights.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Json`]; [`Error::Model`] for what this crate cannot compute; as [`HfWeights::open`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let config = config::read(&path.as_ref().join(CONFIG))?;
        Ok(Self { config, weights: HfWeights::open(path)? })
    }

    /// The decoder's shape.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// What lies beside the config.
    pub fn weights(&self) -> &HfWeights {
        &self.weights
    }
}

/// The `config.json` of an encoder.
///
/// # Errors
/// [`Error::File`], [`Error::Json`]; [`Error::Model`] for what this crate cannot compute.
pub fn encoder_config(folder: &Path) -> Result<EncoderConfig> {
    bert::read(&folder.join(CONFIG))
}

/// The weights of a model folder: their headers in memory, they themselves mapped.
#[derive(Debug)]
pub struct HfWeights {
    path: PathBuf,
    shards: Vec<Shard>,
    /// Which shard holds a weight.
    index: BTreeMap<String, usize>,
    /// The weights in four bits, and which shard holds what belongs to them.
    nf4: BTreeMap<String, Nf4>,
    nf4_parts: BTreeMap<String, usize>,
}

impl HfWeights {
    /// Reads and checks the headers.
    ///
    /// # Errors
    /// [`Error::File`]; [`Error::Model`] for a folder without weights, for a shard that is missing, for weights that
    /// bitsandbytes wrote otherwise than in NF4, and for whatever contradicts the format or a file's length.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let (whole, index) = (path.join(WEIGHTS), path.join(INDEX));
        let (shards, mut index) = if whole.exists() {
            let shard = Shard::open(whole)?;
            let index = shard.names().map(|name| (name, 0)).collect();
            (vec![shard], index)
        } else if index.exists() {
            open_shards(&index)?
        } else {
            return Err(Error::Model { path, problem: Problem::NoWeights });
        };
        let (states, nf4_parts) = bitsandbytes::split(&mut index);
        let mut weights = Self { path, shards, index, nf4: BTreeMap::new(), nf4_parts };
        for (weight, state) in states {
            let nf4 = weights.nf4_state(&weight, &state)?;
            weights.nf4.insert(weight, nf4);
        }
        Ok(weights)
    }

    /// Where the folder is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of the weights, in the order of the alphabet.
    pub fn weight_names(&self) -> impl Iterator<Item = &str> {
        self.index.keys().map(String::as_str)
    }

    /// The file that holds a weight, and the weight's shape.
    ///
    /// # Errors
    /// [`Problem::NoTensor`].
    pub fn weight_shape(&self, name: &str) -> Result<(&Path, &[usize])> {
        let shard = self.shard(name)?;
        let shape = match self.nf4.get(name) {
            Some(nf4) => &nf4.shape,
            None => shard.shape(name)?,
        };
        Ok((shard.path(), shape))
    }

    /// How a weight's elements are stored, without reading it.
    ///
    /// # Errors
    /// [`Problem::NoTensor`], [`Problem::DType`].
    pub fn weight_encoding(&self, name: &str) -> Result<Encoding> {
        match self.nf4.contains_key(name) {
            true => Ok(Encoding::Blocks(BlockFormat::NF4)),
            false => self.weight_dtype(name).map(Encoding::Dense),
        }
    }

    /// The dtype of a weight; of one in four bits, that which it had before.
    ///
    /// # Errors
    /// [`Problem::NoTensor`], [`Problem::DType`].
    pub fn weight_dtype(&self, name: &str) -> Result<DType> {
        match self.nf4.get(name) {
            Some(nf4) => Ok(nf4.dtype),
            None => self.shard(name)?.dtype(name),
        }
    }

    /// What a weight takes as it is stored.
    ///
    /// # Errors
    /// [`Problem::NoTensor`].
    pub fn weight_len_bytes(&self, name: &str) -> Result<usize> {
        match self.nf4.get(name) {
            Some(nf4) => Ok(nf4.len_bytes()),
            None => self.shard(name)?.len_bytes(name),
        }
    }

    /// One weight, where it lies in its file; in blocks of memory of its own, if it is in four bits.
    ///
    /// # Errors
    /// [`Problem::NoTensor`], [`Problem::DType`].
    pub fn weight(&self, name: &str) -> Result<StoredTensor> {
        match self.nf4.get(name) {
            Some(nf4) => self.read_nf4(name, nf4),
            None => self.shard(name)?.read(name),
        }
    }

    fn shard(&self, name: &str) -> Result<&Shard> {
        self.shard_at(name, self.index.get(name))
    }

    /// Of a weight, or of what belongs to one in four bits.
    fn part_shard(&self, name: &str) -> Result<&Shard> {
        self.shard_at(name, self.nf4_parts.get(name).or_else(|| self.index.get(name)))
    }

    fn shard_at(&self, name: &str, at: Option<&usize>) -> Result<&Shard> {
        match at {
            Some(&shard) => Ok(&self.shards[shard]),
            None => {
                let problem = Problem::NoTensor { tensor: name.to_owned() };
                let path = match &self.shards[..] {
                    [one] => one.path().to_owned(),
                    _ => self.path.join(INDEX),
                };
                Err(Error::Model { path, problem })
            }
        }
    }
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    /// Tensor to file.
    weight_map: BTreeMap<String, String>,
}

/// Every shard that the index names, each holding what the index says it does.
fn open_shards(index: &Path) -> Result<(Vec<Shard>, BTreeMap<String, usize>)> {
    let Index { weight_map } = file::read_json(index)?;
    let mut shards = Vec::new();
    let mut opened: BTreeMap<&str, usize> = BTreeMap::new();
    let mut places = BTreeMap::new();
    for (tensor, name) in &weight_map {
        let at = match opened.get(name.as_str()) {
            Some(&at) => at,
            None => {
                shards.push(open_shard(index, name, tensor)?);
                opened.insert(name, shards.len() - 1);
                shards.len() - 1
            }
        };
        // The index is believed only as far as the shard agrees.
        shards[at].shape(tensor)?;
        places.insert(tensor.clone(), at);
    }
    Ok((shards, places))
}

fn open_shard(index: &Path, name: &str, tensor: &str) -> Result<Shard> {
    let mut parts = Path::new(name).components();
    let plain = matches!(parts.next(), Some(std::path::Component::Normal(_)));
    if !plain || parts.next().is_some() {
        let problem = Problem::ShardName { tensor: tensor.to_owned(), name: name.to_owned() };
        return Err(Error::Model { path: index.to_owned(), problem });
    }
    let path = index.with_file_name(name);
    if !path.exists() {
        let problem = Problem::MissingShard { tensor: tensor.to_owned() };
        return Err(Error::Model { path, problem });
    }
    Shard::open(path)
}

//! A Hugging Face model folder: `config.json`, and the weights in `model.safetensors` or in the
//! shards that `model.safetensors.index.json` lists.
//!
//! Headers are read and checked against the files' lengths when the folder is opened; then the files
//! are mapped, so that weights are in memory once at most, and shared by all who run them. See
//! [`MappedBytes`](super::bytes::MappedBytes) for what must not happen to a mapped file.

mod config;
mod config_json;
mod problem;
mod rope;
mod shard;
mod write;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use metal_candle_graph::DType;
use serde::Deserialize;

pub(crate) use self::config_json::config_json;
pub use self::problem::Problem;
use self::shard::Shard;
pub(crate) use self::write::SafetensorsWriter;
use super::gguf::StoredTensor;
use super::{DecoderConfig, Error, Result, file};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// An open model folder: its config and the headers of its weights in memory, the weights mapped.
#[derive(Debug)]
pub struct HfFolder {
    path: PathBuf,
    config: DecoderConfig,
    shards: Vec<Shard>,
    /// Which shard holds a tensor.
    index: BTreeMap<String, usize>,
}

impl HfFolder {
    /// Reads and checks `config.json` and the headers of the weights.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Json`]; [`Error::Model`] for what this crate cannot compute, for a
    /// shard that is missing, and for whatever contradicts the format or a file's length.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let config = config::read(&path.join(CONFIG))?;
        let (whole, index) = (path.join(WEIGHTS), path.join(INDEX));
        let (shards, index) = if whole.exists() {
            let shard = Shard::open(whole)?;
            let index = shard.names().map(|name| (name, 0)).collect();
            (vec![shard], index)
        } else if index.exists() {
            open_shards(&index)?
        } else {
            return Err(Error::Model { path, problem: Problem::NoWeights });
        };
        Ok(Self { path, config, shards, index })
    }

    /// Where the folder is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The decoder's shape.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
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
        Ok((shard.path(), shard.shape(name)?))
    }

    /// How a weight's elements are stored, without reading it.
    ///
    /// # Errors
    /// [`Problem::NoTensor`], [`Problem::DType`].
    pub fn weight_dtype(&self, name: &str) -> Result<DType> {
        self.shard(name)?.dtype(name)
    }

    /// What a weight takes in its file.
    ///
    /// # Errors
    /// [`Problem::NoTensor`].
    pub fn weight_len_bytes(&self, name: &str) -> Result<usize> {
        self.shard(name)?.len_bytes(name)
    }

    /// One weight, where it lies in its file.
    ///
    /// # Errors
    /// [`Problem::NoTensor`], [`Problem::DType`].
    pub fn weight(&self, name: &str) -> Result<StoredTensor> {
        self.shard(name)?.read(name)
    }

    fn shard(&self, name: &str) -> Result<&Shard> {
        match self.index.get(name) {
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

//! A fused model as a Hugging Face folder.

use super::{Fused, encode, float_type, in_file, layer_of, merge};
use crate::error::ErrorKind;
use crate::io::gguf::{Encoding, GgufFile, StoredTensor};
use crate::io::hf::{HfFolder, SafetensorsWriter, config_json};
use crate::io::{self, Tokenizer, file};
use crate::nn::LoRAAdapter;
use crate::{DType, Device, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

const CONFIG: &str = "config.json";
const WHOLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// What a folder may hold beside what is copied: weights, in any format.
const WEIGHTS: [&str; 9] =
    ["safetensors", "bin", "pt", "pth", "gguf", "h5", "msgpack", "onnx", "npz"];

/// Merges an adapter into a model and writes a Hugging Face folder; `config.json` comes last, so
/// that a folder that is not whole is none.
///
/// From a folder, every weight keeps its dtype and its shard (one in NF4 becomes of the dtype that it had before), and
/// all other files are copied. From
/// a GGUF file, `config.json`, `tokenizer.json` and `tokenizer_config.json` are made from its
/// metadata, and the weights are f32. `float` (f32, f16 or bf16) is another dtype for all weights.
///
/// # Errors
/// Where the adapter is for another base, a merged weight is not finite, the folder holds a model
/// already or cannot be written, or a GGUF file's metadata say what a `config.json` cannot.
pub fn fuse_to_folder(
    base: &Path,
    adapter: &Path,
    to: &Path,
    float: Option<DType>,
) -> Result<Fused> {
    let float = float.map(float_type).transpose()?;
    refuse_occupied(to)?;
    match crate::models::load::is_folder(base)? {
        true => from_folder(&HfFolder::open(base)?, adapter, to, float),
        false => from_gguf(&GgufFile::open(base)?, adapter, to, float.unwrap_or(DType::F32)),
    }
}

fn refuse_occupied(to: &Path) -> Result<()> {
    let held = [CONFIG, WHOLE, INDEX].into_iter().find(|name| to.join(name).exists());
    match held {
        Some(file) => Err(ErrorKind::FuseOccupied { path: to.to_owned(), file }.into()),
        None => Ok(fs::create_dir_all(to).map_err(io::Error::file(to))?),
    }
}

fn from_folder(base: &HfFolder, adapter: &Path, to: &Path, float: Option<DType>) -> Result<Fused> {
    let adapter = LoRAAdapter::load(adapter, base.config(), &Device::Cpu)?;
    let base = base.weights();
    let mut shards: BTreeMap<PathBuf, Vec<&str>> = BTreeMap::new();
    for name in base.weight_names() {
        shards.entry(base.weight_shape(name)?.0.to_owned()).or_default().push(name);
    }
    let dtype = |name: &str| -> Result<DType> {
        Ok(match float {
            Some(dtype) => dtype,
            None => base.weight_dtype(name)?,
        })
    };
    let (mut weight_map, mut total_bytes) = (Map::new(), 0);
    for (shard, names) in &shards {
        let file = shard.file_name().unwrap_or_default();
        let mut writer = SafetensorsWriter::default();
        for name in names {
            writer.tensor(name, base.weight_shape(name)?.1, dtype(name)?);
            weight_map.insert((*name).to_owned(), file.to_string_lossy().into());
        }
        writer.write(&to.join(file), |name| {
            fused(name, shard, base.weight(name)?, &adapter, Encoding::Dense(dtype(name)?))
        })?;
        total_bytes += writer.len_bytes();
    }
    let tensors = weight_map.len();
    if !base.path().join(WHOLE).exists() {
        let index = json!({ "metadata": { "total_size": total_bytes }, "weight_map": weight_map });
        write_json(&to.join(INDEX), &index)?;
    }
    copy_rest(base.path(), to)?;
    let path = base.path().join(CONFIG);
    let mut config: Map<String, Value> = file::read_json(&path)?;
    // Its weights are floats from now on.
    let was_quantised = config.remove("quantization_config").is_some();
    if let Some(dtype) = float {
        // Newer files say dtype.
        let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        config.insert(key.to_owned(), dtype_name(dtype).into());
    }
    if float.is_some() || was_quantised {
        write_json(&to.join(CONFIG), &config.into())?;
    } else {
        file::write_atomic(&to.join(CONFIG), &file::read(&path)?)?;
    }
    Ok(Fused { fused: adapter.layers().len(), tensors })
}

fn from_gguf(base: &GgufFile, adapter: &Path, to: &Path, dtype: DType) -> Result<Fused> {
    let config = base.decoder_config()?;
    // What may fail comes before what takes long.
    let problem = |problem| io::Error::Model { path: base.path().to_owned(), problem };
    let json = config_json(&config, dtype).map_err(problem)?;
    let tokenizer = Tokenizer::from_gguf(base)?;
    let adapter = LoRAAdapter::load(adapter, &config, &Device::Cpu)?;
    let mut writer = SafetensorsWriter::default();
    for name in base.weight_names() {
        writer.tensor(&name, base.weight_shape(&name)?, dtype);
    }
    writer.write(&to.join(WHOLE), |name| {
        fused(name, base.path(), base.weight(name)?, &adapter, Encoding::Dense(dtype))
    })?;
    tokenizer.save(to)?;
    write_json(&to.join(CONFIG), &json.into())?;
    let tensors = base.weight_names().count();
    Ok(Fused { fused: adapter.layers().len(), tensors })
}

/// One weight as it goes into the folder; untouched bytes where nothing changes them.
fn fused(
    name: &str,
    path: &Path,
    stored: StoredTensor,
    adapter: &LoRAAdapter,
    encoding: Encoding,
) -> Result<StoredTensor> {
    match layer_of(adapter, name) {
        Some(layer) => encode(path, &merge(name, path, &stored, layer)?, encoding),
        None if stored.encoding == encoding => Ok(stored),
        None => {
            let values = stored.dequantize().map_err(in_file(path))?;
            let values = values.flatten_all()?.to_vec1::<f32>()?;
            encode(path, &(values, stored.shape), encoding)
        }
    }
}

/// The tokenizer and whatever else lies beside the weights.
fn copy_rest(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from).map_err(io::Error::file(from))? {
        let path = entry.map_err(io::Error::file(from))?.path();
        let name = path.file_name().unwrap_or_default();
        let is_weights = path.extension().is_some_and(|ext| WEIGHTS.iter().any(|w| ext == *w));
        let is_ours = name == CONFIG || name == INDEX || name.to_string_lossy().starts_with('.');
        if path.is_file() && !is_weights && !is_ours {
            file::write_atomic(&to.join(name), &file::read(&path)?)?;
        }
    }
    Ok(())
}

fn write_json(path: &Path, json: &Value) -> io::Result<()> {
    let text = serde_json::to_string_pretty(json);
    let text = text.expect("metal-candle bug: a JSON value cannot be printed");
    file::write_atomic(path, text.as_bytes())
}

fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        _ => "float32",
    }
}

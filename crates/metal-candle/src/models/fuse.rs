//! An adapter merged into its base: every adapted weight becomes `W + scale · B A`, computed in f32.
//!
//! Weights are read, merged and written one by one, so that a model needs no room in memory.

mod folder;

use crate::error::ErrorKind;
use crate::io::gguf::{Encoding, GgufFile, GgufWriter, StoredTensor, hf_name};
use crate::io::{self, DecoderConfig, HfFolder};
use crate::nn::{LoRAAdapter, LoRALayer};
use crate::{DType, Device, LazyTensor, Result};
use std::path::Path;

pub use folder::fuse_to_folder;

/// How an adapter was merged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fused {
    /// Weights that the adapter changed.
    pub fused: usize,
    /// All tensors that were written.
    pub tensors: usize,
}

/// The shape of the model at this path, without its weights.
///
/// # Errors
/// Where there is no model, or none that this crate knows.
pub fn decoder_config(model: &Path) -> Result<DecoderConfig> {
    match super::load::is_folder(model)? {
        true => Ok(HfFolder::open(model)?.config().clone()),
        false => Ok(GgufFile::open(model)?.decoder_config()?),
    }
}

/// Merges an adapter into a GGUF model and writes another GGUF file in one step.
///
/// All metadata and every tensor that the adapter leaves alone are copied byte for byte. A merged
/// weight is quantised as it was, or written as `float` (f32, f16 or bf16) if one is given.
///
/// # Errors
/// Where the base is no GGUF file, the adapter is for another, a merged weight is not finite, or
/// the file cannot be written.
pub fn fuse_to_gguf(base: &Path, adapter: &Path, to: &Path, float: Option<DType>) -> Result<Fused> {
    if super::load::is_folder(base)? {
        return Err(ErrorKind::FuseFolderToGguf { path: base.to_owned() }.into());
    }
    let file = GgufFile::open(base)?;
    let adapter = LoRAAdapter::load(adapter, &file.decoder_config()?, &Device::Cpu)?;
    let mut writer = GgufWriter::like(&file);
    let mut adapted = Vec::with_capacity(file.tensors().len());
    for tensor in file.tensors() {
        let weight = hf_name(&tensor.name);
        let layer = weight.as_deref().and_then(|weight| layer_of(&adapter, weight));
        let encoding = match (layer, float) {
            (Some(_), Some(dtype)) => Encoding::Dense(float_type(dtype)?),
            _ => tensor.encoding,
        };
        writer.tensor(&tensor.name, &tensor.shape, encoding);
        adapted.push(weight.zip(layer).map(|(weight, layer)| (weight, layer, encoding)));
    }
    writer.write(to, |i| {
        let name = &file.tensors()[i].name;
        let Some((weight, layer, encoding)) = &adapted[i] else {
            return Ok(file.tensor_bytes(name)?);
        };
        let merged = merge(weight, base, &file.weight(weight)?, layer)?;
        let mut stored = encode(base, &merged, *encoding)?;
        file.permute_rows(weight, &mut stored)?;
        Ok::<_, crate::Error>(stored)
    })?;
    Ok(Fused { fused: adapter.layers().len(), tensors: file.tensors().len() })
}

/// The adapter's branch of a weight.
fn layer_of<'a>(adapter: &'a LoRAAdapter, weight: &str) -> Option<&'a LoRALayer> {
    adapter.layer(weight.strip_suffix(".weight")?)
}

fn float_type(dtype: DType) -> Result<DType> {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => Ok(dtype),
        other => Err(ErrorKind::FuseType { got: other }.into()),
    }
}

/// `W + scale · B A` as f32, `[out, in]`.
fn merge(
    weight: &str,
    path: &Path,
    stored: &StoredTensor,
    layer: &LoRALayer,
) -> Result<(Vec<f32>, Vec<usize>)> {
    let dense = stored.dequantize().map_err(in_file(path))?;
    let merged: Vec<f32> = layer.merge(&LazyTensor::from_tensor(&dense)?)?.to_vec()?;
    match merged.iter().find(|x| !x.is_finite()) {
        Some(&got) => Err(ErrorKind::FusedNotFinite { weight: weight.to_owned(), got }.into()),
        None => Ok((merged, stored.shape.clone())),
    }
}

fn encode(
    path: &Path,
    values: &(Vec<f32>, Vec<usize>),
    encoding: Encoding,
) -> Result<StoredTensor> {
    Ok(StoredTensor::encode(&values.0, &values.1, encoding).map_err(in_file(path))?)
}

fn in_file(path: &Path) -> impl Fn(io::gguf::Problem) -> io::Error + '_ {
    |problem| io::Error::Gguf { path: path.to_owned(), problem }
}

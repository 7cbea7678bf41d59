//! Where a run stands, in one file that is written in one step: a kill at any moment leaves the old one or the new
//! one.

use super::StepCount;
use crate::io::data::Cursor;
use crate::io::{self, file};
use crate::{Device, Error, LazyTensor, Result};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::path::Path;

/// What can be wrong with a checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum Problem {
    #[error("not a checkpoint of this program: {cause}")]
    Format { cause: String },
    #[error(
        "the run that wrote it had {name} {expected}, this one has {got}: give the same, or begin \
         anew in another folder"
    )]
    Setting { name: String, expected: String, got: String },
    #[error("it lacks the tensor {name}, or has it in another shape")]
    Tensor { name: String },
}

/// Where a run stands, beside its tensors.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Iterations that are done.
    pub iteration: usize,
    /// What the optimizer has counted.
    pub count: StepCount,
    /// The next batch.
    pub cursor: Cursor,
    /// The lowest validation loss so far.
    pub best: Option<f32>,
    /// Validations since then.
    pub stale: usize,
}

/// The key of the metadata under which everything but the tensors stands.
const KEY: &str = "metal_candle_training";

/// More than any run counts, and few enough that going on cannot overflow.
const MOST: usize = u32::MAX as usize;

#[derive(Serialize, Deserialize)]
struct Metadata {
    progress: Progress,
    /// What must be the same for the run to go on.
    settings: Map<String, Value>,
}

/// Writes a checkpoint.
///
/// # Errors
/// Where the file cannot be written.
pub(super) fn save<'t>(
    path: &Path,
    tensors: impl Iterator<Item = (String, &'t LazyTensor)>,
    progress: &Progress,
    settings: &Map<String, Value>,
) -> Result<()> {
    let mut parts: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, tensor) in tensors {
        let values: Vec<f32> = tensor.to_vec()?;
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        parts.push((name, tensor.dims().to_vec(), bytes));
    }
    let bug = "metal-candle bug: a checkpoint cannot be written as safetensors";
    let views = parts.iter().map(|(name, dims, bytes)| {
        (name, TensorView::new(Dtype::F32, dims.clone(), bytes).expect(bug))
    });
    let metadata = Metadata { progress: progress.clone(), settings: settings.clone() };
    let metadata = serde_json::to_string(&metadata).expect(bug);
    let metadata = HashMap::from([(KEY.to_owned(), metadata)]);
    let bytes = safetensors::serialize(views, Some(metadata)).expect(bug);
    Ok(file::write_atomic(path, &bytes)?)
}

/// Reads a checkpoint of a run with these settings; the tensors in the order of `names`.
///
/// # Errors
/// Where the file cannot be read, is none, or belongs to another run.
pub(super) fn load(
    path: &Path,
    names: impl Iterator<Item = String>,
    settings: &Map<String, Value>,
    device: &Device,
) -> Result<(Vec<LazyTensor>, Progress)> {
    let bytes = file::read(path)?;
    let failed = |problem: Problem| {
        Error::from(io::Error::Checkpoint { path: path.to_owned(), problem: Box::new(problem) })
    };
    let format = |cause: String| failed(Problem::Format { cause });
    let header = SafeTensors::read_metadata(&bytes).map_err(|e| format(e.to_string()))?.1;
    let text = header.metadata().as_ref().and_then(|m| m.get(KEY));
    let text = text.ok_or_else(|| format(format!("no {KEY} among its metadata")))?;
    let metadata: Metadata = serde_json::from_str(text).map_err(|e| format(e.to_string()))?;
    check(&metadata.settings, settings).map_err(failed)?;
    let Progress { iteration, count, cursor, .. } = &metadata.progress;
    let counts = [*iteration, count.updates, count.steps, cursor.batch];
    if counts.into_iter().any(|n| n > MOST) || cursor.epoch > MOST as u64 {
        return Err(format(format!("its progress is {:?}", metadata.progress)));
    }
    let file = SafeTensors::deserialize(&bytes).map_err(|e| format(e.to_string()))?;
    let mut tensors = Vec::new();
    for name in names {
        let view = file.tensor(&name).ok().filter(|view| view.dtype() == Dtype::F32);
        let view = view.ok_or_else(|| failed(Problem::Tensor { name }))?;
        let values = view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
        tensors.push(LazyTensor::from_vec(values.collect::<Vec<_>>(), view.shape(), device)?);
    }
    Ok((tensors, metadata.progress))
}

/// The first setting that differs.
fn check(
    expected: &Map<String, Value>,
    got: &Map<String, Value>,
) -> std::result::Result<(), Problem> {
    for (name, expected) in expected {
        let got = got.get(name).unwrap_or(&Value::Null);
        if got != expected {
            let (name, expected, got) = (name.clone(), expected.to_string(), got.to_string());
            return Err(Problem::Setting { name, expected, got });
        }
    }
    Ok(())
}

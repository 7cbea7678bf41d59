//! What can be wrong with a file. Every error names the file; the `problem` says what and where.

use std::path::{Path, PathBuf};

use metal_candle_graph::BlockFormat;

use super::{chat, data, gguf, hf, peft, tokenizer};

/// A file that cannot be read, written or understood.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum Error {
    /// The operating system refused.
    #[error("{}: {cause}", path.display())]
    File { path: PathBuf, cause: std::io::Error },
    /// A configuration file is not the JSON that was expected; the cause has line and column.
    #[error("{}: {cause}", path.display())]
    Json { path: PathBuf, cause: serde_json::Error },
    /// A model file in the GGUF format.
    #[error("{}: {problem}", path.display())]
    Gguf { path: PathBuf, problem: gguf::Problem },
    /// A model in a Hugging Face folder.
    #[error("{}: {problem}", path.display())]
    Model { path: PathBuf, problem: hf::Problem },
    /// A weight that does not fit the model's configuration.
    #[error("{}: tensor {tensor:?} has shape {got:?}: expected {expected:?}", path.display())]
    WeightShape { path: PathBuf, tensor: String, expected: Vec<usize>, got: Vec<usize> },
    /// A weight with a number that the dtype asked for does not hold.
    #[error(
        "{}: tensor {tensor:?} has the number {value:e}, which f16 does not hold: load it as bf16",
        path.display()
    )]
    WeightRange { path: PathBuf, tensor: String, value: f32 },
    /// A weight that cannot be quantised as it was asked for.
    #[error("{}: tensor {tensor:?} cannot be quantised to {format:?}: {problem}", path.display())]
    WeightQuantise { path: PathBuf, tensor: String, format: BlockFormat, problem: gguf::Problem },
    /// Nothing there to load.
    #[error(
        "{}: no such file or folder: expected a GGUF file, or a folder with config.json, \
         tokenizer.json and model.safetensors",
        path.display()
    )]
    NoModel { path: PathBuf },
    /// No encoder there to load.
    #[error(
        "{}: expected the folder of an encoder, with config.json, tokenizer.json and model.safetensors",
        path.display()
    )]
    NoEncoder { path: PathBuf },
    /// A tokenizer, or a text that it cannot encode.
    #[error("{}: tokenizer: {problem}", path.display())]
    Tokenizer { path: PathBuf, problem: tokenizer::Problem },
    /// A chat template, or messages that it does not accept.
    #[error("chat template: {0}")]
    Chat(#[from] chat::Problem),
    /// A line of training data. Columns count bytes from 1, as `serde_json` counts them.
    #[error("{}:{line}:{column}: {problem}", path.display())]
    Row { path: PathBuf, line: usize, column: usize, problem: data::RowProblem },
    /// A data set as a whole.
    #[error("{}: {problem}", path.display())]
    Data { path: PathBuf, problem: data::Problem },
    /// Where a training run stood.
    #[error("{}: {problem}", path.display())]
    Checkpoint { path: PathBuf, problem: Box<crate::train::checkpoint::Problem> },
    /// A LoRA configuration or adapter.
    #[error("{}: {problem}", path.display())]
    Adapter { path: PathBuf, problem: peft::Problem },
}

/// [`std::result::Result`] with this module's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Wraps what the operating system said about `path`.
    pub(crate) fn file(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |cause| Error::File { path: path.to_owned(), cause }
    }
}

//! Training data: JSONL rows, token sequences with a mask of what is trained, padded batches.
//!
//! Formats and folder layout are mlx-lm's; unlike there, a row is recognised by itself rather than
//! by the first of its file, every assistant turn is trained under `mask_prompt` rather than the
//! last one, and no row is dropped at the end of an epoch.

mod batch;
mod tokenize;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

pub use self::batch::{Batch, BatchOptions, Batcher, Cursor, Order};
pub use self::tokenize::{Example, Examples, TokenizeOptions, tokenize};
use super::{Error, Message, Result};

/// What can be wrong with one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum RowProblem {
    #[error("not valid JSON for a row: {cause}")]
    Json { cause: String },
    #[error("not UTF-8")]
    Utf8,
    #[error(
        "the row has the keys {keys:?}: expected \"messages\", \"prompt\" with \"completion\", \
         or \"text\""
    )]
    Format { keys: Vec<String> },
    #[error("\"messages\" is empty")]
    NoMessages,
    #[error("the model has no chat template: use rows with \"text\"")]
    NoTemplate,
    #[error("{cause}")]
    Template { cause: String },
    #[error(
        "the chat template writes assistant turn {turn} differently once more turns follow, so \
         its tokens cannot be told apart: train without mask_prompt, or one turn a row"
    )]
    Turn { turn: usize },
    #[error("{cause}")]
    Tokenizer { cause: String },
}

/// What can be wrong with a data set as a whole.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum Problem {
    #[error("no rows")]
    Empty,
    #[error("the folder has no train.jsonl")]
    NoTrainFile,
    #[error("none of the {rows} rows has a token to train on")]
    NothingTrained { rows: usize },
    #[error("{what} is 0: expected at least 1")]
    Zero { what: &'static str },
    #[error("token mask of {trained} entries for {ids} ids")]
    Mask { ids: usize, trained: usize },
}

/// What a row says.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// A chat, with the tools that the assistant may call.
    Chat {
        /// The turns.
        messages: Vec<Message>,
        /// What may be called, as JSON Schema.
        tools: Option<Vec<Value>>,
    },
    /// One question and its answer.
    Completion {
        /// The question.
        prompt: String,
        /// The answer.
        completion: String,
    },
    /// Plain text.
    Text(String),
}

/// A row and where it stood.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Line in the file, from 1.
    pub line: usize,
    /// What it says.
    pub content: Content,
}

/// The rows of one file.
#[derive(Clone, Debug, PartialEq)]
pub struct Rows {
    /// The file, for messages about its rows.
    pub path: PathBuf,
    /// In the order of the file; blank lines left out.
    pub rows: Vec<Row>,
}

/// A data set, split as its folder says.
#[derive(Clone, Debug, PartialEq)]
pub struct Dataset {
    /// `train.jsonl`, or the single file.
    pub train: Rows,
    /// `valid.jsonl`.
    pub valid: Option<Rows>,
    /// `test.jsonl`.
    pub test: Option<Rows>,
}

impl Dataset {
    /// A folder with `train.jsonl` and perhaps `valid.jsonl` and `test.jsonl`, or a single file,
    /// which is then all for training.
    ///
    /// # Errors
    /// As [`Rows::read`]; [`Problem::NoTrainFile`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if !path.is_dir() {
            return Ok(Self { train: Rows::read(path)?, valid: None, test: None });
        }
        let split = |name: &str| {
            let file = path.join(name);
            file.exists().then(|| Rows::read(&file)).transpose()
        };
        let train = split("train.jsonl")?
            .ok_or_else(|| Error::Data { path: path.to_owned(), problem: Problem::NoTrainFile })?;
        Ok(Self { train, valid: split("valid.jsonl")?, test: split("test.jsonl")? })
    }
}

impl Rows {
    /// Every line of a JSONL file.
    ///
    /// # Errors
    /// [`Error::File`]; [`Error::Row`] at the first line that is no row; [`Problem::Empty`].
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut reader = BufReader::new(File::open(path).map_err(Error::file(path))?);
        let mut rows = Vec::new();
        let mut bytes = Vec::new();
        for line in 1.. {
            bytes.clear();
            if reader.read_until(b'\n', &mut bytes).map_err(Error::file(path))? == 0 {
                break;
            }
            let at =
                |(column, problem)| Error::Row { path: path.to_owned(), line, column, problem };
            if let Some(content) = Content::parse(&bytes).map_err(at)? {
                rows.push(Row { line, content });
            }
        }
        if rows.is_empty() {
            return Err(Error::Data { path: path.to_owned(), problem: Problem::Empty });
        }
        Ok(Self { path: path.to_owned(), rows })
    }
}

/// Every key that may make a row; keys beside these are left alone.
#[derive(Deserialize)]
struct Fields {
    messages: Option<Vec<Message>>,
    tools: Option<Vec<Value>>,
    prompt: Option<String>,
    completion: Option<String>,
    text: Option<String>,
}

impl Content {
    /// One line, or `None` for a blank one. Errors come with their column.
    fn parse(bytes: &[u8]) -> std::result::Result<Option<Self>, (usize, RowProblem)> {
        let text = str::from_utf8(bytes).map_err(|e| (e.valid_up_to() + 1, RowProblem::Utf8))?;
        let text = text.trim_end_matches(['\n', '\r']);
        // Some editors begin a file with a byte order mark.
        let (skipped, text) = match text.strip_prefix('\u{feff}') {
            Some(rest) => (text.len() - rest.len(), rest),
            None => (0, text),
        };
        if text.trim().is_empty() {
            return Ok(None);
        }
        // Serde would take an array for the fields in their order.
        if !text.trim_start().starts_with('{') {
            let cause = "expected an object".to_owned();
            return Err((skipped + 1, RowProblem::Json { cause }));
        }
        let fields: Fields = serde_json::from_str(text).map_err(|cause| {
            let message = cause.to_string();
            // The position is the error's own; serde_json's counts lines within the row.
            let cause_only = message.rsplit_once(" at line ").map_or(&*message, |(what, _)| what);
            (skipped + cause.column().max(1), RowProblem::Json { cause: cause_only.to_owned() })
        })?;
        match fields {
            Fields { messages: Some(messages), .. } if messages.is_empty() => {
                Err((1, RowProblem::NoMessages))
            }
            Fields { messages: Some(messages), tools, .. } => {
                Ok(Some(Content::Chat { messages, tools }))
            }
            Fields { prompt: Some(prompt), completion: Some(completion), .. } => {
                Ok(Some(Content::Completion { prompt, completion }))
            }
            Fields { text: Some(text), .. } => Ok(Some(Content::Text(text))),
            _ => {
                let row: serde_json::Map<String, Value> =
                    serde_json::from_str(text).unwrap_or_default();
                Err((1, RowProblem::Format { keys: row.keys().cloned().collect() }))
            }
        }
    }
}

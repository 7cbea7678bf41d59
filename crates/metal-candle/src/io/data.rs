//! Training data: rows of JSON lines or CSV, token sequences with a mask of what is trained, padded
//! batches.
//!
//! Formats and folder layout are mlx-lm's; unlike there, a row is recognised by itself rather than
//! by the first of its file, every assistant turn is trained under `mask_prompt` rather than the
//! last one, and no row is dropped at the end of an epoch. Columns may have other names
//! ([`Columns`]).
//!
//! Parquet is not read; `duckdb -c "COPY (FROM 'train.parquet') TO 'train.jsonl'"` converts it.

mod batch;
mod columns;
mod csv;
mod json;
mod tokenize;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde_json::Value;

pub use self::batch::{Batch, BatchOptions, Batcher, Cursor, Documents, Occupancy, Order};
pub use self::columns::Columns;
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
    #[error("the row has the columns {keys:?}: expected {expected}")]
    Format { keys: Vec<String>, expected: String },
    #[error("the quote that opens here is never closed")]
    CsvQuote,
    #[error(
        "expected a comma or the end of the line after the closing quote: a quote within quotes \
         is written twice"
    )]
    CsvAfterQuote,
    #[error("the row has {got} values: the header has {expected}")]
    CsvColumns { expected: usize, got: usize },
    #[error("the header has the column {name:?} twice")]
    CsvDuplicate { name: String },
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
    #[error(
        "no such file or folder: expected a folder with train.jsonl (or .csv), or one such file"
    )]
    Missing,
    #[error("no rows")]
    Empty,
    #[error("the folder has no {split}.jsonl or {split}.csv")]
    NoFile { split: &'static str },
    #[error("the folder has both {split}.jsonl and {split}.csv: keep the one that is meant")]
    TwoFiles { split: &'static str },
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
    /// Line in the file where it begins, from 1.
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
    /// `train.jsonl` or `train.csv`, or the single file.
    pub train: Rows,
    /// `valid.jsonl` or `valid.csv`.
    pub valid: Option<Rows>,
    /// `test.jsonl` or `test.csv`.
    pub test: Option<Rows>,
}

impl Dataset {
    /// A folder with `train.jsonl` and perhaps `valid.jsonl` and `test.jsonl` (or `.csv`), or a
    /// single file, which is then all for training.
    ///
    /// # Errors
    /// As [`Rows::read`]; [`Problem::Missing`], [`Problem::NoFile`], [`Problem::TwoFiles`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Dataset::open_with(path, &Columns::default())
    }

    /// [`Dataset::open`] of rows whose columns may have other names.
    ///
    /// # Errors
    /// As [`Dataset::open`].
    pub fn open_with(path: impl AsRef<Path>, columns: &Columns) -> Result<Self> {
        let path = path.as_ref();
        if !path.is_dir() {
            return Ok(Self { train: Rows::read_with(path, columns)?, valid: None, test: None });
        }
        let split = |name| {
            let file = split_file(path, name)?;
            file.map(|file| Rows::read_with(file, columns)).transpose()
        };
        let no_file =
            || Error::Data { path: path.to_owned(), problem: Problem::NoFile { split: "train" } };
        let train = split("train")?.ok_or_else(no_file)?;
        Ok(Self { train, valid: split("valid")?, test: split("test")? })
    }
}

/// The file of a folder that holds this split: `split.jsonl` or `split.csv`.
///
/// # Errors
/// [`Problem::TwoFiles`].
pub fn split_file(folder: &Path, split: &'static str) -> Result<Option<PathBuf>> {
    let files = ["jsonl", "csv"].map(|extension| folder.join(split).with_extension(extension));
    let mut files = files.into_iter().filter(|file| file.exists());
    match (files.next(), files.next()) {
        (Some(_), Some(_)) => {
            Err(Error::Data { path: folder.to_owned(), problem: Problem::TwoFiles { split } })
        }
        (file, _) => Ok(file),
    }
}

impl Rows {
    /// Every row of a file: CSV with a header where it is called `.csv`, else JSON lines.
    ///
    /// # Errors
    /// [`Problem::Missing`]; [`Error::File`]; [`Error::Row`] at the first line that is no row; [`Problem::Empty`].
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        Rows::read_with(path, &Columns::default())
    }

    /// [`Rows::read`] of rows whose columns may have other names.
    ///
    /// # Errors
    /// As [`Rows::read`].
    pub fn read_with(path: impl AsRef<Path>, columns: &Columns) -> Result<Self> {
        let path = path.as_ref();
        if !path.exists() {
            return Err(Error::Data { path: path.to_owned(), problem: Problem::Missing });
        }
        let is_csv = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("csv"));
        let rows = if is_csv { csv_rows(path, columns)? } else { json_rows(path, columns)? };
        if rows.is_empty() {
            return Err(Error::Data { path: path.to_owned(), problem: Problem::Empty });
        }
        Ok(Self { path: path.to_owned(), rows })
    }

    /// [`Rows::read_with`] of a file, or of the file of a folder that holds this split.
    ///
    /// # Errors
    /// As [`Rows::read`]; [`Problem::NoFile`], [`Problem::TwoFiles`].
    pub fn read_split(
        path: impl AsRef<Path>,
        split: &'static str,
        columns: &Columns,
    ) -> Result<Self> {
        let path = path.as_ref();
        if !path.is_dir() {
            return Rows::read_with(path, columns);
        }
        let file = split_file(path, split)?;
        let problem = Problem::NoFile { split };
        let file = file.ok_or_else(|| Error::Data { path: path.to_owned(), problem })?;
        Rows::read_with(file, columns)
    }
}

fn json_rows(path: &Path, columns: &Columns) -> Result<Vec<Row>> {
    let wanted = columns.wanted();
    let mut reader = BufReader::new(File::open(path).map_err(Error::file(path))?);
    let mut rows = Vec::new();
    let mut bytes = Vec::new();
    for line in 1.. {
        bytes.clear();
        if reader.read_until(b'\n', &mut bytes).map_err(Error::file(path))? == 0 {
            break;
        }
        let at = |(column, problem)| Error::Row { path: path.to_owned(), line, column, problem };
        if let Some(content) = json::parse(&bytes, &wanted).map_err(at)? {
            rows.push(Row { line, content });
        }
    }
    Ok(rows)
}

fn csv_rows(path: &Path, columns: &Columns) -> Result<Vec<Row>> {
    let at = |(line, column, problem)| Error::Row { path: path.to_owned(), line, column, problem };
    // A value is a string there: no chat.
    let wanted = columns::Wanted { chat: None, ..columns.wanted() };
    csv::parse(&super::file::read(path)?, &wanted).map_err(at)
}

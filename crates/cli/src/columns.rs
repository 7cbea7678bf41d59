//! What the commands that read rows share: the data, and what its columns are called.

use anyhow::{Context, Result};
use metal_candle::io::data::Columns;
use std::path::{Path, PathBuf};

/// The rows to read.
#[derive(clap::Args)]
pub(crate) struct DataArgs {
    /// A folder with train, valid and test (.jsonl or .csv), or one such file
    // Optional in `plan` alone, which needs no rows.
    #[arg(long, required = true)]
    pub(crate) data: Option<PathBuf>,
    /// The column that holds the chat, instead of messages
    #[arg(long, value_name = "COLUMN")]
    chat_field: Option<String>,
    /// The column that holds the question, instead of prompt
    #[arg(long, value_name = "COLUMN")]
    prompt_field: Option<String>,
    /// The column that holds the answer, instead of completion
    #[arg(long, value_name = "COLUMN")]
    completion_field: Option<String>,
    /// The column that holds the text, instead of text; several are joined by line breaks
    #[arg(long, value_name = "COLUMN", num_args = 1..)]
    text_field: Vec<String>,
}

impl DataArgs {
    pub(crate) fn path(&self) -> Result<&Path> {
        self.data.as_deref().context("--data is missing")
    }

    pub(crate) fn columns(&self) -> Columns {
        Columns {
            chat: self.chat_field.clone(),
            prompt: self.prompt_field.clone(),
            completion: self.completion_field.clone(),
            text: self.text_field.clone(),
        }
    }
}

//! `metal-candle data`

use crate::columns::DataArgs;
use crate::model::ModelSource;
use crate::ui::stdout_has_color;
use anyhow::{Context, Result};
use metal_candle::io::data::{Example, Problem, Row, Rows, TokenizeOptions, split_file, tokenize};
use metal_candle::io::{Error, GgufFile, Tokenizer};
use std::io::Write;
use std::path::{Path, PathBuf};

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Show rows as a model reads them, and which of their tokens are trained
    Inspect(Inspect),
}

#[derive(clap::Args)]
pub(crate) struct Inspect {
    #[command(flatten)]
    model: ModelSource,
    #[command(flatten)]
    data: DataArgs,
    /// Tokens of a row; longer ones are cut and counted
    #[arg(long, default_value_t = 2048)]
    max_seq_length: usize,
    /// Train the completions only, not the prompts
    #[arg(long)]
    mask_prompt: bool,
    /// Show so many rows of each file
    #[arg(long, default_value_t = 3)]
    rows: usize,
}

pub(crate) fn run(command: &Command) -> Result<()> {
    match command {
        Command::Inspect(args) => inspect(args),
    }
}

fn inspect(args: &Inspect) -> Result<()> {
    let files = files(args.data.path()?)?;
    let tokenizer = tokenizer(&args.model.path()?)?;
    let marks = Marks::choose();
    let mut out = std::io::stdout();
    for file in files {
        let rows = Rows::read_with(&file, &args.data.columns())?;
        for row in rows.rows.iter().take(args.rows) {
            out.write_all(show(&rows, row, &tokenizer, args, &marks)?.as_bytes())?;
        }
        writeln!(out, "{}", totals(&rows, &tokenizer, args)?)?;
    }
    Ok(())
}

/// The files of a data set.
fn files(data: &Path) -> Result<Vec<PathBuf>> {
    if !data.is_dir() {
        return Ok(vec![data.to_owned()]);
    }
    let mut files = Vec::new();
    for split in ["train", "valid", "test"] {
        files.extend(split_file(data, split)?);
    }
    let found = (!files.is_empty()).then_some(files);
    found.with_context(|| {
        format!("{}: expected train, valid or test in it, as .jsonl or .csv", data.display())
    })
}

fn tokenizer(model: &Path) -> Result<Tokenizer> {
    let loaded = match model.is_dir() {
        true => Tokenizer::from_file(model.join("tokenizer.json")),
        false => GgufFile::open(model).and_then(|file| Tokenizer::from_gguf(&file)),
    };
    loaded.with_context(|| format!("cannot load the tokenizer of {}", model.display()))
}

/// How trained text is told from other text.
struct Marks {
    trained: [&'static str; 2],
    other: [&'static str; 2],
}

impl Marks {
    /// Colours or brackets.
    fn choose() -> Marks {
        match stdout_has_color() {
            true => Marks { trained: ["\x1b[32m", "\x1b[0m"], other: ["\x1b[2m", "\x1b[0m"] },
            false => Marks { trained: ["[", "]"], other: ["", ""] },
        }
    }
}

/// One row as text.
fn show(
    rows: &Rows,
    row: &Row,
    tokenizer: &Tokenizer,
    args: &Inspect,
    marks: &Marks,
) -> Result<String> {
    let one = Rows { path: rows.path.clone(), rows: vec![row.clone()] };
    let at = format!("{}:{}", rows.path.display(), row.line);
    // Cut by us, so that what was cut can be told.
    let options = TokenizeOptions { max_seq_length: usize::MAX, mask_prompt: args.mask_prompt };
    let all = match tokenize(&one, tokenizer, options) {
        Err(Error::Data { problem: Problem::NothingTrained { .. }, .. }) => {
            return Ok(format!("--- {at}: no token is trained\n\n"));
        }
        all => all?,
    };
    let example = &all.examples[0];
    let len = example.ids.len();
    let kept = len.min(args.max_seq_length);
    let mut text = format!("--- {at}: {len} tokens, {} trained", example.trained_tokens());
    if kept < len {
        text += &format!("; the last {} are cut off", len - kept);
    }
    Ok(text + "\n" + &marked(example, kept, tokenizer, marks)? + "\n\n")
}

/// The first `len` tokens, marked by whether predicting them is trained.
fn marked(example: &Example, len: usize, tokenizer: &Tokenizer, marks: &Marks) -> Result<String> {
    // The first token is never predicted.
    let trained = |i: usize| i > 0 && example.trained[i];
    let mut text = String::new();
    let mut start = 0;
    let mut before = String::new();
    while start < len {
        let is_trained = trained(start);
        let end = (start..len).find(|i| trained(*i) != is_trained).unwrap_or(len);
        // Decoders look at a token's neighbours: what a run adds to all before it is its text.
        let upto = tokenizer.decode(&example.ids[..end], false)?;
        let [open, close] = if is_trained { marks.trained } else { marks.other };
        text += open;
        text += &printable(upto.get(before.len()..).unwrap_or_default());
        text += close;
        (start, before) = (end, upto);
    }
    Ok(text)
}

/// Data must not steer the terminal.
fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\t' => out.push(c),
            c if c.is_control() => out.extend(c.escape_default()),
            c => out.push(c),
        }
    }
    out
}

fn totals(rows: &Rows, tokenizer: &Tokenizer, args: &Inspect) -> Result<String> {
    let (max_seq_length, mask_prompt) = (args.max_seq_length, args.mask_prompt);
    let all = tokenize(rows, tokenizer, TokenizeOptions { max_seq_length, mask_prompt })?;
    let mut lengths: Vec<usize> = all.examples.iter().map(|e| e.ids.len()).collect();
    lengths.sort_unstable();
    let (median, longest) = (lengths[lengths.len() / 2], lengths[lengths.len() - 1]);
    Ok(format!(
        "{}: {} rows, {} tokens, {} trained ({:.0} %); median {median}, longest {longest}; {} \
         rows cut to {max_seq_length} tokens, {} left out without a trained token",
        rows.path.display(),
        rows.rows.len(),
        all.tokens,
        all.trained_tokens,
        100.0 * all.trained_tokens as f64 / all.tokens as f64,
        all.truncated,
        all.untrained,
    ))
}

#[cfg(test)]
mod tests {
    use super::printable;

    #[test]
    fn data_cannot_steer_the_terminal() {
        assert_eq!(printable("a\n\tb é"), "a\n\tb é");
        assert_eq!(printable("\x1b[2J\r"), "\\u{1b}[2J\\r");
    }
}

//! `metal-candle embed`

use crate::model::ModelArgs;
use crate::ui::{note, progress};
use anyhow::{Context, Result, bail};
use metal_candle::embed::{EmbeddingModel, Embeddings};
use metal_candle::io::file::write_atomic_with;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// The texts; without them, and without --file, the lines of standard input
    #[arg(value_name = "TEXT")]
    texts: Vec<String>,
    /// The lines of a file; - is standard input
    #[arg(long, conflicts_with = "texts")]
    file: Option<PathBuf>,
    /// Write the vectors to this file, as one tensor `embeddings` if it ends in .safetensors, as JSON lines if it ends
    /// in .jsonl [default: JSON lines on standard output]
    #[arg(short, long)]
    output: Option<PathBuf>,
    /// Texts at a time
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    batch_size: u32,
}

/// What is written, and where.
enum Target<'a> {
    Lines,
    LinesOf(&'a Path),
    Tensor(&'a Path),
}

pub(crate) fn run(args: &Args) -> Result<()> {
    // Before the model: a mistake in the flags or the file should not take its time.
    let target = target(args.output.as_deref())?;
    let texts = texts(args)?;
    let model = load(args)?;
    let bar = progress(texts.len() as u64, "{bar:30} {pos}/{len} eta {eta}");
    let started = Instant::now();
    let vectors = model.encode_with(&texts, |texts| bar.inc(texts as u64))?;
    bar.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    write(&target, &texts, &vectors)?;
    note!(
        "{} texts, {} numbers each, in {seconds:.2} s, {:.1} texts/s; {} cut to {} tokens",
        vectors.len(),
        vectors.dimension(),
        vectors.len() as f64 / seconds,
        vectors.cut(),
        model.config().max_seq_length
    );
    Ok(())
}

fn load(args: &Args) -> Result<EmbeddingModel> {
    let device = args.model.device().present()?;
    let name = device.describe()?;
    let path = args.model.source().path()?;
    let model = EmbeddingModel::load(&path, args.model.base(), &device)
        .with_context(|| format!("cannot load {}", args.model.source().given()))?;
    note!("device: {name}");
    let model = model.with_activations(args.model.activations(&device));
    Ok(model.with_batch_size(args.batch_size as usize))
}

fn target(output: Option<&Path>) -> Result<Target<'_>> {
    let Some(path) = output else { return Ok(Target::Lines) };
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("safetensors") => Ok(Target::Tensor(path)),
        Some("jsonl") => Ok(Target::LinesOf(path)),
        _ => bail!(
            "--output {}: expected a name that ends in .safetensors or .jsonl",
            path.display()
        ),
    }
}

fn texts(args: &Args) -> Result<Vec<String>> {
    let lines = match args.file.as_deref() {
        None if !args.texts.is_empty() => return Ok(args.texts.clone()),
        Some(path) if path != Path::new("-") => {
            let bytes = metal_candle::io::file::read(path)?;
            lines(&bytes[..]).with_context(|| format!("cannot read {}", path.display()))?
        }
        _ => lines(std::io::stdin().lock()).context("cannot read standard input")?,
    };
    if lines.is_empty() {
        bail!("no texts: expected some after the flags, in --file, or on standard input");
    }
    Ok(lines)
}

/// Every line is a text, an empty one too, so that the vectors are as many as the lines.
fn lines(from: impl BufRead) -> std::io::Result<Vec<String>> {
    from.lines().collect()
}

fn write(target: &Target<'_>, texts: &[String], vectors: &Embeddings) -> Result<()> {
    match target {
        Target::Lines => write_lines(&mut std::io::stdout().lock(), texts, vectors)?,
        Target::LinesOf(path) => write_atomic_with(path, |to| {
            let failed = |cause| metal_candle::io::Error::File { path: path.to_path_buf(), cause };
            write_lines(to, texts, vectors).map_err(failed)
        })?,
        Target::Tensor(path) => vectors.save(path)?,
    }
    Ok(())
}

fn write_lines(to: &mut dyn Write, texts: &[String], vectors: &Embeddings) -> std::io::Result<()> {
    for (text, vector) in texts.iter().zip(vectors.rows()) {
        // Not as a `Value`, whose numbers are f64: twice the digits.
        let (text, vector) = (serde_json::to_string(text)?, serde_json::to_string(vector)?);
        writeln!(to, r#"{{"text":{text},"embedding":{vector}}}"#)?;
    }
    to.flush()
}

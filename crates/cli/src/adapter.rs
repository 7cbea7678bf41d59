//! `metal-candle adapter`

use crate::model::locate;
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use metal_candle::io::{AdapterFormat, adapter};
use metal_candle::models::fuse::decoder_config;
use std::path::PathBuf;

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Write an adapter in another tool's format
    Convert(ConvertArgs),
}

#[derive(clap::Args)]
pub(crate) struct ConvertArgs {
    /// A folder of PEFT's or mlx-lm's, or a GGUF file: which one is told by its files
    #[arg(long)]
    adapter_path: PathBuf,
    /// The format to write
    #[arg(long, value_enum)]
    to: Format,
    /// A folder, or a file for gguf
    #[arg(long)]
    save_path: PathBuf,
    /// The base: needed from and to gguf, and to make sure that the adapter fits; a GGUF file, a
    /// folder, or a name on the hub
    #[arg(long)]
    model: Option<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// Hugging Face's PEFT
    Peft,
    /// Apple's mlx-lm
    Mlx,
    /// llama.cpp's --lora
    Gguf,
}

pub(crate) fn run(command: &Command) -> Result<()> {
    match command {
        Command::Convert(args) => convert(args),
    }
}

fn convert(args: &ConvertArgs) -> Result<()> {
    let ConvertArgs { adapter_path: from, save_path: to, model, .. } = args;
    let base = match model {
        Some(model) => Some(decoder_config(&locate(model, None, "main")?)?),
        None => None,
    };
    let from_format = AdapterFormat::detect(from)?;
    let to_format = match args.to {
        Format::Peft => AdapterFormat::Peft,
        Format::Mlx => AdapterFormat::Mlx,
        Format::Gguf => AdapterFormat::Gguf,
    };
    if to_format == AdapterFormat::Gguf && to.is_dir() {
        bail!("{} is a folder: expected the path of a file to write", to.display());
    }
    let adapter = adapter::load(from, base.as_ref())
        .with_context(|| format!("cannot read the adapter {}", from.display()))?;
    adapter::save(&adapter, to, to_format, base.as_ref())
        .with_context(|| format!("cannot write an adapter in {to_format}'s format"))?;
    let modules = adapter.modules.len();
    println!("{}: {modules} modules, from {from_format}'s format to {to_format}'s", to.display());
    Ok(())
}

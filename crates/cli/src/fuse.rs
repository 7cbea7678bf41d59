//! `metal-candle fuse`

use crate::model::ModelSource;
use anyhow::{Context, Result};
use clap::ValueEnum;
use metal_candle::DType;
use metal_candle::models::fuse::{fuse_to_folder, fuse_to_gguf};
use std::path::PathBuf;

/// Names follow mlx-lm's.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelSource,
    /// The adapter to merge: a folder of PEFT's or mlx-lm's, or a GGUF file
    #[arg(long, default_value = "adapters")]
    adapter_path: PathBuf,
    /// The folder to write
    #[arg(long, default_value = "fused_model")]
    save_path: PathBuf,
    /// Write merged weights as floats, f32 unless f16 or bf16 is given; in a folder, all weights
    #[arg(
        long,
        value_enum,
        value_name = "TYPE",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "f32"
    )]
    dequantize: Option<Float>,
    /// Write a GGUF file instead of a Hugging Face folder (from a GGUF base); what is not merged
    /// stays as it is, byte for byte
    #[arg(long)]
    export_gguf: bool,
    /// The name of the GGUF file within --save-path
    #[arg(long, default_value = "ggml-model.gguf", requires = "export_gguf")]
    gguf_path: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum Float {
    F32,
    F16,
    Bf16,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let float = args.dequantize.map(|float| match float {
        Float::F32 => DType::F32,
        Float::F16 => DType::F16,
        Float::Bf16 => DType::BF16,
    });
    let (adapter, folder) = (&args.adapter_path, &args.save_path);
    let base = &args.model.path()?;
    let cannot = || format!("cannot fuse {} into {}", adapter.display(), args.model.given());
    let (to, fused) = if args.export_gguf {
        let to = folder.join(&args.gguf_path);
        let parent = to.parent().unwrap_or(folder);
        std::fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
        let fused = fuse_to_gguf(base, adapter, &to, float).with_context(cannot)?;
        (to, fused)
    } else {
        let fused = fuse_to_folder(base, adapter, folder, float).with_context(cannot)?;
        (folder.clone(), fused)
    };
    println!("{}: {} of {} tensors merged", to.display(), fused.fused, fused.tensors);
    Ok(())
}

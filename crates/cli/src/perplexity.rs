//! `metal-candle perplexity`

use crate::columns::DataArgs;
use crate::model::ModelArgs;
use crate::ui::progress;
use anyhow::{Result, bail};
use metal_candle::io::data::{
    BatchOptions, Batcher, Examples, Order, Rows, TokenizeOptions, tokenize,
};
use metal_candle::nn::ApplyAdapter;
use metal_candle::{LazyTensor, compile};
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

/// Names follow mlx-lm where it has them.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// A trained adapter: a folder of PEFT's or mlx-lm's, or a GGUF file
    #[arg(long)]
    adapter_path: Option<PathBuf>,
    #[command(flatten)]
    data: DataArgs,
    /// Tokens of a row; longer ones are cut and counted
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(2..))]
    max_seq_length: u32,
    /// Rows from the file's beginning; 0 is all
    #[arg(long, default_value_t = 256)]
    num_samples: usize,
    /// Rows at a time
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    batch_size: u32,
    /// Judge the completions only, not the prompts
    #[arg(long)]
    mask_prompt: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut rows = Rows::read_split(args.data.path()?, "test", &args.data.columns())?;
    if args.num_samples > 0 {
        rows.rows.truncate(args.num_samples);
    }
    let loaded = args.model.load_with(args.adapter_path.as_deref())?;
    let max_seq_length = args.max_seq_length as usize;
    let options = TokenizeOptions { max_seq_length, mask_prompt: args.mask_prompt };
    let all = tokenize(&rows, &loaded.tokenizer, options)?;
    let context = loaded.decoder.config.max_position_embeddings;
    if max_seq_length > context {
        bail!("--max-seq-length: the model's context is {context} tokens, got {max_seq_length}");
    }
    let options =
        BatchOptions { batch_size: args.batch_size as usize, max_seq_length, order: Order::File };
    let mut batcher = Batcher::new(all.examples.clone(), options)
        .map_err(|problem| anyhow::anyhow!("{}: {problem}", rows.path.display()))?;

    let decoder = loaded.decoder;
    let device = *decoder.device();
    let loss = compile(move |args: &[LazyTensor]| {
        Ok(vec![decoder.loss(&args[0], &args[1], decoder.adapter())?])
    });
    let bar = progress(batcher.batches_per_epoch() as u64, "{bar:30} {pos}/{len} eta {eta}");
    let started = Instant::now();
    let (mut sum, mut tokens) = (0.0, 0);
    for _ in 0..batcher.batches_per_epoch() {
        let batch = batcher.next_batch();
        let dims = [batch.batch, batch.seq];
        let ids = LazyTensor::from_vec(batch.ids, &dims, &device)?;
        let labels = LazyTensor::from_vec(batch.labels, &dims, &device)?;
        if batch.trained > 0 {
            // A mean over the batch: [] -> a sum over its tokens.
            let mean = loss.call(vec![ids, labels])?[0].to_vec::<f32>()?[0];
            sum += f64::from(mean) * batch.trained as f64;
            tokens += batch.trained;
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    print(args, &all, sum / tokens as f64, tokens, started.elapsed().as_secs_f64())
}

fn print(args: &Args, all: &Examples, loss: f64, tokens: usize, seconds: f64) -> Result<()> {
    let mut out = std::io::stdout();
    let (perplexity, rate, rows) = (loss.exp(), tokens as f64 / seconds, all.examples.len());
    if args.json {
        let result = serde_json::json!({
            "perplexity": perplexity, "loss": loss, "tokens": tokens, "rows": rows,
            "truncated": all.truncated, "tokens_per_second": rate,
        });
        writeln!(out, "{result}")?;
        return Ok(());
    }
    writeln!(out, "perplexity {perplexity:.3} (loss {loss:.4} per token)")?;
    writeln!(
        out,
        "{tokens} tokens of {rows} rows in {seconds:.1} s, {rate:.0} tok/s; {} rows cut to {} \
         tokens",
        all.truncated, args.max_seq_length
    )?;
    Ok(())
}

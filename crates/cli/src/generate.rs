//! `metal-candle generate`

use crate::model::ModelArgs;
use anyhow::{Context, Result, bail};
use metal_candle::generate::{Finish, Generated, Generator, GeneratorConfig, SamplingStrategy};
use metal_candle::io::chat::{ChatTemplate, Message};
use std::io::{BufRead, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;

/// Names follow mlx-lm where it has them.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// A trained adapter (PEFT's format)
    #[arg(long)]
    adapter_path: Option<PathBuf>,
    /// The prompt; - reads it from standard input
    #[arg(short, long, required_unless_present = "prompts_file")]
    prompt: Option<String>,
    /// Many prompts: JSON lines with a field `prompt`; prints a JSON line for each
    #[arg(long, conflicts_with = "prompt")]
    prompts_file: Option<PathBuf>,
    /// Tokens at most
    #[arg(short, long, default_value_t = 256)]
    max_tokens: usize,
    /// Sampling temperature; 0 takes the most likely token
    #[arg(long, default_value_t = 0.0)]
    temp: f64,
    /// Sample from the k most likely tokens; 0 is all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Sample from the most likely tokens that together have this probability
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Of the random choices
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Continue the prompt as it is, without the model's chat template
    #[arg(long)]
    ignore_chat_template: bool,
    /// Print nothing but the text
    #[arg(short, long)]
    quiet: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let loaded = args.model.load_with(args.adapter_path.as_deref())?;
    let tokenizer = Arc::new(loaded.tokenizer);
    let template = tokenizer.chat_template().filter(|_| !args.ignore_chat_template);
    let generator = Generator::new(Arc::new(loaded.decoder), Arc::clone(&tokenizer))?;
    match &args.prompts_file {
        Some(path) => many(args, &generator, template, path),
        None => one(args, &generator, template),
    }
}

fn one(args: &Args, generator: &Generator, template: Option<&ChatTemplate>) -> Result<()> {
    let mut prompt = args.prompt.clone().unwrap_or_default();
    if prompt == "-" {
        prompt.clear();
        std::io::stdin().read_to_string(&mut prompt).context("cannot read standard input")?;
    }
    let mut out = std::io::stdout();
    let generated = generator.generate(&render(template, &prompt)?, &config(args)?, |token| {
        // A closed pipe ends the program at the next line; a lost token is no reason to stop here.
        let _ = out.write_all(token.text.as_bytes()).and_then(|()| out.flush());
    })?;
    println!();
    if !args.quiet {
        eprintln!("{}", summary(&generated));
    }
    Ok(())
}

fn many(
    args: &Args,
    generator: &Generator,
    template: Option<&ChatTemplate>,
    path: &PathBuf,
) -> Result<()> {
    let file =
        std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    for (i, line) in std::io::BufReader::new(file).lines().enumerate() {
        let line = line?;
        if line.trim().is_empty() {
            continue;
        }
        let row: serde_json::Value = serde_json::from_str(&line)
            .with_context(|| format!("{}:{}: not JSON", path.display(), i + 1))?;
        let Some(prompt) = row.get("prompt").and_then(|p| p.as_str()) else {
            bail!("{}:{}: expected a field \"prompt\" with a text", path.display(), i + 1);
        };
        let generated = generator.generate(&render(template, prompt)?, &config(args)?, |_| {})?;
        println!("{}", serde_json::json!({ "prompt": prompt, "completion": generated.text }));
    }
    Ok(())
}

fn render(template: Option<&ChatTemplate>, prompt: &str) -> Result<String> {
    Ok(match template {
        Some(template) => template.render(&[Message::new("user", prompt)], None, true)?,
        None => prompt.to_string(),
    })
}

fn config(args: &Args) -> Result<GeneratorConfig> {
    if args.temp < 0.0 || !(0.0..=1.0).contains(&args.top_p) {
        bail!(
            "expected --temp of 0 or more and --top-p in 0..=1, got {} and {}",
            args.temp,
            args.top_p
        );
    }
    let sampling = match args.temp {
        0.0 => SamplingStrategy::Greedy,
        temperature => {
            SamplingStrategy::Sample { temperature, top_k: args.top_k, top_p: args.top_p }
        }
    };
    Ok(GeneratorConfig { max_tokens: args.max_tokens, sampling, seed: args.seed })
}

fn summary(g: &Generated) -> String {
    let rate =
        |tokens: usize, time: std::time::Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
    let end = match g.finish {
        Finish::EndOfText => "",
        Finish::Length => " (--max-tokens reached)",
        Finish::Context => " (the model's context is full)",
    };
    format!(
        "prompt: {} tokens, {:.1} tok/s; generation: {} tokens, {:.1} tok/s{end}",
        g.prompt_tokens,
        rate(g.prompt_tokens, g.prefill),
        g.ids.len(),
        rate(g.ids.len().saturating_sub(1), g.decode)
    )
}

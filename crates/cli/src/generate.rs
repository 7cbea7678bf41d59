//! `metal-candle generate`

use crate::model::ModelArgs;
use crate::sampling::{SamplingArgs, summary};
use crate::ui::{note, progress};
use anyhow::{Context, Result, bail};
use metal_candle::generate::{Generator, GeneratorConfig};
use metal_candle::io::chat::{ChatTemplate, Message};
use std::io::{BufRead, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Names follow mlx-lm where it has them.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// A trained adapter: a folder of PEFT's or mlx-lm's, or a GGUF file
    #[arg(long)]
    adapter_path: Option<PathBuf>,
    /// The prompt; - reads it from standard input. May be repeated: then a JSON line is printed for
    /// each
    #[arg(short, long, required_unless_present = "prompts_file")]
    prompt: Vec<String>,
    /// Many prompts: JSON lines with a field `prompt`; prints a JSON line for each
    #[arg(long, conflicts_with = "prompt")]
    prompts_file: Option<PathBuf>,
    /// Of many prompts, so many at once
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    batch_size: u32,
    /// What the system says before the prompt
    #[arg(long, conflicts_with = "ignore_chat_template")]
    system_prompt: Option<String>,
    /// The answer begins with this text, which is not printed
    #[arg(long)]
    prefill_response: Option<String>,
    /// Continue the prompt as it is, without the model's chat template
    #[arg(long)]
    ignore_chat_template: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    // Before the model: a mistake in the file should not take its time.
    let prompts = match &args.prompts_file {
        Some(path) => from_file(path)?,
        None => args.prompt.clone(),
    };
    let loaded = args.model.load_with(args.adapter_path.as_deref())?;
    let tokenizer = Arc::new(loaded.tokenizer);
    let config = args.sampling.config(&tokenizer, &loaded.generation)?;
    let template = tokenizer.chat_template().filter(|_| !args.ignore_chat_template);
    if template.is_none() && args.system_prompt.is_some() {
        bail!("--system-prompt: the model has no chat template to put it into");
    }
    let decoder = Arc::new(args.sampling.cache.of(loaded.decoder));
    let generator = Generator::new(decoder, Arc::clone(&tokenizer));
    match &prompts[..] {
        [prompt] if args.prompts_file.is_none() => one(args, &generator, &config, template, prompt),
        prompts => many(args, &generator, &config, template, prompts),
    }
}

fn one(
    args: &Args,
    generator: &Generator,
    config: &GeneratorConfig,
    template: Option<&ChatTemplate>,
    prompt: &str,
) -> Result<()> {
    let mut prompt = prompt.to_owned();
    if prompt == "-" {
        prompt.clear();
        std::io::stdin().read_to_string(&mut prompt).context("cannot read standard input")?;
    }
    let mut out = std::io::stdout();
    let prompt = render(args, template, &prompt)?;
    let generated = generator.generate(&prompt, config, |token| {
        // A closed pipe ends the program at the last line; a lost token is no reason to stop here.
        let _ = out.write_all(token.text.as_bytes()).and_then(|()| out.flush());
    })?;
    writeln!(out)?;
    note!("{}", summary(&generated));
    Ok(())
}

fn many(
    args: &Args,
    generator: &Generator,
    config: &GeneratorConfig,
    template: Option<&ChatTemplate>,
    prompts: &[String],
) -> Result<()> {
    let mut out = std::io::stdout();
    let bar = progress(prompts.len() as u64, "{bar:30} {pos}/{len} eta {eta}");
    for prompts in prompts.chunks(args.batch_size as usize) {
        let rendered = prompts.iter().map(|prompt| render(args, template, prompt));
        let rendered = rendered.collect::<Result<Vec<_>>>()?;
        let all = generator.generate_batch(&rendered, config, |_, _| {})?;
        for (prompt, generated) in prompts.iter().zip(all) {
            let row = serde_json::json!({ "prompt": prompt, "completion": generated.text });
            bar.suspend(|| writeln!(out, "{row}"))?;
        }
        bar.inc(prompts.len() as u64);
    }
    bar.finish_and_clear();
    Ok(())
}

/// The prompts of a file of JSON lines.
fn from_file(path: &Path) -> Result<Vec<String>> {
    let file =
        std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut prompts = Vec::new();
    for (i, line) in std::io::BufReader::new(file).lines().enumerate() {
        let at = || format!("{}:{}", path.display(), i + 1);
        let line = line.with_context(at)?;
        if line.trim().is_empty() {
            continue;
        }
        let row: serde_json::Value =
            serde_json::from_str(&line).with_context(|| format!("{}: not JSON", at()))?;
        let Some(prompt) = row.get("prompt").and_then(|p| p.as_str()) else {
            bail!("{}: expected a field \"prompt\" with a text", at());
        };
        prompts.push(prompt.to_owned());
    }
    Ok(prompts)
}

/// All that the model reads.
fn render(args: &Args, template: Option<&ChatTemplate>, prompt: &str) -> Result<String> {
    let mut text = match template {
        Some(template) => {
            let system = args.system_prompt.iter().map(|text| Message::new("system", text));
            let messages: Vec<_> = system.chain([Message::new("user", prompt)]).collect();
            template.render(&messages, None, true)?
        }
        None => prompt.to_owned(),
    };
    text += args.prefill_response.as_deref().unwrap_or_default();
    Ok(text)
}

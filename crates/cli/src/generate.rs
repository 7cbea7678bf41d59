//! `metal-candle generate`

use crate::model::ModelArgs;
use crate::sampling::{SamplingArgs, summary};
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
    /// The prompt; - reads it from standard input
    #[arg(short, long, required_unless_present = "prompts_file")]
    prompt: Option<String>,
    /// Many prompts: JSON lines with a field `prompt`; prints a JSON line for each
    #[arg(long, conflicts_with = "prompt")]
    prompts_file: Option<PathBuf>,
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
    /// Print nothing but the text
    #[arg(short, long)]
    quiet: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let loaded = args.model.load_with(args.adapter_path.as_deref())?;
    let tokenizer = Arc::new(loaded.tokenizer);
    let config = args.sampling.config(&tokenizer)?;
    let template = tokenizer.chat_template().filter(|_| !args.ignore_chat_template);
    if template.is_none() && args.system_prompt.is_some() {
        bail!("--system-prompt: the model has no chat template to put it into");
    }
    let generator = Generator::new(Arc::new(loaded.decoder), Arc::clone(&tokenizer))?;
    match &args.prompts_file {
        Some(path) => many(args, &generator, &config, template, path),
        None => one(args, &generator, &config, template),
    }
}

fn one(
    args: &Args,
    generator: &Generator,
    config: &GeneratorConfig,
    template: Option<&ChatTemplate>,
) -> Result<()> {
    let mut prompt = args.prompt.clone().unwrap_or_default();
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
    if !args.quiet {
        eprintln!("{}", summary(&generated));
    }
    Ok(())
}

fn many(
    args: &Args,
    generator: &Generator,
    config: &GeneratorConfig,
    template: Option<&ChatTemplate>,
    path: &Path,
) -> Result<()> {
    let file =
        std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut out = std::io::stdout();
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
        let generated = generator.generate(&render(args, template, prompt)?, config, |_| {})?;
        let row = serde_json::json!({ "prompt": prompt, "completion": generated.text });
        writeln!(out, "{row}")?;
    }
    Ok(())
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

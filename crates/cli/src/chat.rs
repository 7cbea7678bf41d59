//! `metal-candle chat`

use crate::is_closed_pipe;
use crate::model::ModelArgs;
use crate::sampling::{SamplingArgs, summary};
use anyhow::{Context, Result};
use metal_candle::generate::{Finish, Generator, GeneratorConfig};
use metal_candle::io::Tokenizer;
use metal_candle::io::chat::Message;
use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;

/// Names follow mlx-lm where it has them.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// A trained adapter: a folder of PEFT's or mlx-lm's, or a GGUF file
    #[arg(long)]
    adapter_path: Option<PathBuf>,
    /// What the system says before the conversation
    #[arg(long)]
    system_prompt: Option<String>,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Print the speed after every answer
    #[arg(short, long)]
    verbose: bool,
}

const HELP: &str = "/reset forgets the conversation, /exit or Ctrl-D ends it, /help shows this.";

pub(crate) fn run(args: &Args) -> Result<()> {
    let loaded = args.model.load_with(args.adapter_path.as_deref())?;
    let tokenizer = Arc::new(loaded.tokenizer);
    tokenizer.chat_template().context("the model has no chat template: use generate")?;
    let config = args.sampling.config(&tokenizer)?;
    let generator = Generator::new(Arc::new(loaded.decoder), Arc::clone(&tokenizer))?;
    let mut chat = Chat { generator, tokenizer, config, messages: Vec::new() };
    chat.reset(args);

    let interactive = std::io::stdin().is_terminal();
    if interactive {
        eprintln!("{HELP}");
    }
    while let Some(line) = read_line(interactive)? {
        match line.trim() {
            "" => {}
            "/exit" | "/quit" => break,
            "/help" => eprintln!("{HELP}"),
            "/reset" => chat.reset(args),
            command if command.starts_with('/') => {
                eprintln!("unknown command {command}. {HELP}");
            }
            said => match chat.answer(said, args.verbose) {
                // A person can go on from here; a script had better know.
                Err(error) if interactive && !is_closed_pipe(&error) => {
                    eprintln!("error: {error:#}");
                }
                result => result?,
            },
        }
    }
    Ok(())
}

/// A conversation, and what continues it.
struct Chat {
    generator: Generator,
    tokenizer: Arc<Tokenizer>,
    config: GeneratorConfig,
    messages: Vec<Message>,
}

impl Chat {
    fn reset(&mut self, args: &Args) {
        let system = args.system_prompt.iter().map(|text| Message::new("system", text));
        self.messages = system.collect();
    }

    /// Prints what the model says to this and remembers both; neither where it fails.
    fn answer(&mut self, said: &str, verbose: bool) -> Result<()> {
        let template = self.tokenizer.chat_template().context("the model has no chat template")?;
        let mut messages = self.messages.clone();
        messages.push(Message::new("user", said));
        let prompt = template.render(&messages, None, true)?;
        let mut out = std::io::stdout();
        let generated = self.generator.generate(&prompt, &self.config, |token| {
            // A closed pipe ends the program at the last line of the answer.
            let _ = out.write_all(token.text.as_bytes()).and_then(|()| out.flush());
        })?;
        writeln!(out)?;
        if verbose || matches!(generated.finish, Finish::Length | Finish::Context) {
            eprintln!("{}", summary(&generated));
        }
        messages.push(Message::new("assistant", generated.text));
        self.messages = messages;
        Ok(())
    }
}

/// `None` at the end of the input.
fn read_line(interactive: bool) -> Result<Option<String>> {
    if interactive {
        eprint!("> ");
    }
    let mut line = String::new();
    let read = std::io::stdin().lock().read_line(&mut line).context("cannot read the input")?;
    if read == 0 && interactive {
        eprintln!();
    }
    Ok((read > 0).then_some(line))
}

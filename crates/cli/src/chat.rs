//! `metal-candle chat`

use crate::is_closed_pipe;
use crate::model::ModelArgs;
use crate::sampling::{SamplingArgs, summary};
use crate::ui::note;
use anyhow::{Context, Result, bail};
use metal_candle::generate::{Finish, Generated, Generator, GeneratorConfig, Session};
use metal_candle::io::chat::Message;
use metal_candle::io::{Tokenizer, file};
use std::io::{BufRead, IsTerminal, Write};
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
    /// What the system says before the conversation
    #[arg(long)]
    system_prompt: Option<String>,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Print the speed after every answer
    #[arg(short, long)]
    verbose: bool,
}

const HELP: &str = "\
/undo takes the last question and its answer back, /reset forgets the conversation,
/save FILE appends it to a file of training rows, /stats prints the speed of the last answer,
/exit or Ctrl-D ends it, /help shows this.";

pub(crate) fn run(args: &Args) -> Result<()> {
    let loaded = args.model.load_with(args.adapter_path.as_deref())?;
    let tokenizer = Arc::new(loaded.tokenizer);
    tokenizer.chat_template().context("the model has no chat template: use generate")?;
    let config = args.sampling.config(&tokenizer, &loaded.generation)?;
    let decoder = Arc::new(args.sampling.cache.of(loaded.decoder));
    let generator = Generator::new(decoder, Arc::clone(&tokenizer));
    let system = args.system_prompt.iter().map(|text| Message::new("system", text)).collect();
    let session = Session::default();
    let mut chat =
        Chat { generator, tokenizer, config, system, turns: Vec::new(), session, last: None };

    let interactive = std::io::stdin().is_terminal();
    if interactive {
        note!("{HELP}");
    }
    while let Some(line) = read_line(interactive)? {
        match line.trim() {
            "" => {}
            "/exit" | "/quit" => break,
            said => match chat.take(said, args.verbose) {
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
    /// What comes before the first turn, if anything.
    system: Vec<Message>,
    /// Questions and their answers.
    turns: Vec<[Message; 2]>,
    /// Compared with every prompt, so that it follows whatever is undone.
    session: Session,
    last: Option<Generated>,
}

impl Chat {
    /// A command or a question.
    fn take(&mut self, line: &str, verbose: bool) -> Result<()> {
        let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match command {
            "/help" => eprintln!("{HELP}"),
            "/reset" => self.turns.clear(),
            "/undo" => match self.turns.pop() {
                Some([question, _]) => {
                    note!("taken back: {}", question.content().unwrap_or_default());
                }
                None => bail!("/undo: there is nothing to take back"),
            },
            "/save" => self.save(Path::new(rest.trim()))?,
            "/stats" => match &self.last {
                Some(generated) => eprintln!("{}", summary(generated)),
                None => bail!("/stats: there was no answer yet"),
            },
            _ if line.starts_with('/') => bail!("unknown command {command}: /help lists them"),
            _ => self.answer(line, verbose)?,
        }
        Ok(())
    }

    /// Prints what the model says to this and remembers both; neither where it fails.
    fn answer(&mut self, said: &str, verbose: bool) -> Result<()> {
        let template = self.tokenizer.chat_template().context("the model has no chat template")?;
        let question = Message::new("user", said);
        let messages: Vec<Message> = self.messages().chain([question.clone()]).collect();
        let prompt = template.render(&messages, None, true)?;
        let mut out = std::io::stdout();
        let on_token = |token: &metal_candle::generate::StreamToken| {
            // A closed pipe ends the program at the last line of the answer.
            let _ = out.write_all(token.text.as_bytes()).and_then(|()| out.flush());
        };
        let generated =
            self.generator.generate_in(&mut self.session, &prompt, &self.config, on_token)?;
        writeln!(std::io::stdout())?;
        if verbose || matches!(generated.finish, Finish::Length | Finish::Context) {
            note!("{}", summary(&generated));
        }
        self.turns.push([question, Message::new("assistant", &generated.text)]);
        self.last = Some(generated);
        Ok(())
    }

    fn messages(&self) -> impl Iterator<Item = Message> {
        self.system.iter().chain(self.turns.iter().flatten()).cloned()
    }

    /// Adds the conversation to a file, as a row that `train` reads.
    fn save(&self, path: &Path) -> Result<()> {
        if path.as_os_str().is_empty() {
            bail!("/save: expected a file's name");
        }
        if self.turns.is_empty() {
            bail!("/save: nothing was said yet");
        }
        let at = || format!("cannot write {}", path.display());
        let mut rows = match path.exists() {
            true => std::fs::read(path).with_context(at)?,
            false => Vec::new(),
        };
        if rows.last().is_some_and(|last| *last != b'\n') {
            rows.push(b'\n');
        }
        let messages = self.messages().map(
            |m| serde_json::json!({ "role": m.role(), "content": m.content().unwrap_or_default() }),
        );
        let row = serde_json::json!({ "messages": messages.collect::<Vec<_>>() });
        writeln!(rows, "{row}")?;
        file::write_atomic(path, &rows).with_context(at)?;
        note!("saved to {}", path.display());
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

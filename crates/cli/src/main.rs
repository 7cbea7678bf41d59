//! The `metal-candle` command.

mod adapter;
mod chat;
mod columns;
mod data;
mod eval;
mod fuse;
mod generate;
mod info;
mod model;
mod perplexity;
mod sampling;
mod train;
mod units;

use clap::{CommandFactory, Parser, Subcommand};
use std::io::Write;
use std::process::ExitCode;

/// Fine-tune and run language models on your own machine.
///
/// Exit codes: 0 where all went well, 1 for a failure, 2 for flags that make no sense.
#[derive(Parser)]
#[command(name = "metal-candle", version, about, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Fine-tune a model with LoRA
    Train(train::Args),
    /// Generate text from a prompt
    Generate(generate::Args),
    /// Talk with a model
    Chat(chat::Args),
    /// Count the answers that a model gets exactly right
    Eval(eval::Args),
    /// Measure how well a model predicts a text
    Perplexity(perplexity::Args),
    /// Merge an adapter into its base
    Fuse(fuse::Args),
    /// Move adapters between PEFT, mlx-lm and llama.cpp
    #[command(subcommand)]
    Adapter(adapter::Command),
    /// Show what is in a model file, a model folder or an adapter
    Info(info::Args),
    /// Look at training data
    #[command(subcommand)]
    Data(data::Command),
    /// Print a script that completes this command's flags in a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Train(args) => train::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Perplexity(args) => perplexity::run(&args),
        Command::Fuse(args) => fuse::run(&args),
        Command::Adapter(command) => adapter::run(&command),
        Command::Info(args) => info::run(&args),
        Command::Data(command) => data::run(&command),
        Command::Completions { shell } => completions(shell),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read the output, such as `head`, had enough of it.
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn completions(shell: clap_complete::Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "metal-candle", &mut script);
    Ok(std::io::stdout().write_all(&script)?)
}

/// Whether nobody reads the output any more.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

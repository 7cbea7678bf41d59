//! The `metal-candle` command.

mod eval;
mod generate;
mod model;
mod train;

use clap::{Parser, Subcommand};

/// Fine-tune and run language models on your own machine.
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
    /// Count the answers that a model gets exactly right
    Eval(eval::Args),
}

fn main() -> std::process::ExitCode {
    let result = match Cli::parse().command {
        Command::Train(args) => train::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Eval(args) => eval::run(&args),
    };
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

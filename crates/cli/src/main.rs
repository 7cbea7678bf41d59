//! The `metal-candle` command.

mod adapter;
mod chat;
mod columns;
mod config;
mod data;
mod device;
mod embed;
mod eval;
mod fuse;
mod generate;
#[cfg(feature = "hub")]
mod hub;
mod info;
mod man;
mod model;
mod perplexity;
mod plan;
mod sampling;
mod train;
mod ui;
mod units;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// Fine-tune and run language models on your own machine.
///
/// Exit codes: 0 where all went well, 1 for a failure, 2 for flags or a --config file that make no
/// sense, 130 where Ctrl-C ended it (training has then finished its step and saved, and --resume
/// goes on).
#[derive(Parser)]
#[command(name = "metal-candle", version, about, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Take flags from a TOML or YAML file: keys are the names of the flags; the command line wins
    // Read by `config::flags`, before the rest is known.
    #[arg(short, long = "config", id = "config", global = true, value_name = "FILE")]
    #[arg(help_heading = ui::EVERYWHERE)]
    _config: Option<PathBuf>,
    #[command(flatten)]
    ui: ui::UiArgs,
}

#[derive(Subcommand)]
enum Command {
    /// Fine-tune a model with LoRA
    Train(Box<train::Args>),
    /// Generate text from a prompt
    Generate(generate::Args),
    /// Talk with a model
    Chat(chat::Args),
    /// Count the answers that a model gets exactly right
    Eval(eval::Args),
    /// Measure how well a model predicts a text
    Perplexity(perplexity::Args),
    /// Give texts vectors that are near each other where the texts mean the same
    Embed(embed::Args),
    /// Merge an adapter into its base
    Fuse(fuse::Args),
    /// Move adapters between PEFT, mlx-lm and llama.cpp
    #[command(subcommand)]
    Adapter(adapter::Command),
    /// Show what training or generation would take, without loading the model
    Plan(Box<plan::Args>),
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
    /// Print the manual page, or write those of all commands to a folder
    #[command(hide = true)]
    Man(man::Args),
}

/// Of flags that make no sense, as clap has it.
const USAGE: u8 = 2;
/// Of a program that Ctrl-C ended: 128 and the signal's number.
const INTERRUPTED: u8 = 130;

/// The commands and their flags.
fn command() -> clap::Command {
    // `plan` takes the flags of `train`, but needs no data to plan for.
    Cli::command().mut_subcommand("plan", |plan| plan.mut_arg("data", |arg| arg.required(false)))
}

fn main() -> ExitCode {
    let flags = match config::flags(command(), std::env::args_os().collect()) {
        Ok(flags) => flags,
        Err(error) => {
            eprintln!("error: {error:#}");
            return ExitCode::from(USAGE);
        }
    };
    let cli = Cli::from_arg_matches(&flags.matches).unwrap_or_else(|error| error.exit());
    ui::init(cli.ui);
    for line in flags.notes {
        ui::note!("{line}");
    }
    match run(cli.command) {
        Ok(train::End::Done) => ExitCode::SUCCESS,
        Ok(train::End::Interrupted) => ExitCode::from(INTERRUPTED),
        // Whoever read the output, such as `head`, had enough of it.
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<train::End> {
    match command {
        Command::Train(args) => return train::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Perplexity(args) => perplexity::run(&args),
        Command::Embed(args) => embed::run(&args),
        Command::Fuse(args) => fuse::run(&args),
        Command::Adapter(command) => adapter::run(&command),
        Command::Plan(args) => plan::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Data(command) => data::run(&command),
        Command::Completions { shell } => completions(shell),
        Command::Man(args) => man::run(&args, self::command()),
    }?;
    Ok(train::End::Done)
}

fn completions(shell: clap_complete::Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command(), "metal-candle", &mut script);
    Ok(std::io::stdout().write_all(&script)?)
}

/// Whether nobody reads the output any more.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_description_of_the_flags_holds_together() {
        super::command().debug_assert();
    }
}

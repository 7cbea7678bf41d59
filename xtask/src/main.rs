//! The repository's own commands: `cargo xtask COMMAND`.

mod apple;
mod bench;
mod command;
mod model;
mod neon;
mod peers;
mod quickstart;
mod reference;
mod test;
mod tidy;

use std::process::ExitCode;

const USAGE: &str = "\
cargo xtask COMMAND

    quickstart [--model FILE]   get a small model, fine-tune it, show its answers before and after
    test                        format, lints, tidy, docs, all tests
    test --device DEVICE        the tests of values on cuda, cuda:N, metal or cpu
    tidy                        the rules of ARCHITECTURE.md, and no loose ends
    bench [FILTER]              the same work through eager Candle and through this library
    bench cpu [OPTIONS]         our work beside everybody else's and the machine's ceilings
    bench cuda [OPTIONS]        the same on an NVIDIA GPU: operations, training, decoding
    bench scaling [OPTIONS]     a step's time and memory against its sizes, as plots
                                (--quick, --threads N, --json FILE, words to filter by;
                                for cuda, --program FILE)
    peers                       adapters against the real PEFT, llama.cpp and mlx-lm
    reference                   make the reference vectors anew, by PyTorch
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["quickstart"] => quickstart::run(None),
        ["quickstart", "--model", path] => quickstart::run(Some(path.as_ref())),
        ["test"] => test::run(),
        ["test", "--device", device] => test::run_on(device),
        ["tidy"] => tidy::run(),
        ["bench", ref rest @ ..] => bench::run(rest),
        ["peers"] => peers::run(),
        ["reference"] => reference::run(),
        [] | ["help" | "-h" | "--help"] => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprint!("unknown arguments: {}\n\n{USAGE}", args.join(" "));
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

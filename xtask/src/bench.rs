//! `cargo xtask bench`: against eager Candle in one process, against other tools, and against size.

mod cpu;
mod cuda;
mod plot;
mod rows;
mod scaling;
mod table;
mod worker;

use crate::command::{cargo, execute, output};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::PathBuf;
use std::process::Command;

pub(crate) fn run(args: &[&str]) -> Result<()> {
    match args {
        ["cpu", args @ ..] => cpu::run(&Options::parse(args)?),
        ["cuda", args @ ..] => cuda::run(&Options::parse(args)?),
        ["scaling", args @ ..] => scaling::run(&Options::parse(args)?),
        _ => execute(
            cargo()
                .args(["bench", "--package", "metal-candle", "--bench", "lazy_vs_eager", "--"])
                .args(args),
        ),
    }
}

/// What follows `cpu`, `cuda` or `scaling`.
struct Options {
    /// Measure each row no longer than shows that it works, and build no release.
    quick: bool,
    threads: usize,
    /// Where the figures go, if not to the target folder.
    json: Option<PathBuf>,
    /// A build of our bench to measure with, where none can be made.
    program: Option<PathBuf>,
    /// Only rows with one of these in their name.
    filter: Vec<String>,
}

impl Options {
    fn parse(args: &[&str]) -> Result<Options> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let mut options =
            Options { quick: false, threads, json: None, program: None, filter: Vec::new() };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} wants a value"));
            match *arg {
                "--quick" => options.quick = true,
                "--threads" => options.threads = value()?.parse().context("--threads")?,
                "--json" => options.json = Some(std::path::absolute(value()?)?),
                "--program" => options.program = Some(std::path::absolute(value()?)?),
                flag if flag.starts_with('-') => bail!(
                    "no flag {flag}: there are --quick, --threads N, --json FILE and, for cuda, --program FILE"
                ),
                word => options.filter.push(word.to_owned()),
            }
        }
        Ok(options)
    }

    fn wants(&self, name: &str) -> bool {
        self.filter.is_empty() || self.filter.iter().any(|word| name.contains(word.as_str()))
    }
}

/// The folder that takes results: no part of the tree.
fn results_folder() -> Result<PathBuf> {
    let metadata = output(cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: Value = serde_json::from_str(&metadata)?;
    let target = metadata["target_directory"].as_str().context("cargo names no target folder")?;
    let folder = PathBuf::from(target).join("bench");
    std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    Ok(folder)
}

/// The processor, as the system calls it; `None` where the system cannot be asked.
fn processor() -> Option<String> {
    let info = output(&mut Command::new("lscpu")).ok()?;
    let named = |key: &str| {
        let value = info.lines().find_map(|line| line.strip_prefix(key))?;
        Some(value.trim().to_owned())
    };
    Some(format!("{} ({} CPUs)", named("Model name:")?, named("CPU(s):")?))
}

/// Builds benches, each a package's; where no time counts, in the profile that tests use.
fn build<const N: usize>(
    quick: bool,
    features: &[&str],
    benches: [(&str, &str); N],
) -> Result<[PathBuf; N]> {
    println!("building the benches");
    let mut command = cargo();
    command.arg(if quick { "test" } else { "bench" });
    command.args(["--no-run", "--message-format=json-render-diagnostics"]).args(features);
    for (package, bench) in benches {
        command.args(["--package", package, "--bench", bench]);
    }
    let built = output(&mut command)?;
    let messages: Vec<Value> =
        built.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let mut paths = benches.map(|_| PathBuf::new());
    for (path, (_, bench)) in paths.iter_mut().zip(benches) {
        let mut found = messages.iter().filter(|m| m["target"]["name"] == bench);
        let built = found.find_map(|m| m["executable"].as_str());
        *path =
            built.map(PathBuf::from).with_context(|| format!("cargo built no bench {bench}"))?;
    }
    Ok(paths)
}

/// The middle one of these; of an even number, the mean of the two.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let n = sorted.len();
    (sorted[n / 2] + sorted[(n - 1) / 2]) / 2.0
}

//! `cargo xtask test`: everything that must hold before a change lands.

use crate::command::{cargo, execute, program, works};
use crate::{apple, model, neon, tidy};
use anyhow::{Context, Result, bail};
use std::time::{Duration, Instant};

/// All that build on every machine: those of GPUs want CUDA's compiler, or an Apple computer.
const FEATURES: [&str; 2] = ["--features", "metal-candle/async-exec"];

type Stage = (&'static str, fn() -> Result<()>);

/// The quick ones first; the tests last, so that their summary closes the output.
const STAGES: [Stage; 10] = [
    ("set-up", set_up),
    ("format", || execute(cargo().args(["fmt", "--all", "--check"]))),
    ("tidy", tidy::run),
    ("clippy", clippy),
    ("clippy for CUDA", clippy_for_cuda),
    ("metal", apple::run),
    ("neon", neon::run),
    ("docs", docs),
    ("doctests", || execute(cargo().args(["test", "--doc", "--workspace"]).args(FEATURES))),
    ("tests", tests),
];

pub(crate) fn run() -> Result<()> {
    let mut times = Vec::new();
    for (name, stage) in STAGES {
        println!("\n== {name}");
        let started = Instant::now();
        let result = stage();
        times.push((name, started.elapsed()));
        if result.is_err() {
            print_times(&times);
        }
        result.with_context(|| format!("the stage {name}"))?;
    }
    print_times(&times);
    Ok(())
}

/// The pages of all crates, with every link in them found.
fn docs() -> Result<()> {
    let mut command = cargo();
    command.args(["doc", "--no-deps", "--workspace"]).args(FEATURES);
    execute(command.env("RUSTDOCFLAGS", "-D warnings"))
}

/// The crates whose tests make tensors on `METAL_CANDLE_TEST_DEVICE`.
const ON_DEVICES: [&str; 3] = ["metal-candle-runtime", "metal-candle", "metal-candle-cli"];

/// The tests that look at values, on this device, by a build that can use it.
pub(crate) fn run_on(device: &str) -> Result<()> {
    let feature = match device.split(':').next() {
        Some("cpu") => None,
        Some(kind @ ("cuda" | "metal")) => Some(kind),
        _ => bail!("--device: expected cpu, cuda, cuda:N or metal, got {device}"),
    };
    let mut command = cargo();
    match has_nextest() {
        true => command.args(["nextest", "run"]),
        false => command.args(["test", "--lib", "--bins", "--tests"]),
    };
    for package in ON_DEVICES {
        command.args(["--package", package]);
        if let Some(feature) = feature {
            command.args(["--features", &format!("{package}/{feature}")]);
        }
    }
    command.env("METAL_CANDLE_TEST_DEVICE", device);
    execute(command.env("METAL_CANDLE_MODELS", model::folder()?))
}

fn print_times(times: &[(&str, Duration)]) {
    let line: Vec<String> =
        times.iter().map(|(name, t)| format!("{name} {:.0} s", t.as_secs_f64())).collect();
    let total: Duration = times.iter().map(|(_, t)| *t).sum();
    println!("\n== {}; {:.0} s in all", line.join(", "), total.as_secs_f64());
}

/// What a new machine lacks.
fn set_up() -> Result<()> {
    for (component, probe) in [("rustfmt", ["fmt", "--version"]), ("clippy", ["clippy", "-V"])] {
        if !works(cargo().args(probe)) {
            execute(program("rustup").args(["component", "add", component]))?;
        }
    }
    if !has_nextest() {
        // Without it the tests still run, by cargo test.
        if let Err(error) = execute(cargo().args(["install", "cargo-nextest", "--locked"])) {
            eprintln!("warning: {error:#}");
        }
    }
    set_up_clang()?;
    for model in [model::fetch()?, model::fetch_encoder()?] {
        println!("model: {}", model.display());
    }
    Ok(())
}

/// Rendered GPU kernels are compiled by it and run on the CPU. The names are those that the test looks for.
fn set_up_clang() -> Result<()> {
    let named = std::env::var_os("METAL_CANDLE_CLANG").is_some();
    let has_clang = || ["clang++-16", "clang++"].iter().any(|c| works(program(c).arg("--version")));
    if named || has_clang() {
        return Ok(());
    }
    if works(program("apt-get").arg("--version")) {
        // The lists of packages may be missing, or old.
        let install = || execute(program("apt-get").args(["install", "--yes", "clang-16"]));
        if let Err(error) = install() {
            eprintln!("warning: {error:#}");
            let update = execute(program("apt-get").arg("update"));
            update
                .and_then(|()| install())
                .context("clang 16 is needed, and apt-get cannot get it")?;
        }
    }
    if !has_clang() {
        bail!("clang 16 or later is needed: install it, or name it in METAL_CANDLE_CLANG");
    }
    Ok(())
}

fn has_nextest() -> bool {
    works(cargo().args(["nextest", "--version"]))
}

fn clippy() -> Result<()> {
    let all = ["clippy", "--workspace", "--all-targets"];
    execute(cargo().args(all).args(FEATURES).args(["--", "--deny", "warnings"]))
}

/// Where `CUDA_HOME` names a toolkit; there the dialects' test asks NVRTC, too. No GPU is needed.
fn clippy_for_cuda() -> Result<()> {
    if std::env::var_os("CUDA_HOME").is_none() {
        println!("skipped: CUDA_HOME names no toolkit, so neither the feature nor NVRTC is tried");
        return Ok(());
    }
    // In the profile of releases and benches: nvcc takes minutes for Candle's kernels, in each profile anew.
    let mut command = cargo();
    command.args(["clippy", "--release", "--all-targets"]);
    for package in ON_DEVICES {
        command.args(["--package", package, "--features", &format!("{package}/cuda")]);
    }
    execute(command.args(["--", "--deny", "warnings"]))
}

fn tests() -> Result<()> {
    let mut command = cargo();
    if has_nextest() {
        command.args(["nextest", "run", "--workspace"]);
    } else {
        // --all-targets but benches: doctests are a stage of their own.
        command.args(["test", "--workspace", "--lib", "--bins", "--tests", "--examples"]);
    }
    command.args(FEATURES);
    execute(command.env("METAL_CANDLE_MODELS", model::folder()?))
}

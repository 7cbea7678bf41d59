//! `cargo xtask peers`: adapters against the real PEFT, llama.cpp and mlx-lm, in both directions.

use crate::command::{cargo, execute, program, root};
use crate::{model, reference};
use anyhow::{Context, Result};
use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Token ids of a sentence; `reference/peers.py` has the same.
const IDS: &str = "504,3575,282,4649,314,7042,30,378,314,260,4764,3030";

/// A few steps, large enough that every layer's adapter does something.
const TRAINING: [(&str, &str); 7] = [
    ("--iters", "3"),
    ("--batch-size", "1"),
    ("--max-seq-length", "64"),
    ("--learning-rate", "2e-3"),
    ("--target-modules", "all-linear"),
    ("--val-batches", "1"),
    ("--save-every", "0"),
];

pub(crate) fn run() -> Result<()> {
    let base = model::fetch()?;
    let python = reference::environment("peers", "reference/peers.lock")?;
    let folder = model::cache()?.join("peers-work");
    // Files of an earlier run would be compared in place of missing ones.
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
    }
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let at = |name: &str| folder.join(name);
    let peers = |command: &str| {
        execute(program(&python).args(["reference/peers.py", command]).arg(&base).arg(&folder))
    };

    println!("\n== adapters: ours by training, PEFT's by PEFT");
    let task = root().join("xtask/quickstart");
    let mut train = metal_candle("train", &base);
    train.arg("--data").arg(task).arg("--adapter-path").arg(at("ours"));
    execute(train.args(TRAINING.iter().flat_map(|(flag, value)| [flag, value])))?;
    peers("make")?;

    println!("\n== converted and fused");
    for (from, to, format) in [
        ("ours", "ours.gguf", "gguf"),
        ("theirs", "theirs.gguf", "gguf"),
        ("ours", "ours-mlx", "mlx"),
    ] {
        let mut convert = command(["adapter", "convert"]);
        convert.args(["--to", format]).arg("--model").arg(&base);
        execute(convert.arg("--adapter-path").arg(at(from)).arg("--save-path").arg(at(to)))?;
    }
    let mut fuse = metal_candle("fuse", &at("base.gguf"));
    fuse.arg("--adapter-path").arg(at("ours")).arg("--save-path").arg(&folder);
    execute(fuse.args(["--export-gguf", "--gguf-path", "fused.gguf"]))?;

    println!("\n== everybody's logits");
    logits(&base, OsStr::new("-"), &at("base.f32"))?;
    for name in ["ours", "theirs"] {
        logits(&base, at(name).as_os_str(), &at(&format!("{name}.f32")))?;
    }
    peers("compare")
}

/// `cargo run` of our command on a model.
fn metal_candle(name: &str, model: &Path) -> Command {
    let mut command = command([name]);
    command.arg("--model").arg(model);
    command
}

fn command<const N: usize>(names: [&str; N]) -> Command {
    let mut command = cargo();
    command.args(["run", "--quiet", "--package", "metal-candle-cli", "--"]).args(names);
    command
}

fn logits(model: &Path, adapter: &OsStr, out: &Path) -> Result<()> {
    let mut example = cargo();
    example.args(["run", "--quiet", "--package", "metal-candle", "--example", "logits", "--"]);
    execute(example.arg(model).arg(adapter).arg(IDS).arg(out))
}

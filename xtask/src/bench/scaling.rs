//! `cargo xtask bench scaling`: a training step's time and memory against batch, sequence, rank and
//! width, as a page of plots.

use super::plot::{Line, Plot};
use super::worker::Worker;
use super::{Options, build, processor, results_folder};
use crate::command::{execute, root};
use crate::model;
use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};
use std::fmt::Write;
use std::path::Path;
use std::process::Command;

/// What is varied, the rest held.
struct Sweep {
    /// Of the plots' files.
    name: &'static str,
    /// On the x axis.
    axis: &'static str,
    /// What is held.
    held: String,
    points: Vec<Point>,
}

struct Point {
    x: usize,
    work: Value,
}

/// What was measured at a point.
struct Found {
    x: usize,
    seconds: f64,
    planned_bytes: f64,
    /// Where the system says so.
    peak_bytes: Option<f64>,
}

pub(super) fn run(options: &Options) -> Result<()> {
    let folder = results_folder()?.join("scaling");
    std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let [bench] = build(options.quick, &[], [("metal-candle", "cpu")])?;
    let mut sweeps = smollm(&model::fetch()?, options.quick);
    if options.wants(WIDTH) {
        sweeps.push(widths(&bench, &folder, options.quick)?);
    }
    let processor = processor();
    let mut page = head(options, processor.as_deref());
    let mut figures = Vec::new();
    for sweep in sweeps.iter().filter(|sweep| options.wants(sweep.name)) {
        let mut found = Vec::new();
        for point in &sweep.points {
            found.push(
                measure(&bench, &folder, point, options)
                    .with_context(|| format!("{} {}, {}", sweep.axis, point.x, sweep.held))?,
            );
        }
        write_sweep(sweep, &found, &folder, &mut page)?;
        let points = found.iter().map(Found::json).collect::<Vec<_>>();
        figures.push(json!({"sweep": sweep.name, "held": sweep.held, "points": points}));
    }
    let index = folder.join("scaling.md");
    std::fs::write(&index, page).with_context(|| index.display().to_string())?;
    let file = options.json.clone().unwrap_or_else(|| folder.join("scaling.json"));
    let figures = json!({
        "threads": options.threads,
        "quick": options.quick,
        "processor": processor,
        "sweeps": figures,
    });
    std::fs::write(&file, serde_json::to_string_pretty(&figures)?)
        .with_context(|| file.display().to_string())?;
    println!("\npage: {}\nfigures: {}", index.display(), file.display());
    Ok(())
}

/// What was measured, where and how.
fn head(options: &Options, processor: Option<&str>) -> String {
    let (flag, end) = match options.quick {
        true => (" --quick", " `--quick` only shows that it works: these are no results."),
        false => ("", ""),
    };
    let (threads, processor) = (options.threads, processor.unwrap_or("an unnamed processor"));
    format!(
        "# Scaling\n\nA LoRA training step (forward, backward, AdamW) with an f32 base, on {threads} \
         threads of {processor}. Made by `cargo xtask bench scaling{flag}`. Times are medians. Memory \
         is what the plan says, and the peak of the process, which includes the loaded model.{end}\n"
    )
}

/// A step of SmolLM2-135M, q and v adapted.
fn smollm(model: &Path, quick: bool) -> Vec<Sweep> {
    let point = |x: usize, [batch, seq, rank]: [usize; 3]| Point {
        x,
        work: json!({
            "work": "train", "model": model, "base": "f32", "activations": "f32", "targets": "qv",
            "batch": batch, "seq": seq, "rank": rank,
        }),
    };
    let short = |all: &[usize]| all[..if quick { 2 } else { all.len() }].to_vec();
    let sweep = |name, axis, held: &str, points| Sweep {
        name,
        axis,
        held: format!("SmolLM2-135M, q and v, {held}"),
        points,
    };
    let batches = short(&[1, 2, 4, 8]).into_iter().map(|b| point(b, [b, 256, 8]));
    let lengths = short(&[64, 128, 256, 512, 1024, 2048]).into_iter().map(|t| point(t, [1, t, 8]));
    let ranks = short(&[4, 8, 16, 32, 64]).into_iter().map(|r| point(r, [1, 256, r]));
    vec![
        sweep("batch", "batch size (rows of 256 tokens)", "rank 8", batches.collect()),
        sweep("sequence", "sequence length (tokens)", "one row, rank 8", lengths.collect()),
        sweep("rank", "LoRA rank", "one row of 256 tokens", ranks.collect()),
    ]
}

const WIDTH: &str = "width";

/// Random models of SmolLM2's proportions.
fn widths(bench: &Path, folder: &Path, quick: bool) -> Result<Sweep> {
    const LAYERS: usize = 8;
    let all: &[usize] = if quick { &[192, 384] } else { &[192, 384, 576, 960, 1536] };
    let mut points = Vec::new();
    for width in all {
        let model = folder.join(format!("random-{width}"));
        let mut command = Command::new(bench);
        command.current_dir(root()).arg("--random-model").arg(&model);
        execute(command.args([width.to_string(), LAYERS.to_string()]))?;
        let work = json!({
            "work": "train", "model": model, "base": "f32", "activations": "f32", "targets": "qv",
            "batch": 1, "seq": 256, "rank": 8,
        });
        points.push(Point { x: *width, work });
    }
    let held = format!("random model of {LAYERS} layers, one row of 256 tokens, rank 8");
    Ok(Sweep { name: WIDTH, axis: "hidden size", held, points })
}

/// In a process of its own, whose peak of memory is the point's.
fn measure(bench: &Path, folder: &Path, point: &Point, options: &Options) -> Result<Found> {
    let mut command = Command::new(bench);
    command.current_dir(root()).args(["--serve", "ours"]);
    command.env("RAYON_NUM_THREADS", options.threads.to_string());
    let mut worker = Worker::start("ours", &mut command, folder.join("ours.log"))?;
    let (calls, seconds) = if options.quick { (1, 0.0) } else { (3, 2.0) };
    let question = json!({"row": point.work, "warmup": 1, "calls": calls, "seconds": seconds});
    let answer = worker.ask(&question.to_string())?;
    let number = |key: &str| answer[key].as_f64();
    let missing = || anyhow!("{}", answer["missing"].as_str().unwrap_or("no figures"));
    Ok(Found {
        x: point.x,
        seconds: number("seconds").ok_or_else(missing)?,
        planned_bytes: number("planned_bytes").ok_or_else(missing)?,
        peak_bytes: number("peak_bytes"),
    })
}

/// Two plots and a table.
fn write_sweep(sweep: &Sweep, found: &[Found], folder: &Path, page: &mut String) -> Result<()> {
    let title = format!("against {}", sweep.axis);
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    let points = |f: &dyn Fn(&Found) -> Option<f64>| {
        found.iter().filter_map(|p| Some((p.x as f64, f(p)?))).collect::<Vec<_>>()
    };
    let lines = vec![Line { name: "a step", points: points(&|p| Some(p.seconds * 1e3)) }];
    let time = Plot { title: &format!("time of a step {title}"), x: sweep.axis, y: "ms", lines };
    let lines = vec![
        Line { name: "planned", points: points(&|p| Some(mib(p.planned_bytes))) },
        Line { name: "peak of the process", points: points(&|p| p.peak_bytes.map(mib)) },
    ];
    let memory =
        Plot { title: &format!("memory of a step {title}"), x: sweep.axis, y: "MiB", lines };
    writeln!(page, "\n## {}: {}\n", sweep.name, sweep.held)?;
    for (what, plot) in [("time", time), ("memory", memory)] {
        let file = format!("{}-{what}.svg", sweep.name);
        std::fs::write(folder.join(&file), plot.svg()).with_context(|| file.clone())?;
        writeln!(page, "![{what} of a step {title}]({file})")?;
    }
    writeln!(page, "\n| {} | ms | planned MiB | peak MiB |\n|--:|--:|--:|--:|", sweep.axis)?;
    for p in found {
        let peak = p.peak_bytes.map_or("-".to_owned(), |bytes| format!("{:.0}", mib(bytes)));
        let (ms, planned) = (p.seconds * 1e3, mib(p.planned_bytes));
        writeln!(page, "| {} | {ms:.1} | {planned:.0} | {peak} |", p.x)?;
        println!(
            "{:<10} {:>6}: {ms:>9.1} ms, planned {planned:>6.0} MiB, peak {peak:>6} MiB",
            sweep.name, p.x
        );
    }
    Ok(())
}

impl Found {
    fn json(&self) -> Value {
        json!({
            "x": self.x,
            "seconds": self.seconds,
            "planned_bytes": self.planned_bytes,
            "peak_bytes": self.peak_bytes,
        })
    }
}

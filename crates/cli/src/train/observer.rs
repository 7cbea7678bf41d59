//! Keeps the log and draws the page while a run goes on.

use super::adapter::targets;
use super::events::{Clock, Log, before, step};
use super::page::{self, Summary, count};
use super::{Args, listed};
use crate::units::{Bytes, Count};
use anyhow::{Context, Result, bail};
use metal_candle::io::data::{Batcher, Examples};
use metal_candle::io::{LoraConfig, file};
use metal_candle::train::Report;
use metal_candle::{Plan, Workspace};
use serde_json::Value;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

/// Sees every report.
pub(super) struct Observer {
    clock: Clock,
    log: Option<Log>,
    page: Option<PathBuf>,
    summary: Option<Summary>,
    events: Vec<Value>,
    started: bool,
    /// What went wrong first.
    failed: Option<anyhow::Error>,
}

impl Observer {
    /// Fails where what is asked for cannot be written. What `writes` not only sees.
    pub(super) fn open(args: &Args, writes: bool) -> Result<Observer> {
        let (log, page) = (args.log.as_ref().filter(|_| writes), args.report.as_ref());
        let page = page.filter(|_| writes);
        if let Some(path) = page {
            // Whoever made the file may replace it; a page that is there is kept for --resume.
            let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
            let is_file = file.and_then(|file| Ok(file.metadata()?.is_file()));
            if !is_file.with_context(|| path.display().to_string())? {
                bail!("{}: expected a file, which the report could replace", path.display());
            }
        }
        Ok(Observer {
            clock: Clock::start(),
            log: log.map(|path| Log::open(path)).transpose()?,
            page: page.cloned(),
            summary: None,
            events: Vec::new(),
            started: false,
            failed: None,
        })
    }

    pub(super) fn describe(&mut self, summary: Summary) {
        self.summary = Some(summary);
    }

    /// Takes note of a report. Where that fails, training is told to stop: it saves, and
    /// [`Observer::finish`] says why.
    pub(super) fn see(&mut self, report: &Report, stop: &AtomicBool) {
        if self.failed.is_none()
            && let Err(error) = self.note(report)
        {
            self.failed = Some(error);
            stop.store(true, Ordering::Relaxed);
        }
    }

    /// Draws the last page.
    pub(super) fn finish(mut self) -> Result<()> {
        match self.failed.take() {
            Some(error) => Err(error.context("training was stopped and saved")),
            None => self.draw(),
        }
    }

    fn note(&mut self, report: &Report) -> Result<()> {
        let event = self.clock.event(report);
        if !self.started {
            self.start(matches!(report, Report::Resumed { .. }).then(|| step(&event)))?;
        }
        if let Some(log) = &mut self.log {
            log.write(&event)?;
        }
        self.events.push(event);
        match report {
            Report::Validation { .. } | Report::Saved { .. } => self.draw(),
            _ => Ok(()),
        }
    }

    /// Begins anew, or takes up what an earlier run has left.
    fn start(&mut self, resumed: Option<u64>) -> Result<()> {
        self.started = true;
        if let Some(log) = &mut self.log {
            log.begin(resumed)?;
        }
        if let (Some(page), Some(step)) = (&self.page, resumed) {
            let text = String::from_utf8_lossy(&file::read(page)?).into_owned();
            self.events = before(page::events(&text), step);
        }
        Ok(())
    }

    fn draw(&self) -> Result<()> {
        if let (Some(page), Some(summary)) = (&self.page, &self.summary) {
            file::write_atomic(page, page::html(summary, &self.events).as_bytes())?;
        }
        Ok(())
    }
}

/// What the page says beside the events; with the plan of a step go its workspaces; `examples` are those for training and for validation;
/// with the adapter's configuration goes how many parameters it has.
pub(super) fn summary(
    args: &Args,
    (plan, workspaces): (&Plan, &[Workspace]),
    examples: [Option<&Examples>; 2],
    batches: &Batcher,
    adapter: (&LoraConfig, usize),
) -> Result<Summary> {
    let mut data = vec![("Source".to_owned(), args.data.path()?.display().to_string())];
    for (name, examples) in ["Training", "Validation"].into_iter().zip(examples) {
        let Some(examples) = examples else { continue };
        let (rows, tokens) = (count(examples.examples.len()), count(examples.tokens));
        let trained = 100.0 * examples.trained_tokens as f64 / examples.tokens.max(1) as f64;
        data.push((
            name.to_owned(),
            format!("{rows} rows, {tokens} tokens, {trained:.0} % trained"),
        ));
        data.push((
            format!("{name}: cut, left out"),
            format!("{}, {}", count(examples.truncated), count(examples.untrained)),
        ));
    }
    let shapes: Vec<String> = batches.shapes().iter().map(|(_, width)| width.to_string()).collect();
    data.push(("Batches of an epoch".to_owned(), count(batches.batches_per_epoch())));
    data.push(("Widths of batches".to_owned(), shapes.join(", ")));
    data.push(("Padding".to_owned(), format!("{:.1} %", 100.0 * batches.occupancy().padding())));
    Ok(Summary {
        model: args.model.name(),
        iters: args.iters as u64,
        planned_bytes: plan.peak_bytes() as u64,
        max_gradient_norm: args.max_grad_norm,
        data,
        settings: settings(args, plan, workspaces, adapter),
    })
}

fn settings(
    args: &Args,
    plan: &Plan,
    workspaces: &[Workspace],
    (adapter, trainable): (&LoraConfig, usize),
) -> Vec<(String, String)> {
    let schedule = match (args.lr_schedule, args.warmup) {
        (schedule, 0) => format!("{schedule:?}").to_lowercase(),
        (schedule, warmup) => format!("{schedule:?}, {warmup} steps of warm-up").to_lowercase(),
    };
    let rows: [(&str, String); 14] = [
        ("Model", args.model.source().given().to_owned()),
        ("Device", args.model.device().named().to_string()),
        ("Adapter", args.adapter_path.display().to_string()),
        ("Target modules", targets(adapter)),
        (
            "Rank, alpha, dropout",
            format!("{}, {}, {}", adapter.r, adapter.lora_alpha, adapter.lora_dropout),
        ),
        ("Trainable parameters", Count(trainable as u64).to_string()),
        (
            "Batch size x accumulation",
            format!("{} x {}", args.batch_size, args.grad_accumulation_steps),
        ),
        (
            "Longest sequence",
            format!("{}{}", args.max_seq_length, if args.packing { ", packed" } else { "" }),
        ),
        ("Learning rate", format!("{:e}, {schedule}", args.learning_rate)),
        ("Weight decay, gradient clip", format!("{}, {}", args.weight_decay, args.max_grad_norm)),
        ("Prompts masked", if args.mask_prompt { "yes" } else { "no" }.to_owned()),
        ("Seed", args.seed.to_string()),
        ("Planned scratch memory", Bytes(plan.arena_bytes as u64).to_string()),
        ("Workspaces beside it", listed(workspaces).unwrap_or_else(|| "none".to_owned())),
    ];
    rows.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

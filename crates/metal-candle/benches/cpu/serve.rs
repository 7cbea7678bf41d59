//! Answers rows on standard input, a JSON line each.
//!
//! A question is `{"row": {..}, "warmup": 3, "calls": 5, "seconds": 0.3}`, and its answer the median of
//! the calls of so many seconds, at least so many calls: `{"seconds": 0.0012, "calls": 250,
//! "peak_bytes": ..}`, or `{"missing": "why"}`. A row is prepared and warmed up when it is first asked
//! for, and let go when another one is.

use crate::ops::Op;
use crate::{Failure, embed, model};
use metal_candle::Device;
use serde_json::{Value, json};
use std::io::{BufRead, Write};
use std::time::Instant;

/// How long to measure.
#[derive(Clone, Copy)]
pub(crate) struct Budget {
    pub(crate) warmup: usize,
    pub(crate) calls: usize,
    pub(crate) seconds: f64,
}

/// What the measured calls took.
pub(crate) struct Measured {
    /// The median.
    pub(crate) seconds: f64,
    pub(crate) calls: usize,
}

/// A row, ready to be called.
pub(crate) struct Prepared {
    /// Returns the seconds of what counts.
    pub(crate) call: Box<dyn FnMut() -> Result<f64, Failure>>,
    /// What the plan says that it holds at most.
    pub(crate) planned_bytes: Option<usize>,
    is_warm: bool,
}

impl Prepared {
    /// Work of which everything counts.
    pub(crate) fn new(mut work: impl FnMut() -> Result<(), Failure> + 'static) -> Prepared {
        Prepared::timed(move || {
            let start = Instant::now();
            work()?;
            Ok(start.elapsed().as_secs_f64())
        })
    }

    /// Work that looks at the clock itself.
    pub(crate) fn timed(call: impl FnMut() -> Result<f64, Failure> + 'static) -> Prepared {
        Prepared { call: Box::new(call), planned_bytes: None, is_warm: false }
    }

    pub(crate) fn measure(&mut self, budget: Budget) -> Result<Measured, Failure> {
        let warmup = if self.is_warm { 0 } else { budget.warmup };
        self.is_warm = true;
        for _ in 0..warmup {
            (self.call)()?;
        }
        let (mut times, start) = (Vec::new(), Instant::now());
        let is_open = |n: usize| start.elapsed().as_secs_f64() < budget.seconds && n < 20_000;
        while times.len() < budget.calls.max(1) || is_open(times.len()) {
            times.push((self.call)()?);
        }
        times.sort_unstable_by(f64::total_cmp);
        Ok(Measured { seconds: times[times.len() / 2], calls: times.len() })
    }
}

/// Until standard input ends.
pub(crate) fn lines(who: &str) -> Result<(), Failure> {
    let mut current: Option<(Value, Prepared)> = None;
    for line in std::io::stdin().lock().lines() {
        let question: Value = serde_json::from_str(&line?)?;
        let answer = answer(who, &question, &mut current);
        let answer = answer.unwrap_or_else(|why| json!({ "missing": why.to_string() }));
        // Nobody listens any more where the one who asked was stopped.
        let mut out = std::io::stdout().lock();
        if writeln!(out, "{answer}").and_then(|()| out.flush()).is_err() {
            break;
        }
    }
    Ok(())
}

fn answer(
    who: &str,
    question: &Value,
    current: &mut Option<(Value, Prepared)>,
) -> Result<Value, Failure> {
    let row = &question["row"];
    if current.as_ref().is_none_or(|(known, _)| known != row) {
        // The old one first, or both would be in memory.
        *current = None;
        *current = Some((row.clone(), prepare(who, row)?));
    }
    let (_, prepared) = current.as_mut().expect("it was just prepared");
    let budget = Budget {
        warmup: number(question, "warmup")?,
        calls: number(question, "calls")?,
        seconds: question["seconds"].as_f64().ok_or("no seconds")?,
    };
    let Measured { seconds, calls } = prepared.measure(budget)?;
    Ok(json!({
        "seconds": seconds,
        "calls": calls,
        // As far as the system says.
        "peak_bytes": Device::Cpu.memory().map(|memory| memory.peak_bytes),
        "planned_bytes": prepared.planned_bytes,
    }))
}

fn prepare(who: &str, row: &Value) -> Result<Prepared, Failure> {
    match (who, text(row, "work")?) {
        ("ours", "train") => model::train(row),
        ("ours", "prefill") => model::prefill(row),
        ("ours", "decode") => model::decode(row),
        ("ours", "overhead") => model::overhead(row),
        ("ours", "embed") => embed::embed(row),
        ("ours", _) => Ok(Prepared::lazy(&Op::parse(row)?)),
        ("candle", _) => Ok(Prepared::eager(&Op::parse(row)?)),
        _ => Err(format!("nobody is called {who:?}: expected ours or candle").into()),
    }
}

pub(crate) fn number(value: &Value, key: &str) -> Result<usize, Failure> {
    let n = value[key].as_u64().ok_or_else(|| format!("{value}: expected a number {key}"))?;
    Ok(n as usize)
}

pub(crate) fn text<'v>(value: &'v Value, key: &str) -> Result<&'v str, Failure> {
    Ok(value[key].as_str().ok_or_else(|| format!("{value}: expected a text {key}"))?)
}

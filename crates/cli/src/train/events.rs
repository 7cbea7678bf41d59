//! What happened in a run, as JSON objects: for the log, and for the page that is drawn from them.

use anyhow::{Context, Result};
use metal_candle::Device;
use metal_candle::io::file;
use metal_candle::train::Report;
use serde_json::{Value, json};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// One JSON object per line, each written as it happens.
pub(super) struct Log {
    path: PathBuf,
    file: File,
}

/// Makes events of reports; knows the time since its start.
pub(crate) struct Clock(Instant);

impl Clock {
    pub(crate) fn start() -> Clock {
        Clock(Instant::now())
    }

    /// What is told, as an object with the name of the event, the step and the seconds so far.
    pub(crate) fn event(&self, report: &Report) -> Value {
        let mut event = match report {
            Report::Train {
                step,
                loss,
                rate,
                gradient_norm,
                trained_tokens_per_second,
                tokens_per_second,
            } => json!({
                "event": "train", "step": step, "loss": number(*loss), "learning_rate": rate,
                "gradient_norm": number(*gradient_norm),
                "tokens_per_second": tokens_per_second.round() as u64,
                "trained_tokens_per_second": trained_tokens_per_second.round() as u64,
            }),
            Report::Validation { step, loss, is_best } => json!({
                "event": "validation", "step": step, "loss": number(*loss), "is_best": is_best,
            }),
            Report::Skipped { step, loss, gradient_norm, culprit } => json!({
                "event": "skipped", "step": step, "loss": number(*loss),
                "gradient_norm": number(*gradient_norm), "culprit": culprit,
            }),
            Report::Resumed { step } => json!({ "event": "resumed", "step": step }),
            Report::Saved { step } => json!({ "event": "saved", "step": step }),
            Report::Stopped { step } => json!({ "event": "stopped", "step": step }),
            Report::Stale { step } => json!({ "event": "stale", "step": step }),
        };
        event["seconds"] = ((self.0.elapsed().as_secs_f64() * 1e3).round() / 1e3).into();
        if let Some(memory) = Device::Cpu.memory() {
            event["resident_bytes"] = memory.used_bytes.into();
            event["peak_resident_bytes"] = memory.peak_bytes.into();
        }
        event
    }
}

/// An f32 as people write it, not as the f64 nearest to it. JSON has no NaN: it becomes null.
fn number(x: f32) -> Value {
    x.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

/// The step of an event; 0 where it has none.
pub(crate) fn step(event: &Value) -> u64 {
    event["step"].as_u64().unwrap_or(0)
}

/// The events of earlier runs that a run that goes on from `step` does not repeat.
pub(crate) fn before(events: Vec<Value>, step_resumed: u64) -> Vec<Value> {
    events.into_iter().filter(|event| step(event) <= step_resumed).collect()
}

impl Log {
    /// Opens the file, which must be writable, and leaves it as it is.
    pub(crate) fn open(path: &Path) -> Result<Log> {
        let file = OpenOptions::new().append(true).create(true).open(path);
        let file = file.with_context(|| path.display().to_string())?;
        Ok(Log { path: path.to_owned(), file })
    }

    /// Begins anew, or keeps what a run that goes on from this step does not repeat: neither what
    /// came after its checkpoint, nor half a line.
    pub(crate) fn begin(&mut self, resumed: Option<u64>) -> Result<()> {
        // A terminal or a pipe has nothing to keep, and must not be replaced by a file.
        let is_file = self.file.metadata().is_ok_and(|metadata| metadata.is_file());
        if !is_file {
            return Ok(());
        }
        let kept = match resumed {
            None => Vec::new(),
            Some(step) => before(read(&self.path)?, step),
        };
        let mut text = String::new();
        for event in kept {
            text += &format!("{event}\n");
        }
        file::write_atomic(&self.path, text.as_bytes())?;
        *self = Log::open(&self.path)?;
        Ok(())
    }

    /// Writes one event, and sees it into the file.
    pub(crate) fn write(&mut self, event: &Value) -> Result<()> {
        let line = format!("{event}\n");
        let written = self.file.write_all(line.as_bytes());
        written.with_context(|| self.path.display().to_string())
    }
}

/// The lines of a log that are whole.
fn read(path: &Path) -> Result<Vec<Value>> {
    let bytes = file::read(path)?;
    let lines = bytes.split(|byte| *byte == b'\n');
    Ok(lines.filter_map(|line| serde_json::from_slice(line).ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::{Clock, Log, number, read, step};
    use metal_candle::train::Report;

    #[test]
    fn a_log_that_goes_on_has_every_step_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        let clock = Clock::start();
        let mut log = Log::open(&path).unwrap();
        log.begin(None).unwrap();
        for step in 1..=4 {
            log.write(&clock.event(&Report::Saved { step })).unwrap();
        }
        // Killed within a line.
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, [&whole[..], b"{\"event\": \"sav"].concat()).unwrap();
        let mut log = Log::open(&path).unwrap();
        log.begin(Some(2)).unwrap();
        log.write(&clock.event(&Report::Resumed { step: 2 })).unwrap();
        log.write(&clock.event(&Report::Saved { step: 3 })).unwrap();
        let steps: Vec<u64> = read(&path).unwrap().iter().map(step).collect();
        assert_eq!(steps, [1, 2, 2, 3]);
        // A run that begins anew has a log of its own.
        Log::open(&path).unwrap().begin(None).unwrap();
        assert!(std::fs::read(&path).unwrap().is_empty());
    }

    #[test]
    fn numbers_are_written_as_people_would() {
        assert_eq!(number(0.1).to_string(), "0.1");
        assert!(number(f32::NAN).is_null() && number(f32::INFINITY).is_null());
    }
}

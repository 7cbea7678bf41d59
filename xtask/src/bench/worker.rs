//! Processes that measure: a question is a line, and so is its answer.

use anyhow::{Context, Result};
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// One of them. It sleeps while another one measures, and ends when it is dropped.
pub(super) struct Worker {
    name: String,
    log: PathBuf,
    child: Child,
    questions: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Worker {
    /// Starts it; what it says beside its answers goes to `log`.
    pub(super) fn start(name: &str, command: &mut Command, log: PathBuf) -> Result<Worker> {
        let errors = File::create(&log).with_context(|| log.display().to_string())?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(errors);
        let mut child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        let questions = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().context("it has an output")?);
        Ok(Worker { name: name.to_owned(), log, child, questions, answers })
    }

    pub(super) fn ask(&mut self, question: &str) -> Result<Value> {
        let ended = || format!("{} ended: see {}", self.name, self.log.display());
        let questions = self.questions.as_mut().with_context(ended)?;
        writeln!(questions, "{question}").with_context(ended)?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer).with_context(ended)?;
        serde_json::from_str(&answer).with_context(ended)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.questions = None;
        // It was started here, and has nothing left to do.
        let _ = self.child.wait();
    }
}

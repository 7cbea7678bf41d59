//! What the trainer tells while it runs.

use crate::io::data::Batch;
use std::time::Instant;

/// What the trainer tells while it runs. Steps count iterations from 1.
#[derive(Clone, Debug, PartialEq)]
pub enum Report {
    /// The mean over the iterations since the last report.
    Train {
        /// Iterations done.
        step: usize,
        /// Mean loss.
        loss: f32,
        /// The last learning rate.
        rate: f64,
        /// Norm of the last gradient, before clipping.
        gradient_norm: f32,
        /// Trained tokens (labels that count) a second.
        trained_tokens_per_second: f64,
        /// Tokens a second, padding included.
        tokens_per_second: f64,
    },
    /// A validation.
    Validation {
        /// Iterations done.
        step: usize,
        /// Mean loss over the validation's batches, weighted by their tokens.
        loss: f32,
        /// Whether it is the lowest so far.
        is_best: bool,
    },
    /// An update was skipped because a value was not finite.
    Skipped {
        /// The number of the step.
        step: usize,
        /// Its loss.
        loss: f32,
        /// Its gradient's norm.
        gradient_norm: f32,
        /// The first parameter whose gradient was not finite.
        culprit: Option<String>,
    },
    /// The run goes on from a checkpoint.
    Resumed {
        /// Iterations that were done.
        step: usize,
    },
    /// Adapter and checkpoint were written.
    Saved {
        /// Iterations done.
        step: usize,
    },
    /// Training was told to end early.
    Stopped {
        /// Iterations done.
        step: usize,
    },
    /// Training ends early because the validation loss no longer falls.
    Stale {
        /// Iterations done.
        step: usize,
    },
}

/// What happened since the last report.
pub(super) struct Window {
    started: Instant,
    loss: f64,
    steps: usize,
    tokens: usize,
    trained: usize,
}

impl Window {
    pub(super) fn start() -> Window {
        Window { started: Instant::now(), loss: 0.0, steps: 0, tokens: 0, trained: 0 }
    }

    pub(super) fn add(&mut self, batches: &[Batch], loss: f32) {
        self.loss += f64::from(loss);
        self.steps += 1;
        self.tokens += batches.iter().map(|b| b.ids.len()).sum::<usize>();
        self.trained += batches.iter().map(|b| b.trained).sum::<usize>();
    }

    pub(super) fn close(&mut self, step: usize, rate: f64, gradient_norm: f32) -> Report {
        let seconds = self.started.elapsed().as_secs_f64();
        let done = std::mem::replace(self, Window::start());
        Report::Train {
            step,
            loss: (done.loss / done.steps as f64) as f32,
            rate,
            gradient_norm,
            trained_tokens_per_second: done.trained as f64 / seconds,
            tokens_per_second: done.tokens as f64 / seconds,
        }
    }
}

//! The loop around the step: batches, schedule, validation, checkpoints, reports.

use super::{AdamWConfig, LRScheduler, TrainStep};
use crate::error::ErrorKind;
use crate::io::data::{Batch, BatchOptions, Batcher, Example, Order};
use crate::models::Decoder;
use crate::nn::LoRAAdapter;
use crate::{Device, Plan, Result};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

/// How to train.
#[derive(Clone, Debug)]
pub struct TrainingConfig {
    /// Updates in all.
    pub iters: usize,
    /// Rows of a batch.
    pub batch_size: usize,
    /// Tokens of a row, at most.
    pub max_seq_length: usize,
    /// The learning rate over the updates.
    pub schedule: LRScheduler,
    /// The optimizer.
    pub optimizer: AdamWConfig,
    /// Gradients of a larger norm are scaled down to this one.
    pub max_gradient_norm: f64,
    /// Orders the batches.
    pub seed: u64,
    /// Updates between two reports.
    pub steps_per_report: usize,
    /// Updates between two validations.
    pub steps_per_eval: usize,
    /// Batches of one validation, at most; 0 is all.
    pub val_batches: usize,
    /// Updates between two saved adapters; 0 is only at the end.
    pub save_every: usize,
    /// Where the adapter goes.
    pub adapter_path: Option<PathBuf>,
}

/// What the trainer tells while it runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Report {
    /// The mean over the updates since the last report.
    Train {
        /// Updates done.
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
        /// Updates done.
        step: usize,
        /// Mean loss over the validation's batches, weighted by their tokens.
        loss: f32,
    },
    /// An update was skipped because a value was not finite.
    Skipped {
        /// The number of the step.
        step: usize,
        /// Its loss.
        loss: f32,
        /// Its gradient's norm.
        gradient_norm: f32,
    },
    /// The adapter was written.
    Saved {
        /// Updates done.
        step: usize,
    },
}

/// Fine-tunes an adapter on a frozen decoder.
pub struct Trainer {
    config: TrainingConfig,
    step: TrainStep,
}

impl Trainer {
    /// # Errors
    /// As [`TrainStep::new`].
    pub fn new(
        decoder: Arc<Decoder>,
        adapter: LoRAAdapter,
        config: TrainingConfig,
    ) -> Result<Self> {
        let device = Device::Cpu;
        let norm = config.max_gradient_norm;
        let step = TrainStep::new(decoder, adapter, config.optimizer, norm, config.seed, &device)?;
        Ok(Trainer { config, step })
    }

    /// Runs all updates, telling `report` what happens; returns the trained adapter.
    ///
    /// # Errors
    /// Where there is nothing to train on, a step fails, or the adapter cannot be written.
    pub fn train(
        &mut self,
        train: &[Example],
        valid: &[Example],
        mut report: impl FnMut(Report),
    ) -> Result<LoRAAdapter> {
        let c = self.config.clone();
        let mut batches = self.batcher(train, Order::Shuffled { seed: c.seed })?;
        if !valid.is_empty() {
            self.validate(valid, 0, &mut report)?;
        }
        let mut window = Window::start();
        for i in 0..c.iters {
            let batch = batches.next_batch();
            let rate = c.schedule.rate(i);
            let metrics = self.step.run(&batch, rate)?;
            let (loss, gradient_norm) = (metrics.loss, metrics.gradient_norm);
            if !metrics.applied {
                report(Report::Skipped { step: i + 1, loss, gradient_norm });
            }
            window.add(&batch, loss);
            if (i + 1).is_multiple_of(c.steps_per_report.max(1)) || i + 1 == c.iters {
                report(window.close(i + 1, rate, gradient_norm));
            }
            let last = i + 1 == c.iters;
            if !valid.is_empty() && (last || (i + 1).is_multiple_of(c.steps_per_eval.max(1))) {
                self.validate(valid, i + 1, &mut report)?;
                window = Window::start();
            }
            if last || c.save_every > 0 && (i + 1).is_multiple_of(c.save_every) {
                self.save(i + 1, &mut report)?;
            }
        }
        self.step.adapter()
    }

    /// The plan of a step on the largest batch that these examples make.
    ///
    /// # Errors
    /// Where they make no batch, or the step cannot be traced.
    pub fn plan(&self, train: &[Example]) -> Result<Plan> {
        let batches = self.batcher(train, Order::File)?;
        let (batch, seq) = batches.shapes()[0];
        let (ids, labels) = (vec![0; batch * seq], vec![0; batch * seq]);
        self.step.plan(&Batch { ids, labels, batch, seq, trained: 0 })
    }

    fn validate(
        &self,
        valid: &[Example],
        step: usize,
        report: &mut impl FnMut(Report),
    ) -> Result<()> {
        let c = &self.config;
        let mut batches = self.batcher(valid, Order::File)?;
        let all = batches.batches_per_epoch();
        let n = if c.val_batches == 0 { all } else { all.min(c.val_batches) };
        let (mut sum, mut tokens) = (0.0, 0usize);
        for _ in 0..n {
            let batch = batches.next_batch();
            let trained = batch.trained;
            sum += f64::from(self.step.evaluate(&batch)?) * trained as f64;
            tokens += trained;
        }
        report(Report::Validation { step, loss: (sum / tokens.max(1) as f64) as f32 });
        Ok(())
    }

    fn batcher(&self, examples: &[Example], order: Order) -> Result<Batcher> {
        let TrainingConfig { batch_size, max_seq_length, .. } = self.config;
        let options = BatchOptions { batch_size, max_seq_length, order };
        Batcher::new(examples.to_vec(), options).map_err(|e| ErrorKind::Data(e).into())
    }

    fn save(&self, step: usize, report: &mut impl FnMut(Report)) -> Result<()> {
        if let Some(path) = &self.config.adapter_path {
            self.step.adapter()?.save(path)?;
            report(Report::Saved { step });
        }
        Ok(())
    }
}

/// What happened since the last report.
struct Window {
    started: Instant,
    loss: f64,
    steps: usize,
    tokens: usize,
    trained: usize,
}

impl Window {
    fn start() -> Window {
        Window { started: Instant::now(), loss: 0.0, steps: 0, tokens: 0, trained: 0 }
    }

    fn add(&mut self, batch: &Batch, loss: f32) {
        self.loss += f64::from(loss);
        self.steps += 1;
        self.tokens += batch.ids.len();
        self.trained += batch.trained;
    }

    fn close(&mut self, step: usize, rate: f64, gradient_norm: f32) -> Report {
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

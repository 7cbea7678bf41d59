//! The loop around the step: batches, schedule, validation, checkpoints, reports.

mod resume;

use super::checkpoint::Progress;
use super::report::{Report, Window};
use super::submit::Finished;
use super::{StepMetrics, TrainStep, TrainingConfig, fit};
use crate::error::ErrorKind;
use crate::io::data::{Batch, Batcher, Example, Order};
use crate::io::file;
use crate::models::Decoder;
use crate::nn::LoRAAdapter;
use crate::{Outline, Plan, Result, Workspace, World};
use serde_json::{Map, Value};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The folder of the best adapter, in the adapter's.
const BEST: &str = "best";

/// Updates that may be skipped in a row.
const SKIPPED_MOST: usize = 20;

/// What a run carries from one step to the next.
struct Run<'a, R> {
    valid: &'a [Example],
    /// What a run that goes on from this one must have in common with it.
    settings: Map<String, Value>,
    progress: Progress,
    /// What the steps did since the last report.
    window: Window,
    /// Updates that were skipped in a row.
    skipped: usize,
    report: R,
}

/// Fine-tunes an adapter on a frozen decoder.
pub struct Trainer {
    config: TrainingConfig,
    decoder: Arc<Decoder>,
    step: TrainStep,
    stop: Arc<AtomicBool>,
}

impl Trainer {
    /// Trains `adapter` from the values that it has; the decoder stays as it is.
    ///
    /// # Errors
    /// As [`TrainStep::new`].
    pub fn new(
        decoder: Arc<Decoder>,
        adapter: LoRAAdapter,
        config: TrainingConfig,
    ) -> Result<Self> {
        let (norm, seed) = (config.max_gradient_norm, config.seed);
        let base = Arc::clone(&decoder);
        let step = TrainStep::new(base, adapter, config.optimizer, norm, seed)?;
        let step = if config.prepack_weights { step.prepacking() } else { step };
        Ok(Trainer { config, decoder, step, stop: Arc::default() })
    }

    /// Ends training after the step in which `stop` becomes true, saved so that it can go on.
    #[must_use]
    pub fn stop_when(mut self, stop: Arc<AtomicBool>) -> Self {
        self.stop = stop;
        self
    }

    /// Trains together with the other ranks of a world, each on rows of its own of every batch, which has
    /// [`batch_size`](TrainingConfig::batch_size) of each: the losses are those of one rank with so many times the rows.
    /// Only rank 0 validates and writes.
    ///
    /// # Errors
    /// As [`TrainStep::within`].
    pub fn within(mut self, world: Arc<World>) -> Result<Self> {
        self.step = self.step.within(world)?;
        Ok(self)
    }

    /// Runs all iterations that are left, telling `report` what happens; returns the trained adapter.
    ///
    /// # Errors
    /// Where there is nothing to train on, a step fails, the checkpoint to resume from is another run's, the
    /// adapter cannot be written, a step does not fit into memory, the base holds a weight that is not finite, 20
    /// updates in a row are skipped, or another rank is lost or trains something else.
    pub fn train(
        &mut self,
        train: &[Example],
        valid: &[Example],
        report: impl FnMut(Report),
    ) -> Result<LoRAAdapter> {
        let c = self.config.clone();
        let mut batches = self.batches(train)?;
        let mut run = self.begin(train, valid, &mut batches, report)?;
        let mut waiting: Option<(usize, Vec<Batch>)> = None;
        while run.progress.iteration < c.iters {
            let rate = c.schedule.rate(run.progress.iteration);
            let micro: Vec<Batch> =
                (0..c.grad_accumulation_steps.max(1)).map(|_| batches.next_batch()).collect();
            let asked = self.stop.load(Ordering::Relaxed);
            let before = self.step.submit_or_stop(&micro, rate, asked)?;
            run.progress.iteration += 1;
            run.progress.cursor = batches.cursor();
            let step = run.progress.iteration;
            if let (Some(finished), Some((step, micro))) = (before, waiting.take()) {
                self.settle(&mut run, step, &micro, finished.metrics)?;
            }
            // While the device works on, the next batch is made; but not past what wants to see this step's end.
            if self.step.is_running() && !c.pauses_after(step) && !self.stops_alone() {
                waiting = Some((step, micro));
                continue;
            }
            let finished = self.step.finish_or_stop()?;
            let Finished { metrics, stopped } =
                finished.expect("metal-candle bug: a step that was submitted is missing");
            self.settle(&mut run, step, &micro, metrics)?;
            run.progress.count = self.step.count();
            // Ranks stop after the same step.
            let stopped = stopped || self.stops_alone();
            if self.pause(&mut run, rate, metrics.gradient_norm, stopped)? {
                break;
            }
        }
        self.step.adapter()
    }

    /// Checks what can be checked before the first step, and looks where that is.
    fn begin<'a, R: FnMut(Report)>(
        &mut self,
        train: &[Example],
        valid: &'a [Example],
        batches: &mut Batcher,
        mut report: R,
    ) -> Result<Run<'a, R>> {
        let settings = self.settings(train)?;
        if let Some(folder) = self.config.adapter_path.as_ref().filter(|_| self.is_first()) {
            // Said now, and not after the first hundred steps.
            file::check_writable(folder)?;
        }
        let shape = self.config.shape(Some(train), self.ranks())?;
        fit::check(self.decoder.device(), shape, |shape| self.step.plan_with_workspaces(shape))?;
        let progress = self.start(batches, &settings, &mut report)?;
        self.check_ranks(&settings, &progress)?;
        let window = Window::start();
        let mut run = Run { valid, settings, progress, window, skipped: 0, report };
        if !valid.is_empty() && run.progress.iteration == 0 {
            self.validate(&mut run)?;
        }
        Ok(run)
    }

    /// Takes note of what a step did.
    fn settle(
        &self,
        run: &mut Run<impl FnMut(Report)>,
        step: usize,
        micro: &[Batch],
        metrics: StepMetrics,
    ) -> Result<()> {
        let StepMetrics { loss, gradient_norm, applied } = metrics;
        run.skipped = if applied { 0 } else { run.skipped + 1 };
        if run.skipped > 0 {
            let culprit = self.step.diagnose(micro)?;
            self.give_up(run.skipped, culprit.as_deref())?;
            (run.report)(Report::Skipped { step, loss, gradient_norm, culprit });
        }
        run.window.add(micro, loss);
        Ok(())
    }

    /// Reports, validates and saves, each where it is time for it; says whether training is over.
    fn pause(
        &self,
        run: &mut Run<impl FnMut(Report)>,
        rate: f64,
        gradient_norm: f32,
        stopped: bool,
    ) -> Result<bool> {
        let (c, step) = (&self.config, run.progress.iteration);
        let mut done = step == c.iters || stopped;
        if done || c.reports_after(step) {
            (run.report)(run.window.close(step, rate, gradient_norm));
        }
        if !run.valid.is_empty() && c.validates_after(step) && !stopped {
            self.validate(run)?;
            done |= c.patience > 0 && self.any(run.progress.stale >= c.patience)?;
        }
        if done || c.saves_after(step) {
            self.save(&run.progress, &run.settings, &mut run.report)?;
        }
        if done && step < c.iters {
            let ended = if stopped { Report::Stopped { step } } else { Report::Stale { step } };
            (run.report)(ended);
        }
        Ok(done)
    }

    /// One alone need not ask others whether to stop.
    fn stops_alone(&self) -> bool {
        self.ranks() == 1 && self.stop.load(Ordering::Relaxed)
    }

    /// The plan of a step on the largest batches that these examples make.
    ///
    /// # Errors
    /// Where they make no batch, or the step cannot be traced.
    pub fn plan(&self, train: &[Example]) -> Result<Plan> {
        self.step.plan(self.config.shape(Some(train), self.ranks())?)
    }

    /// [`Trainer::plan`], and what its runs hold on the device beside it.
    ///
    /// # Errors
    /// As [`Trainer::plan`].
    pub fn plan_with_workspaces(&self, train: &[Example]) -> Result<(Plan, Vec<Workspace>)> {
        self.step.plan_with_workspaces(self.config.shape(Some(train), self.ranks())?)
    }

    /// The step of a training with this configuration on the largest batches that `train` makes, or
    /// without it on the largest that any data make within the model's context; nothing is allocated, and the decoder's
    /// weights may be placeholders.
    ///
    /// # Errors
    /// As [`Trainer::plan`].
    pub fn outline(
        decoder: Arc<Decoder>,
        adapter: &LoRAAdapter,
        config: &TrainingConfig,
        train: Option<&[Example]>,
    ) -> Result<Outline> {
        let mut shape = config.shape(train, 1)?;
        if train.is_none() {
            shape.seq = shape.seq.min(decoder.config.max_position_embeddings);
        }
        TrainStep::outline(decoder, adapter, config.optimizer, config.max_gradient_norm, shape)
    }

    /// The batches that these examples make, from the first one on.
    ///
    /// # Errors
    /// Where they make none.
    pub fn batches(&self, train: &[Example]) -> Result<Batcher> {
        self.config.batcher(train, Order::Shuffled { seed: self.config.seed }, self.ranks())
    }

    fn ranks(&self) -> usize {
        self.step.ranks().map_or(1, |ranks| ranks.world().size())
    }

    /// Whether it is for this rank to validate and to write.
    fn is_first(&self) -> bool {
        self.step.ranks().is_none_or(|ranks| ranks.world().rank() == 0)
    }

    fn any(&self, says_so: bool) -> Result<bool> {
        self.step.ranks().map_or(Ok(says_so), |ranks| ranks.any(says_so))
    }

    /// Sees that all ranks begin the same run at the same place.
    fn check_ranks(&self, settings: &Map<String, Value>, progress: &Progress) -> Result<()> {
        let Some(ranks) = self.step.ranks() else { return Ok(()) };
        let settings = Value::Object(settings.clone());
        ranks.check_same(&format!("{settings} {}", progress.iteration))
    }

    /// An error where going on is in vain: where the base itself is broken, or nothing is learnt any more.
    fn give_up(&self, skipped: usize, culprit: Option<&str>) -> Result<()> {
        if self.step.updates() == 0 && skipped == 1 {
            // No step was ever good: a damaged model would make none of them so.
            self.decoder.check_weights()?;
        }
        if skipped < SKIPPED_MOST {
            return Ok(());
        }
        let culprit = culprit.unwrap_or("the loss").to_owned();
        Err(ErrorKind::NoUpdate { skipped, culprit }.into())
    }

    /// Measures the loss of the validation data, and keeps the adapter of the lowest one.
    fn validate(&self, run: &mut Run<impl FnMut(Report)>) -> Result<()> {
        if self.is_first() {
            let loss = self.validation_loss(run.valid)?;
            let progress = &mut run.progress;
            // What is not finite is never the best: nothing would be lower.
            let is_best = loss.is_finite() && progress.best.is_none_or(|best| loss < best);
            (run.report)(Report::Validation { step: progress.iteration, loss, is_best });
            if is_best {
                (progress.best, progress.stale) = (Some(loss), 0);
                let path = self.config.adapter_path.as_ref();
                if let Some(path) = path.filter(|_| progress.iteration > 0) {
                    self.step.adapter()?.save(path.join(BEST))?;
                }
            } else {
                progress.stale += 1;
            }
        }
        // The time that this took is no step's.
        run.window = Window::start();
        Ok(())
    }

    /// The mean over the trained tokens of so many batches as are configured.
    fn validation_loss(&self, valid: &[Example]) -> Result<f32> {
        // As many rows as one rank with the batches of all would take.
        let limit = self.config.val_batches * self.ranks();
        let mut batches = self.config.batcher(valid, Order::File, 1)?;
        let all = batches.batches_per_epoch();
        let n = if limit == 0 { all } else { all.min(limit) };
        let (mut sum, mut tokens) = (0.0, 0usize);
        for _ in 0..n {
            let batch = batches.next_batch();
            sum += f64::from(self.step.evaluate(&batch)?) * batch.trained as f64;
            tokens += batch.trained;
        }
        Ok((sum / tokens.max(1) as f64) as f32)
    }
}

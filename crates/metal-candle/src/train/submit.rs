//! Steps that are asked for, and what they did.

use super::step::{StepMetrics, TrainStep, scalar};
use crate::io::data::Batch;
use crate::transform::Underway;
use crate::{LazyTensor, Result, Timing};

/// A step whose metrics nobody has read.
pub(super) enum Submitted {
    /// The device may be at work on it.
    Running(Underway),
    /// The results but the state.
    Over(Vec<Option<LazyTensor>>),
}

/// What one step did, and whether any rank was asked to stop.
#[derive(Clone, Copy, Debug)]
pub(super) struct Finished {
    pub(super) metrics: StepMetrics,
    pub(super) stopped: bool,
}

impl TrainStep {
    /// One update on one batch, at this learning rate.
    ///
    /// # Errors
    /// Where an id or a label is out of range, or memory runs out; the state is then lost with the step.
    pub fn run(&mut self, batch: &Batch, rate: f64) -> Result<StepMetrics> {
        self.run_accumulated(std::slice::from_ref(batch), rate)
    }

    /// One update on several batches, one after the other within one plan: as if they were one, in the memory of
    /// one. The metrics of a step that was submitted before are dropped.
    ///
    /// # Errors
    /// As [`TrainStep::run`].
    pub fn run_accumulated(&mut self, batches: &[Batch], rate: f64) -> Result<StepMetrics> {
        self.finish()?;
        self.submit(batches, rate)?;
        Ok(self.finish()?.expect("metal-candle bug: a step that was submitted is missing"))
    }

    /// [`TrainStep::run_accumulated`] without waiting for it, where the device works by itself (NVIDIA's GPUs; not among
    /// several ranks). Returns what the step did that was submitted before, if nobody has asked: that is waited for while
    /// the device is at work on this one. So at most one step is ahead, and all steps do what they do one by one,
    /// bit for bit.
    ///
    /// # Errors
    /// As [`TrainStep::run`], for either step.
    pub fn submit(&mut self, batches: &[Batch], rate: f64) -> Result<Option<StepMetrics>> {
        let finished = self.submit_or_stop(batches, rate, false)?;
        Ok(finished.map(|finished| finished.metrics))
    }

    /// Waits for the step that was submitted last; `None` if all are finished.
    ///
    /// # Errors
    /// As [`TrainStep::run`].
    pub fn finish(&mut self) -> Result<Option<StepMetrics>> {
        Ok(self.finish_or_stop()?.map(|finished| finished.metrics))
    }

    /// Whether a step was submitted and the device may still be at work on it.
    pub fn is_running(&self) -> bool {
        matches!(&self.submitted, Some(Submitted::Running(run)) if !run.is_over())
    }

    /// [`TrainStep::submit`]; `stop` asks all ranks to stop after this step.
    pub(super) fn submit_or_stop(
        &mut self,
        batches: &[Batch],
        rate: f64,
        stop: bool,
    ) -> Result<Option<Finished>> {
        let args = self.take_arguments(batches, rate, stop)?;
        let mut run = self.step.start(args)?;
        let before = self.submitted.take();
        let mut state: Vec<_> = self.state_results().map(|i| run.take(i)).collect();
        self.submitted = Some(if state.iter().any(Option::is_none) {
            // A part of the state comes by way of the host.
            let mut results = run.wait()?;
            let rest = results.split_off(self.state_results().start);
            state.iter_mut().zip(rest).for_each(|(x, rest)| *x = x.take().or(rest));
            Submitted::Over(results)
        } else {
            Submitted::Running(run)
        });
        self.state = state.into_iter().collect::<Option<_>>().expect(MISSING);
        before.map(|before| self.land(before)).transpose()
    }

    /// [`TrainStep::finish`]
    pub(super) fn finish_or_stop(&mut self) -> Result<Option<Finished>> {
        self.submitted.take().map(|last| self.land(last)).transpose()
    }

    /// [`TrainStep::run`], and the seconds that it took on the device: of each step of its plan, or of all.
    ///
    /// # Errors
    /// As [`TrainStep::run`].
    pub fn profile(
        &mut self,
        batch: &Batch,
        rate: f64,
        timing: Timing,
    ) -> Result<(StepMetrics, Vec<f64>)> {
        self.finish()?;
        let args = self.take_arguments(std::slice::from_ref(batch), rate, false)?;
        let (mut results, seconds) = self.step.profile(args, timing)?;
        self.state = results.split_off(self.state_results().start);
        let results = results.into_iter().map(Some).collect();
        Ok((self.land(Submitted::Over(results))?.metrics, seconds))
    }

    /// Where among the results the state is.
    fn state_results(&self) -> std::ops::Range<usize> {
        let start = 3 + usize::from(self.traced.in_world);
        start..start + self.traced.state_len()
    }

    /// The state, which the step takes along, and what changes from step to step.
    fn take_arguments(
        &mut self,
        batches: &[Batch],
        rate: f64,
        stop: bool,
    ) -> Result<Vec<LazyTensor>> {
        let rest = self.arguments(batches, rate, stop)?;
        let mut args = std::mem::take(&mut self.state);
        args.extend(rest);
        self.count.steps += 1;
        Ok(args)
    }

    fn land(&mut self, submitted: Submitted) -> Result<Finished> {
        let results = match submitted {
            Submitted::Running(run) => run.wait()?,
            Submitted::Over(results) => results,
        };
        let number = |result: &Option<LazyTensor>| scalar(result.as_ref().expect(MISSING));
        let (gradient_norm, loss) = (number(&results[1])?, number(&results[2])?);
        let applied = loss.is_finite() && gradient_norm.is_finite();
        self.count.updates += usize::from(applied);
        let asked = if self.traced.in_world { number(&results[3])? } else { 0.0 };
        Ok(Finished { metrics: StepMetrics { loss, gradient_norm, applied }, stopped: asked > 0.0 })
    }
}

const MISSING: &str = "metal-candle bug: a result of the step is missing";

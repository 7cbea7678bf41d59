//! What a training is told.

use super::{AdamWConfig, LRScheduler, StepShape};
use crate::Result;
use crate::error::ErrorKind;
use crate::io::data::{BatchOptions, Batcher, Example, Order};
use std::path::PathBuf;

/// How to train.
#[derive(Clone, Debug)]
pub struct TrainingConfig {
    /// Iterations in all: one update each.
    pub iters: usize,
    /// Rows of a batch, of each rank if there are several.
    pub batch_size: usize,
    /// Batches of an update.
    pub grad_accumulation_steps: usize,
    /// Tokens of a row, at most.
    pub max_seq_length: usize,
    /// Whether several examples share a row, kept apart in attention, so that little is padding.
    pub packing: bool,
    /// Whether frozen matrices are laid out once for the CPU's products, for more memory ([`Compiled::prepacking`]).
    ///
    /// [`Compiled::prepacking`]: crate::Compiled::prepacking
    pub prepack_weights: bool,
    /// The learning rate over the iterations.
    pub schedule: LRScheduler,
    /// The optimizer.
    pub optimizer: AdamWConfig,
    /// Gradients of a larger norm are scaled down to this one.
    pub max_gradient_norm: f64,
    /// Orders the batches and picks what is dropped.
    pub seed: u64,
    /// Iterations between two reports.
    pub steps_per_report: usize,
    /// Iterations between two validations.
    pub steps_per_eval: usize,
    /// Batches of one validation, at most; 0 is all.
    pub val_batches: usize,
    /// Validations without a lower loss after which training ends; 0 is never.
    pub patience: usize,
    /// Iterations between two checkpoints; 0 is only at the end.
    pub save_every: usize,
    /// Where the adapter goes: the last one into the folder itself, the one of the lowest validation loss into
    /// `best`, and what is needed to go on into `training_state.safetensors`.
    pub adapter_path: Option<PathBuf>,
    /// Go on where the run in `adapter_path` stopped.
    pub resume: bool,
}

impl Default for TrainingConfig {
    /// mlx-lm's defaults, with clipping.
    fn default() -> Self {
        TrainingConfig {
            iters: 1000,
            batch_size: 4,
            grad_accumulation_steps: 1,
            max_seq_length: 2048,
            packing: false,
            prepack_weights: false,
            schedule: LRScheduler::Constant { rate: 1e-5 },
            optimizer: AdamWConfig::default(),
            max_gradient_norm: 1.0,
            seed: 0,
            steps_per_report: 10,
            steps_per_eval: 200,
            val_batches: 25,
            patience: 0,
            save_every: 100,
            adapter_path: None,
            resume: false,
        }
    }
}

impl TrainingConfig {
    pub(super) fn reports_after(&self, step: usize) -> bool {
        step.is_multiple_of(self.steps_per_report.max(1))
    }

    pub(super) fn validates_after(&self, step: usize) -> bool {
        step == self.iters || step.is_multiple_of(self.steps_per_eval.max(1))
    }

    pub(super) fn saves_after(&self, step: usize) -> bool {
        self.save_every > 0 && step.is_multiple_of(self.save_every)
    }

    /// Whether anything but the next step comes after this one.
    pub(super) fn pauses_after(&self, step: usize) -> bool {
        self.reports_after(step) || self.validates_after(step) || self.saves_after(step)
    }

    /// One of so many ranks' part of the largest batches of an update that these examples make, or any.
    pub(super) fn shape(&self, train: Option<&[Example]>, ranks: usize) -> Result<StepShape> {
        let order = Order::Shuffled { seed: self.seed };
        let seq = match train {
            Some(train) => self.batcher(train, order, ranks)?.shapes()[0].1,
            None => self.max_seq_length,
        };
        let batch = self.batch_size;
        let accumulated = self.grad_accumulation_steps.max(1);
        Ok(StepShape { batch, seq, accumulated, packed: self.packing })
    }

    /// Batches with the rows of so many ranks.
    pub(super) fn batcher(
        &self,
        examples: &[Example],
        order: Order,
        ranks: usize,
    ) -> Result<Batcher> {
        let TrainingConfig { max_seq_length, packing, .. } = *self;
        let batch_size = self.batch_size * ranks;
        let options = BatchOptions { batch_size, max_seq_length, order };
        let new = if packing { Batcher::packed } else { Batcher::new };
        new(examples.to_vec(), options).map_err(|e| ErrorKind::Data(e).into())
    }
}

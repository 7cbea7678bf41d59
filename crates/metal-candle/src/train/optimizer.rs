//! AdamW and gradient clipping, as graph operations.

use crate::{LazyTensor, Result};

/// AdamW with decoupled decay (Loshchilov & Hutter 2019).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the mean of the gradients.
    pub beta1: f64,
    /// Decay of the mean of their squares.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Multiplied by the learning rate and taken off the weight itself.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    /// PyTorch's defaults.
    fn default() -> Self {
        AdamWConfig { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }
    }
}

/// What changes from step to step: `f32[]` each, so that the plan stays the same.
pub(super) struct StepScalars<'a> {
    /// The learning rate.
    pub(super) rate: &'a LazyTensor,
    /// `1 / (1 - beta1^t)`, for the one count `t` of all parameters.
    pub(super) correction1: &'a LazyTensor,
    /// `1 / (1 - beta2^t)`
    pub(super) correction2: &'a LazyTensor,
}

/// One parameter's state.
pub(super) struct Moments {
    pub(super) parameter: LazyTensor,
    pub(super) mean: LazyTensor,
    pub(super) square: LazyTensor,
}

impl AdamWConfig {
    /// The corrections of update number `t`, counted from 1.
    pub(super) fn corrections(&self, t: usize) -> [f64; 2] {
        [self.beta1, self.beta2].map(|beta| 1.0 / (1.0 - beta.powf(t as f64)))
    }

    /// The state after one update; unchanged where `apply` (`u8[]`) is 0.
    pub(super) fn update(
        &self,
        state: &Moments,
        gradient: &LazyTensor,
        scalars: &StepScalars<'_>,
        apply: &LazyTensor,
    ) -> Result<Moments> {
        let mean =
            state.mean.affine(self.beta1, 0.0)?.add(&gradient.affine(1.0 - self.beta1, 0.0)?)?;
        let square = state
            .square
            .affine(self.beta2, 0.0)?
            .add(&gradient.sqr()?.affine(1.0 - self.beta2, 0.0)?)?;
        let root = square.mul(scalars.correction2)?.sqrt()?.affine(1.0, self.eps)?;
        let direction = mean.mul(scalars.correction1)?.div(&root)?;
        let decayed = direction.add(&state.parameter.affine(self.weight_decay, 0.0)?)?;
        let parameter = state.parameter.sub(&decayed.mul(scalars.rate)?)?;
        Ok(Moments {
            parameter: apply.where_cond(&parameter, &state.parameter)?,
            mean: apply.where_cond(&mean, &state.mean)?,
            square: apply.where_cond(&square, &state.square)?,
        })
    }
}

/// The norm of all gradients together, `f32[]`.
pub(super) fn global_norm(gradients: &[LazyTensor]) -> Result<LazyTensor> {
    let mut sum: Option<LazyTensor> = None;
    for gradient in gradients {
        let square = gradient.sqr()?.sum_all()?;
        sum = Some(match sum {
            Some(sum) => sum.add(&square)?,
            None => square,
        });
    }
    sum.expect("metal-candle bug: a step without gradients").sqrt()
}

/// What to multiply the gradients by so that their norm is at most `max_norm` (PyTorch's `clip_grad_norm_`).
pub(super) fn clip_factor(norm: &LazyTensor, max_norm: f64) -> Result<LazyTensor> {
    norm.affine(1.0, 1e-6)?.recip()?.affine(max_norm, 0.0)?.clamp(0.0, 1.0)
}

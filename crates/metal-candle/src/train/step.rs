//! The training step: one compiled function, its state donated.

use super::AdamWConfig;
use super::optimizer::{Moments, StepScalars, clip_factor, global_norm};
use crate::io::data::Batch;
use crate::models::Decoder;
use crate::nn::LoRAAdapter;
use crate::{Compiled, Device, LazyTensor, Result, compile, grad};
use std::sync::Arc;

/// What one step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepMetrics {
    /// The mean loss before the update.
    pub loss: f32,
    /// The norm of all gradients before clipping.
    pub gradient_norm: f32,
    /// False if a value was not finite: then nothing was updated.
    pub applied: bool,
}

/// An adapter in training: parameters, moments, and the compiled step that moves them.
///
/// The arguments of the step are `[ids, labels, rate, correction1, correction2, seed, p.., m.., v..]`, its
/// results `[loss, norm, p.., m.., v..]`; the states are updated in place.
pub struct TrainStep {
    adapter: LoRAAdapter,
    state: Vec<LazyTensor>,
    step: Compiled,
    evaluate: Compiled,
    optimizer: AdamWConfig,
    updates: usize,
    /// Steps so far, applied or not: with the seed, what dropout depends on.
    steps: usize,
    seed: i64,
}

/// Arguments before the state.
const INPUTS: usize = 6;

impl TrainStep {
    /// Prepares to train `adapter` on a frozen `decoder`.
    ///
    /// # Errors
    /// Where the adapter does not fit the decoder (when the step is first traced).
    pub fn new(
        decoder: Arc<Decoder>,
        adapter: LoRAAdapter,
        optimizer: AdamWConfig,
        max_gradient_norm: f64,
        seed: u64,
        device: &Device,
    ) -> Result<TrainStep> {
        let parameters = adapter.parameters();
        let n = parameters.len();
        let mut state = Vec::with_capacity(3 * n);
        // The step owns and overwrites its state: the caller's adapter keeps its own values.
        for parameter in &parameters {
            state.push(parameter.to_owned_copy()?);
        }
        for _ in 0..2 {
            for p in &parameters {
                state.push(LazyTensor::zeros(p.dims(), p.dtype(), device)?.to_owned_copy()?);
            }
        }
        let (model, shape) = (Arc::clone(&decoder), adapter.clone());
        let step = compile(move |args: &[LazyTensor]| {
            trace_step(&model, &shape, &optimizer, max_gradient_norm, args)
        })
        .donate((INPUTS..INPUTS + 3 * n).collect::<Vec<_>>());
        let shape = adapter.clone();
        let evaluate = compile(move |args: &[LazyTensor]| {
            let adapter = shape.with_parameters(&args[2..])?;
            Ok(vec![decoder.loss(&args[0], &args[1], Some(&adapter))?])
        });
        Ok(TrainStep {
            adapter,
            state,
            step,
            evaluate,
            optimizer,
            updates: 0,
            steps: 0,
            seed: seed as i64,
        })
    }

    /// One update on one batch, at this learning rate.
    ///
    /// # Errors
    /// Where an id or a label is out of range, or memory runs out; the state is then lost with the step.
    pub fn run(&mut self, batch: &Batch, rate: f64) -> Result<StepMetrics> {
        let [correction1, correction2] = self.optimizer.corrections(self.updates + 1);
        let mut args = tensors(batch)?;
        for scalar in [rate, correction1, correction2] {
            args.push(LazyTensor::from_vec(vec![scalar as f32], &[], &Device::Cpu)?);
        }
        args.push(LazyTensor::from_vec(
            vec![self.seed.wrapping_add(self.steps as i64)],
            &[],
            &Device::Cpu,
        )?);
        self.steps += 1;
        args.append(&mut self.state);
        let mut results = self.step.call(args)?;
        self.state = results.split_off(2);
        let (loss, gradient_norm) = (scalar(&results[0])?, scalar(&results[1])?);
        let applied = loss.is_finite() && gradient_norm.is_finite();
        self.updates += usize::from(applied);
        Ok(StepMetrics { loss, gradient_norm, applied })
    }

    /// The loss on a batch, nothing updated.
    ///
    /// # Errors
    /// As [`TrainStep::run`]; the state is kept.
    pub fn evaluate(&self, batch: &Batch) -> Result<f32> {
        let mut args = tensors(batch)?;
        args.extend(self.parameters().iter().cloned());
        scalar(&self.evaluate.call(args)?[0])
    }

    /// The adapter as it is now.
    ///
    /// # Errors
    /// Never for a state of this step.
    pub fn adapter(&self) -> Result<LoRAAdapter> {
        let copies = self.parameters().iter().map(LazyTensor::to_owned_copy);
        self.adapter.with_parameters(&copies.collect::<Result<Vec<_>>>()?)
    }

    /// Updates so far: steps that were applied.
    pub fn updates(&self) -> usize {
        self.updates
    }

    /// The plan of a step on batches of this shape, to be printed.
    ///
    /// # Errors
    /// Where the step could not be traced.
    pub fn plan(&self, batch: &Batch) -> Result<metal_candle_compiler::Plan> {
        let mut args = tensors(batch)?;
        for _ in 0..3 {
            args.push(LazyTensor::from_vec(vec![0f32], &[], &Device::Cpu)?);
        }
        args.push(LazyTensor::from_vec(vec![0i64], &[], &Device::Cpu)?);
        args.extend(self.state.iter().cloned());
        self.step.plan(&args)
    }

    fn parameters(&self) -> &[LazyTensor] {
        &self.state[..self.state.len() / 3]
    }
}

fn trace_step(
    decoder: &Decoder,
    shape: &LoRAAdapter,
    optimizer: &AdamWConfig,
    max_norm: f64,
    args: &[LazyTensor],
) -> Result<Vec<LazyTensor>> {
    let [ids, labels, rate, correction1, correction2, seed] = [0, 1, 2, 3, 4, 5].map(|i| &args[i]);
    let n = (args.len() - INPUTS) / 3;
    let (parameters, moments) = args[INPUTS..].split_at(n);
    let (means, squares) = moments.split_at(n);

    let adapter = shape.with_parameters(parameters)?.with_dropout(seed);
    let loss = decoder.loss(ids, labels, Some(&adapter))?;
    let gradients = grad(&loss, &parameters.iter().collect::<Vec<_>>())?;
    let norm = global_norm(&gradients)?;
    let clip = clip_factor(&norm, max_norm)?;
    // Not finite minus itself is NaN, and NaN is not 0: one test for both.
    let total = norm.add(&loss)?;
    let apply = total.sub(&total)?.eq(&total.zeros_like()?)?;

    let scalars = StepScalars { rate, correction1, correction2 };
    let (mut p, mut m, mut v) = (Vec::new(), Vec::new(), Vec::new());
    for (i, gradient) in gradients.iter().enumerate() {
        let state = Moments {
            parameter: parameters[i].clone(),
            mean: means[i].clone(),
            square: squares[i].clone(),
        };
        let next = optimizer.update(&state, &gradient.mul(&clip)?, &scalars, &apply)?;
        p.push(next.parameter);
        m.push(next.mean);
        v.push(next.square);
    }
    Ok([vec![loss, norm], p, m, v].concat())
}

fn tensors(batch: &Batch) -> Result<Vec<LazyTensor>> {
    let dims = [batch.batch, batch.seq];
    Ok(vec![
        LazyTensor::from_vec(batch.ids.clone(), &dims, &Device::Cpu)?,
        LazyTensor::from_vec(batch.labels.clone(), &dims, &Device::Cpu)?,
    ])
}

fn scalar(x: &LazyTensor) -> Result<f32> {
    x.to_scalar::<f32>()
}

//! What the training step computes, as the functions from which its plans are traced.

use super::AdamWConfig;
use super::optimizer::{Moments, StepScalars, clip_factor, global_norm};
use super::ranks::sums;
use crate::models::{Decoder, PackedInput};
use crate::nn::LoRAAdapter;
use crate::{Compiled, LazyTensor, Result, compile, grad};
use std::sync::Arc;

/// Arguments between the state and the micro-batches, of one rank.
pub(super) const SCALARS: usize = 4;

/// What the compiled functions are traced from.
#[derive(Clone)]
pub(super) struct Traced {
    pub(super) decoder: Arc<Decoder>,
    pub(super) adapter: LoRAAdapter,
    /// Parameters.
    pub(super) n: usize,
    /// Whether there are other ranks.
    pub(super) in_world: bool,
}

impl Traced {
    /// Parameters, means, squares, and whether the step before was applied.
    pub(super) fn state_len(&self) -> usize {
        3 * self.n + 1
    }

    /// The loss, and the gradients of all parameters; of several ranks this one's part of them.
    ///
    /// Each micro-batch goes forward and back before the next begins, so that its activations are gone by then.
    pub(super) fn gradients(&self, args: &[LazyTensor]) -> Result<(LazyTensor, Vec<LazyTensor>)> {
        let parameters = &args[..self.n];
        let (scalars, batches) =
            args[self.state_len()..].split_at(SCALARS + usize::from(self.in_world));
        let seed = &scalars[3];
        // The shares are the only scalars.
        let shares = batches.iter().filter(|x| x.rank() == 0).count();
        let (batches, shares) = batches.split_at(batches.len() - shares);
        let size = batches.len() / shares.len().max(1);
        let adapter = self.adapter.with_parameters(parameters)?.with_dropout(seed);
        let wrt: Vec<&LazyTensor> = parameters.iter().collect();
        let mut sum: Option<(LazyTensor, Vec<LazyTensor>)> = None;
        for (i, batch) in batches.chunks(size).enumerate() {
            let mut loss = loss(&self.decoder, batch, &adapter)?;
            if let Some(share) = shares.get(i) {
                loss = loss.mul(share)?;
            }
            let gradients = grad(&loss, &wrt)?;
            sum = Some(match sum {
                None => (loss, gradients),
                Some((total, sums)) => {
                    let sums = sums.iter().zip(&gradients).map(|(a, b)| a.add(b));
                    (total.add(&loss)?, sums.collect::<Result<_>>()?)
                }
            });
        }
        Ok(sum.expect("metal-candle bug: a step without a batch"))
    }

    /// The square of each gradient's norm; of several ranks the sums of theirs, which are finite where all are.
    pub(super) fn norms(self) -> Compiled {
        compile(move |args: &[LazyTensor]| {
            let (_, gradients) = self.gradients(args)?;
            let norms = gradients.iter().map(|g| g.sqr()?.sum_all());
            let norms = norms.collect::<Result<Vec<_>>>()?;
            if self.in_world { sums(&norms) } else { Ok(norms) }
        })
    }

    /// The whole step, its state donated.
    pub(super) fn compiled(self, optimizer: AdamWConfig, max_norm: f64) -> Compiled {
        let state = 0..self.state_len();
        compile(move |args: &[LazyTensor]| self.step(&optimizer, max_norm, args)).donate(state)
    }

    fn step(
        &self,
        optimizer: &AdamWConfig,
        max_norm: f64,
        args: &[LazyTensor],
    ) -> Result<Vec<LazyTensor>> {
        let [rate, if_skipped, if_applied] = [0, 1, 2].map(|i| &args[self.state_len() + i]);
        let corrections = args[3 * self.n].where_cond(if_applied, if_skipped)?;
        let (mut loss, mut gradients) = self.gradients(args)?;
        let mut stop = None;
        if self.in_world {
            gradients.extend([loss, args[self.state_len() + SCALARS].clone()]);
            gradients = sums(&gradients)?;
            stop = gradients.pop();
            loss = gradients.pop().expect("metal-candle bug: a sum without the loss");
        }
        let norm = global_norm(&gradients)?;
        let clip = clip_factor(&norm, max_norm)?;
        // Not finite minus itself is NaN, and NaN is not 0: one test for both.
        let total = norm.add(&loss)?;
        let apply = total.sub(&total)?.eq(&total.zeros_like()?)?;

        let [correction1, correction2] = [0, 1].map(|i| corrections.narrow(0, i, 1)?.reshape(&[]));
        let (correction1, correction2) = (&correction1?, &correction2?);
        let scalars = StepScalars { rate, correction1, correction2 };
        let (mut p, mut m, mut v) = (Vec::new(), Vec::new(), Vec::new());
        for (i, gradient) in gradients.iter().enumerate() {
            let state = Moments {
                parameter: args[i].clone(),
                mean: args[self.n + i].clone(),
                square: args[2 * self.n + i].clone(),
            };
            let next = optimizer.update(&state, &gradient.mul(&clip)?, &scalars, &apply)?;
            p.push(next.parameter);
            m.push(next.mean);
            v.push(next.square);
        }
        // The corrections first: they read whether the step before was applied, and then this one's answer may take its
        // place. Then the norm: what it needs is recorded micro-batch by micro-batch.
        let first = [corrections, norm, loss].into_iter().chain(stop);
        Ok([first.collect(), p, m, v, vec![apply]].concat())
    }
}

/// The mean loss of a batch, given as the step's arguments.
pub(super) fn loss(
    decoder: &Decoder,
    batch: &[LazyTensor],
    adapter: &LoRAAdapter,
) -> Result<LazyTensor> {
    let packed = match batch {
        [_, _, segments, positions] => Some(PackedInput { segments, positions }),
        _ => None,
    };
    decoder.loss_packed(&batch[0], &batch[1], packed, Some(adapter))
}

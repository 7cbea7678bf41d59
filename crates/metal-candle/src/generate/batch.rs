//! Several texts at once.

use super::generator::{CACHE_BUCKET, Generator};
use super::run::{Run, Scores};
use super::step::{self, PREFILL_BUCKET};
use super::{Generated, GeneratorConfig, KVCache, StreamToken};
use crate::{LazyTensor, Result};

impl Generator {
    /// Generates from several prompts at once, each as [`Generator::generate`] would on its own; a
    /// step reads the weights once for all of them. Results are in the order of the prompts.
    ///
    /// Shorter prompts are padded on the left, hidden from attention and not counted by positions.
    /// `on_token` is told which prompt a token belongs to.
    ///
    /// # Numerics
    /// Products over several rows may round their sums in another order than over one: where two
    /// tokens are equally likely to the last bits, another one may be chosen.
    ///
    /// # Errors
    /// As [`Generator::generate`].
    pub fn generate_batch(
        &self,
        prompts: &[impl AsRef<str>],
        config: &GeneratorConfig,
        mut on_token: impl FnMut(usize, &StreamToken),
    ) -> Result<Vec<Generated>> {
        config.check()?;
        let ids = prompts.iter().map(|prompt| self.encode(prompt.as_ref()));
        let ids = ids.collect::<Result<Vec<_>>>()?;
        let run = |ids: &Vec<u32>| Run::new(self.tokenizer(), config.clone(), ids.clone(), 0);
        let mut runs: Vec<Run<'_>> = ids.iter().map(run).collect();
        let Some(longest) = ids.iter().map(Vec::len).max() else { return Ok(Vec::new()) };
        if runs.iter().all(Run::is_finished) {
            return Ok(runs.into_iter().map(Run::into_generated).collect());
        }

        let mut rows = Rows::new(self, &ids, longest, config.max_tokens)?;
        let mut next: Vec<Vec<u32>> = ids;
        while !runs.iter().all(Run::is_finished) {
            let logits = rows.step(self, &next)?;
            for (i, (run, logits)) in runs.iter_mut().zip(logits).enumerate() {
                if run.is_finished() {
                    continue;
                }
                if let Some(token) = run.accept(Scores::Logits(logits), rows.has_room(i))? {
                    on_token(i, &token);
                }
            }
            // A row that is done goes on unseen until all are.
            next = runs.iter().map(|run| vec![run.last()]).collect();
        }
        Ok(runs.into_iter().map(Run::into_generated).collect())
    }
}

/// The cache of a batch, and where each row begins in it.
struct Rows {
    cache: KVCache,
    /// Positions before the first token of each row.
    pads: Vec<usize>,
    /// Which positions of the cache hold tokens or will: `u8 [b, capacity]`.
    keys: LazyTensor,
    context: usize,
}

impl Rows {
    fn new(generator: &Generator, ids: &[Vec<u32>], longest: usize, max: usize) -> Result<Rows> {
        let (config, device) = (&generator.decoder().config, generator.decoder().device());
        let (batch, context) = (ids.len(), config.max_position_embeddings);
        let width = if longest == 1 { 1 } else { longest.next_multiple_of(PREFILL_BUCKET) };
        let capacity = width.saturating_add(max.min(context)).next_multiple_of(CACHE_BUCKET);
        let pads: Vec<usize> = ids.iter().map(|ids| width - ids.len()).collect();
        let keys = pads.iter().flat_map(|pad| (0..capacity).map(move |at| u8::from(at >= *pad)));
        let keys = LazyTensor::from_vec(keys.collect(), &[batch, capacity], device)?;
        let cache = KVCache::new(generator.decoder(), batch, capacity)?;
        Ok(Rows { cache, pads, keys, context })
    }

    /// Whether the row's next token has a position in the model's context.
    fn has_room(&self, row: usize) -> bool {
        self.cache.len() - self.pads[row] < self.context
    }

    /// Takes in the next tokens of every row and gives the logits after the last one of each.
    fn step(&mut self, generator: &Generator, next: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
        let (b, start) = (self.pads.len(), self.cache.len());
        let t = next.iter().zip(&self.pads).map(|(ids, pad)| ids.len() + pad).max();
        let t = if start == 0 { t.unwrap_or(1) } else { 1 };
        let (mut ids, mut positions, mut queries) = (Vec::new(), Vec::new(), Vec::new());
        for (row, pad) in next.iter().zip(&self.pads) {
            ids.resize(ids.len() + t - row.len(), 0);
            ids.extend(row);
            for at in start..start + t {
                // A row that is done may go beyond the table of positions.
                positions.push(at.saturating_sub(*pad).min(self.context - 1) as u32);
                queries.push(u8::from(at >= *pad));
            }
        }
        let device = self.cache.device();
        let mut args = vec![
            LazyTensor::from_vec(ids, &[b, t], device)?,
            step::scalar(start, device)?,
            LazyTensor::from_vec(positions, &[b, t], device)?,
            LazyTensor::from_vec(queries, &[b, t], device)?,
            self.keys.clone(),
        ];
        args.append(&mut self.cache.keys);
        args.append(&mut self.cache.values);
        let logits = generator.step_many(args, t, &mut self.cache)?;
        Ok(logits.chunks(logits.len() / b).map(<[f32]>::to_vec).collect())
    }
}

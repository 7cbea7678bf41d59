//! The loop around the decode step.

use super::run::Run;
use super::{Generated, GeneratorConfig, KVCache, StreamToken, TokenStream};
use crate::error::ErrorKind;
use crate::io::tokenizer::Tokenizer;
use crate::models::{CacheInput, Decoder};
use crate::nn::{ApplyAdapter, LoRAAdapter};
use crate::{Compiled, Device, LazyTensor, Result, compile};
use std::sync::Arc;

/// Generates text with a decoder and the adapter that is on it. Another one is put on by
/// [`ApplyAdapter`], from an [`AdapterRegistry`](crate::nn::AdapterRegistry) if there are several.
///
/// A step's arguments are `[ids, position, last, k.., v..]` and its results `[logits of position
/// last, k.., v..]`, the cache updated in place.
#[derive(Debug)]
pub struct Generator {
    decoder: Arc<Decoder>,
    tokenizer: Arc<Tokenizer>,
    step: Compiled,
}

/// Prompts are padded to a multiple of this many tokens, so that few plans serve all lengths.
const PREFILL_BUCKET: usize = 32;
/// The cache holds a multiple of this many positions.
const CACHE_BUCKET: usize = 256;

impl Generator {
    /// # Errors
    /// Never; the step is traced when it first runs.
    pub fn new(decoder: Arc<Decoder>, tokenizer: Arc<Tokenizer>) -> Result<Generator> {
        let step = step(&decoder);
        Ok(Generator { decoder, tokenizer, step })
    }

    /// The same base, without a copy, with what `change` does to its adapter.
    fn change<T>(&mut self, change: impl FnOnce(&mut Decoder) -> Result<T>) -> Result<T> {
        let mut decoder = Decoder::clone(&self.decoder);
        let changed = change(&mut decoder)?;
        self.decoder = Arc::new(decoder);
        self.step = step(&self.decoder);
        Ok(changed)
    }

    /// Generates from a prompt, to which nothing is added: the caller applies the chat template.
    ///
    /// # Errors
    /// Where the prompt is empty or longer than the model's context; as [`GeneratorConfig::check`].
    pub fn generate(
        &self,
        prompt: &str,
        config: &GeneratorConfig,
        mut on_token: impl FnMut(&StreamToken),
    ) -> Result<Generated> {
        let (mut run, mut cache, mut next) = self.begin(prompt, config.clone())?;
        while !run.is_finished() {
            let args = arguments(&next, &mut cache)?;
            let results = self.step.call(args)?;
            let logits = self.results(results, next.len(), &mut cache)?;
            if let Some(token) = run.accept(logits, cache.has_room())? {
                on_token(&token);
            }
            next = vec![run.last()];
        }
        Ok(run.into_generated())
    }

    /// As [`Generator::generate`], but awaited: token by token, and no thread is blocked.
    ///
    /// # Errors
    /// As [`Generator::generate`].
    pub fn stream(&self, prompt: &str, config: &GeneratorConfig) -> Result<TokenStream<'_>> {
        let (run, cache, next) = self.begin(prompt, config.clone())?;
        Ok(TokenStream::new(self, run, cache, next))
    }

    /// The run, its cache, and the ids that go into it first.
    fn begin(&self, prompt: &str, config: GeneratorConfig) -> Result<(Run<'_>, KVCache, Vec<u32>)> {
        config.check()?;
        let ids = self.tokenizer.encode(prompt, false)?;
        let context = self.decoder.config.max_position_embeddings;
        if ids.is_empty() || ids.len() > context {
            return Err(ErrorKind::PromptLength { tokens: ids.len(), context }.into());
        }
        // However many tokens are asked for, the context ends them.
        let most = ids.len().saturating_add(config.max_tokens).min(context);
        let capacity = most.next_multiple_of(CACHE_BUCKET).min(context);
        let cache = KVCache::new(&self.decoder.config, 1, capacity, &Device::Cpu)?;
        Ok((Run::new(&self.tokenizer, config, ids.clone()), cache, ids))
    }

    /// Puts `ids` into the cache and returns the logits after the last of them.
    pub(super) async fn step_async(
        &self,
        ids: Vec<u32>,
        mut cache: KVCache,
    ) -> Result<(Vec<f32>, KVCache)> {
        let results = self.step.call_async(arguments(&ids, &mut cache)?).await?;
        let logits = self.results(results, ids.len(), &mut cache)?;
        Ok((logits, cache))
    }

    /// The logits of a step that took in `tokens`; its keys and values are the cache again.
    fn results(
        &self,
        mut results: Vec<LazyTensor>,
        tokens: usize,
        cache: &mut KVCache,
    ) -> Result<Vec<f32>> {
        cache.values = results.split_off(1 + self.decoder.config.num_layers);
        cache.keys = results.split_off(1);
        cache.advance(tokens);
        let logits = results[0].to_vec1::<f32>()?;
        if logits.iter().any(|logit| logit.is_nan()) {
            self.decoder.check_weights()?;
            return Err(ErrorKind::LogitsNotFinite.into());
        }
        Ok(logits)
    }
}

/// Swaps adapters between generations; the base stays where it is.
impl ApplyAdapter for Generator {
    fn apply_adapter(&mut self, adapter: LoRAAdapter) -> Result<Option<LoRAAdapter>> {
        self.change(|decoder| decoder.apply_adapter(adapter))
    }

    fn remove_adapter(&mut self) -> Option<LoRAAdapter> {
        let removed = self.change(|decoder| Ok(decoder.remove_adapter()));
        removed.expect("metal-candle bug: an adapter cannot be taken off")
    }

    fn adapter(&self) -> Option<&LoRAAdapter> {
        self.decoder.adapter()
    }
}

/// The compiled step of a decoder with its adapter; the cache is donated.
fn step(decoder: &Arc<Decoder>) -> Compiled {
    let model = Arc::clone(decoder);
    compile(move |args: &[LazyTensor]| trace_step(&model, args))
        .donate((3..3 + 2 * decoder.config.num_layers).collect::<Vec<_>>())
}

/// A step's arguments; keys and values are taken out of the cache.
fn arguments(ids: &[u32], cache: &mut KVCache) -> Result<Vec<LazyTensor>> {
    let padded = match ids.len() {
        1 => 1,
        n => n.next_multiple_of(PREFILL_BUCKET).min(cache.capacity() - cache.len()),
    };
    // Padding stands after the prompt: nothing that counts sees it, and later tokens overwrite it.
    let mut row = ids.to_vec();
    row.resize(padded, 0);
    let scalar = |value: usize| LazyTensor::from_vec(vec![value as i64], &[], &Device::Cpu);
    let mut args = vec![
        LazyTensor::from_vec(row, &[1, padded], &Device::Cpu)?,
        scalar(cache.len())?,
        scalar(ids.len() - 1)?,
    ];
    args.append(&mut cache.keys);
    args.append(&mut cache.values);
    Ok(args)
}

fn trace_step(decoder: &Decoder, args: &[LazyTensor]) -> Result<Vec<LazyTensor>> {
    let layers = decoder.config.num_layers;
    let (keys, values) = args[3..].split_at(layers);
    let cache = CacheInput { keys, values, position: &args[1] };
    let (hidden, keys, values) = decoder.hidden_cached(&args[0], cache, decoder.adapter())?;
    // Only one position's logits are wanted: [1, t, hidden] -> [1, 1, hidden] -> [vocabulary]
    let last = hidden.dynamic_slice(1, &args[2], 1)?;
    let logits = decoder.logits(&last)?.reshape(&[decoder.config.vocab_size])?;
    Ok([vec![logits], keys, values].concat())
}

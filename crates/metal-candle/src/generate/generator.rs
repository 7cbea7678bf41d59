//! The loop around the decode step.

use super::run::Run;
use super::step::{self, DecodeShape};
use super::{Generated, GeneratorConfig, KVCache, Session, StreamToken, TokenStream};
use crate::error::ErrorKind;
use crate::io::tokenizer::Tokenizer;
use crate::models::Decoder;
use crate::nn::{ApplyAdapter, LoRAAdapter};
use crate::{Compiled, LazyTensor, Outline, Recording, Result};
use std::sync::Arc;

/// Generates text with a decoder and the adapter that is on it. Another one is put on by
/// [`ApplyAdapter`], from an [`AdapterRegistry`](crate::nn::AdapterRegistry) if there are several.
#[derive(Debug)]
pub struct Generator {
    decoder: Arc<Decoder>,
    tokenizer: Arc<Tokenizer>,
    one: Compiled,
    many: Compiled,
}

/// The cache holds a multiple of this many positions.
pub(super) const CACHE_BUCKET: usize = 256;

impl Generator {
    /// # Errors
    /// Never; a step is traced when it first runs.
    pub fn new(decoder: Arc<Decoder>, tokenizer: Arc<Tokenizer>) -> Result<Generator> {
        let (one, many) = steps(&decoder);
        Ok(Generator { decoder, tokenizer, one, many })
    }

    /// What a step of this shape would run, and on what; nothing is allocated, and the decoder's
    /// weights may be placeholders.
    ///
    /// # Errors
    /// Where the adapter on it does not fit, or there are more tokens than positions.
    pub fn outline(decoder: Arc<Decoder>, shape: DecodeShape) -> Result<Outline> {
        step::outline(decoder, shape)
    }

    /// The same base, without a copy, with what `change` does to its adapter.
    fn change<T>(&mut self, change: impl FnOnce(&mut Decoder) -> Result<T>) -> Result<T> {
        let mut decoder = Decoder::clone(&self.decoder);
        let changed = change(&mut decoder)?;
        self.decoder = Arc::new(decoder);
        (self.one, self.many) = steps(&self.decoder);
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
        on_token: impl FnMut(&StreamToken),
    ) -> Result<Generated> {
        self.generate_in(&mut Session::default(), prompt, config, on_token)
    }

    /// As [`Generator::generate`], but what the session's cache has in common with the prompt is
    /// not computed again: the turns of a conversation take in only what is new.
    ///
    /// # Errors
    /// As [`Generator::generate`]; the session is then empty.
    pub fn generate_in(
        &self,
        session: &mut Session,
        prompt: &str,
        config: &GeneratorConfig,
        mut on_token: impl FnMut(&StreamToken),
    ) -> Result<Generated> {
        let (mut run, mut cache, mut next) = self.begin(session, prompt, config.clone())?;
        while !run.is_finished() {
            let logits = self.logits(&next, &mut cache)?;
            if let Some(token) = run.accept(logits, cache.has_room())? {
                on_token(&token);
            }
            next = vec![run.last()];
        }
        session.keep(&self.decoder, run.seen(), cache);
        Ok(run.into_generated())
    }

    /// Puts `ids` into the cache and gives the logits after the last of them, for a caller who chooses tokens by
    /// himself.
    ///
    /// # Errors
    /// Where there are no ids, or more than the cache has room for; the cache is then lost with the step.
    pub fn logits(&self, ids: &[u32], cache: &mut KVCache) -> Result<Vec<f32>> {
        let tokens = check_room(ids, cache)?;
        let results = self.one.call(step::arguments(ids, cache)?)?;
        self.results(results, tokens, cache)
    }

    /// What [`Generator::logits`] of these ids would compute, and from what: logits, then keys and values. The cache
    /// stays as it is.
    ///
    /// # Errors
    /// As [`Generator::logits`].
    pub fn recording(&self, ids: &[u32], cache: &KVCache) -> Result<Recording> {
        check_room(ids, cache)?;
        step::recording(&self.one, ids, cache)
    }

    /// As [`Generator::generate`], but awaited: token by token, and no thread is blocked.
    ///
    /// # Errors
    /// As [`Generator::generate`].
    pub fn stream(&self, prompt: &str, config: &GeneratorConfig) -> Result<TokenStream<'_>> {
        let (run, cache, next) = self.begin(&mut Session::default(), prompt, config.clone())?;
        Ok(TokenStream::new(self, run, cache, next))
    }

    pub(super) fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    pub(super) fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The ids of a prompt that fits into the context.
    pub(super) fn encode(&self, prompt: &str) -> Result<Vec<u32>> {
        let ids = self.tokenizer.encode(prompt, false)?;
        let context = self.decoder.config.max_position_embeddings;
        match ids.is_empty() || ids.len() > context {
            true => Err(ErrorKind::PromptLength { tokens: ids.len(), context }.into()),
            false => Ok(ids),
        }
    }

    /// The run, its cache, and the ids that go into it first.
    fn begin(
        &self,
        session: &mut Session,
        prompt: &str,
        config: GeneratorConfig,
    ) -> Result<(Run<'_>, KVCache, Vec<u32>)> {
        config.check()?;
        let ids = self.encode(prompt)?;
        let context = self.decoder.config.max_position_embeddings;
        // However many tokens are asked for, the context ends them.
        let most = ids.len().saturating_add(config.max_tokens).min(context);
        let capacity = most.next_multiple_of(CACHE_BUCKET).min(context);
        let cache = session.take(&self.decoder, &ids, capacity)?;
        let next = ids[cache.len()..].to_vec();
        Ok((Run::new(&self.tokenizer, config, ids, cache.len()), cache, next))
    }

    /// Puts `ids` into the cache and returns the logits after the last of them.
    pub(super) async fn step_async(
        &self,
        ids: Vec<u32>,
        mut cache: KVCache,
    ) -> Result<(Vec<f32>, KVCache)> {
        let results = self.one.call_async(step::arguments(&ids, &mut cache)?).await?;
        let logits = self.results(results, ids.len(), &mut cache)?;
        Ok((logits, cache))
    }

    /// The logits of a step over several texts, `[b, vocabulary]`.
    pub(super) fn step_many(
        &self,
        args: Vec<LazyTensor>,
        tokens: usize,
        cache: &mut KVCache,
    ) -> Result<Vec<f32>> {
        self.results(self.many.call(args)?, tokens, cache)
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
        let logits = results[0].to_vec::<f32>()?;
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

/// How many tokens there are, if there are some and the cache has room for them.
fn check_room(ids: &[u32], cache: &KVCache) -> Result<usize> {
    let (tokens, context) = (ids.len(), cache.capacity() - cache.len());
    match tokens == 0 || tokens > context {
        true => Err(ErrorKind::PromptLength { tokens, context }.into()),
        false => Ok(tokens),
    }
}

/// The compiled steps of a decoder with its adapter, over one text and over several.
fn steps(decoder: &Arc<Decoder>) -> (Compiled, Compiled) {
    (step::one(Arc::clone(decoder)), step::many(Arc::clone(decoder)))
}

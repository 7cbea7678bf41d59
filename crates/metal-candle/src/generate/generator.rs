//! The loop around the decode step.

use super::run::{Run, Scores};
use super::step::{self, DecodeShape, Wanted};
use super::{Generated, GeneratorConfig, KVCache, Session, StreamToken, TokenStream};
use crate::error::ErrorKind;
use crate::io::tokenizer::Tokenizer;
use crate::models::Decoder;
use crate::nn::{ApplyAdapter, LoRAAdapter};
use crate::{Compiled, LazyTensor, Outline, Recording, Result, Timing};
use std::sync::Arc;

/// Generates text with a decoder and the adapter that is on it. Another one is put on by
/// [`ApplyAdapter`], from an [`AdapterRegistry`](crate::nn::AdapterRegistry) if there are several.
#[derive(Debug)]
pub struct Generator {
    decoder: Arc<Decoder>,
    tokenizer: Arc<Tokenizer>,
    steps: Steps,
}

/// The compiled steps of a decoder with its adapter; each is traced when it first runs.
#[derive(Debug)]
struct Steps {
    logits: Compiled,
    best: Compiled,
    /// Over several texts.
    many: Compiled,
}

impl Steps {
    fn new(decoder: &Arc<Decoder>) -> Steps {
        Steps {
            logits: step::one(Arc::clone(decoder), Wanted::Logits),
            best: step::one(Arc::clone(decoder), Wanted::Best),
            many: step::many(Arc::clone(decoder)),
        }
    }

    fn one(&self, wanted: Wanted) -> &Compiled {
        match wanted {
            Wanted::Logits => &self.logits,
            Wanted::Best => &self.best,
        }
    }
}

/// The cache holds a multiple of this many positions.
pub(super) const CACHE_BUCKET: usize = 256;

impl Generator {
    /// From its parts. Nothing is traced before a step first runs.
    pub fn new(decoder: Arc<Decoder>, tokenizer: Arc<Tokenizer>) -> Generator {
        let steps = Steps::new(&decoder);
        Generator { decoder, tokenizer, steps }
    }

    /// What a step of this shape would run, and on what; nothing is allocated, and the decoder's
    /// weights may be placeholders.
    ///
    /// # Errors
    /// Where the adapter on it does not fit, or there are more tokens than positions.
    pub fn outline(decoder: Arc<Decoder>, shape: DecodeShape) -> Result<Outline> {
        step::outline(decoder, shape)
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
            let scores = self.step(run.wants(), &next, &mut cache)?;
            if let Some(token) = run.accept(scores, cache.has_room())? {
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
    /// Where there are no ids, or more than the cache has room for; where a logit is not a number; the cache is then lost
    /// with the step.
    pub fn logits(&self, ids: &[u32], cache: &mut KVCache) -> Result<Vec<f32>> {
        match self.step(Wanted::Logits, ids, cache)? {
            Scores::Logits(logits) => Ok(logits),
            Scores::Best(_) => panic!("metal-candle bug: a step that gives no logits"),
        }
    }

    /// Puts `ids` into the cache and gives the likeliest token after the last of them, the first of equals. It is chosen
    /// where the model is, so that a GPU's logits need not come to the host.
    ///
    /// # Errors
    /// As [`Generator::logits`].
    pub fn best(&self, ids: &[u32], cache: &mut KVCache) -> Result<u32> {
        Ok(self.step(Wanted::Best, ids, cache)?.best())
    }

    /// [`Generator::best`], and the seconds that it took on the device: of each step of its plan, or of all.
    ///
    /// # Errors
    /// As [`Generator::best`].
    pub fn profile(
        &self,
        ids: &[u32],
        cache: &mut KVCache,
        timing: Timing,
    ) -> Result<(u32, Vec<f64>)> {
        check_room(ids, cache)?;
        let args = step::arguments(ids, cache)?;
        let (results, seconds) = self.steps.one(Wanted::Best).profile(args, timing)?;
        Ok((self.scores(Wanted::Best, results, ids.len(), cache)?.best(), seconds))
    }

    fn step(&self, wanted: Wanted, ids: &[u32], cache: &mut KVCache) -> Result<Scores> {
        let tokens = check_room(ids, cache)?;
        let results = self.steps.one(wanted).call(step::arguments(ids, cache)?)?;
        self.scores(wanted, results, tokens, cache)
    }

    /// What [`Generator::logits`] of these ids would compute, and from what: logits, then keys and values. The cache
    /// stays as it is.
    ///
    /// # Errors
    /// As [`Generator::logits`].
    pub fn recording(&self, ids: &[u32], cache: &KVCache) -> Result<Recording> {
        check_room(ids, cache)?;
        step::recording(&self.steps.logits, ids, cache)
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

    /// As [`Generator::step`], awaited.
    pub(super) async fn step_async(
        &self,
        wanted: Wanted,
        ids: Vec<u32>,
        mut cache: KVCache,
    ) -> Result<(Scores, KVCache)> {
        let results = self.steps.one(wanted).call_async(step::arguments(&ids, &mut cache)?).await?;
        let scores = self.scores(wanted, results, ids.len(), &mut cache)?;
        Ok((scores, cache))
    }

    /// The logits of a step over several texts, `[b, vocabulary]`.
    pub(super) fn step_many(
        &self,
        args: Vec<LazyTensor>,
        tokens: usize,
        cache: &mut KVCache,
    ) -> Result<Vec<f32>> {
        let results = self.steps.many.call(args)?;
        let logits = self.remember(results, 1, tokens, cache)[0].to_vec::<f32>()?;
        self.check(&logits)?;
        Ok(logits)
    }

    /// What a step says that took in `tokens`.
    fn scores(
        &self,
        wanted: Wanted,
        results: Vec<LazyTensor>,
        tokens: usize,
        cache: &mut KVCache,
    ) -> Result<Scores> {
        let results = self.remember(results, wanted.results(), tokens, cache);
        let last = results.last().expect("metal-candle bug: a step without results");
        let logits = last.to_vec::<f32>()?;
        self.check(&logits)?;
        Ok(match wanted {
            Wanted::Logits => Scores::Logits(logits),
            Wanted::Best => Scores::Best(results[0].to_vec::<u32>()?[0]),
        })
    }

    /// The keys and values that a step of `tokens` gave after its first results are the cache again.
    fn remember(
        &self,
        mut results: Vec<LazyTensor>,
        first: usize,
        tokens: usize,
        cache: &mut KVCache,
    ) -> Vec<LazyTensor> {
        // Into the vectors that they were taken out of, which have room for them.
        cache.values.extend(results.drain(first + self.decoder.config.num_layers..));
        cache.keys.extend(results.drain(first..));
        cache.advance(tokens);
        results
    }

    /// One that is NaN is the largest, wherever that is looked for.
    fn check(&self, logits: &[f32]) -> Result<()> {
        if !logits.iter().any(|logit| logit.is_nan()) {
            return Ok(());
        }
        self.decoder.check_weights()?;
        Err(ErrorKind::LogitsNotFinite.into())
    }
}

/// Swaps adapters between generations. A clone of the decoder shares its weights, so the base stays where it is.
impl ApplyAdapter for Generator {
    fn apply_adapter(&mut self, adapter: LoRAAdapter) -> Result<Option<LoRAAdapter>> {
        let mut decoder = Decoder::clone(&self.decoder);
        let replaced = decoder.apply_adapter(adapter)?;
        *self = Generator::new(Arc::new(decoder), Arc::clone(&self.tokenizer));
        Ok(replaced)
    }

    fn remove_adapter(&mut self) -> Option<LoRAAdapter> {
        let mut decoder = Decoder::clone(&self.decoder);
        let removed = decoder.remove_adapter();
        *self = Generator::new(Arc::new(decoder), Arc::clone(&self.tokenizer));
        removed
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

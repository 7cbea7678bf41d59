//! The loop around the decode step.

use super::{KVCache, SamplingStrategy, sample_token};
use crate::error::ErrorKind;
use crate::io::tokenizer::Tokenizer;
use crate::models::{CacheInput, Decoder};
use crate::nn::ApplyAdapter;
use crate::{Compiled, Device, LazyTensor, Result, compile};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How to generate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GeneratorConfig {
    /// Tokens at most.
    pub max_tokens: usize,
    /// How each is chosen.
    pub sampling: SamplingStrategy,
    /// Of the random choices.
    pub seed: u64,
}

impl Default for GeneratorConfig {
    fn default() -> Self {
        GeneratorConfig { max_tokens: 256, sampling: SamplingStrategy::Greedy, seed: 0 }
    }
}

/// One token as it comes.
#[derive(Clone, Debug, PartialEq)]
pub struct StreamToken {
    /// Its id.
    pub id: u32,
    /// The text that it completes; empty while a character is not whole.
    pub text: String,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model said so.
    EndOfText,
    /// `max_tokens` were made.
    Length,
    /// The model's context is full.
    Context,
}

/// What came out.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// The text, without the end token.
    pub text: String,
    /// The ids, without the end token.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Time until the first token was chosen.
    pub prefill: Duration,
    /// Time for the rest.
    pub decode: Duration,
}

/// Generates text with a decoder and the adapter that is on it.
///
/// A step's arguments are `[ids, position, last, k.., v..]` and its results `[logits of position last, k.., v..]`,
/// the cache updated in place.
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
        let layers = decoder.config.num_layers;
        let model = Arc::clone(&decoder);
        let step = compile(move |args: &[LazyTensor]| trace_step(&model, args))
            .donate((3..3 + 2 * layers).collect::<Vec<_>>());
        Ok(Generator { decoder, tokenizer, step })
    }

    /// Generates from a prompt, to which nothing is added: the caller applies the chat template.
    ///
    /// # Errors
    /// Where the prompt is empty or longer than the model's context.
    pub fn generate(
        &self,
        prompt: &str,
        config: &GeneratorConfig,
        mut on_token: impl FnMut(&StreamToken),
    ) -> Result<Generated> {
        let ids = self.tokenizer.encode(prompt, false)?;
        let context = self.decoder.config.max_position_embeddings;
        if ids.is_empty() || ids.len() > context {
            return Err(ErrorKind::PromptLength { tokens: ids.len(), context }.into());
        }
        let started = Instant::now();
        let room = (ids.len() + config.max_tokens).next_multiple_of(PREFILL_BUCKET);
        let capacity = room.next_multiple_of(CACHE_BUCKET).min(context.max(ids.len()));
        let mut cache = KVCache::new(&self.decoder.config, 1, capacity, &Device::Cpu)?;
        let mut logits = self.step(&ids, &mut cache)?;
        let mut out = Generated {
            text: String::new(),
            ids: Vec::new(),
            finish: Finish::Length,
            prompt_tokens: ids.len(),
            prefill: started.elapsed(),
            decode: Duration::ZERO,
        };
        let mut stream = self.tokenizer.stream();
        while out.ids.len() < config.max_tokens {
            let draw = out.ids.len() as u64;
            let id = sample_token(&logits, config.sampling, config.seed, draw);
            if self.tokenizer.is_end(id) {
                out.finish = Finish::EndOfText;
                break;
            }
            out.ids.push(id);
            let text = stream.push(id)?;
            out.text += &text;
            on_token(&StreamToken { id, text });
            if out.ids.len() == config.max_tokens {
                break;
            }
            if cache.len() == cache.capacity() {
                out.finish = Finish::Context;
                break;
            }
            logits = self.step(&[id], &mut cache)?;
        }
        out.decode = started.elapsed() - out.prefill;
        Ok(out)
    }

    /// Puts `ids` into the cache and returns the logits after the last of them.
    fn step(&self, ids: &[u32], cache: &mut KVCache) -> Result<Vec<f32>> {
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
        let mut results = self.step.call(args)?;
        cache.values = results.split_off(1 + self.decoder.config.num_layers);
        cache.keys = results.split_off(1);
        cache.advance(ids.len());
        results[0].to_vec1::<f32>()
    }
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

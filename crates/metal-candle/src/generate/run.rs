//! One generation in progress: it is given logits and says which token they make.

use super::logits::{LogProbs, adjust, forbid, logprobs};
use super::step::Wanted;
use super::stop::{Settled, StopStrings};
use super::{Finish, Generated, GeneratorConfig, StreamToken, sample_token};
use crate::Result;
use crate::io::tokenizer::{TextStream, Tokenizer};
use std::time::{Duration, Instant};

/// What a step says of the next token.
#[derive(Debug)]
pub(super) enum Scores {
    Logits(Vec<f32>),
    /// The likeliest one.
    Best(u32),
}

impl Scores {
    /// Of a step that was to give the token.
    pub(super) fn best(&self) -> u32 {
        match self {
            Scores::Best(id) => *id,
            Scores::Logits(_) => panic!("metal-candle bug: a step that gives no token"),
        }
    }
}

/// What is known between two steps. It runs nothing itself, so that blocking and awaiting callers
/// share it.
#[derive(Debug)]
pub(super) struct Run<'r> {
    tokenizer: &'r Tokenizer,
    config: GeneratorConfig,
    text: TextStream<'r>,
    stops: StopStrings,
    end_tokens: Vec<u32>,
    /// The prompt and what was made of it.
    seen: Vec<u32>,
    started: Instant,
    out: Generated,
    finished: bool,
}

impl<'r> Run<'r> {
    pub(super) fn new(
        tokenizer: &'r Tokenizer,
        config: GeneratorConfig,
        prompt: Vec<u32>,
        cached_tokens: usize,
    ) -> Run<'r> {
        let special = tokenizer.special();
        let own = [special.eos, special.eot].into_iter().flatten();
        let out = Generated {
            text: String::new(),
            ids: Vec::new(),
            logprobs: Vec::new(),
            finish: Finish::Length,
            prompt_tokens: prompt.len(),
            cached_tokens,
            prefill: Duration::ZERO,
            decode: Duration::ZERO,
        };
        Run {
            tokenizer,
            text: tokenizer.stream(),
            stops: StopStrings::new(config.stop.clone()),
            end_tokens: own.chain(config.end_tokens.iter().copied()).collect(),
            seen: prompt,
            started: Instant::now(),
            out,
            finished: config.max_tokens == 0,
            config,
        }
    }

    /// Whether the end may come: not before as many tokens as were asked for.
    fn has_enough(&self) -> bool {
        self.out.ids.len() >= self.config.min_tokens
    }

    /// What of the next step is enough to choose its token.
    pub(super) fn wants(&self) -> Wanted {
        let plain = self.config.sampling.takes_the_best() && self.config.logprobs.is_none();
        if plain && self.has_enough() { Wanted::Best } else { Wanted::Logits }
    }

    /// Chooses the next token. `room` says whether the cache has a place for it.
    ///
    /// `None` where the model ended and nothing was held back.
    pub(super) fn accept(&mut self, scores: Scores, room: bool) -> Result<Option<StreamToken>> {
        let enough = self.has_enough();
        let (id, logprobs) = match scores {
            Scores::Best(id) => (id, None),
            Scores::Logits(logits) => self.choose(logits),
        };
        if self.out.ids.is_empty() {
            self.out.prefill = self.started.elapsed();
        }
        if enough && self.end_tokens.contains(&id) {
            let text = self.finish(Finish::EndOfText, String::new())?;
            return Ok((!text.is_empty()).then_some(StreamToken { id, text, logprobs }));
        }
        self.seen.push(id);
        self.out.ids.push(id);
        self.out.logprobs.extend(logprobs.clone());
        let text = self.text.push(id)?;
        let text = self.settle(text, enough, room)?;
        Ok(Some(StreamToken { id, text, logprobs }))
    }

    fn choose(&self, mut logits: Vec<f32>) -> (u32, Option<LogProbs>) {
        adjust(&mut logits, &self.config.sampling, &self.seen);
        if !self.has_enough() {
            forbid(&mut logits, &self.end_tokens);
        }
        let draw = self.out.ids.len() as u64;
        let id = sample_token(&logits, self.config.sampling.strategy, self.config.seed, draw);
        (id, self.config.logprobs.map(|top| logprobs(&logits, id, top)))
    }

    /// What can be given out of new text; ends the run where it must.
    fn settle(&mut self, text: String, stops_count: bool, room: bool) -> Result<String> {
        let text = match stops_count {
            false => text,
            true => match self.stops.push(&text) {
                Settled::Text(text) => text,
                Settled::Stopped(text) => {
                    self.end(Finish::Stop, &text);
                    return Ok(text);
                }
            },
        };
        if self.out.ids.len() == self.config.max_tokens {
            return self.finish(Finish::Length, text);
        }
        if !room {
            return self.finish(Finish::Context, text);
        }
        self.out.text += &text;
        Ok(text)
    }

    /// Ends the run; what was held back follows `text`.
    fn finish(&mut self, finish: Finish, mut text: String) -> Result<String> {
        let whole = std::mem::replace(&mut self.text, self.tokenizer.stream());
        match self.stops.push(&whole.finish()?) {
            Settled::Text(tail) => {
                text += &tail;
                text += &self.stops.rest();
                self.end(finish, &text);
            }
            Settled::Stopped(tail) => {
                text += &tail;
                self.end(Finish::Stop, &text);
            }
        }
        Ok(text)
    }

    fn end(&mut self, finish: Finish, text: &str) {
        self.out.text += text;
        self.out.finish = finish;
        self.out.decode = self.started.elapsed().saturating_sub(self.out.prefill);
        self.finished = true;
    }

    pub(super) fn is_finished(&self) -> bool {
        self.finished
    }

    /// The token that was chosen last.
    pub(super) fn last(&self) -> u32 {
        *self.seen.last().expect("metal-candle bug: a run without a prompt")
    }

    /// The prompt and what was made of it.
    pub(super) fn seen(&self) -> &[u32] {
        &self.seen
    }

    pub(super) fn into_generated(self) -> Generated {
        self.out
    }
}

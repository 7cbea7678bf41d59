//! What a caller asks for, and what comes back.

use super::{LogProbs, Sampling};
use crate::Result;
use crate::error::ErrorKind;
use std::time::Duration;

/// How to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct GeneratorConfig {
    /// Tokens at most.
    pub max_tokens: usize,
    /// Tokens at least: before them no end token is chosen and no stop string looked for.
    pub min_tokens: usize,
    /// How each is chosen.
    pub sampling: Sampling,
    /// Of the random choices.
    pub seed: u64,
    /// Texts that end the generation and are no part of what comes out.
    pub stop: Vec<String>,
    /// Tokens that end it beside the model's own.
    pub end_tokens: Vec<u32>,
    /// Log-probabilities of every chosen token, and of so many of the likeliest.
    pub logprobs: Option<usize>,
}

impl Default for GeneratorConfig {
    fn default() -> Self {
        GeneratorConfig {
            max_tokens: 256,
            min_tokens: 0,
            sampling: Sampling::default(),
            seed: 0,
            stop: Vec::new(),
            end_tokens: Vec::new(),
            logprobs: None,
        }
    }
}

impl GeneratorConfig {
    /// Sees whether the settings have a meaning.
    ///
    /// # Errors
    /// As [`Sampling::check`]; [`ErrorKind::EmptyStop`].
    pub fn check(&self) -> Result<()> {
        if self.stop.iter().any(String::is_empty) {
            return Err(ErrorKind::EmptyStop.into());
        }
        self.sampling.check()
    }
}

/// One token as it comes.
#[derive(Clone, Debug, PartialEq)]
pub struct StreamToken {
    /// Its id.
    pub id: u32,
    /// The text that it settles; empty while a character is not whole, or while the text may begin
    /// a stop string.
    ///
    /// Where the model ends and text was still held back, the end token brings it.
    pub text: String,
    /// Where they were asked for.
    pub logprobs: Option<LogProbs>,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model said so.
    EndOfText,
    /// One of the stop strings came.
    Stop,
    /// `max_tokens` were made.
    Length,
    /// The model's context is full.
    Context,
}

/// What came out.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// The text, without the end token and without the stop string.
    pub text: String,
    /// The ids, without the end token; those of a stop string are among them.
    pub ids: Vec<u32>,
    /// One for each id, where they were asked for.
    pub logprobs: Vec<LogProbs>,
    /// Why it ended.
    pub finish: Finish,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// So many of them had been computed before, in the same session.
    pub cached_tokens: usize,
    /// Time until the first token was chosen.
    pub prefill: Duration,
    /// Time for the rest.
    pub decode: Duration,
}

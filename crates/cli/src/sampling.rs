//! What `generate` and `chat` share: how tokens are chosen, what ends a text, and how it is remembered.

use crate::model::CacheArgs;
use anyhow::{Context, Result};
use metal_candle::generate::{Finish, Generated, GeneratorConfig, Sampling, SamplingStrategy};
use metal_candle::io::{GenerationConfig, Tokenizer};
use std::time::Duration;

/// Names follow mlx-lm where it has them.
#[derive(clap::Args)]
pub(crate) struct SamplingArgs {
    /// Tokens at most
    #[arg(short, long, default_value_t = 256)]
    max_tokens: usize,
    /// Tokens at least: before them the model cannot end
    #[arg(long, default_value_t = 0)]
    min_tokens: usize,
    /// Sampling temperature; 0 takes the most likely token [default: the model's, or 0]
    #[arg(long, value_parser = at_least_0, allow_negative_numbers = true)]
    temp: Option<f64>,
    /// Sample from the k most likely tokens; 0 is all [default: the model's, or 0]
    #[arg(long)]
    top_k: Option<usize>,
    /// Sample from the most likely tokens that together have this probability [default: the
    /// model's, or 1]
    #[arg(long, value_parser = part, allow_negative_numbers = true)]
    top_p: Option<f64>,
    /// Sample from tokens at least this fraction as likely as the most likely one
    #[arg(long, default_value_t = 0.0, value_parser = fraction, allow_negative_numbers = true)]
    min_p: f64,
    /// Makes tokens that were seen less likely; 1 does nothing [default: the model's, or 1]
    #[arg(long, value_parser = above_0, allow_negative_numbers = true)]
    repetition_penalty: Option<f64>,
    /// Tokens that count as seen: so many of the last ones; 0 is all
    #[arg(long, default_value_t = 20)]
    repetition_context_size: usize,
    /// Added to the logit of a token, by its id; may be repeated
    #[arg(long, value_name = "ID=BIAS", value_parser = bias, allow_hyphen_values = true)]
    logit_bias: Vec<(u32, f32)>,
    /// A text that ends the answer and is not printed; may be repeated
    #[arg(long)]
    stop: Vec<String>,
    /// A token that ends the answer beside the model's own; may be repeated
    #[arg(long)]
    extra_eos_token: Vec<String>,
    /// Of the random choices
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    pub(crate) cache: CacheArgs,
}

impl SamplingArgs {
    /// The settings; what no flag says is as the model's `generation_config.json` has it.
    ///
    /// # Errors
    /// Where a token is not in the vocabulary, or the library refuses a setting.
    pub(crate) fn config(
        &self,
        tokenizer: &Tokenizer,
        model: &GenerationConfig,
    ) -> Result<GeneratorConfig> {
        // The model's filters are meant for its temperature.
        let sampled = model.do_sample && self.temp.is_none();
        let theirs = |value: Option<f64>| value.filter(|_| sampled);
        let temp = self.temp.or(theirs(model.temperature.or(Some(1.0)))).unwrap_or(0.0);
        let top_p = self.top_p.or(theirs(model.top_p)).unwrap_or(1.0);
        let top_k = self.top_k.or(model.top_k.filter(|_| sampled)).unwrap_or(0);
        let min_p = self.min_p;
        let penalty = self.repetition_penalty.or(model.repetition_penalty).unwrap_or(1.0);
        let strategy = match temp {
            0.0 => SamplingStrategy::Greedy,
            temperature => SamplingStrategy::Sample { temperature, top_k, top_p, min_p },
        };
        let id = |token: &String| {
            tokenizer
                .token_id(token)
                .with_context(|| format!("--extra-eos-token: the model has no token {token:?}"))
        };
        let extra = self.extra_eos_token.iter().map(id);
        let config = GeneratorConfig {
            max_tokens: self.max_tokens,
            min_tokens: self.min_tokens,
            sampling: Sampling {
                strategy,
                repetition_penalty: penalty,
                repetition_context: self.repetition_context_size,
                logit_bias: self.logit_bias.iter().copied().collect(),
            },
            seed: self.seed,
            stop: self.stop.clone(),
            end_tokens: extra
                .chain(model.eos_token_ids.iter().map(|id| Ok(*id)))
                .collect::<Result<_>>()?,
            logprobs: None,
        };
        config.check()?;
        Ok(config)
    }
}

/// Speeds, and why the text ended where the model did not say so.
pub(crate) fn summary(g: &Generated) -> String {
    let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
    let end = match g.finish {
        Finish::EndOfText => "",
        Finish::Stop => " (a stop string came)",
        Finish::Length => " (--max-tokens reached)",
        Finish::Context => " (the model's context is full)",
    };
    let cached = match g.cached_tokens {
        0 => String::new(),
        n => format!(" ({n} of them kept)"),
    };
    format!(
        "prompt: {} tokens{cached}, {:.1} tok/s; generation: {} tokens, {:.1} tok/s{end}",
        g.prompt_tokens,
        rate(g.prompt_tokens - g.cached_tokens, g.prefill),
        g.ids.len(),
        rate(g.ids.len().saturating_sub(1), g.decode)
    )
}

fn number(text: &str, expected: &str, holds: impl Fn(f64) -> bool) -> Result<f64, String> {
    let number = text.parse().ok().filter(|x: &f64| x.is_finite() && holds(*x));
    number.ok_or_else(|| format!("expected {expected}"))
}

fn at_least_0(text: &str) -> Result<f64, String> {
    number(text, "a number of 0 or more", |x| x >= 0.0)
}

fn above_0(text: &str) -> Result<f64, String> {
    number(text, "a number above 0", |x| x > 0.0)
}

fn part(text: &str) -> Result<f64, String> {
    number(text, "a number above 0 and at most 1", |x| x > 0.0 && x <= 1.0)
}

fn fraction(text: &str) -> Result<f64, String> {
    number(text, "a number from 0 to 1", |x| (0.0..=1.0).contains(&x))
}

fn bias(text: &str) -> Result<(u32, f32), String> {
    let (id, bias) = text.split_once('=').ok_or("expected ID=BIAS, such as 42=-1.5")?;
    let id = id.parse().map_err(|_| format!("expected a token id, got {id:?}"))?;
    let bias: f32 = bias.parse().map_err(|_| format!("expected a number, got {bias:?}"))?;
    Ok((id, bias))
}

//! From logits to a token.

use crate::Result;
use crate::error::ErrorKind;
use metal_candle_graph::{Distribution, random_f64};
use std::collections::BTreeMap;

/// How the next token is chosen. The filters apply in the order top-k, top-p, min-p, on
/// probabilities at the given temperature; each keeps at least the most likely token.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum SamplingStrategy {
    /// The most likely one; the lowest id on ties.
    #[default]
    Greedy,
    /// At random.
    Sample {
        /// Divides the logits; above 0.
        temperature: f64,
        /// Only the `k` most likely; 0 is all.
        top_k: usize,
        /// Only the most likely ones that together reach this probability (Holtzman et al. 2020); 1
        /// is all.
        top_p: f64,
        /// Only those at least this fraction as likely as the most likely one (Nguyen et al. 2024);
        /// 0 is all.
        min_p: f64,
    },
}

impl SamplingStrategy {
    /// At random, at this temperature, from all tokens.
    pub fn temperature(temperature: f64) -> SamplingStrategy {
        SamplingStrategy::Sample { temperature, top_k: 0, top_p: 1.0, min_p: 0.0 }
    }
}

/// A strategy, and what is done to the logits before it.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// How a token is chosen in the end.
    pub strategy: SamplingStrategy,
    /// Divides the positive and multiplies the negative logits of tokens that were seen (Keskar et
    /// al. 2019); above 0, and 1 changes nothing.
    pub repetition_penalty: f64,
    /// Of so many last tokens, the prompt's included; 0 is all.
    pub repetition_context: usize,
    /// Added to the logits of these tokens; minus infinity forbids one.
    pub logit_bias: BTreeMap<u32, f32>,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling {
            strategy: SamplingStrategy::Greedy,
            repetition_penalty: 1.0,
            repetition_context: 20,
            logit_bias: BTreeMap::new(),
        }
    }
}

impl From<SamplingStrategy> for Sampling {
    fn from(strategy: SamplingStrategy) -> Sampling {
        Sampling { strategy, ..Sampling::default() }
    }
}

impl Sampling {
    /// Whether it is the likeliest token that is taken, whatever was seen.
    pub(super) fn takes_the_best(&self) -> bool {
        self.strategy == SamplingStrategy::Greedy
            && self.repetition_penalty == 1.0
            && self.logit_bias.is_empty()
    }

    /// Whether every setting is one that means something.
    ///
    /// # Errors
    /// [`ErrorKind::Sampling`] for the first that does not.
    pub fn check(&self) -> Result<()> {
        let finite_above_0 = |x: f64| x > 0.0 && x.is_finite();
        if let SamplingStrategy::Sample { temperature, top_p, min_p, .. } = self.strategy {
            const ABOVE: &str = "a finite number above 0";
            expect("temperature", ABOVE, temperature, finite_above_0(temperature))?;
            expect("top_p", "above 0 and at most 1", top_p, top_p > 0.0 && top_p <= 1.0)?;
            expect("min_p", "0 to 1", min_p, (0.0..=1.0).contains(&min_p))?;
        }
        let penalty = self.repetition_penalty;
        let allowed = finite_above_0(penalty);
        expect("repetition_penalty", "a finite number above 0", penalty, allowed)?;
        for bias in self.logit_bias.values() {
            let allowed = bias.is_finite() || *bias == f32::NEG_INFINITY;
            expect("logit_bias", "a number or minus infinity", f64::from(*bias), allowed)?;
        }
        Ok(())
    }
}

fn expect(name: &'static str, expected: &'static str, got: f64, holds: bool) -> Result<()> {
    match holds {
        true => Ok(()),
        false => Err(ErrorKind::Sampling { name, expected, got }.into()),
    }
}

/// Chooses a token by `strategy`; draw number `draw` of `seed` is always the same number.
///
/// Logits that are NaN are never chosen, unless all are: then it is token 0.
pub fn sample_token(logits: &[f32], strategy: SamplingStrategy, seed: u64, draw: u64) -> u32 {
    match strategy {
        SamplingStrategy::Greedy => argmax(logits),
        SamplingStrategy::Sample { temperature, top_k, top_p, min_p } => {
            let mut kept = weights(logits, temperature);
            cut(&mut kept, top_k, top_p, min_p);
            let total: f64 = kept.iter().map(|(_, p)| p).sum();
            let mut left = total * random_f64(Distribution::Uniform, seed as i64, 0, draw);
            for (id, p) in &kept {
                left -= p;
                if left < 0.0 {
                    return *id;
                }
            }
            kept.last().map_or(0, |(id, _)| *id)
        }
    }
}

fn argmax(logits: &[f32]) -> u32 {
    // In lanes, which compilers make vectors of; comparisons pass over NaN.
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (chunks, rest) = logits.as_chunks::<16>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = if *x > *lane { *x } else { *lane };
        }
    }
    let max = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    logits.iter().position(|x| *x == max).unwrap_or(0) as u32
}

/// The tokens that may be drawn, most likely first, which has the weight 1.
fn weights(logits: &[f32], temperature: f64) -> Vec<(u32, f64)> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |x: f32| match x == max {
        true => 1.0, // also where both are infinite
        false => ((f64::from(x) - f64::from(max)) / temperature.max(1e-6)).exp(),
    };
    let mut all: Vec<(u32, f64)> = logits
        .iter()
        .enumerate()
        .map(|(i, x)| (i as u32, weight(*x)))
        .filter(|(_, p)| *p > 0.0)
        .collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    all
}

/// Cuts the tail off.
fn cut(kept: &mut Vec<(u32, f64)>, top_k: usize, top_p: f64, min_p: f64) {
    if top_k > 0 {
        kept.truncate(top_k);
    }
    let total: f64 = kept.iter().map(|(_, p)| p).sum();
    let mut sum = 0.0;
    let reached = kept.iter().position(|(_, p)| {
        sum += p;
        sum >= top_p * total
    });
    kept.truncate(reached.map_or(kept.len(), |i| i + 1));
    let unlikely = kept.iter().skip(1).position(|(_, p)| *p < min_p);
    kept.truncate(unlikely.map_or(kept.len(), |i| i + 1));
}

#[cfg(test)]
mod tests {
    use super::{Sampling, SamplingStrategy, sample_token};
    use crate::ErrorKind;

    const LOGITS: [f32; 4] = [0.0, 2.0, 1.0, f32::NAN];
    const DRAWS: usize = 20_000;

    fn sample(temperature: f64, top_k: usize, top_p: f64, min_p: f64) -> SamplingStrategy {
        SamplingStrategy::Sample { temperature, top_k, top_p, min_p }
    }

    fn counts(logits: &[f32; 4], strategy: SamplingStrategy) -> [usize; 4] {
        let mut counts = [0; 4];
        for draw in 0..DRAWS {
            counts[sample_token(logits, strategy, 7, draw as u64) as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_largest_and_the_first_of_equals() {
        assert_eq!(sample_token(&LOGITS, SamplingStrategy::Greedy, 0, 0), 1);
        assert_eq!(sample_token(&[1.0, 3.0, 3.0], SamplingStrategy::Greedy, 0, 0), 1);
    }

    #[test]
    fn frequencies_follow_the_softmax_at_the_temperature() {
        let n = counts(&LOGITS, SamplingStrategy::temperature(0.5));
        let weights = [(-4.0f64).exp(), 1.0, (-2.0f64).exp(), 0.0];
        let total: f64 = weights.iter().sum();
        for (n, w) in n.iter().zip(weights) {
            assert!((*n as f64 / DRAWS as f64 - w / total).abs() < 0.01);
        }
    }

    #[test]
    fn every_filter_cuts_the_tail_and_keeps_the_likeliest() {
        let k = counts(&LOGITS, sample(1.0, 2, 1.0, 0.0));
        assert!(k[0] == 0 && k[1] > 0 && k[2] > 0 && k[3] == 0);
        // Of the likeliest token's probability the others have exp(-1) = 0.37 and exp(-2) = 0.14.
        let p = counts(&LOGITS, sample(1.0, 0, 1.0, 0.2));
        assert!(p[0] == 0 && p[1] > 0 && p[2] > 0 && p[3] == 0);
        for strategy in [sample(1.0, 0, 0.5, 0.0), sample(1.0, 0, 1.0, 1.0)] {
            assert_eq!(counts(&LOGITS, strategy), [0, DRAWS, 0, 0]);
        }
    }

    #[test]
    fn a_token_at_minus_infinity_is_never_drawn() {
        let logits = [f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY, 1.0];
        let n = counts(&logits, SamplingStrategy::temperature(1e3));
        assert!(n[0] == 0 && n[2] == 0 && n[1] > 0 && n[3] > 0);
        assert_eq!(sample_token(&[f32::NAN], SamplingStrategy::temperature(1.0), 0, 0), 0);
        assert_eq!(sample_token(&[0.0, f32::INFINITY], sample(1.0, 0, 1.0, 0.1), 0, 0), 1);
    }

    #[test]
    fn a_draw_is_a_function_of_seed_and_number() {
        let draws = |seed| -> Vec<u32> {
            let strategy = SamplingStrategy::temperature(1.0);
            (0..50).map(|draw| sample_token(&LOGITS, strategy, seed, draw)).collect()
        };
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
    }

    #[test]
    fn a_setting_out_of_range_is_refused_by_name() {
        let refused = |sampling: Sampling, want: &str| {
            let error = sampling.check().unwrap_err();
            let ErrorKind::Sampling { name, .. } = error.kind() else { panic!("{error}") };
            assert_eq!(*name, want);
        };
        for temperature in [-1.0, 0.0, f64::NAN, f64::INFINITY] {
            refused(sample(temperature, 0, 1.0, 0.0).into(), "temperature");
        }
        for top_p in [0.0, 1.1, f64::NAN] {
            refused(sample(1.0, 0, top_p, 0.0).into(), "top_p");
        }
        for min_p in [-0.1, 1.1, f64::NAN] {
            refused(sample(1.0, 0, 1.0, min_p).into(), "min_p");
        }
        for repetition_penalty in [0.0, -1.0, f64::NAN] {
            let sampling = Sampling { repetition_penalty, ..Sampling::default() };
            refused(sampling, "repetition_penalty");
        }
        let bias = Sampling { logit_bias: [(0, f32::NAN)].into(), ..Sampling::default() };
        refused(bias, "logit_bias");
        assert!(Sampling::default().check().is_ok());
        assert!(Sampling::from(sample(0.7, 40, 1.0, 1.0)).check().is_ok());
    }
}

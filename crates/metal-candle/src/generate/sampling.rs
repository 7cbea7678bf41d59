//! From logits to a token.

use metal_candle_graph::{Distribution, random_f64};

/// How the next token is chosen. The filters apply in the order top-k, top-p, on probabilities at the given
/// temperature.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SamplingStrategy {
    /// The most likely one; the lowest id on ties.
    Greedy,
    /// At random.
    Sample {
        /// Divides the logits; above 0.
        temperature: f64,
        /// Only the `k` most likely; 0 is all.
        top_k: usize,
        /// Only the most likely ones that together reach this probability (Holtzman et al. 2020); 1 is all.
        top_p: f64,
    },
}

/// Chooses a token by `strategy`; draw number `draw` of `seed` is always the same number.
///
/// Logits that are NaN are never chosen, unless all are: then it is token 0.
pub fn sample_token(logits: &[f32], strategy: SamplingStrategy, seed: u64, draw: u64) -> u32 {
    match strategy {
        SamplingStrategy::Greedy => argmax(logits),
        SamplingStrategy::Sample { temperature, top_k, top_p } => {
            let kept = candidates(logits, temperature, top_k, top_p);
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
    let mut best = 0;
    for (i, x) in logits.iter().enumerate() {
        if *x > logits[best] || logits[best].is_nan() && !x.is_nan() {
            best = i;
        }
    }
    best as u32
}

/// The tokens that may be drawn with their weights, most likely first.
fn candidates(logits: &[f32], temperature: f64, top_k: usize, top_p: f64) -> Vec<(u32, f64)> {
    let max = f64::from(logits[argmax(logits) as usize]);
    let weight = |x: &f32| ((f64::from(*x) - max) / temperature.max(1e-6)).exp();
    let mut kept: Vec<(u32, f64)> = logits
        .iter()
        .enumerate()
        .filter(|(_, x)| !x.is_nan())
        .map(|(i, x)| (i as u32, weight(x)))
        .collect();
    kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
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
    kept
}

#[cfg(test)]
mod tests {
    use super::{SamplingStrategy, sample_token};

    const LOGITS: [f32; 4] = [0.0, 2.0, 1.0, f32::NAN];

    fn counts(strategy: SamplingStrategy) -> [usize; 4] {
        let mut counts = [0; 4];
        for draw in 0..20_000 {
            counts[sample_token(&LOGITS, strategy, 7, draw) as usize] += 1;
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
        let n = counts(SamplingStrategy::Sample { temperature: 0.5, top_k: 0, top_p: 1.0 });
        let weights = [(-4.0f64).exp(), 1.0, (-2.0f64).exp(), 0.0];
        let total: f64 = weights.iter().sum();
        for (n, w) in n.iter().zip(weights) {
            assert!((*n as f64 / 20_000.0 - w / total).abs() < 0.01);
        }
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let k = counts(SamplingStrategy::Sample { temperature: 1.0, top_k: 2, top_p: 1.0 });
        assert!(k[0] == 0 && k[1] > 0 && k[2] > 0 && k[3] == 0);
        let p = counts(SamplingStrategy::Sample { temperature: 1.0, top_k: 0, top_p: 0.5 });
        assert_eq!(p, [0, 20_000, 0, 0]);
    }
}

//! What is done to logits before a token is chosen, and what is read off them then.

use super::Sampling;

/// Natural logarithms of probabilities: after penalties and biases, before temperature and filters.
#[derive(Clone, Debug, PartialEq)]
pub struct LogProbs {
    /// Of the token that was chosen.
    pub chosen: f32,
    /// The likeliest tokens, the likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// Applies the repetition penalty for the tokens `seen` so far, and then the biases.
pub(super) fn adjust(logits: &mut [f32], sampling: &Sampling, seen: &[u32]) {
    if sampling.repetition_penalty != 1.0 {
        let window = match sampling.repetition_context {
            0 => seen.len(),
            n => n.min(seen.len()),
        };
        penalise(logits, sampling.repetition_penalty as f32, &seen[seen.len() - window..]);
    }
    for (id, bias) in &sampling.logit_bias {
        if let Some(logit) = logits.get_mut(*id as usize) {
            *logit += bias;
        }
    }
}

/// Keskar et al. 2019, but for negative logits, which dividing would make likelier. A token that
/// was seen twice is penalised once.
fn penalise(logits: &mut [f32], penalty: f32, seen: &[u32]) {
    let mut seen = seen.to_vec();
    seen.sort_unstable();
    seen.dedup();
    for id in seen {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
    }
}

/// Makes sure that none of `ids` is chosen.
pub(super) fn forbid(logits: &mut [f32], ids: &[u32]) {
    for id in ids {
        if let Some(logit) = logits.get_mut(*id as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// The log-probability of `chosen`, and the `top` likeliest tokens.
pub(super) fn logprobs(logits: &[f32], chosen: u32, top: usize) -> LogProbs {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp = |x: &f32| f64::from(x - max).exp();
    let sum: f64 = logits.iter().filter(|x| !x.is_nan()).map(exp).sum();
    let log = |x: f32| (f64::from(x - max) - sum.ln()) as f32;
    let mut order: Vec<u32> =
        (0..logits.len() as u32).filter(|id| !logits[*id as usize].is_nan()).collect();
    let descending =
        |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if top < order.len() {
        order.select_nth_unstable_by(top, descending);
        order.truncate(top);
    }
    order.sort_unstable_by(descending);
    LogProbs {
        chosen: log(logits.get(chosen as usize).copied().unwrap_or(f32::NAN)),
        top: order.into_iter().map(|id| (id, log(logits[id as usize]))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::{Sampling, adjust, forbid, logprobs};

    fn adjusted(sampling: Sampling, seen: &[u32]) -> Vec<f32> {
        let mut logits = vec![2.0, -2.0, 0.0, 1.0];
        adjust(&mut logits, &sampling, seen);
        logits
    }

    #[test]
    fn the_penalty_pushes_every_seen_logit_down_once() {
        let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        assert_eq!(adjusted(sampling.clone(), &[]), [2.0, -2.0, 0.0, 1.0]);
        assert_eq!(adjusted(sampling.clone(), &[0, 1, 0, 1]), [1.0, -4.0, 0.0, 1.0]);
        // An id outside the vocabulary is nobody's.
        assert_eq!(adjusted(sampling, &[9]), [2.0, -2.0, 0.0, 1.0]);
    }

    #[test]
    fn the_penalty_forgets_what_lies_before_its_window() {
        let last_two =
            Sampling { repetition_penalty: 2.0, repetition_context: 2, ..Sampling::default() };
        assert_eq!(adjusted(last_two, &[0, 1, 3]), [2.0, -4.0, 0.0, 0.5]);
        let all =
            Sampling { repetition_penalty: 2.0, repetition_context: 0, ..Sampling::default() };
        assert_eq!(adjusted(all, &[0, 1, 3]), [1.0, -4.0, 0.0, 0.5]);
    }

    #[test]
    fn a_bias_is_added_and_a_forbidden_token_is_never_likely() {
        let sampling = Sampling { logit_bias: [(1, 5.0), (9, 1.0)].into(), ..Sampling::default() };
        assert_eq!(adjusted(sampling, &[]), [2.0, 3.0, 0.0, 1.0]);
        let mut logits = vec![1.0, 2.0];
        forbid(&mut logits, &[1, 7]);
        assert_eq!(logits, [1.0, f32::NEG_INFINITY]);
    }

    #[test]
    fn log_probabilities_are_those_of_the_softmax() {
        let logits = [1.0f32, 3.0, f32::NAN, 2.0, f32::NEG_INFINITY];
        let all = logprobs(&logits, 3, 9);
        let sum: f64 = all.top.iter().map(|(_, p)| f64::from(*p).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6);
        assert_eq!(all.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 3, 0, 4]);
        assert_eq!(all.chosen, all.top[1].1);
        assert!((all.top[0].1 - all.top[1].1 - 1.0).abs() < 1e-6);
        assert_eq!(logprobs(&logits, 3, 2).top, all.top[..2]);
        assert!(logprobs(&logits, 0, 0).top.is_empty());
    }
}

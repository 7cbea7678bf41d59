//! Texts of like lengths together, so that little is padded and few shapes are planned.

/// Texts of one run.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Batch {
    /// Which texts.
    pub(super) texts: Vec<usize>,
    /// Tokens of each with its padding.
    pub(super) len: usize,
}

/// How large a batch may be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Texts.
    pub(super) texts: usize,
    /// Tokens in all, padding included, unless a single text has more.
    pub(super) tokens: usize,
    /// Tokens of a text.
    pub(super) len: usize,
}

/// Texts of these lengths in batches, the longest first: what does not fit into memory says so at once.
///
/// Numbers of texts are powers of two and lengths are rounded up, so that a plan is soon met again.
pub(super) fn batches(lens: &[usize], limits: Limits) -> Vec<Batch> {
    let mut order: Vec<usize> = (0..lens.len()).collect();
    order.sort_by_key(|&text| std::cmp::Reverse(lens[text]));
    let mut rest = &order[..];
    let mut batches = Vec::new();
    while let Some(&longest) = rest.first() {
        let len = padded(lens[longest]).min(limits.len.max(1));
        let most = limits.texts.min(limits.tokens / len).min(rest.len()).max(1);
        let (texts, others) = rest.split_at(1 << most.ilog2());
        batches.push(Batch { texts: texts.to_vec(), len });
        rest = others;
    }
    batches
}

/// A length that may have a plan already: at most an eighth more, or 7 tokens.
fn padded(len: usize) -> usize {
    let step = (len.next_power_of_two() / 16).max(8);
    len.next_multiple_of(step).max(step)
}

#[cfg(test)]
mod tests {
    use super::{Batch, Limits, batches, padded};
    use std::collections::BTreeSet;

    const LIMITS: Limits = Limits { texts: 32, tokens: 2048, len: 512 };

    #[test]
    fn every_text_is_in_one_batch_that_holds_it() {
        let lens: Vec<usize> = (0..1000).map(|i| i * i % 513).collect();
        let all = batches(&lens, LIMITS);
        let mut seen: Vec<usize> = all.iter().flat_map(|batch| batch.texts.clone()).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..1000).collect::<Vec<_>>());
        for Batch { texts, len } in &all {
            assert!(texts.iter().all(|&text| lens[text] <= *len), "{texts:?} in {len}");
            assert!(texts.len().is_power_of_two() && texts.len() <= 32);
            assert!(texts.len() * len <= 2048 && *len <= 512, "{} x {len}", texts.len());
        }
        let tokens: usize = lens.iter().sum();
        let padded: usize = all.iter().map(|batch| batch.texts.len() * batch.len).sum();
        assert!(padded < tokens + tokens / 10, "{padded} for {tokens}");
    }

    #[test]
    fn a_text_beyond_the_limit_of_tokens_stands_alone() {
        let limits = Limits { texts: 32, tokens: 64, len: 512 };
        let all = batches(&[3, 500, 3], limits);
        assert_eq!(all[0], Batch { texts: vec![1], len: 512 });
        assert_eq!(all[1], Batch { texts: vec![0, 2], len: 8 });
    }

    #[test]
    fn no_texts_are_no_batches_and_a_text_without_tokens_is_one() {
        assert_eq!(batches(&[], LIMITS), []);
        assert_eq!(batches(&[0], LIMITS), [Batch { texts: vec![0], len: 8 }]);
        // No longer than there are positions for.
        let limits = Limits { len: 5, ..LIMITS };
        assert_eq!(batches(&[5, 4], limits), [Batch { texts: vec![0, 1], len: 5 }]);
    }

    #[test]
    fn few_lengths_are_planned() {
        let lens: BTreeSet<usize> = (0..=512).map(padded).collect();
        assert!(lens.len() <= 32, "{lens:?}");
        assert!((64..=512).all(|len| padded(len) - len <= len / 8));
    }
}

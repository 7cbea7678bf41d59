//! How wide batches are padded.

/// Batches are padded to a multiple of it: what kernels like, and a start on few shapes.
const MULTIPLE: usize = 32;
/// Widths at most. Each is a plan, with memory of its own.
const MOST: usize = 16;
/// Fewer widths are taken where they cost no more than this part of all columns.
const TOLERANCE: f64 = 0.05;

/// The columns that a row of so many inputs takes at least.
pub(super) fn rounded(inputs: usize, max_seq_length: usize) -> usize {
    inputs.next_multiple_of(MULTIPLE).min(max_seq_length)
}

/// The widths to pad to, ascending, for batches that need at least these: the fewest, at most
/// sixteen, that waste little more than each batch's own width would, and of so many the best
/// (dynamic programming over the widths that occur).
pub(super) fn choose(mut needed: Vec<usize>) -> Vec<usize> {
    needed.sort_unstable();
    let total: usize = needed.iter().sum();
    let groups: Vec<(usize, usize)> =
        needed.chunk_by(|a, b| a == b).map(|group| (group[0], group.len())).collect();
    let allowed = (total as f64 * TOLERANCE) as usize;
    let mut table = Table::new(&groups);
    while table.waste() > allowed && table.cuts.len() < MOST {
        table.add_width();
    }
    table.widths()
}

/// The least waste of the first `j + 1` groups in ever more widths.
struct Table<'g> {
    /// Width and number of batches, ascending.
    groups: &'g [(usize, usize)],
    /// Batches before each group, and the columns that they need.
    before: Vec<(usize, usize)>,
    /// Of the last round.
    least: Vec<usize>,
    /// By round: where the last width's groups begin.
    cuts: Vec<Vec<usize>>,
}

impl<'g> Table<'g> {
    fn new(groups: &'g [(usize, usize)]) -> Table<'g> {
        let mut before = vec![(0, 0)];
        for (width, count) in groups {
            let (batches, columns) = before[before.len() - 1];
            before.push((batches + count, columns + width * count));
        }
        let mut table = Table { groups, before, least: Vec::new(), cuts: Vec::new() };
        table.least = (0..groups.len()).map(|j| table.cost(0, j)).collect();
        table.cuts.push(vec![0; groups.len()]);
        table
    }

    /// What is wasted where the groups `i..=j` are padded to the width of `j`.
    fn cost(&self, i: usize, j: usize) -> usize {
        let ((from, needed), (to, all)) = (self.before[i], self.before[j + 1]);
        self.groups[j].0 * (to - from) - (all - needed)
    }

    fn waste(&self) -> usize {
        self.least[self.least.len() - 1]
    }

    fn add_width(&mut self) {
        let best = |j: usize| {
            let split = (1..=j).map(|i| (self.least[i - 1] + self.cost(i, j), i));
            split.chain([(self.cost(0, j), 0)]).min().unwrap_or_default()
        };
        let (least, cuts) = (0..self.groups.len()).map(best).unzip();
        self.least = least;
        self.cuts.push(cuts);
    }

    fn widths(&self) -> Vec<usize> {
        let mut widths = Vec::new();
        let mut end = self.groups.len();
        for cuts in self.cuts.iter().rev() {
            if end == 0 {
                break;
            }
            widths.push(self.groups[end - 1].0);
            end = cuts[end - 1];
        }
        widths.reverse();
        widths
    }
}

#[cfg(test)]
mod tests {
    use super::{MOST, choose};

    /// Columns beyond what is needed.
    fn waste(needed: &[usize], widths: &[usize]) -> usize {
        let pad = |n: &usize| widths.iter().find(|w| *w >= n).unwrap() - n;
        needed.iter().map(pad).sum()
    }

    /// The least waste of any choice of `k` widths, by trying them all.
    fn least(needed: &[usize], k: usize) -> usize {
        let mut all = needed.to_vec();
        all.sort_unstable();
        all.dedup();
        let choices = (1u32..1 << all.len()).filter(|set| set.count_ones() as usize == k);
        let largest = 1u32 << (all.len() - 1);
        choices
            .filter(|set| set & largest != 0)
            .map(|set| {
                let widths: Vec<usize> =
                    (0..all.len()).filter(|i| set >> i & 1 == 1).map(|i| all[i]).collect();
                waste(needed, &widths)
            })
            .min()
            .unwrap()
    }

    #[test]
    fn no_choice_of_so_many_widths_wastes_less() {
        for seed in 0..200u64 {
            let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let mut random = |n: u64| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 33) % n
            };
            let needed: Vec<usize> =
                (0..1 + random(40)).map(|_| 32 * (1 + random(10) * random(2)) as usize).collect();
            let widths = choose(needed.clone());
            assert!(widths.len() <= MOST && widths.is_sorted(), "{widths:?}");
            assert_eq!(waste(&needed, &widths), least(&needed, widths.len()), "{needed:?}");
            if widths.len() > 1 {
                let total: usize = needed.iter().sum();
                assert!(least(&needed, widths.len() - 1) as f64 > 0.05 * total as f64 - 1.0);
            }
        }
    }

    #[test]
    fn many_lengths_are_few_widths() {
        let needed: Vec<usize> = (1..=64).flat_map(|i| vec![32 * i; 65 - i]).collect();
        let widths = choose(needed.clone());
        let total: usize = needed.iter().sum();
        assert!((2..=MOST).contains(&widths.len()), "{widths:?}");
        assert!((waste(&needed, &widths) as f64) < 0.08 * total as f64, "{widths:?}");
        assert_eq!(choose(vec![2048, 2016, 2048]), [2048]);
        assert_eq!(choose(vec![32, 2048]), [32, 2048]);
    }
}

//! Which commands must wait for those before them.
//!
//! The encoder lets commands overlap, as MLX's and Candle's do: the three products that read one row of activations need
//! not wait for each other. Metal tracks whole buffers, and the arena is one: so a barrier goes where the plan's own bytes
//! ask for it, and nowhere else.

use std::ops::Range;

/// Bytes of one of the run's allocations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) base: usize,
    pub(super) bytes: Range<usize>,
}

/// What a command reads and writes.
#[derive(Clone, Debug, Default)]
pub(super) struct Touched {
    pub(super) reads: Vec<Span>,
    pub(super) writes: Vec<Span>,
}

impl Span {
    fn meets(&self, other: &Span) -> bool {
        self.base == other.base
            && self.bytes.start < other.bytes.end
            && other.bytes.start < self.bytes.end
    }
}

impl Touched {
    /// Whether one of them writes what the other touches.
    fn conflicts(&self, other: &Touched) -> bool {
        let meet = |a: &[Span], b: &[Span]| a.iter().any(|a| b.iter().any(|b| a.meets(b)));
        meet(&self.writes, &other.writes)
            || meet(&self.writes, &other.reads)
            || meet(&self.reads, &other.writes)
    }
}

/// By command: whether a barrier must stand before it.
pub(super) fn barriers(commands: &[Touched]) -> Vec<bool> {
    let mut since = 0;
    let mut barrier = |(at, command): (usize, &Touched)| {
        let must_wait = commands[since..at].iter().any(|before| before.conflicts(command));
        if must_wait {
            since = at;
        }
        must_wait
    };
    commands.iter().enumerate().map(&mut barrier).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(base: usize, bytes: Range<usize>) -> Span {
        Span { base, bytes }
    }

    fn command(reads: &[&Span], writes: &[&Span]) -> Touched {
        let cloned = |spans: &[&Span]| spans.iter().copied().cloned().collect();
        Touched { reads: cloned(reads), writes: cloned(writes) }
    }

    #[test]
    fn products_of_one_row_do_not_wait_for_each_other() {
        let x = span(3, 0..64);
        let products = [0, 1, 2].map(|i| command(&[&x], &[&span(0, i * 64..(i + 1) * 64)]));
        let attention = command(&[&span(0, 0..192)], &[&span(0, 192..256)]);
        let all = [&products[..], &[attention]].concat();
        assert_eq!(barriers(&all), [false, false, false, true]);
    }

    #[test]
    fn every_kind_of_hazard_waits() {
        let (first, second) = (span(0, 0..16), span(0, 16..32));
        let read_after_write = [command(&[], &[&first]), command(&[&first], &[])];
        let write_after_read = [command(&[&first], &[]), command(&[], &[&first])];
        let write_after_write = [command(&[], &[&first]), command(&[], &[&first])];
        for commands in [read_after_write, write_after_read, write_after_write] {
            assert_eq!(barriers(&commands), [false, true]);
        }
        let apart = [command(&[], &[&first]), command(&[&second], &[])];
        assert_eq!(barriers(&apart), [false, false]);
        let elsewhere = [command(&[], &[&first]), command(&[], &[&span(1, 0..16)])];
        assert_eq!(barriers(&elsewhere), [false, false]);
    }

    /// Between two commands that conflict there is always a barrier, in any sequence.
    #[test]
    fn no_two_commands_that_overlap_conflict() {
        let mut state = 1u64;
        let mut below = |n: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % n
        };
        for _ in 0..200 {
            let mut spans = |n: u64| {
                (0..n)
                    .map(|_| {
                        let (base, start) = (below(3) as usize, below(8) as usize * 16);
                        span(base, start..start + 16 * (1 + below(3) as usize))
                    })
                    .collect::<Vec<_>>()
            };
            let commands: Vec<Touched> =
                (0..30).map(|_| Touched { reads: spans(2), writes: spans(1) }).collect();
            let barriers = barriers(&commands);
            for later in 0..commands.len() {
                for earlier in 0..later {
                    let ordered = barriers[earlier + 1..=later].contains(&true);
                    assert!(ordered || !commands[earlier].conflicts(&commands[later]));
                }
            }
            assert!(barriers.contains(&false));
        }
    }
}

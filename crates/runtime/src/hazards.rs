//! Which commands must wait for those before them.
//!
//! The three products that read one row of activations need not wait for each other. Metal's encoder lets commands overlap,
//! as MLX and Candle do; it tracks whole buffers, and the arena is one: so a barrier goes where the plan's own bytes ask for
//! it, and nowhere else. On CUDA's one stream, small kernels that need not wait are launched as one.

use std::ops::Range;

/// Bytes of one of the run's allocations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) base: usize,
    pub(crate) bytes: Range<usize>,
}

/// What a command reads and writes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Touched {
    pub(crate) reads: Vec<Span>,
    pub(crate) writes: Vec<Span>,
}

impl Span {
    pub(crate) fn meets(&self, other: &Span) -> bool {
        self.base == other.base
            && self.bytes.start < other.bytes.end
            && other.bytes.start < self.bytes.end
    }
}

impl Touched {
    /// Whether one of them writes what the other touches.
    pub(crate) fn conflicts(&self, other: &Touched) -> bool {
        self.overwrites(other) || other.overwrites(self)
    }

    /// Whether it writes what the other touches.
    pub(crate) fn overwrites(&self, other: &Touched) -> bool {
        meet(&self.writes, &other.writes) || meet(&self.writes, &other.reads)
    }

    /// Whether it writes what it reads.
    #[cfg(feature = "cuda")]
    pub(crate) fn updates_in_place(&self) -> bool {
        meet(&self.writes, &self.reads)
    }
}

fn meet(a: &[Span], b: &[Span]) -> bool {
    a.iter().any(|a| b.iter().any(|b| a.meets(b)))
}

/// By command: whether a barrier must stand before it.
#[cfg(any(test, feature = "metal"))]
pub(crate) fn barriers(commands: &[Touched]) -> Vec<bool> {
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

/// What a command needs of a launch that it shares.
#[cfg(any(test, feature = "cuda"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Room {
    /// Threads of a block: those of one launch have blocks of one size.
    pub(crate) block: usize,
    pub(crate) threads: usize,
    pub(crate) operands: usize,
}

/// So many groups back, at most, a command looks for company.
#[cfg(any(test, feature = "cuda"))]
const WINDOW: usize = 32;

/// The commands in groups that follow each other: none of a group conflicts with another of it, and what conflicts stays in
/// order. A command without [`Room`] is alone; the threads and operands of a group are `most` in all.
#[cfg(any(test, feature = "cuda"))]
pub(crate) fn side_by_side(
    commands: &[(Touched, Option<Room>)],
    most_threads: usize,
    most_operands: usize,
) -> Vec<Vec<usize>> {
    let mut groups: Vec<(Vec<usize>, Option<Room>)> = Vec::new();
    let joined = |group: Option<Room>, own: Option<Room>| {
        let (group, own) = (group?, own?);
        let (threads, operands) = (group.threads + own.threads, group.operands + own.operands);
        let fits = group.block == own.block && threads <= most_threads && operands <= most_operands;
        fits.then_some(Room { block: own.block, threads, operands })
    };
    for (at, (touched, room)) in commands.iter().enumerate() {
        let conflicts =
            |group: &Vec<usize>| group.iter().any(|c| commands[*c].0.conflicts(touched));
        let window = groups.len().saturating_sub(WINDOW);
        let after = (window..groups.len()).rev().find(|g| conflicts(&groups[*g].0));
        let mut later = after.map_or(window, |group| group + 1)..groups.len();
        match later.find_map(|g| Some((g, joined(groups[g].1, *room)?))) {
            Some((group, all)) => {
                groups[group].0.push(at);
                groups[group].1 = Some(all);
            }
            None => groups.push((vec![at], *room)),
        }
    }
    groups.into_iter().map(|(commands, _)| commands).collect()
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

    /// Room for a kernel of so many threads.
    fn room(threads: usize) -> Option<Room> {
        Some(Room { block: 256, threads, operands: 3 })
    }

    #[test]
    fn kernels_that_need_not_wait_share_a_launch() {
        let x = span(3, 0..64);
        let to = |i: usize| span(0, i * 64..(i + 1) * 64);
        let product = |i: usize| (command(&[&x], &[&to(i)]), room(512));
        let rotate = |i: usize| (command(&[&to(i)], &[&to(i + 4)]), room(256));
        // Each product is followed by what reads it, as a plan has them.
        let all = [product(0), rotate(0), product(1), rotate(1), product(2)];
        assert_eq!(side_by_side(&all, 4096, 100), [vec![0, 2, 4], vec![1, 3]]);
        // Two products fill the device, or the parameters.
        assert_eq!(side_by_side(&all, 1024, 100), [vec![0, 2], vec![1, 3, 4]]);
        assert_eq!(side_by_side(&all, 4096, 6), [vec![0, 2], vec![1, 3], vec![4]]);
        // What is no small kernel runs alone.
        let alone = all.map(|(touched, _)| (touched, None));
        assert_eq!(side_by_side(&alone, 4096, 100), [[0], [1], [2], [3], [4]]);
    }

    /// Between two commands that conflict there is always a barrier, in any sequence.
    #[test]
    fn no_two_commands_that_overlap_conflict() {
        let mut state = 1;
        for _ in 0..200 {
            let commands = drawn(&mut state);
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
    /// Commands that conflict stay in order, whatever shares a launch; and something does.
    #[test]
    fn what_conflicts_is_never_side_by_side() {
        let mut state = 2;
        let mut shared = 0;
        for _ in 0..200 {
            let commands = drawn(&mut state);
            let wishes: Vec<_> = commands.iter().map(|c| (c.clone(), room(256))).collect();
            let groups = side_by_side(&wishes, 1024, 9);
            let mut group_of = vec![usize::MAX; commands.len()];
            for (g, group) in groups.iter().enumerate() {
                assert!(group.len() <= 3, "{group:?}");
                shared += group.len() - 1;
                group.iter().for_each(|c| group_of[*c] = g);
            }
            for later in 0..commands.len() {
                for earlier in 0..later {
                    let ordered = group_of[earlier] < group_of[later];
                    assert!(ordered || !commands[earlier].conflicts(&commands[later]));
                }
            }
        }
        assert!(shared > 0);
    }

    fn drawn(state: &mut u64) -> Vec<Touched> {
        let mut below = |n: u64| {
            *state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (*state >> 33) % n
        };
        let mut spans = |n: u64| {
            let mut one = || {
                let (base, start) = (below(3) as usize, below(8) as usize * 16);
                span(base, start..start + 16 * (1 + below(3) as usize))
            };
            (0..n).map(|_| one()).collect::<Vec<_>>()
        };
        (0..30).map(|_| Touched { reads: spans(2), writes: spans(1) }).collect()
    }
}

//! Who does which tasks of a work: every thread begins with a range of its own, from the front, and one that has done its
//! range takes half of what is left of another's.
//!
//! Neighbouring tasks read neighbouring memory. So a thread goes through most of its part of a weight in order, as
//! processors foresee it; where threads took the tasks of one list in turn, each fetched anew at every task.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Memory that is fetched by itself: threads that write neighbours do not wait for each other. Two lines, as processors
/// fetch pairs.
#[derive(Default)]
#[repr(align(128))]
pub(super) struct Apart<T>(pub(super) T);

/// The range of each thread.
pub(super) struct Ranges(Box<[Apart<AtomicU64>]>);

/// Bits of a bound.
const BITS: u32 = 20;
/// Tasks of a work, at most.
pub(super) const MOST: usize = (1 << BITS) - 1;
/// What follows the last number of a work is 0.
pub(super) const NUMBERS: u64 = 1 << (64 - 2 * BITS);

/// Tasks that nobody has taken, with the number of their work: who exchanges them for fewer knows which work they are of,
/// and that everything about it is there until they are done.
#[derive(Clone, Copy, PartialEq)]
struct Free {
    number: u64,
    start: usize,
    end: usize,
}

impl Free {
    fn of(bits: u64) -> Free {
        let bound = |shift| (bits >> shift) as usize & MOST;
        Free { number: bits >> (2 * BITS), start: bound(BITS), end: bound(0) }
    }

    fn bits(self) -> u64 {
        self.number << (2 * BITS) | (self.start as u64) << BITS | self.end as u64
    }
}

impl Ranges {
    pub(super) fn new(threads: usize) -> Ranges {
        Ranges((0..threads).map(|_| Apart::default()).collect())
    }

    /// Shares out tasks `0..n`, at most [`MOST`], of which none of an earlier work is left.
    pub(super) fn open(&self, number: u64, n: usize, threads: usize) {
        for (i, range) in self.0[..threads].iter().enumerate() {
            let free = Free { number, start: i * n / threads, end: (i + 1) * n / threads };
            range.0.store(free.bits(), Ordering::Relaxed);
        }
    }

    /// A task of this work, for thread `me` of so many.
    pub(super) fn take(&self, number: u64, me: usize, threads: usize) -> Option<usize> {
        let first = |free: Free| free.start..free.start + 1;
        if let Some(task) = self.exchange(me, number, first) {
            return Some(task.start);
        }
        let others = (me + 1..threads).chain(0..me);
        let half = |free: Free| free.start.midpoint(free.end)..free.end;
        let taken = others.into_iter().find_map(|other| self.exchange(other, number, half))?;
        // Nobody else writes a range that is empty, and a later work comes when these tasks are done.
        let rest = Free { number, start: taken.start + 1, end: taken.end };
        self.0[me].0.store(rest.bits(), Ordering::Release);
        Some(taken.start)
    }

    /// Takes all tasks of this work that threads have not taken; how many.
    pub(super) fn take_all(&self, number: u64, threads: usize) -> usize {
        let all = |free: Free| free.start..free.end;
        (0..threads).filter_map(|of| self.exchange(of, number, all)).map(|tasks| tasks.len()).sum()
    }

    /// Takes what `part` says of the tasks that thread `of` has, if they are of this work: those at the front or those at
    /// the back.
    fn exchange(
        &self,
        of: usize,
        number: u64,
        part: impl Fn(Free) -> Range<usize>,
    ) -> Option<Range<usize>> {
        let range = &self.0[of].0;
        let mut bits = range.load(Ordering::Acquire);
        loop {
            let free = Free::of(bits);
            if free.number != number || free.start == free.end {
                return None;
            }
            let taken = part(free);
            let rest = if taken.start == free.start {
                Free { start: taken.end, ..free }
            } else {
                Free { end: taken.start, ..free }
            };
            match range.compare_exchange_weak(
                bits,
                rest.bits(),
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return Some(taken),
                Err(now) => bits = now,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a thread takes, until there is no more.
    fn all(ranges: &Ranges, number: u64, me: usize, threads: usize) -> Vec<usize> {
        std::iter::from_fn(|| ranges.take(number, me, threads)).collect()
    }

    #[test]
    fn a_thread_goes_through_its_own_range_in_order_and_then_through_halves_of_others() {
        let ranges = Ranges::new(2);
        ranges.open(1, 16, 2);
        assert_eq!(ranges.take(1, 1, 2), Some(8));
        let expected = [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15, 10, 11, 9];
        assert_eq!(all(&ranges, 1, 0, 2), expected);
        assert_eq!(ranges.take(1, 1, 2), None);
    }

    #[test]
    fn tasks_of_another_work_are_not_taken() {
        let ranges = Ranges::new(3);
        ranges.open(NUMBERS - 1, 9, 3);
        assert_eq!(all(&ranges, 0, 0, 3), [0; 0]);
        assert_eq!(ranges.take(NUMBERS - 1, 2, 3), Some(6));
        assert_eq!(ranges.take_all(0, 3), 0);
        assert_eq!(ranges.take_all(NUMBERS - 1, 3), 8);
        ranges.open(0, 2, 2);
        assert_eq!(all(&ranges, NUMBERS - 1, 2, 3), [0; 0]);
        assert_eq!(all(&ranges, 0, 0, 2), [0, 1]);
    }

    #[test]
    fn as_many_tasks_as_there_may_be_are_all_taken() {
        let ranges = Ranges::new(3);
        ranges.open(5, MOST, 3);
        let mut taken: Vec<usize> = (0..3).flat_map(|me| all(&ranges, 5, me, 3)).collect();
        taken.sort_unstable();
        assert!(taken.into_iter().eq(0..MOST));
    }
}

//! The memory of runs, kept from one to the next.

use crate::Result;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The memory of runs of one executable. As many are made as runs are in flight; a few are kept while nothing runs.
pub(crate) struct RunMemories<M> {
    idle: Mutex<Vec<M>>,
    most_idle: usize,
    /// The arena of each.
    arena_bytes: usize,
    allocated: AtomicUsize,
}

impl<M> RunMemories<M> {
    /// Makes the first one at once: memory that is not there is missed before anything runs.
    ///
    /// # Errors
    /// Those of `make`.
    pub(crate) fn new(
        most_idle: usize,
        arena_bytes: usize,
        make: impl FnOnce() -> Result<M>,
    ) -> Result<RunMemories<M>> {
        let (idle, allocated) = (Mutex::new(Vec::new()), AtomicUsize::new(0));
        let memories = RunMemories { idle, most_idle, arena_bytes, allocated };
        let first = memories.take(make)?;
        memories.give_back(first);
        Ok(memories)
    }

    fn idle(&self) -> MutexGuard<'_, Vec<M>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One that nobody uses.
    ///
    /// # Errors
    /// Those of `make`, which is called where there is none.
    pub(crate) fn take(&self, make: impl FnOnce() -> Result<M>) -> Result<M> {
        if let Some(memory) = self.idle().pop() {
            return Ok(memory);
        }
        let memory = make()?;
        self.allocated.fetch_add(self.arena_bytes, Ordering::Relaxed);
        Ok(memory)
    }

    pub(crate) fn give_back(&self, memory: M) {
        let mut idle = self.idle();
        if idle.len() < self.most_idle {
            idle.push(memory);
        } else {
            self.allocated.fetch_sub(self.arena_bytes, Ordering::Relaxed);
        }
    }

    /// Of those in use and those that are kept.
    pub(crate) fn allocated_arena_bytes(&self) -> usize {
        self.allocated.load(Ordering::Relaxed)
    }
}

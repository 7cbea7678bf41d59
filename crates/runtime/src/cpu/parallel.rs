//! Loops that may be spread over the executor's threads.
//!
//! How the work is cut depends on its size alone, never on the number of threads: the same plan gives the same
//! bits with any. Every task can be taken by another thread: cores are seldom equally fast, and never equally free.

use crate::team;

/// Elements that one task should at least touch.
pub(crate) const GRAIN: usize = 1 << 14;

/// `f(0), .., f(n - 1)`, in any order.
pub(crate) fn for_each(parallel: bool, n: usize, f: impl Fn(usize) + Send + Sync) {
    if parallel && n > 1 {
        team::for_each(n, &f);
    } else {
        (0..n).for_each(f);
    }
}

/// `f(i, the i-th len elements of data)`; the last may be shorter.
pub(crate) fn for_each_chunk<T: Send>(
    parallel: bool,
    data: &mut [T],
    len: usize,
    f: impl Fn(usize, &mut [T]) + Send + Sync,
) {
    let (len, all) = (len.max(1), data.len());
    let parts = Parts::new(data);
    for_each(parallel, all.div_ceil(len), |i| {
        // SAFETY: chunks are apart.
        f(i, unsafe { parts.part(i * len, len.min(all - i * len)) });
    });
}

/// `f(i, the i-th row of data)` for rows of `cols` elements, several rows a task.
pub(crate) fn for_each_row<T: Send>(
    parallel: bool,
    data: &mut [T],
    cols: usize,
    f: impl Fn(usize, &mut [T]) + Send + Sync,
) {
    for_each_rows(parallel, data, cols, |first, data| {
        for (i, row) in data.chunks_exact_mut(cols).enumerate() {
            f(first + i, row);
        }
    });
}

/// `f(i, some rows of data)`, of which the first is the i-th, for rows of `cols` elements.
pub(crate) fn for_each_rows<T: Send>(
    parallel: bool,
    data: &mut [T],
    cols: usize,
    f: impl Fn(usize, &mut [T]) + Send + Sync,
) {
    if cols == 0 {
        return;
    }
    let rows = (GRAIN / cols).max(1);
    for_each_chunk(parallel, data, rows * cols, |chunk, data| f(chunk * rows, data));
}

/// A slice that several tasks write, each its own part.
#[derive(Clone, Copy)]
pub(crate) struct Parts<T> {
    data: *mut T,
    len: usize,
}

// SAFETY: a `&mut [T]` given out in parts; `part` asks that no two overlap.
unsafe impl<T: Send> Send for Parts<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Parts<T> {}

impl<T> Parts<T> {
    /// The caller keeps `data` borrowed for as long as it uses the parts.
    pub(crate) fn new(data: &mut [T]) -> Parts<T> {
        Parts { data: data.as_mut_ptr(), len: data.len() }
    }

    /// Where a part begins, for what writes some of it, and leaves the rest to others.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn start_of(&self, start: usize, len: usize) -> *mut T {
        assert!(start + len <= self.len, "metal-candle bug: {start} + {len} of {}", self.len);
        self.data.wrapping_add(start)
    }

    /// # Safety
    /// The slice is still borrowed, and no other live part overlaps this one.
    #[expect(clippy::mut_from_ref, reason = "the parts are disjoint, as the caller promises")]
    pub(crate) unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start + len <= self.len, "metal-candle bug: {start} + {len} of {}", self.len);
        // SAFETY: within the slice; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), len) }
    }
}

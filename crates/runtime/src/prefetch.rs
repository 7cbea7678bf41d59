//! Asking for memory before it is read.
//!
//! A run of a large plan drives the handles of what it is given out of the caches. Read one after the other, each of them is
//! waited for; asked for at once, they come together.

use std::sync::Arc;

const LINE_BYTES: usize = 64;

/// Asks the processor for what each of these holds, and for its counts: a hint, which does nothing where there is no
/// instruction for it. For hundreds of handles that are about to be read, one after the other.
pub fn prefetch<'a, T: 'a>(handles: impl IntoIterator<Item = &'a Arc<T>>) {
    for handle in handles {
        // An `Arc` keeps its two counts in front of the value.
        let counts = 2 * size_of::<usize>();
        let start = Arc::as_ptr(handle).cast::<u8>().wrapping_sub(counts);
        lines(start, counts + size_of::<T>());
    }
}

#[inline]
fn lines(start: *const u8, bytes: usize) {
    let before = start.addr() % LINE_BYTES;
    for at in (0..before + bytes).step_by(LINE_BYTES) {
        crate::cpu::prefetch(start.wrapping_sub(before).wrapping_add(at));
    }
}

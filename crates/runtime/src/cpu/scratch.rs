//! Scratch memory of a thread, kept from call to call.

use crate::Workspace;
use std::cell::RefCell;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Vectors larger than this are given back after use.
const RETAINED_BYTES: usize = 32 << 20;

/// A cache line, so that no vector register is loaded from two.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[expect(dead_code, reason = "read as elements")] [u8; 64]);

thread_local! {
    /// Free vectors; nested uses take one each, so the same use finds the same size again.
    static FREE: RefCell<Vec<Memory>> = const { RefCell::new(Vec::new()) };
}

/// What all threads hold.
static HELD_BYTES: AtomicUsize = AtomicUsize::new(0);

/// See [`Device::workspaces`](crate::Device::workspaces).
pub(crate) fn workspaces() -> Vec<Workspace> {
    let bytes = HELD_BYTES.load(Ordering::Relaxed);
    vec![Workspace::shared("packed factors and rows of the threads", bytes)]
}

/// A vector that is counted.
#[derive(Default)]
struct Memory(Vec<Line>);

impl Memory {
    fn len_bytes(&self) -> usize {
        self.0.len() * size_of::<Line>()
    }

    /// Makes it at least so long.
    fn grow(&mut self, lines: usize) {
        let more = lines.saturating_sub(self.0.len());
        if more > 0 {
            self.0.reserve_exact(more);
            self.0.resize(lines, Line([0; 64]));
            HELD_BYTES.fetch_add(more * size_of::<Line>(), Ordering::Relaxed);
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        HELD_BYTES.fetch_sub(self.len_bytes(), Ordering::Relaxed);
    }
}

/// Types that scratch memory can hold.
///
/// # Safety
/// Any bytes are a value, and the alignment is at most that of a cache line.
pub(crate) unsafe trait Pod: Copy {}
// SAFETY: any bytes are a number.
unsafe impl Pod for f32 {}
// SAFETY: as above.
unsafe impl Pod for f64 {}
// SAFETY: as above.
unsafe impl Pod for i64 {}
// SAFETY: as above.
unsafe impl Pod for u32 {}
// SAFETY: as above.
unsafe impl Pod for half::bf16 {}
// SAFETY: as above.
unsafe impl Pod for half::f16 {}

/// Runs `f` with `len` elements of whatever the last use left in them.
///
/// Uses may be nested: each takes a vector of its own.
pub(crate) fn with<T: Pod, R>(len: usize, f: impl FnOnce(&mut [T]) -> R) -> R {
    let lines = (len * size_of::<T>()).div_ceil(size_of::<Line>());
    let mut memory = FREE.with_borrow_mut(Vec::pop).unwrap_or_default();
    memory.grow(lines);
    // SAFETY: the vector holds at least `len` elements' bytes, all initialised, aligned for T; any bytes are a T.
    let elements =
        unsafe { std::slice::from_raw_parts_mut(memory.0.as_mut_ptr().cast::<T>(), len) };
    let result = f(elements);
    if memory.len_bytes() <= RETAINED_BYTES {
        FREE.with_borrow_mut(|free| free.push(memory));
    }
    result
}

/// [`with`] in parts of the given lengths.
pub(crate) fn split<T: Pod, R, const N: usize>(
    lens: [usize; N],
    f: impl FnOnce([&mut [T]; N]) -> R,
) -> R {
    with(lens.iter().sum(), |mut rest: &mut [T]| {
        f(lens.map(|len| {
            let (part, after) = std::mem::take(&mut rest).split_at_mut(len);
            rest = after;
            part
        }))
    })
}

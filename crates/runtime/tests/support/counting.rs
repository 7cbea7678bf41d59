//! A global allocator that counts. In this crate, where `unsafe` may be; the tests of others
//! include it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicIsize, AtomicUsize, Ordering};

/// The system's allocator, watched while [`watch`] runs.
pub(crate) struct Counting;

static ON: AtomicBool = AtomicBool::new(false);
static COUNT: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);
static LIVE_BYTES: AtomicIsize = AtomicIsize::new(0);
static PEAK_BYTES: AtomicIsize = AtomicIsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);

/// What was allocated, by any thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Allocated {
    pub(crate) count: usize,
    pub(crate) bytes: usize,
    pub(crate) largest: usize,
    /// Allocated less freed.
    pub(crate) live_bytes: isize,
    /// The most that was live at a time.
    pub(crate) peak_bytes: usize,
}

fn note(allocated: usize, freed: usize) {
    if !ON.load(Ordering::Relaxed) {
        return;
    }
    if allocated > 0 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        BYTES.fetch_add(allocated, Ordering::Relaxed);
        LARGEST.fetch_max(allocated, Ordering::Relaxed);
    }
    let change = allocated as isize - freed as isize;
    let live = LIVE_BYTES.fetch_add(change, Ordering::Relaxed) + change;
    PEAK_BYTES.fetch_max(live, Ordering::Relaxed);
}

// SAFETY: everything is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size(), 0);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size(), 0);
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, data: *mut u8, layout: Layout) {
        note(0, layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(data, layout) }
    }
    unsafe fn realloc(&self, data: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size, layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.realloc(data, layout, size) }
    }
}

/// What `f` allocates; one at a time.
pub(crate) fn watch<T>(f: impl FnOnce() -> T) -> (T, Allocated) {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    for counter in [&COUNT, &BYTES, &LARGEST] {
        counter.store(0, Ordering::Relaxed);
    }
    LIVE_BYTES.store(0, Ordering::Relaxed);
    PEAK_BYTES.store(0, Ordering::Relaxed);
    ON.store(true, Ordering::Relaxed);
    let value = f();
    ON.store(false, Ordering::Relaxed);
    let allocated = Allocated {
        count: COUNT.load(Ordering::Relaxed),
        bytes: BYTES.load(Ordering::Relaxed),
        largest: LARGEST.load(Ordering::Relaxed),
        live_bytes: LIVE_BYTES.load(Ordering::Relaxed),
        peak_bytes: PEAK_BYTES.load(Ordering::Relaxed).unsigned_abs(),
    };
    (value, allocated)
}

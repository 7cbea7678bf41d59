//! Huge pages for large memory: a fault for every 2 MiB instead of every 4 KiB.

/// From this size on it pays to ask.
#[cfg(target_os = "linux")]
const LARGE_BYTES: usize = 4 << 20;

/// Asks the system to back fresh memory with huge pages. A wish: nothing depends on the answer.
#[cfg(target_os = "linux")]
pub(crate) fn prefer_huge(start: *mut u8, len_bytes: usize) {
    const PAGE_BYTES: usize = 4096;
    if len_bytes < LARGE_BYTES {
        return;
    }
    let skipped = start.align_offset(PAGE_BYTES);
    let len_bytes = (len_bytes - skipped) / PAGE_BYTES * PAGE_BYTES;
    // SAFETY: whole pages within memory that is ours; the advice changes nothing that it holds.
    unsafe {
        libc::madvise(start.add(skipped).cast(), len_bytes, libc::MADV_HUGEPAGE);
    }
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn prefer_huge(_start: *mut u8, _len_bytes: usize) {}

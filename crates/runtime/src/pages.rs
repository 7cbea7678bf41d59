//! The host's memory: huge pages for what is large, a fault for every 2 MiB instead of every 4 KiB; and how much there is.

use crate::device::Memory;

/// From this size on the system's work for fresh memory is worth avoiding: smaller blocks the allocator itself uses again.
pub(crate) const LARGE_BYTES: usize = 4 << 20;

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

/// As Linux tells it (proc(5): `/proc/meminfo`, `/proc/self/status`).
pub(crate) fn memory() -> Option<Memory> {
    let read = |path| std::fs::read_to_string(path).ok();
    let (machine, own) = (read("/proc/meminfo")?, read("/proc/self/status")?);
    Some(Memory {
        free_bytes: bytes_of(&machine, "MemAvailable:")?,
        used_bytes: bytes_of(&own, "VmRSS:")?,
        peak_bytes: bytes_of(&own, "VmHWM:")?,
    })
}

/// `Name:   1234 kB`
fn bytes_of(text: &str, name: &str) -> Option<usize> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let number = line.trim().strip_suffix(" kB")?.parse::<usize>().ok()?;
    number.checked_mul(1 << 10)
}

#[cfg(test)]
mod tests {
    use super::{bytes_of, memory};

    #[test]
    fn sizes_are_read_as_the_kernel_writes_them() {
        let text = "MemTotal:       24576 kB\nMemFree:  12 kB\nHugePages_Total:       0\n";
        assert_eq!(bytes_of(text, "MemTotal:"), Some(24576 << 10));
        assert_eq!(bytes_of(text, "MemFree:"), Some(12 << 10));
        assert_eq!(bytes_of(text, "HugePages_Total:"), None);
        assert_eq!(bytes_of(text, "Swap:"), None);
    }

    #[test]
    fn the_peak_is_no_less_than_what_is_used() {
        let Some(memory) = memory() else { return };
        assert!(memory.used_bytes > 0 && memory.peak_bytes >= memory.used_bytes / 2, "{memory:?}");
    }
}

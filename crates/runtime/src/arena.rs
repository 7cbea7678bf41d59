//! One aligned allocation, made once and used by run after run.

use crate::pages::prefer_huge;
use crate::{Error, Result};
use std::alloc::{self, Layout};
use std::ptr::NonNull;

/// Zeroed bytes; every byte is initialised from the start, so that no run can read what nobody wrote.
pub(crate) struct Arena {
    data: NonNull<u8>,
    layout: Layout,
}

// SAFETY: an arena owns its bytes, and gives them out as raw pointers only.
unsafe impl Send for Arena {}
// SAFETY: `&Arena` reads the pointer and the size, nothing behind them.
unsafe impl Sync for Arena {}

impl Arena {
    pub(crate) fn new(bytes: usize, align: usize) -> Result<Arena> {
        let out_of_memory = || Error::OutOfMemory { what: "the arena".into(), bytes };
        let layout = Layout::from_size_align(bytes, align).map_err(|_| out_of_memory())?;
        if bytes == 0 {
            // No bytes, but aligned: empty slices are made of it.
            let data = std::ptr::without_provenance_mut(align);
            let data = NonNull::new(data).expect("metal-candle bug: an alignment of 0");
            return Ok(Arena { data, layout });
        }
        // SAFETY: the layout has a size.
        let data = unsafe { alloc::alloc_zeroed(layout) };
        let data = NonNull::new(data).ok_or_else(out_of_memory)?;
        prefer_huge(data.as_ptr(), bytes);
        Ok(Arena { data, layout })
    }

    pub(crate) fn len_bytes(&self) -> usize {
        self.layout.size()
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.data.as_ptr()
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        if self.layout.size() != 0 {
            // SAFETY: allocated in `new` with this layout.
            unsafe { alloc::dealloc(self.data.as_ptr(), self.layout) }
        }
    }
}

//! When the device reached a step.

use super::Gpu;
use super::gpu::Said;
use crate::Result;
use cudarc::driver::result::event;
use cudarc::driver::sys::{CUevent, CUevent_flags, CUstream};

/// An event before every step, and one after the last.
pub(super) struct Marks {
    events: Vec<CUevent>,
}

impl Marks {
    pub(super) fn new(gpu: &Gpu, steps: usize) -> Result<Marks> {
        gpu.bind()?;
        let mut marks = Marks { events: Vec::with_capacity(steps + 1) };
        for _ in 0..=steps {
            let event = event::create(CUevent_flags::CU_EVENT_DEFAULT);
            marks.events.push(event.said(|| "making an event".into())?);
        }
        Ok(marks)
    }

    pub(super) fn set(&self, step: usize, stream: CUstream) -> Result<()> {
        // SAFETY: an event of this context, which lives as long as the marks.
        unsafe { event::record(self.events[step], stream) }.said(|| "recording an event".into())
    }

    /// What each step took, once the stream is through.
    pub(super) fn seconds(&self, clock: &mut Vec<f64>) -> Result<()> {
        for pair in self.events.windows(2) {
            // SAFETY: both were recorded, and the stream has been waited for.
            let milliseconds = unsafe { event::elapsed(pair[0], pair[1]) };
            clock.push(f64::from(milliseconds.said(|| "reading an event".into())?) / 1e3);
        }
        Ok(())
    }
}

impl Drop for Marks {
    fn drop(&mut self) {
        for event in &self.events {
            // SAFETY: made in `new`. A failure can be told to nobody.
            let _ = unsafe { event::destroy(*event) };
        }
    }
}

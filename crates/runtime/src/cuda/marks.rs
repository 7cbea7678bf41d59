//! When the device reached a command.

use super::Gpu;
use super::gpu::Said;
use crate::Result;
use crate::executable::Timing;
use cudarc::driver::result::event;
use cudarc::driver::sys::{CUevent, CUevent_flags, CUstream};

/// An event before every command, or before them all, and one after the last.
pub(super) struct Marks {
    pub(super) timing: Timing,
    events: Vec<CUevent>,
}

impl Marks {
    pub(super) fn new(gpu: &Gpu, timing: Timing, commands: usize) -> Result<Marks> {
        gpu.bind()?;
        let intervals = match timing {
            Timing::Steps => commands,
            Timing::Whole => 1,
        };
        let mut marks = Marks { timing, events: Vec::with_capacity(intervals + 1) };
        for _ in 0..=intervals {
            let event = event::create(CUevent_flags::CU_EVENT_DEFAULT);
            marks.events.push(event.said(|| "making an event".into())?);
        }
        Ok(marks)
    }

    pub(super) fn set(&self, number: usize, stream: CUstream) -> Result<()> {
        // SAFETY: an event of this context, which lives as long as the marks.
        unsafe { event::record(self.events[number], stream) }.said(|| "recording an event".into())
    }

    /// What lay between the events, once the stream is through.
    pub(super) fn seconds(&self) -> Result<Vec<f64>> {
        let between = |pair: &[CUevent]| {
            // SAFETY: both were recorded, and the stream has been waited for.
            let milliseconds = unsafe { event::elapsed(pair[0], pair[1]) };
            Ok(f64::from(milliseconds.said(|| "reading an event".into())?) / 1e3)
        };
        self.events.windows(2).map(between).collect()
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

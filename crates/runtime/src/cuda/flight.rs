//! A run that the stream was asked for: what comes back of it, and when.

use super::Gpu;
use super::gpu::Said;
use super::memory::{Pinned, Resident};
use super::staging::Staging;
use crate::buffer::Buffer;
use crate::in_flight::Flight;
use crate::{Result, mapped};
use cudarc::driver::result::event;
use cudarc::driver::sys::{CUevent, CUevent_flags};
use metal_candle_compiler::render::Status;
use metal_candle_compiler::{OutputSource, Plan};
use std::sync::{Arc, Mutex, PoisonError};

/// The host's side of the staging memory, one for each run in flight, kept from one to the next.
pub(super) struct Hosts {
    gpu: Arc<Gpu>,
    len_bytes: usize,
    idle: Mutex<Vec<Pinned>>,
}

/// A run that has been asked for.
pub(super) struct Asked {
    hosts: Arc<Hosts>,
    staging: Arc<Staging>,
    /// Until the run has been waited for.
    host: Option<Pinned>,
    event: Event,
}

/// A moment of the stream.
struct Event {
    gpu: Arc<Gpu>,
    raw: CUevent,
}

// SAFETY: a handle that any thread may give to the driver.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Hosts {
    pub(super) fn new(gpu: &Arc<Gpu>, len_bytes: usize) -> Result<Hosts> {
        let idle = Mutex::new(vec![Pinned::new(gpu, len_bytes)?]);
        Ok(Hosts { gpu: Arc::clone(gpu), len_bytes, idle })
    }

    pub(super) fn take(&self) -> Result<Pinned> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        idle.map_or_else(|| Pinned::new(&self.gpu, self.len_bytes), Ok)
    }

    pub(super) fn give_back(&self, host: Pinned) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(host);
    }
}

impl Asked {
    /// Of all that the stream was asked for up to now.
    pub(super) fn new(
        gpu: &Arc<Gpu>,
        hosts: &Arc<Hosts>,
        staging: &Arc<Staging>,
        host: Pinned,
    ) -> Result<Asked> {
        let event = Event::record(gpu);
        if event.is_err() {
            // The device still writes to what is given back here.
            let _ = gpu.synchronize();
        }
        let (hosts, staging) = (Arc::clone(hosts), Arc::clone(staging));
        Ok(Asked { hosts, staging, host: Some(host), event: event? })
    }
}

impl Flight for Asked {
    fn land(mut self: Box<Self>, plan: &Plan, results: &mut [Option<Buffer>]) -> Result<()> {
        // If this fails, the drop below waits in vain, too: the device is lost.
        self.event.wait()?;
        let host = self.host.take().expect("metal-candle bug: a run ended twice");
        let arrived = arrived(&self.event.gpu, plan, &self.staging, &host, results);
        self.hosts.give_back(host);
        arrived
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        if let Some(host) = self.host.take() {
            // The device writes there until then. A failure can be told to nobody.
            let _ = self.event.wait();
            self.hosts.give_back(host);
        }
    }
}

impl Event {
    fn record(gpu: &Arc<Gpu>) -> Result<Event> {
        let flags = CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let raw = event::create(flags).said(|| "making an event".into())?;
        let event = Event { gpu: Arc::clone(gpu), raw };
        // SAFETY: an event of this context.
        unsafe { event::record(raw, gpu.raw_stream()) }.said(|| "recording an event".into())?;
        Ok(event)
    }

    fn wait(&self) -> Result<()> {
        self.gpu.bind()?;
        // SAFETY: it was recorded on a stream of this context.
        unsafe { event::synchronize(self.raw) }
            .said(|| format!("waiting for {}", self.gpu.device()))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: made in `new`. A failure can be told to nobody.
            let _ = unsafe { event::destroy(self.raw) };
        }
    }
}

/// Fills in the results that came back to the host with a run that is over.
///
/// # Errors
/// [`crate::Error::Graph`] for a bad index that a step met.
pub(super) fn arrived(
    gpu: &Arc<Gpu>,
    plan: &Plan,
    staging: &Staging,
    host: &Pinned,
    results: &mut [Option<Buffer>],
) -> Result<()> {
    Status::from_bytes(&host.bytes()[staging.status..]).check().map_err(crate::Error::Graph)?;
    for (i, output) in plan.outputs.iter().enumerate() {
        if let (OutputSource::Written, Some(slot)) = (output.source, staging.outputs[i]) {
            let bytes = &host.bytes()[slot..][..output.ty.size_bytes()];
            let data = mapped::copy(bytes, output.ty.dtype);
            results[i] = Some(Buffer::on_device(Box::new(Resident::on_host(gpu, data))));
        }
    }
    fill_in_equal(plan, results);
    Ok(())
}

/// Fills in the results that equal another one.
pub(super) fn fill_in_equal(plan: &Plan, results: &mut [Option<Buffer>]) {
    for (i, output) in plan.outputs.iter().enumerate() {
        // One that is there may have a twin that was taken.
        if let (OutputSource::SameAs(first), None) = (output.source, &results[i]) {
            results[i] = results[first as usize].clone();
        }
    }
}

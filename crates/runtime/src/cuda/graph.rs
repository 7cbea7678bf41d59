//! What a run asked for, recorded and asked for again in one go.

use super::Gpu;
use super::gpu::Said;
use crate::Result;
use cudarc::driver::result;
use cudarc::driver::sys::{self, CUstream};
use std::sync::{Arc, PoisonError};

/// The commands of a run, with the addresses that they had.
pub(super) struct Graph {
    gpu: Arc<Gpu>,
    graph: sys::CUgraph,
    executable: sys::CUgraphExec,
}

// SAFETY: handles that any thread may give to the driver, one at a time: a workspace has one owner.
unsafe impl Send for Graph {}

impl Graph {
    /// Records what `enqueue` asks of the stream that it is given; nothing of it runs.
    pub(super) fn record(
        gpu: &Arc<Gpu>,
        enqueue: impl FnOnce(CUstream) -> Result<()>,
    ) -> Result<Graph> {
        let recorder = gpu.recorder.lock().unwrap_or_else(PoisonError::into_inner);
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        let doing = || "recording a plan".to_owned();
        recorder.begin_capture(mode).said(doing)?;
        let outcome = enqueue(recorder.cu_stream());
        // SAFETY: capture has begun, and ends whatever happened in between.
        let graph = unsafe { result::stream::end_capture(recorder.cu_stream()) };
        outcome?;
        let graph = graph.said(doing)?;
        // SAFETY: a graph that was just recorded.
        match unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) } {
            Ok(executable) => Ok(Graph { gpu: Arc::clone(gpu), graph, executable }),
            Err(error) => {
                // SAFETY: as above.
                let _ = unsafe { result::graph::destroy(graph) };
                Err(error).said(doing)
            }
        }
    }

    /// Asks the device's stream for all of it.
    ///
    /// # Safety
    /// What was recorded may run: all addresses in it are still those of the memory that they were.
    pub(super) unsafe fn replay(&self, gpu: &Gpu) -> Result<()> {
        let _alone = gpu.library.alone();
        // SAFETY: the caller's promise.
        unsafe { result::graph::launch(self.executable, gpu.raw_stream()) }
            .said(|| "replaying a plan".into())
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // A run that nobody has waited for yet may replay it.
        let _ = self.gpu.synchronize();
        // SAFETY: made in `record`, and used no more. A failure can be told to nobody.
        unsafe {
            let _ = result::graph::exec_destroy(self.executable);
            let _ = result::graph::destroy(self.graph);
        }
    }
}

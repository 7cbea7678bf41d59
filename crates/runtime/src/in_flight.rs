//! Runs that were asked for and need not be over.

use crate::{AsyncGraphExecutor, Buffer, Executable, Result};
use metal_candle_compiler::Plan;
use std::fmt;
use std::sync::Arc;

/// What a device makes of being asked for a run.
pub(crate) struct Started {
    /// By output: the result, if it may be handed on already. What is asked of the device with it comes after the run.
    pub(crate) results: Vec<Option<Buffer>>,
    /// `None` for a run that is over.
    pub(crate) flight: Option<Box<dyn Flight>>,
}

/// The rest of a run. Dropping it waits for the device.
pub(crate) trait Flight: Send + Sync {
    /// Waits for the device, and fills in the results that have come back with the run.
    ///
    /// # Errors
    /// Those of the run.
    fn land(self: Box<Self>, plan: &Plan, results: &mut [Option<Buffer>]) -> Result<()>;
}

/// A run that was asked for and need not be over. What lies on the device can be handed on to the next run meanwhile; what
/// comes back to the host is there once it has been waited for.
pub struct InFlight {
    started: Started,
    // Dropped last: the device runs on its memory.
    executable: Arc<Executable>,
}

impl Started {
    /// A run that was waited for.
    pub(crate) fn over(results: Vec<Buffer>) -> Started {
        Started { results: results.into_iter().map(Some).collect(), flight: None }
    }
}

impl InFlight {
    /// Whether the run is over, so that all results are there.
    pub fn is_over(&self) -> bool {
        self.started.flight.is_none()
    }

    /// Takes the result of this number, if it is on the device or there already. Before the run is known to be over, it may
    /// be given to other runs on this device, and read: both wait for this one by themselves.
    pub fn take(&mut self, output: usize) -> Option<Buffer> {
        self.started.results[output].take()
    }

    /// Waits for the run. Returns the results that were not taken.
    ///
    /// # Errors
    /// As [`AsyncGraphExecutor::run`].
    pub fn wait(mut self) -> Result<Vec<Option<Buffer>>> {
        let mut results = std::mem::take(&mut self.started.results);
        if let Some(flight) = self.started.flight.take() {
            flight.land(self.executable.plan(), &mut results)?;
        }
        Ok(results)
    }
}

impl AsyncGraphExecutor {
    /// As [`AsyncGraphExecutor::run`], but where the device works by itself, it is not waited for: NVIDIA's GPUs, unless
    /// the run sums over ranks or reads a tensor of Candle's, which must not be written meanwhile. Elsewhere the run is
    /// over when this returns.
    ///
    /// # Errors
    /// As [`AsyncGraphExecutor::run`]; what only the run can show comes with [`InFlight::wait`].
    pub fn start(&self, executable: &Arc<Executable>, inputs: Vec<Buffer>) -> Result<InFlight> {
        let started = executable.start(inputs, self.team())?;
        Ok(InFlight { started, executable: Arc::clone(executable) })
    }
}

impl fmt::Debug for InFlight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InFlight").field("is_over", &self.is_over()).finish_non_exhaustive()
    }
}

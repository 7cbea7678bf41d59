//! Runs that are held back, so that what awaits them finds them pending.

use metal_candle::{AsyncGraphExecutor, Device, LazyTensor, Result};
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex};
use std::task::{Context, Wake, Waker};
use std::time::Duration;

/// What is submitted to the executor waits until this is dropped: each of its threads is kept at the end of a run, in
/// the waker of whoever awaits that.
pub(crate) struct Held {
    door: Arc<Door>,
    /// A run that nobody awaits any more is left out.
    _awaited: Vec<Pin<Box<dyn Future<Output = Result<candle_core::Tensor>> + Send>>>,
}

#[derive(Default)]
struct Door {
    is_open: Mutex<bool>,
    opened: Condvar,
}

impl Held {
    pub(crate) fn back() -> Held {
        let door = Arc::<Door>::default();
        let waker = Waker::from(Arc::clone(&door));
        let mut awaited = Vec::new();
        while awaited.len() < AsyncGraphExecutor::global().threads() {
            let x = LazyTensor::from_slice(&[1f32], &[1], &Device::Cpu).unwrap().exp().unwrap();
            let mut run: Pin<Box<dyn Future<Output = _> + Send>> =
                Box::pin(async move { x.eval_async().await });
            // One that is over at once would keep nobody.
            if run.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
                awaited.push(run);
            }
        }
        Held { door, _awaited: awaited }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        *self.door.is_open.lock().unwrap() = true;
        self.door.opened.notify_all();
    }
}

impl Wake for Door {
    /// On the thread whose run is over. Not for ever, or whoever blocks for a run would hang instead of failing.
    fn wake(self: Arc<Self>) {
        let is_open = self.is_open.lock().unwrap();
        let limit = Duration::from_secs(20);
        drop(self.opened.wait_timeout_while(is_open, limit, |is_open| !*is_open).unwrap());
    }
}

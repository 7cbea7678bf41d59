//! Conveniences that name tokio's types (feature `async-exec`).

use super::LazyTensor;
use super::eval::run_async;
use crate::Result;
use candle_core::Tensor;
use std::panic::Location;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::error::Elapsed;

impl LazyTensor {
    /// [`LazyTensor::eval_async`] as a task of tokio's, which makes its way whether or not it is awaited.
    ///
    /// # Panics
    /// Outside of a tokio runtime, as [`tokio::spawn`].
    ///
    /// # Errors
    /// The task gives those of [`LazyTensor::eval`].
    #[track_caller]
    pub fn spawn_eval(&self) -> JoinHandle<Result<Tensor>> {
        let (root, location) = (self.clone(), Location::caller());
        tokio::spawn(async move {
            let mut tensors = run_async(&[&root], location).await?;
            Ok(tensors.remove(0))
        })
    }

    /// [`LazyTensor::eval_async`], given up after `limit`. Work that has begun is finished elsewhere; its
    /// result is dropped.
    ///
    /// # Errors
    /// [`Elapsed`] after `limit`; else those of [`LazyTensor::eval`].
    #[track_caller]
    pub fn eval_timeout(
        &self,
        limit: Duration,
    ) -> impl Future<Output = std::result::Result<Result<Tensor>, Elapsed>> + Send {
        let future = self.eval_async();
        async move { tokio::time::timeout(limit, future).await }
    }
}

//! Running what was recorded.

use super::{LazyTensor, Leaf, State, Trace, one_device, trace};
use crate::error::{AtCaller, ErrorKind};
use crate::{Device, Error, Result};
use candle_core::Tensor;
use metal_candle_compiler::Plan;
use metal_candle_runtime::{AsyncGraphExecutor, Buffer, Element, Executable, PlanCache};
use std::panic::Location;
use std::sync::{Arc, OnceLock, PoisonError};

/// Plans of `eval`, by their graphs.
const CACHED_PLANS: usize = 64;

pub(crate) fn plans() -> &'static PlanCache {
    static PLANS: OnceLock<PlanCache> = OnceLock::new();
    PLANS.get_or_init(|| PlanCache::new(CACHED_PLANS))
}

impl LazyTensor {
    /// Computes this tensor, waits for it, and returns it as a Candle tensor that shares its memory.
    ///
    /// Afterwards the handle holds the value, and nothing of what it was made of.
    ///
    /// # Errors
    /// Where a run-time index is out of range or memory runs out.
    #[track_caller]
    pub fn eval(&self) -> Result<Tensor> {
        let mut tensors = LazyTensor::eval_all(&[self])?;
        Ok(tensors.remove(0))
    }

    /// [`LazyTensor::eval`] without blocking the thread: recording is looked up at once, the work runs elsewhere.
    ///
    /// # Errors
    /// As [`LazyTensor::eval`].
    #[track_caller]
    pub fn eval_async(&self) -> impl Future<Output = Result<Tensor>> + Send {
        let location = Location::caller();
        async move {
            let mut tensors = run_async(&[self], location).await?;
            Ok(tensors.remove(0))
        }
    }

    /// Computes several tensors as one plan: what they share is computed once.
    ///
    /// # Errors
    /// As [`LazyTensor::eval`].
    #[track_caller]
    pub fn eval_all(roots: &[&LazyTensor]) -> Result<Vec<Tensor>> {
        if let Some(job) = Job::of(roots, Location::caller())? {
            let run = AsyncGraphExecutor::global().run(&job.executable, job.inputs);
            fulfil(&job.roots, run.at_caller()?);
        }
        roots.iter().map(|root| root.tensor()).collect()
    }

    /// [`LazyTensor::eval_all`] without blocking the thread.
    ///
    /// # Errors
    /// As [`LazyTensor::eval`].
    #[track_caller]
    pub fn eval_all_async(
        roots: &[&LazyTensor],
    ) -> impl Future<Output = Result<Vec<Tensor>>> + Send {
        run_async(roots, Location::caller())
    }

    /// The plan that evaluating `roots` together would run, to be printed.
    ///
    /// # Errors
    /// Where the arena could not be addressed.
    #[track_caller]
    pub fn plan(roots: &[&LazyTensor]) -> Result<Plan> {
        let device = one_device("plan", roots.iter().copied())?.unwrap_or_default();
        let trace = trace(roots, false);
        metal_candle_compiler::plan(&trace.graph, device.target(), &[])
            .map_err(metal_candle_runtime::Error::from)
            .at_caller()
    }

    /// The plan that evaluating `roots` would run, from the cache that [`LazyTensor::eval`] uses.
    ///
    /// # Errors
    /// As [`LazyTensor::plan`].
    #[track_caller]
    pub fn cached_plan(roots: &[&LazyTensor]) -> Result<Arc<Executable>> {
        let device = one_device("cached_plan", roots.iter().copied())?.unwrap_or_default();
        let trace = trace(roots, false);
        plans().get(&trace.graph, &[], &device).at_caller()
    }

    /// The elements in row-major order.
    ///
    /// # Errors
    /// As [`LazyTensor::eval`], and where `T` is another type.
    #[track_caller]
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        self.buffer()?.to_vec().at_caller()
    }

    /// The elements of a rank-1 tensor.
    ///
    /// # Errors
    /// As [`LazyTensor::to_vec`], and for another rank.
    #[track_caller]
    pub fn to_vec1<T: Element>(&self) -> Result<Vec<T>> {
        self.check_rank("to_vec1", "1", 1)?;
        self.to_vec()
    }

    /// The rows of a rank-2 tensor.
    ///
    /// # Errors
    /// As [`LazyTensor::to_vec`], and for another rank.
    #[track_caller]
    pub fn to_vec2<T: Element>(&self) -> Result<Vec<Vec<T>>> {
        self.check_rank("to_vec2", "2", 2)?;
        let (data, cols) = (self.to_vec()?, self.dims()[1]);
        Ok((0..self.dims()[0]).map(|i| data[i * cols..][..cols].to_vec()).collect())
    }

    /// The value of a tensor of one element.
    ///
    /// # Errors
    /// As [`LazyTensor::to_vec`], and for another number of elements.
    #[track_caller]
    pub fn to_scalar<T: Element>(&self) -> Result<T> {
        if self.elem_count() != 1 {
            return Err(Error::from(ErrorKind::NotAScalar { got: self.ty() }));
        }
        Ok(self.to_vec()?.remove(0))
    }

    /// The same values in memory that nothing else holds, so that it may be donated.
    ///
    /// # Errors
    /// As [`LazyTensor::eval`].
    #[track_caller]
    pub fn to_owned_copy(&self) -> Result<LazyTensor> {
        let buffer = self.buffer()?.into_owned().at_caller()?;
        Ok(LazyTensor::ready(buffer, self.ty()))
    }

    /// The value on `device`: this tensor itself if it is there, else a copy, for which it is computed first. A copy
    /// is a constant to gradients.
    ///
    /// # Errors
    /// As [`LazyTensor::eval`]; for a device that this build or this machine lacks, or one without memory for it.
    #[track_caller]
    pub fn to_device(&self, device: &Device) -> Result<LazyTensor> {
        if self.device() == device {
            return Ok(self.clone());
        }
        let copy = match self.0.read() {
            State::Placeholder => LazyTensor::placeholder(self.dims(), self.dtype(), device)?,
            _ => {
                let buffer = self.buffer()?.to_device(device).at_caller()?;
                LazyTensor::ready(buffer, self.ty())
            }
        };
        Ok(copy.alias(self.0.name.clone(), false))
    }

    /// The value in memory of its own: its own handle's, if this was the last one.
    ///
    /// # Errors
    /// As [`LazyTensor::eval`].
    #[track_caller]
    pub(crate) fn into_owned(self) -> Result<LazyTensor> {
        let ty = self.ty();
        let buffer = self.into_buffer()?.into_owned().at_caller()?;
        Ok(LazyTensor::ready(buffer, ty))
    }

    /// The value's memory, computed if need be.
    #[track_caller]
    pub(crate) fn buffer(&self) -> Result<Buffer> {
        if let State::Ready(buffer) = self.0.read() {
            return Ok(buffer);
        }
        if let Some(job) = Job::of(&[self], Location::caller())? {
            let run = AsyncGraphExecutor::global().run(&job.executable, job.inputs);
            fulfil(&job.roots, run.at_caller()?);
        }
        match self.0.read() {
            State::Ready(buffer) => Ok(buffer),
            _ => panic!("metal-candle bug: a tensor was evaluated and has no value"),
        }
    }

    /// The memory of a handle that is given away: unique if this was the last handle.
    #[track_caller]
    pub(crate) fn into_buffer(self) -> Result<Buffer> {
        let buffer = self.buffer()?;
        // The node goes first, or it would still hold the memory.
        drop(self);
        Ok(buffer)
    }

    /// As [`LazyTensor::into_buffer`], and what is left of the handle if it was the last one.
    #[track_caller]
    pub(crate) fn give_away(mut self) -> Result<(Buffer, Option<Vacant>)> {
        if let Some(node) = Arc::get_mut(&mut self.0) {
            let state = node.state.get_mut().unwrap_or_else(PoisonError::into_inner);
            // Looked at before it is moved: an operation, which is far larger, stays.
            if matches!(state, State::Ready(_))
                && let State::Ready(buffer) = std::mem::replace(state, State::Placeholder)
            {
                return Ok((buffer, Some(Vacant(self))));
            }
        }
        Ok((self.into_buffer()?, None))
    }

    /// The value as a Candle tensor; from then on both share the memory.
    #[track_caller]
    fn tensor(&self) -> Result<Tensor> {
        let mut state = self.0.state.write().unwrap_or_else(PoisonError::into_inner);
        let State::Ready(buffer) = &mut *state else {
            panic!("metal-candle bug: a tensor was evaluated and has no value")
        };
        // The handle lets go while Candle takes over, or the memory would have to be copied.
        let empty = Buffer::from_vec(Vec::<u8>::new());
        let tensor = std::mem::replace(buffer, empty).into_candle(&self.0.ty.shape).at_caller()?;
        *buffer = Buffer::from_candle(&tensor).at_caller()?;
        Ok(tensor)
    }

    #[track_caller]
    pub(super) fn check_rank(
        &self,
        op: &'static str,
        expected: &'static str,
        rank: usize,
    ) -> Result<()> {
        let got = self.rank();
        let ok = (got == rank).then_some(());
        ok.ok_or(metal_candle_graph::Error::Rank { op, expected, got }).at_caller()
    }
}

/// A handle that has given its value away, and to which there is no other. A result that comes to be in an argument's memory
/// gets the argument's handle: hundreds of them in every step, none of which is made anew.
pub(crate) struct Vacant(LazyTensor);

impl Vacant {
    /// Asks for what is left of these handles, which are about to be filled.
    pub(crate) fn prefetch<'v>(handles: impl IntoIterator<Item = &'v Vacant>) {
        LazyTensor::prefetch(handles.into_iter().map(|Vacant(handle)| handle));
    }

    /// A value of the type that the one before had, on the same device.
    pub(crate) fn fill(mut self, buffer: Buffer) -> LazyTensor {
        let node =
            Arc::get_mut(&mut self.0.0).expect("metal-candle bug: a vacant handle is shared");
        (node.name, node.detached) = (None, false);
        *node.state.get_mut().unwrap_or_else(PoisonError::into_inner) = State::Ready(buffer);
        self.0
    }
}

/// A run to be made: the roots that have no value yet.
struct Job {
    roots: Vec<LazyTensor>,
    executable: Arc<Executable>,
    inputs: Vec<Buffer>,
}

impl Job {
    fn of(roots: &[&LazyTensor], location: &'static Location<'static>) -> Result<Option<Job>> {
        let unevaluated: Vec<&LazyTensor> =
            roots.iter().copied().filter(|root| !root.is_evaluated()).collect();
        let device = one_device("eval", unevaluated.iter().copied());
        let device = device.map_err(|error| error.moved_to(location))?;
        let Some(device) = device else { return Ok(None) };
        let Trace { graph, leaves, .. } = trace(&unevaluated, false);
        let inputs = leaves.into_iter().map(|leaf| match leaf {
            Leaf::Value(buffer) => Ok(buffer),
            Leaf::Placeholder(ty) => Err(Error::at(ErrorKind::PlaceholderValue { ty }, location)),
            Leaf::Argument(index) => Err(Error::at(ErrorKind::ArgumentValue { index }, location)),
            Leaf::Detached => panic!("metal-candle bug: a detached input in an evaluation"),
        });
        let inputs = inputs.collect::<Result<Vec<_>>>()?;
        let executable = plans().get(&graph, &[], &device).map_err(|e| Error::at(e, location))?;
        Ok(Some(Job { roots: unevaluated.into_iter().cloned().collect(), executable, inputs }))
    }
}

/// `location` is the caller's line, which an `async fn` could not see.
pub(super) async fn run_async(
    roots: &[&LazyTensor],
    location: &'static Location<'static>,
) -> Result<Vec<Tensor>> {
    if let Some(job) = Job::of(roots, location)? {
        let pending = AsyncGraphExecutor::global().submit(job.executable, job.inputs);
        fulfil(&job.roots, pending.await.map_err(|e| Error::at(e, location))?);
    }
    roots.iter().map(|root| root.tensor()).collect()
}

fn fulfil(roots: &[LazyTensor], values: Vec<Buffer>) {
    for (root, value) in roots.iter().zip(values) {
        root.0.fulfil(value);
    }
}

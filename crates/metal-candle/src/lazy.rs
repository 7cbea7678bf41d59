//! [`LazyTensor`]: an immutable handle to something that is, or can be, computed.

mod create;
mod eval;
mod ops;
#[cfg(feature = "async-exec")]
mod tasks;
mod trace;

use crate::error::{AtCaller, ErrorKind};
use crate::{DType, Device, Result};
use metal_candle_graph::{Operation, TensorType, infer};
use metal_candle_runtime::Buffer;
use smallvec::SmallVec;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

pub(crate) use eval::Vacant;
pub use ops::{Attention, CrossEntropy, Dim};
pub(crate) use trace::{Leaf, Trace, trace};

/// A tensor that is computed when it is needed.
///
/// Operations record what is to be done, check dtype and shape at once, and return a new handle. Nothing runs
/// until [`LazyTensor::eval`] or one of its kin. Cloning a handle copies nothing.
///
/// ```
/// use metal_candle::{Device, LazyTensor};
/// let x = LazyTensor::from_slice(&[1f32, 2.0], &[2], &Device::Cpu)?;
/// assert_eq!((&x + &x).to_vec1::<f32>()?, [2.0, 4.0]);
/// # Ok::<(), metal_candle::Error>(())
/// ```
#[derive(Clone)]
pub struct LazyTensor(Arc<Node>);

pub(crate) struct Node {
    ty: TensorType,
    device: Device,
    name: Option<Arc<str>>,
    /// Gradients stop here.
    detached: bool,
    state: RwLock<State>,
}

#[derive(Clone)]
pub(crate) enum State {
    Op {
        op: Operation,
        inputs: SmallVec<[LazyTensor; 3]>,
    },
    /// In memory; what it was made of has been let go.
    Ready(Buffer),
    /// The argument of a function that is being traced.
    Argument(u32),
    /// A type without a value.
    Placeholder,
}

impl LazyTensor {
    /// The extents.
    pub fn dims(&self) -> &[usize] {
        self.0.ty.shape.dims()
    }

    /// The extents; the same as [`LazyTensor::dims`].
    pub fn shape(&self) -> &[usize] {
        self.dims()
    }

    /// The number of dims.
    pub fn rank(&self) -> usize {
        self.dims().len()
    }

    /// The number of elements.
    pub fn elem_count(&self) -> usize {
        self.0.ty.shape.len()
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.0.ty.dtype
    }

    /// Where it is computed.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// The name given by [`LazyTensor::named`].
    pub fn name(&self) -> Option<&str> {
        self.0.name.as_deref()
    }

    /// Whether it is in memory.
    pub fn is_evaluated(&self) -> bool {
        matches!(self.0.read(), State::Ready(_))
    }

    /// The same tensor under a name, which errors about gradients then use.
    #[must_use]
    pub fn named(self, name: &str) -> LazyTensor {
        self.alias(Some(name.into()), self.0.detached)
    }

    /// The same values, as a constant to gradients.
    #[must_use]
    pub fn detach(&self) -> LazyTensor {
        self.alias(self.0.name.clone(), true)
    }

    fn alias(&self, name: Option<Arc<str>>, detached: bool) -> LazyTensor {
        let state = RwLock::new(self.0.read());
        LazyTensor(Arc::new(Node { ty: self.0.ty, device: self.0.device, name, detached, state }))
    }

    pub(crate) fn ty(&self) -> TensorType {
        self.0.ty
    }

    pub(crate) fn is_of(&self, ty: &TensorType) -> bool {
        self.0.ty == *ty
    }

    /// Records `op`; its operands are as the graph wants them: broadcast, of one dtype.
    ///
    /// # Errors
    /// Operands of several devices, and whatever inference refuses, at the caller's line.
    #[track_caller]
    pub(crate) fn record(op: Operation, inputs: &[&LazyTensor]) -> Result<LazyTensor> {
        let device = one_device(op.name(), inputs.iter().copied())?.unwrap_or_default();
        let types: SmallVec<[TensorType; 4]> = inputs.iter().map(|x| x.0.ty).collect();
        let ty = infer(&op, &types).at_caller()?;
        Ok(LazyTensor::from_parts(op, inputs.iter().map(|x| (*x).clone()).collect(), ty, device))
    }

    pub(crate) fn from_parts(
        op: Operation,
        inputs: SmallVec<[LazyTensor; 3]>,
        ty: TensorType,
        device: Device,
    ) -> LazyTensor {
        LazyTensor::new(State::Op { op, inputs }, ty, device)
    }

    pub(crate) fn ready(buffer: Buffer, ty: TensorType) -> LazyTensor {
        let device = buffer.device();
        LazyTensor::new(State::Ready(buffer), ty, device)
    }

    pub(crate) fn argument(index: u32, ty: TensorType, device: Device) -> LazyTensor {
        LazyTensor::new(State::Argument(index), ty, device)
    }

    fn new(state: State, ty: TensorType, device: Device) -> LazyTensor {
        let state = RwLock::new(state);
        LazyTensor(Arc::new(Node { ty, device, name: None, detached: false, state }))
    }

    /// Asks for what these handles hold, which is about to be read.
    pub(crate) fn prefetch<'x>(handles: impl IntoIterator<Item = &'x LazyTensor>) {
        metal_candle_runtime::prefetch(handles.into_iter().map(|handle| &handle.0));
    }

    /// Whether both are handles to one tensor.
    pub(crate) fn is_same(&self, other: &LazyTensor) -> bool {
        self.key() == other.key()
    }

    /// Identity of the node, for maps.
    fn key(&self) -> *const Node {
        Arc::as_ptr(&self.0)
    }
}

/// The device that these tensors are on; `None` if there are none.
///
/// # Errors
/// [`ErrorKind::DeviceMismatch`], at the caller's line.
#[track_caller]
pub(crate) fn one_device<'x>(
    op: &'static str,
    tensors: impl IntoIterator<Item = &'x LazyTensor>,
) -> Result<Option<Device>> {
    let mut devices = tensors.into_iter().map(|x| x.0.device);
    let Some(lhs) = devices.next() else { return Ok(None) };
    match devices.find(|device| *device != lhs) {
        Some(rhs) => Err(ErrorKind::DeviceMismatch { op, lhs, rhs }.into()),
        None => Ok(Some(lhs)),
    }
}

impl Node {
    fn read(&self) -> State {
        // A state is replaced whole, so a panic elsewhere cannot have left half of one.
        self.state.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts a value in place of the operation, which lets go of its inputs.
    fn fulfil(&self, buffer: Buffer) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *state, State::Ready(buffer));
        drop(state);
        release(old);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let State::Op { inputs, .. } = state
            && !inputs.is_empty()
        {
            release(State::Op { op: Operation::Select, inputs: std::mem::take(inputs) });
        }
    }
}

/// Drops a state without recursion: a chain of a million operations would overflow the stack.
fn release(state: State) {
    let mut stack: Vec<LazyTensor> = Vec::new();
    let State::Op { inputs, .. } = state else { return };
    stack.extend(inputs);
    while let Some(LazyTensor(node)) = stack.pop() {
        // Only the last handle takes its inputs apart; then its own drop finds none.
        if let Some(mut node) = Arc::into_inner(node) {
            let state = node.state.get_mut().unwrap_or_else(PoisonError::into_inner);
            if let State::Op { inputs, .. } = state {
                stack.extend(std::mem::take(inputs));
            }
        }
    }
}

impl fmt::Debug for LazyTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match self.0.read() {
            State::Op { op, .. } => format!("{op}"),
            State::Ready(_) => "in memory".to_string(),
            State::Argument(i) => format!("argument {i}"),
            State::Placeholder => "placeholder".to_string(),
        };
        write!(f, "LazyTensor({}, {state})", self.0.ty)
    }
}

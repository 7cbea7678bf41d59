//! Trace once, call many times.

use super::Recording;
use crate::error::{AtCaller, ErrorKind};
use crate::lazy::{LazyTensor, Leaf, Trace, Vacant, one_device, trace};
use crate::{Device, Error, Result};
use metal_candle_compiler::{OutputSource, Plan};
use metal_candle_graph::TensorType;
use metal_candle_runtime::{
    AsyncGraphExecutor, Buffer, Executable, InFlight, Timing, Workspace, World,
};
use smallvec::SmallVec;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

type Function = dyn Fn(&[LazyTensor]) -> Result<Vec<LazyTensor>> + Send + Sync;

/// A function that is traced once for each tuple of argument types and then only run.
///
/// Tensors that the function captures are held by it. Arguments may be donated: their memory is then updated in
/// place, and the caller's handle must be the only one.
///
/// On the CPU, the memory of a large result (4 MiB and more) is used again by a later call, once its last handle has been dropped: so
/// a call that is repeated waits for no fresh memory. At most one is kept for each result and each tuple of types, until the
/// function is dropped; [`Compiled::spare_bytes`] says how much that is. What has become a Candle tensor
/// ([`LazyTensor::eval`]), or was donated to another call, is not kept.
///
/// ```
/// use metal_candle::{DType, Device, LazyTensor, compile};
/// let f = compile(|x: &[LazyTensor]| Ok(vec![x[0].sqr()?.add(&x[1])?]));
/// let x = LazyTensor::full(2.0, &[3], DType::F32, &Device::Cpu)?;
/// assert_eq!(f.call(vec![x.clone(), x])?[0].to_vec1::<f32>()?, [6.0, 6.0, 6.0]);
/// # Ok::<(), metal_candle::Error>(())
/// ```
pub struct Compiled {
    f: Box<Function>,
    donated: Vec<usize>,
    /// Over whose ranks it sums.
    world: Option<Arc<World>>,
    prepacks: bool,
    /// Most recently used last.
    traced: Mutex<Vec<Arc<Traced>>>,
}

/// A plan before there is any memory for it: what would run, and on what.
#[derive(Clone, Debug, PartialEq)]
pub struct Outline {
    /// What would run.
    pub plan: Plan,
    /// One for each of the plan's inputs.
    pub inputs: Vec<InputSource>,
}

impl Outline {
    /// What the function's calls hold on this device beside the plan's memory if it is [prepacking](Compiled::prepacking): what it
    /// captures has no bytes yet, so all of it is taken for what can be prepacked.
    pub fn prepacked(&self, device: &Device) -> Workspace {
        let is_captured = |i: usize| matches!(self.inputs[i], InputSource::Captured(_));
        device.prepacked(&self.plan, is_captured)
    }
}

/// Where an input of a plan comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InputSource {
    /// The argument at this position.
    Argument(usize),
    /// A tensor that the function holds, by its name if it has one.
    Captured(Option<String>),
}

/// Traces kept of one function: shapes beyond that are traced anew, the least recently used first.
const CAPACITY: usize = 32;

/// The trace for arguments of these types, which becomes the most recently used one.
fn known(traces: &mut Vec<Arc<Traced>>, args: &[LazyTensor]) -> Option<Arc<Traced>> {
    let at = traces.iter().rposition(|traced| traced.takes(args))?;
    let found = traces.remove(at);
    traces.push(Arc::clone(&found));
    Some(found)
}

struct Traced {
    types: Vec<TensorType>,
    device: Device,
    executable: Arc<Executable>,
    /// What each input of the plan is that the executable does not hold.
    inputs: Vec<Leaf>,
    results: Vec<TensorType>,
    /// By result: the argument in whose memory it comes to be, if it is of the same type.
    updated: Vec<Option<u32>>,
}

/// What an executable is to be given for a call.
struct Bound {
    inputs: Vec<Buffer>,
    /// By argument: its handle, if there was no other.
    vacant: Vec<Option<Vacant>>,
}

/// A trace before it is made ready to run.
struct Planned {
    plan: Plan,
    device: Device,
    results: Vec<TensorType>,
    trace: Trace,
}

/// A call that need not be over: what it leaves on the device may go into the next one.
pub(crate) struct Underway {
    run: InFlight,
    traced: Arc<Traced>,
    vacant: Vec<Option<Vacant>>,
}

/// Wraps `f`. Nothing is traced before the first call.
pub fn compile(
    f: impl Fn(&[LazyTensor]) -> Result<Vec<LazyTensor>> + Send + Sync + 'static,
) -> Compiled {
    let (f, donated, traced) = (Box::new(f), Vec::new(), Mutex::new(Vec::new()));
    Compiled { f, donated, world: None, prepacks: false, traced }
}

impl Compiled {
    /// Arguments at these positions are given away at every call.
    #[must_use]
    pub fn donate(mut self, positions: impl IntoIterator<Item = usize>) -> Compiled {
        self.donated.extend(positions);
        self
    }

    /// Where the function [sums over ranks](LazyTensor::all_reduce), it does so over those of this world: each of them
    /// must make the same calls.
    #[must_use]
    pub fn within(mut self, world: Arc<World>) -> Compiled {
        self.world = Some(world);
        self
    }

    /// On the CPU, lays out the matrices that the function captures, once and for all, as its products of many rows take them, instead
    /// of in every call. The results have the same bits.
    ///
    /// It takes their memory once more, or twice where a call multiplies by a matrix and by its transpose, as a step of training
    /// does with frozen weights: [`Outline::prepacked`] says how much. Functions that capture the same matrices share it, and it
    /// is let go with the last of them. Candle tensors and weights in blocks stay as they are; so does all on other devices,
    /// which read matrices as they lie.
    #[must_use]
    pub fn prepacking(mut self) -> Compiled {
        self.prepacks = true;
        self
    }

    /// Runs the function and waits. Results are in memory.
    ///
    /// # Errors
    /// Those of the function when it is traced; a donated argument that something else holds; a failed run.
    #[track_caller]
    pub fn call(&self, args: Vec<LazyTensor>) -> Result<Vec<LazyTensor>> {
        let traced = self.traced(&args)?;
        let Bound { inputs, mut vacant } = traced.bind(args)?;
        let values = AsyncGraphExecutor::global().run(&traced.executable, inputs).at_caller()?;
        Ok(traced.results(values, &mut vacant))
    }

    /// [`Compiled::call`], not waited for where the device works by itself.
    ///
    /// # Errors
    /// As [`Compiled::call`]; what only the run can show comes with [`Underway::wait`].
    #[track_caller]
    pub(crate) fn start(&self, args: Vec<LazyTensor>) -> Result<Underway> {
        let traced = self.traced(&args)?;
        let Bound { inputs, vacant } = traced.bind(args)?;
        let run = AsyncGraphExecutor::global().start(&traced.executable, inputs).at_caller()?;
        Ok(Underway { run, traced, vacant })
    }

    /// [`Compiled::call`], and the seconds that it took on the device: of each step of the plan, or of all.
    ///
    /// # Errors
    /// As [`Compiled::call`].
    #[track_caller]
    pub fn profile(
        &self,
        args: Vec<LazyTensor>,
        timing: Timing,
    ) -> Result<(Vec<LazyTensor>, Vec<f64>)> {
        let traced = self.traced(&args)?;
        let Bound { inputs, mut vacant } = traced.bind(args)?;
        let run = AsyncGraphExecutor::global().profile(&traced.executable, inputs, timing);
        let (values, seconds) = run.at_caller()?;
        Ok((traced.results(values, &mut vacant), seconds))
    }

    /// [`Compiled::call`] without blocking the thread.
    ///
    /// # Errors
    /// As [`Compiled::call`].
    #[track_caller]
    pub fn call_async(
        &self,
        args: Vec<LazyTensor>,
    ) -> impl Future<Output = Result<Vec<LazyTensor>>> + Send {
        // The caller's line, which an `async fn` could not see.
        let location = std::panic::Location::caller();
        async move {
            let traced = self.traced(&args)?;
            let Bound { inputs, mut vacant } = traced.bind(args)?;
            let executable = Arc::clone(&traced.executable);
            let run = AsyncGraphExecutor::global().submit(executable, inputs).await;
            Ok(traced.results(run.map_err(|e| Error::at(e, location))?, &mut vacant))
        }
    }

    /// The plan for arguments of these types; nothing is run.
    ///
    /// # Errors
    /// Those of the function when it is traced.
    #[track_caller]
    pub fn plan(&self, args: &[LazyTensor]) -> Result<Plan> {
        Ok(self.outline(args)?.plan)
    }

    /// The plan for arguments of these types, and what each of its inputs is. Nothing is run and no
    /// memory of the plan's is allocated: arguments, and what the function captures, may be
    /// [placeholders](LazyTensor::placeholder).
    ///
    /// # Errors
    /// Those of the function when it is traced.
    #[track_caller]
    pub fn outline(&self, args: &[LazyTensor]) -> Result<Outline> {
        let Planned { plan, trace, .. } = self.planned(args)?;
        let source = |(leaf, handle): (&Leaf, &LazyTensor)| match leaf {
            Leaf::Argument(i) => InputSource::Argument(*i as usize),
            Leaf::Value(_) | Leaf::Placeholder(_) | Leaf::Detached => {
                InputSource::Captured(handle.name().map(str::to_owned))
            }
        };
        let inputs = trace.leaves.iter().zip(trace.inputs()).map(source).collect();
        Ok(Outline { plan, inputs })
    }

    /// What a call with these arguments would compute, and from what. Nothing is run, and nothing is given away.
    ///
    /// # Errors
    /// Those of the function when it is traced.
    #[track_caller]
    pub fn recording(&self, args: &[LazyTensor]) -> Result<Recording> {
        let Planned { plan, trace, .. } = self.planned(args)?;
        let donated = plan.inputs.iter().map(|input| input.donated).collect();
        Ok(Recording::new(&trace, args, donated))
    }

    /// The scratch memory that is held now: [`Plan::arena_bytes`] of every shape that was called,
    /// once for each call in flight. Results, and the [spares](Compiled::spare_bytes) of them, come on top.
    pub fn allocated_arena_bytes(&self) -> usize {
        self.traces().iter().map(|t| t.executable.allocated_arena_bytes()).sum()
    }

    /// The memory of results that nobody holds any more, kept for later calls.
    pub fn spare_bytes(&self) -> usize {
        self.traces().iter().map(|t| t.executable.spare_bytes()).sum()
    }

    #[track_caller]
    fn traced(&self, args: &[LazyTensor]) -> Result<Arc<Traced>> {
        LazyTensor::prefetch(args);
        if let Some(known) = known(&mut self.traces(), args) {
            return Ok(known);
        }
        one_device("a call of a compiled function", args)?;
        // Tracing runs the caller's code, which may call this function: not under the lock.
        let new = Arc::new(self.trace(args)?);
        let mut traces = self.traces();
        // Another thread may have called meanwhile: there is one trace, with one memory, for both.
        if let Some(known) = known(&mut traces, args) {
            return Ok(known);
        }
        if traces.len() == CAPACITY {
            traces.remove(0);
        }
        traces.push(Arc::clone(&new));
        Ok(new)
    }

    fn traces(&self) -> MutexGuard<'_, Vec<Arc<Traced>>> {
        self.traced.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[track_caller]
    fn trace(&self, args: &[LazyTensor]) -> Result<Traced> {
        let Planned { plan, device, results, trace } = self.planned(args)?;
        // What the function captures is the same in every call.
        let held = |leaf: &Leaf| match leaf {
            Leaf::Value(buffer) => Some(buffer.clone()),
            Leaf::Argument(_) | Leaf::Placeholder(_) | Leaf::Detached => None,
        };
        let captured = trace.leaves.iter().map(held).collect();
        let updated = plan.outputs.iter().zip(&results).map(|(output, ty)| {
            let OutputSource::Donated(input) = output.source else { return None };
            let Leaf::Argument(argument) = trace.leaves[input as usize] else { return None };
            (args[argument as usize].ty() == *ty).then_some(argument)
        });
        let updated = updated.collect();
        let executable = Executable::holding(plan, &device, self.world.as_ref(), captured);
        let mut executable = executable.at_caller()?.keeping_spares();
        if self.prepacks {
            executable = executable.prepacking().at_caller()?;
        }
        let inputs = trace.leaves.into_iter().filter(|leaf| held(leaf).is_none()).collect();
        Ok(Traced {
            types: args.iter().map(LazyTensor::ty).collect(),
            device,
            executable: Arc::new(executable),
            inputs,
            results,
            updated,
        })
    }

    #[track_caller]
    fn planned(&self, args: &[LazyTensor]) -> Result<Planned> {
        if let Some(donated) = self.donated.iter().copied().find(|d| *d >= args.len()) {
            return Err(Error::from(ErrorKind::DonatedArgument { donated, got: args.len() }));
        }
        one_device("a call of a compiled function", args)?;
        let placeholder =
            |(i, x): (usize, &LazyTensor)| LazyTensor::argument(i as u32, x.ty(), *x.device());
        let placeholders: Vec<LazyTensor> = args.iter().enumerate().map(placeholder).collect();
        let outputs = (self.f)(&placeholders)?;
        // Without arguments, what the function captures says where it runs; with both, they may differ.
        let device = one_device("a compiled function", args.iter().chain(&outputs))?;
        let device = device.unwrap_or_default();
        let trace = trace(&outputs.iter().collect::<Vec<_>>(), false);
        let donated: Vec<bool> = trace
            .leaves
            .iter()
            .map(|leaf| matches!(leaf, Leaf::Argument(i) if self.donated.contains(&(*i as usize))))
            .collect();
        let plan = metal_candle_compiler::plan(&trace.graph, device.target(), &donated)
            .map_err(metal_candle_runtime::Error::from)
            .at_caller()?;
        let results = outputs.iter().map(LazyTensor::ty).collect();
        Ok(Planned { plan, device, results, trace })
    }
}

impl Traced {
    /// Whether it is that of a call with these arguments.
    fn takes(&self, args: &[LazyTensor]) -> bool {
        let alike = |(ty, x): (&TensorType, &LazyTensor)| x.is_of(ty) && *x.device() == self.device;
        self.types.len() == args.len() && self.types.iter().zip(args).all(alike)
    }

    /// What the executable is to be given: the arguments that the plan takes.
    #[track_caller]
    fn bind(&self, args: Vec<LazyTensor>) -> Result<Bound> {
        let mut buffers: SmallVec<[Option<Buffer>; 64]> = SmallVec::with_capacity(args.len());
        let mut vacant = Vec::with_capacity(args.len());
        for arg in args {
            let (buffer, handle) = arg.give_away()?;
            buffers.push(Some(buffer));
            vacant.push(handle);
        }
        let mut inputs = Vec::with_capacity(self.inputs.len());
        for leaf in &self.inputs {
            inputs.push(match leaf {
                // Each argument is one input of the plan, so its memory is handed on, not shared.
                Leaf::Argument(i) => buffers[*i as usize]
                    .take()
                    .expect("metal-candle bug: an argument is two inputs of its plan"),
                Leaf::Placeholder(ty) => {
                    return Err(ErrorKind::PlaceholderValue { ty: *ty }).at_caller();
                }
                Leaf::Value(_) => panic!("metal-candle bug: a captured value is not held"),
                Leaf::Detached => {
                    panic!("metal-candle bug: a detached input in a compiled function")
                }
            });
        }
        Ok(Bound { inputs, vacant })
    }

    fn results(&self, values: Vec<Buffer>, vacant: &mut [Option<Vacant>]) -> Vec<LazyTensor> {
        // The run has driven them out of the caches.
        Vacant::prefetch(vacant.iter().flatten());
        let values = values.into_iter().enumerate();
        values.map(|(i, value)| self.result(i, value, vacant)).collect()
    }

    fn result(&self, i: usize, value: Buffer, vacant: &mut [Option<Vacant>]) -> LazyTensor {
        match self.updated[i].and_then(|argument| vacant[argument as usize].take()) {
            Some(handle) => handle.fill(value),
            None => LazyTensor::ready(value, self.results[i]),
        }
    }
}

impl Underway {
    pub(crate) fn is_over(&self) -> bool {
        self.run.is_over()
    }

    /// The result of this number, if it may be handed on already.
    pub(crate) fn take(&mut self, result: usize) -> Option<LazyTensor> {
        let value = self.run.take(result)?;
        Some(self.traced.result(result, value, &mut self.vacant))
    }

    /// Waits for the results that were not taken.
    ///
    /// # Errors
    /// Those of the run.
    #[track_caller]
    pub(crate) fn wait(self) -> Result<Vec<Option<LazyTensor>>> {
        let Underway { run, traced, mut vacant } = self;
        let values = run.wait().at_caller()?.into_iter().enumerate();
        Ok(values.map(|(i, value)| Some(traced.result(i, value?, &mut vacant))).collect())
    }
}

impl fmt::Debug for Compiled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let traced = self.traced.lock().unwrap_or_else(PoisonError::into_inner);
        f.debug_struct("Compiled")
            .field("donated", &self.donated)
            .field("traced", &traced.len())
            .finish()
    }
}

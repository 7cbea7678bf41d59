//! What the steps ask of the device: launches of kernels, and products.

use super::Gpu;
use super::compile::Function;
use super::gpu::Said;
use super::join::join;
use super::nccl::Sum;
use super::product::Product;
use crate::hazards::Touched;
use crate::parts::parts;
use crate::places::{Place, places};
use crate::{Result, World};
use cudarc::driver::DriverError;
use cudarc::driver::sys::{self, CUdeviceptr, CUstream};
use metal_candle_compiler::render::{self, Binding, Dialect, Part, Source};
use metal_candle_compiler::{self as compiler, LibraryCall, Plan};
use smallvec::SmallVec;
use std::ffi::c_void;
use std::sync::Arc;

/// One launch or product.
pub(super) struct Command {
    /// The steps that it is of, in order; mostly one.
    pub(super) steps: SmallVec<[usize; 1]>,
    pub(super) places: SmallVec<[Place; 4]>,
    action: Action,
}

enum Action {
    Launch { function: Function, grid: u32, block: u32, shared_bytes: u32 },
    Product(Product),
    Sum(Sum),
}

/// The commands of a plan, and the scratch memory that the greediest of its calls wants.
pub(super) struct Commands {
    pub(super) list: Vec<Command>,
    pub(super) scratch_bytes: usize,
}

/// A command whose kernel is not compiled yet.
pub(super) struct Draft {
    pub(super) steps: SmallVec<[usize; 1]>,
    pub(super) places: SmallVec<[Place; 4]>,
    pub(super) work: Work,
}

/// What a step asks for, before anything is joined.
pub(super) struct Wish {
    pub(super) step: usize,
    pub(super) bindings: Vec<Binding>,
    /// Of each binding.
    pub(super) places: SmallVec<[Place; 4]>,
    pub(super) touched: Touched,
    pub(super) work: Work,
}

pub(super) enum Work {
    Kernel(Source),
    Product(Product),
    Sum(Sum),
}

impl Wish {
    fn new(plan: &Plan, step: usize, bindings: Vec<Binding>, work: Work) -> Result<Wish> {
        let align_bytes = work.kernel().map_or(1, |source| source.align_bytes);
        let places = places(plan, step, &bindings, align_bytes)?;
        let touched = Touched::new(plan, &plan.steps[step], &bindings);
        Ok(Wish { step, bindings, places, touched, work })
    }
}

impl Work {
    pub(super) fn kernel(&self) -> Option<&Source> {
        match self {
            Work::Kernel(source) => Some(source),
            Work::Product(_) | Work::Sum(_) => None,
        }
    }
}

impl Commands {
    /// # Errors
    /// [`crate::Error::Render`] for a step that the device cannot run; [`crate::Error::Compile`]; what the driver says.
    pub(super) fn new(gpu: &Gpu, plan: &Plan, world: Option<&Arc<World>>) -> Result<Commands> {
        let (mut wishes, mut scratch_bytes) = (Vec::new(), 0);
        for (index, step) in plan.steps.iter().enumerate() {
            if let (compiler::Work::Call(LibraryCall::AllReduce), Some(world)) = (&step.work, world)
            {
                let sum = Work::Sum(Sum::new(world, step));
                wishes.push(Wish::new(plan, index, vec![Binding::Out(0)], sum)?);
                continue;
            }
            let call = parts(plan, index, Dialect::CUDA, &gpu.limits)?;
            scratch_bytes = scratch_bytes.max(call.workspace_bytes);
            for part in call.parts {
                let (bindings, work) = work(gpu, part)?;
                if matches!(&work, Work::Kernel(source) if source.launch.grid == 0) {
                    continue;
                }
                wishes.push(Wish::new(plan, index, bindings, work)?);
            }
        }
        let list = compile(gpu, join(wishes, plan, &gpu.limits))?;
        Ok(Commands { list, scratch_bytes })
    }
}

/// A part as a command to be, and what it is bound to.
fn work(gpu: &Gpu, part: Part) -> Result<(Vec<Binding>, Work)> {
    Ok(match part {
        Part::Kernel(source) => (source.bindings.clone(), Work::Kernel(source)),
        Part::Product(product) => {
            let bindings = product.places().map(|place| place.binding).collect();
            let work = match gpu.library.product(&product)? {
                Some(product) => Work::Product(product),
                None => Work::Kernel(render::product(&product, Dialect::CUDA, &gpu.limits)),
            };
            (bindings, work)
        }
    })
}

fn compile(gpu: &Gpu, drafts: Vec<Draft>) -> Result<Vec<Command>> {
    let sources: Vec<&Source> = drafts.iter().filter_map(|draft| draft.work.kernel()).collect();
    let mut functions = gpu.kernels.get(gpu, &sources)?.into_iter();
    let command = |Draft { steps, places, work }| {
        let action = match work {
            Work::Product(product) => Action::Product(product),
            Work::Sum(sum) => Action::Sum(sum),
            Work::Kernel(source) => Action::Launch {
                function: functions.next().expect("metal-candle bug: a kernel is missing"),
                grid: source.launch.grid as u32,
                block: source.launch.block as u32,
                shared_bytes: source.launch.shared_bytes as u32,
            },
        };
        Command { steps, places, action }
    };
    Ok(drafts.into_iter().map(command).collect())
}

impl Command {
    /// Asks the stream for it.
    ///
    /// # Safety
    /// `bases` holds memory for every slot of the plan, which has been verified; it stays until the stream is through.
    pub(super) unsafe fn enqueue(
        &self,
        gpu: &Gpu,
        bases: &[CUdeviceptr],
        stream: CUstream,
    ) -> Result<()> {
        let at = |place: &Place| bases[place.base].wrapping_add(place.offset_bytes as u64);
        match &self.action {
            Action::Launch { function, grid, block, shared_bytes } => {
                let mut addresses: SmallVec<[CUdeviceptr; 16]> =
                    self.places.iter().map(at).collect();
                let mut parameters: SmallVec<[*mut c_void; 16]> =
                    addresses.iter_mut().map(|a| std::ptr::from_mut(a).cast()).collect();
                let config = launch_config(*grid, *block, *shared_bytes, stream);
                // SAFETY: the function takes as many addresses; the caller's promise for what lies there. It waits
                // for the kernel before it by itself, if it is launched early.
                unsafe { launch(gpu, config, *function, &mut parameters) }
                    .said(|| format!("launching step {}", self.steps[0]))
            }
            Action::Product(product) => {
                let addresses: SmallVec<[CUdeviceptr; 4]> = self.places.iter().map(at).collect();
                // SAFETY: the caller's promise.
                unsafe { gpu.library.enqueue(product, &addresses, stream) }
            }
            // SAFETY: the caller's promise.
            Action::Sum(sum) => unsafe { sum.enqueue(at(&self.places[0]), stream) },
        }
    }
}

fn launch_config(
    grid: u32,
    block: u32,
    shared_bytes: u32,
    stream: CUstream,
) -> sys::CUlaunchConfig {
    sys::CUlaunchConfig {
        gridDimX: grid,
        gridDimY: 1,
        gridDimZ: 1,
        blockDimX: block,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: shared_bytes,
        hStream: stream,
        attrs: std::ptr::null_mut(),
        numAttrs: 0,
    }
}

/// Launches a kernel, from Hopper on while the one before it ends (see `after_predecessor` in the header).
///
/// # Safety
/// As `cuLaunchKernelEx`.
unsafe fn launch(
    gpu: &Gpu,
    mut config: sys::CUlaunchConfig,
    function: Function,
    parameters: &mut [*mut c_void],
) -> std::result::Result<(), DriverError> {
    let mut early = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: Default::default(),
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    };
    if gpu.architecture >= 90 {
        config.attrs = &raw mut early;
        config.numAttrs = 1;
    }
    let parameters = parameters.as_mut_ptr();
    // SAFETY: the caller's promise; the attribute outlives the call.
    unsafe {
        sys::cuLaunchKernelEx(&raw const config, function.0, parameters, std::ptr::null_mut())
    }
    .result()
}

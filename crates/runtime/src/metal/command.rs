//! What a step asks of the device: launches of kernels, and products.

use super::Gpu;
use super::gpu::Said;
use super::library::Wanted;
use super::product::{Addend, Parameters, Product};
use crate::Result;
use crate::hazards::{self, Touched};
use crate::parts::parts;
use crate::places::{Bases, Place, places};
use candle_metal_kernels::metal::{Buffer, ComputePipeline, ConstantValues, Value};
use candle_metal_kernels::source::Source as CandleSource;
use metal_candle_compiler::Plan;
use metal_candle_compiler::render::{self, Dialect, Part, Source};
use objc2::runtime::ProtocolObject;
use objc2_metal::{MTLBarrierScope, MTLComputeCommandEncoder, MTLSize};
use smallvec::SmallVec;
use std::ops::Range;
use std::ptr::NonNull;

/// One launch or product.
pub(super) struct Command {
    step: usize,
    places: SmallVec<[Place; 4]>,
    pipeline: ComputePipeline,
    action: Action,
    /// Whether it must wait for those before it.
    barrier: bool,
}

enum Action {
    Launch { grid: usize, block: usize, shared_bytes: usize },
    Product(Product),
}

/// The commands of a plan, and the scratch memory that the greediest of its calls wants.
pub(super) struct Commands {
    list: Vec<Command>,
    pub(super) scratch_bytes: usize,
    /// By base: whether a command refers to it.
    pub(super) used: Vec<bool>,
}

/// A command whose kernel is not compiled yet.
struct Draft {
    step: usize,
    places: SmallVec<[Place; 4]>,
    touched: Touched,
    work: DraftWork,
}

enum DraftWork {
    Kernel(Source),
    Product(Product),
}

type Encoder = ProtocolObject<dyn MTLComputeCommandEncoder>;

impl Commands {
    /// # Errors
    /// [`Error::Render`] for a step that the device cannot run, as one of f64; [`Error::Compile`]; what Metal says.
    pub(super) fn new(gpu: &Gpu, plan: &Plan) -> Result<Commands> {
        let (mut drafts, mut scratch_bytes) = (Vec::new(), 0);
        for index in 0..plan.steps.len() {
            let call = parts(plan, index, Dialect::METAL, &gpu.limits)?;
            scratch_bytes = scratch_bytes.max(call.workspace_bytes);
            for part in call.parts {
                drafts.extend(draft(gpu, plan, index, part)?);
            }
        }
        let touched: Vec<Touched> = drafts.iter().map(|draft| draft.touched.clone()).collect();
        let mut used = vec![false; Bases::outputs(plan) + plan.outputs.len()];
        for place in drafts.iter().flat_map(|draft| &draft.places) {
            used[place.base] = true;
        }
        let list = compile(gpu, plan, drafts, &hazards::barriers(&touched))?;
        Ok(Commands { list, scratch_bytes, used })
    }

    /// Asks for those of these steps. `bases` are the run's allocations, with the bytes to skip in each; `None` for those that no
    /// command refers to.
    ///
    /// # Safety
    /// They hold memory for every slot of the plan, which has been verified, until the command buffer has completed.
    pub(super) unsafe fn encode(
        &self,
        gpu: &Gpu,
        encoder: &Encoder,
        bases: &[Option<(&Buffer, usize)>],
        steps: Range<usize>,
    ) {
        for command in self.list.iter().filter(|command| steps.contains(&command.step)) {
            if command.barrier {
                encoder.memoryBarrierWithScope(MTLBarrierScope::Buffers);
            }
            // SAFETY: the caller's promise.
            unsafe { command.encode(gpu, encoder, bases) };
        }
    }
}

/// A part as a command to be; none where there is nothing to do.
fn draft(gpu: &Gpu, plan: &Plan, index: usize, part: Part) -> Result<Option<Draft>> {
    let step = &plan.steps[index];
    let (bindings, align_bytes, work) = match part {
        Part::Kernel(source) => {
            (source.bindings.clone(), source.align_bytes, DraftWork::Kernel(source))
        }
        Part::Product(product) => {
            let render::Product { alpha, accumulate, a, b, bias, out } = &product;
            let asked = match bias {
                None => Product::new([a, b, out], *alpha, *accumulate, gpu.few_cores),
                // Its kernels add none.
                Some(_) => None,
            };
            match asked {
                Some(asked) => {
                    let bindings = product.places().map(|place| place.binding).collect();
                    (bindings, out.dtype.size_bytes(), DraftWork::Product(asked))
                }
                None => {
                    let source = render::product(&product, Dialect::METAL, &gpu.limits);
                    (source.bindings.clone(), source.align_bytes, DraftWork::Kernel(source))
                }
            }
        }
    };
    if matches!(&work, DraftWork::Kernel(source) if source.launch.grid == 0) {
        return Ok(None);
    }
    let touched = Touched::new(plan, step, &bindings);
    let places = places(plan, index, &bindings, align_bytes)?;
    Ok(Some(Draft { step: index, places, touched, work }))
}

fn compile(gpu: &Gpu, plan: &Plan, drafts: Vec<Draft>, barriers: &[bool]) -> Result<Vec<Command>> {
    let wanted: Vec<Wanted<'_>> = drafts
        .iter()
        .filter_map(|draft| match &draft.work {
            DraftWork::Kernel(source) => {
                let label = plan.steps[draft.step].label.as_str();
                Some(Wanted { step: draft.step, label, source })
            }
            DraftWork::Product(_) => None,
        })
        .collect();
    let mut pipelines = gpu.library.get(&wanted, |source| gpu.compile(source))?.into_iter();
    let mut commands = Vec::with_capacity(drafts.len());
    for (draft, barrier) in drafts.into_iter().zip(barriers) {
        let (pipeline, action) = match draft.work {
            DraftWork::Kernel(source) => {
                let launch = source.launch;
                let (grid, block, shared_bytes) = (launch.grid, launch.block, launch.shared_bytes);
                let pipeline = pipelines.next().expect("metal-candle bug: a kernel is missing");
                (pipeline, Action::Launch { grid, block, shared_bytes })
            }
            DraftWork::Product(product) => {
                (candle_kernel(gpu, &product)?, Action::Product(product))
            }
        };
        let (step, places) = (draft.step, draft.places);
        commands.push(Command { step, places, pipeline, action, barrier: *barrier });
    }
    Ok(commands)
}

/// One of Candle's own kernels, which Candle compiles and keeps.
fn candle_kernel(gpu: &Gpu, product: &Product) -> Result<ComputePipeline> {
    let kernels = gpu.candle_device().kernels();
    let adds = product.addend().is_some();
    let (source, constants) = match &product.parameters {
        Parameters::Matrices { aligned: [m, n, k], .. } => {
            let flags = [(10, false), (100, adds), (110, adds), (200, *m), (201, *n), (202, *k)];
            let flags = flags.into_iter().chain([(300, false)]);
            let values = flags.map(|(id, value)| (id, Value::Bool(value))).collect();
            (CandleSource::Gemm, Some(ConstantValues::new(values)))
        }
        Parameters::Vector(_) => (CandleSource::Gemv, None),
    };
    let name = product.kernel.clone();
    kernels
        .load_pipeline_with_constants(gpu.raw(), source, name, constants)
        .said(|| format!("compiling Candle's {}", product.kernel))
}

impl Command {
    /// # Safety
    /// As [`Commands::encode`].
    unsafe fn encode(&self, gpu: &Gpu, encoder: &Encoder, bases: &[Option<(&Buffer, usize)>]) {
        let at = |i: usize| {
            let Place { base, offset_bytes } = self.places[i];
            let (buffer, skipped) =
                bases[base].expect("metal-candle bug: an operand has no memory");
            (buffer, skipped + offset_bytes)
        };
        encoder.setComputePipelineState(self.pipeline.as_ref());
        let size = |[width, height, depth]: [usize; 3]| MTLSize { width, height, depth };
        match &self.action {
            Action::Launch { grid, block, shared_bytes } => {
                for i in 0..self.places.len() {
                    // SAFETY: the caller's promise; the kernel has so many operands.
                    unsafe { set_buffer(encoder, i, at(i)) };
                }
                if *shared_bytes > 0 {
                    // SAFETY: within the limits for which it was rendered.
                    unsafe { encoder.setThreadgroupMemoryLength_atIndex(*shared_bytes, 0) };
                }
                encoder.dispatchThreadgroups_threadsPerThreadgroup(
                    size([*grid, 1, 1]),
                    size([*block, 1, 1]),
                );
            }
            Action::Product(product) => {
                for starts in &product.starts {
                    let operand = |i: usize| (at(i).0, at(i).1 + starts[i]);
                    let factors = if product.swapped { [1, 0] } else { [0, 1] };
                    let [a, b] = factors.map(operand);
                    let out = operand(2);
                    let addend = match product.addend() {
                        Some(Addend::Zero) => (&gpu.zero, 0),
                        Some(Addend::Result) | None => out,
                    };
                    // SAFETY: the caller's promise; numbers and order are those of the kernel's parameters.
                    unsafe { set_product(encoder, &product.parameters, [a, b, addend, out]) };
                    encoder.dispatchThreadgroups_threadsPerThreadgroup(
                        size(product.grid),
                        size(product.block),
                    );
                }
            }
        }
    }
}

/// # Safety
/// The kernel's parameter of this number is a buffer.
unsafe fn set_buffer(encoder: &Encoder, index: usize, (buffer, offset): (&Buffer, usize)) {
    // SAFETY: the caller's promise.
    unsafe { encoder.setBuffer_offset_atIndex(Some(buffer.as_ref()), offset, index) };
}

/// # Safety
/// The kernel's parameter of this number is a constant of this type.
unsafe fn set_bytes<T>(encoder: &Encoder, index: usize, value: &T) {
    // SAFETY: the caller's promise; the bytes are copied before the call returns.
    unsafe { encoder.setBytes_length_atIndex(NonNull::from(value).cast(), size_of::<T>(), index) };
}

/// # Safety
/// The operands are those that the parameters were made for.
unsafe fn set_product(
    encoder: &Encoder,
    parameters: &Parameters,
    [a, b, addend, out]: [(&Buffer, usize); 4],
) {
    // SAFETY: the caller's promise; the numbers are those in `mlx_gemm.metal` and `gemv.metal`.
    unsafe {
        match parameters {
            Parameters::Matrices { gemm, add, .. } => {
                [a, b, addend, out]
                    .into_iter()
                    .enumerate()
                    .for_each(|(i, o)| set_buffer(encoder, i, o));
                set_bytes(encoder, 4, gemm);
                set_bytes(encoder, 5, add);
                set_bytes(encoder, 6, &1i32);
                set_bytes(encoder, 7, &[gemm.batch_stride_a, gemm.batch_stride_b]);
            }
            Parameters::Vector(v) => {
                let (matrix, vector) = if v.matrix_is_b { (b, a) } else { (a, b) };
                let operands = [matrix, vector, addend, out];
                operands.into_iter().enumerate().for_each(|(i, o)| set_buffer(encoder, i, o));
                set_bytes(encoder, 4, &v.in_len);
                set_bytes(encoder, 5, &v.out_len);
                set_bytes(encoder, 6, &v.matrix_ld);
                set_bytes(encoder, 7, &v.alpha);
                set_bytes(encoder, 8, &v.beta);
                set_bytes(encoder, 9, &1i32);
                set_bytes(encoder, 10, &1i32);
                set_bytes(encoder, 11, &v.vector_batch_stride);
                set_bytes(encoder, 12, &v.matrix_batch_stride);
                set_bytes(encoder, 13, &v.addend_batch_stride);
                set_bytes(encoder, 14, &v.addend_stride);
            }
        }
    }
}

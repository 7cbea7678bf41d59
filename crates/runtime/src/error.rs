//! What can go wrong between a plan and its results.

use crate::{Device, WorldError};
use metal_candle_compiler::Slot;
use metal_candle_compiler::render::RenderError;
use metal_candle_graph::{DType, TensorType};

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error(transparent)]
    Compiler(#[from] metal_candle_compiler::Error),
    /// What only the values could show: an index out of range.
    #[error(transparent)]
    Graph(#[from] metal_candle_graph::Error),
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    #[error("{what}: no memory for {bytes} bytes")]
    OutOfMemory { what: String, bytes: usize },
    #[error("no thread could be started to run on: {0}")]
    Thread(#[source] std::io::Error),
    #[error("step {step} ({label}) panicked: {message}")]
    KernelPanic { step: usize, label: String, message: String },
    #[error("expected {expected} inputs, got {got}")]
    InputCount { expected: usize, got: usize },
    #[error("input {index}: expected {expected}, got {got} of {len} elements")]
    InputType { index: usize, expected: TensorType, got: DType, len: usize },
    #[error("input {index} is on {got}, the plan is for {expected}: move it with `to_device`")]
    InputDevice { index: usize, expected: Device, got: Device },
    #[error(
        "input {input} is donated, but something else holds its memory too: \
         give the only handle away, or `Buffer::into_owned` it first"
    )]
    DonatedShared { input: usize },
    #[error("expected a buffer of {expected}, got {got}")]
    DType { expected: DType, got: DType },
    #[error("expected a shape of {expected} elements, got {got}")]
    Len { expected: usize, got: usize },
    #[error("dtype {got:?} is not supported: cast to one of u8, u32, i64, bf16, f16, f32, f64")]
    UnsupportedDType { got: candle_core::DType },
    #[error(
        "there is no device {got} here: use cpu, or a build with its feature (cuda, metal) on a machine that has one"
    )]
    Device { got: String },
    #[error("expected a device (cpu, cuda, cuda:N, metal or metal:N), got {got:?}")]
    DeviceName { got: String },
    #[error("{device}: this build lacks the feature `{0}`: build with --features {0}", device.feature())]
    NotInBuild { device: Device },
    #[error("{device}: this machine has {}", gpus(device, names))]
    NotInMachine { device: Device, names: Vec<String> },
    /// What the driver, or a library, of an NVIDIA GPU said.
    #[error("CUDA, {doing}: {message}")]
    Cuda { doing: String, message: String },
    #[error("step {step} ({label}): {source}")]
    Step { step: usize, label: String, source: Box<Error> },
    /// What Metal said.
    #[error("Metal, {doing}: {message}")]
    Metal { doing: String, message: String },
    /// What went wrong between ranks.
    #[error(transparent)]
    World(#[from] WorldError),
    #[error("a run was given up before its end")]
    Lost,
    /// A kernel whose text the device's compiler refuses.
    #[error("the kernel {kernel} does not compile:\n{log}")]
    Compile { kernel: String, log: String },
    /// A step that the device's language cannot say.
    #[error("step {step} ({label}): {source}")]
    Render { step: usize, label: String, source: RenderError },
    /// The plan would touch memory that is not its own; never true of a plan that the compiler made.
    #[error("step {step} ({label}): {fault}")]
    Plan { step: usize, label: String, fault: PlanFault },
}

/// The GPUs of a machine that lacks the one that was asked for.
fn gpus(device: &Device, names: &[String]) -> String {
    let maker = match device {
        Device::Cuda(_) => "NVIDIA GPU, or no driver for one (see nvidia-smi)",
        Device::Cpu | Device::Metal(_) => "GPU that Metal can use",
    };
    match names {
        [] => format!("no {maker}"),
        [only] => format!("one GPU of this kind, number 0: {only}"),
        names => format!("GPUs 0 to {}: {}", names.len() - 1, names.join(", ")),
    }
}

pub type Result<T> = std::result::Result<T, Error>;

/// How a step breaks the contract of a plan.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanFault {
    #[error("{slot:?} is beyond the plan's inputs, outputs or arena")]
    NoSuchSlot { slot: Slot },
    #[error("bytes {from}..{to} of {slot:?} are touched, which has {len_bytes}")]
    OutOfBounds { slot: Slot, from: isize, to: isize, len_bytes: usize },
    #[error("{slot:?} does not start at a multiple of the size of {dtype}")]
    Misaligned { slot: Slot, dtype: DType },
    #[error("input {input} is written, but the caller does not give it away")]
    WritesInput { input: u32 },
    #[error("an output shares memory with another operand and is not read where it is written")]
    Overlap,
    #[error("an access of the kernel names operand {arg}, of {count}")]
    NoSuchOperand { arg: u32, count: usize },
    #[error("an access of the kernel has {got} strides, its space {expected} axes")]
    Rank { expected: usize, got: usize },
    #[error("the kernel takes {got} where the operand holds {expected}")]
    AccessDType { expected: DType, got: DType },
    #[error("a sum over ranks is not in place on one dense operand of f32 or f64")]
    AllReduce,
    #[error("a result does not have the type, or comes from a place, that the plan says")]
    Output,
}

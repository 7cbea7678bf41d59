//! A [`Kernel`] as source text for a GPU.
//!
//! ```text
//! launch ── how many threads, and who works on a row     Kernel, Limits -> Launch
//! passes ── what is computed in which pass, what is kept  Kernel, Launch -> Passes
//! body ──── the text, the same in every dialect          Passes         -> Source
//! dialect ─ what a language calls things: `cuda.rs`, `metal.rs`
//! call ──── a library call, as kernels and products       LibraryCall    -> Call
//! product ─ a plain kernel for products that a library does not take
//! beside ── kernels that need not wait for each other, as one   Sources -> Source
//! ```
//!
//! A dialect is data about a language, not a device: nothing here needs a GPU, and the tests compile both
//! dialects as C++ and run them. The text is specialised to the kernel's extents and strides, so that a compiler
//! turns divisions into multiplications and keeps a row in registers.

mod beside;
mod body;
mod call;
mod cuda;
mod dialect;
mod index;
mod launch;
mod metal;
mod passes;
mod product;
mod scalar;
mod text;

pub use beside::{Ahead, beside};
pub use call::{Call, Part, Place, Product, Status, call};
pub use dialect::Dialect;
pub use launch::{Launch, Limits, Team, TensorCores, launch};
pub use product::product;

use crate::kernel::{Access, Kernel, KernelOp};
use metal_candle_graph::{Class, DType};

/// Why a kernel cannot be rendered or launched.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RenderError {
    #[error("{language} has no {dtype}: cast to f32, or run on the CPU")]
    DType { language: &'static str, dtype: DType },
    #[error("a kernel of {operands} operands, where {limit} can be bound: plan with shorter tapes")]
    Operands { operands: usize, limit: usize },
    #[error("no kernel for {call} in {language}: run it on the CPU")]
    Call { language: &'static str, call: &'static str },
}

/// Memory that a kernel is given the address of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Binding {
    /// The step's argument of this number.
    Arg(u32),
    /// The step's output of this number.
    Out(u32),
    /// So many bytes into an argument, or an output.
    ArgAt {
        arg: u32,
        offset_bytes: usize,
    },
    OutAt {
        out: u32,
        offset_bytes: usize,
    },
    /// So many bytes into the [call's workspace](Call::workspace_bytes).
    Workspace {
        offset_bytes: usize,
    },
    /// The run's [status](Status).
    Status,
}

impl Binding {
    /// So many bytes further.
    fn further(self, bytes: usize) -> Binding {
        match self {
            _ if bytes == 0 => self,
            Binding::Arg(arg) => Binding::ArgAt { arg, offset_bytes: bytes },
            Binding::Out(out) => Binding::OutAt { out, offset_bytes: bytes },
            Binding::ArgAt { arg, offset_bytes } => {
                Binding::ArgAt { arg, offset_bytes: offset_bytes + bytes }
            }
            Binding::OutAt { out, offset_bytes } => {
                Binding::OutAt { out, offset_bytes: offset_bytes + bytes }
            }
            Binding::Workspace { offset_bytes } => {
                Binding::Workspace { offset_bytes: offset_bytes + bytes }
            }
            Binding::Status => panic!("metal-candle bug: a part of the status"),
        }
    }
}

/// A rendered kernel. Its text wants the dialect's [header](Dialect::header) before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    pub name: String,
    pub text: String,
    pub bindings: Vec<Binding>,
    pub launch: Launch,
    /// What the address of every operand must be a multiple of.
    pub align_bytes: usize,
    /// Whether it uses a template of a library call.
    pub is_call: bool,
    /// What it asks for before it waits, by itself, for the kernel before it. No kernel of the run may write that; where one does,
    /// [`Dialect::waiting`].
    pub asks_first: Option<Binding>,
}

/// Renders `kernel`, to be launched within `limits`, as the function `name`.
///
/// Outputs may share memory with arguments as [`Step`](crate::Step) says: every thread has read what it replaces.
///
/// # Errors
/// [`RenderError::DType`] for f64 in a language without; what [`launch`](fn@launch) refuses.
pub fn render(
    kernel: &Kernel,
    dialect: &Dialect,
    limits: &Limits,
    name: &str,
) -> Result<Source, RenderError> {
    check_dtypes(kernel, dialect)?;
    let launch = launch(kernel, limits)?;
    let operands = operands(kernel);
    let align_bytes =
        operands.iter().map(|o| body::access_bytes(kernel, &launch, o)).max().unwrap_or(1);
    let text = body::render(kernel, dialect, &launch, &operands, name);
    let bindings = operands.iter().map(|o| o.binding).collect();
    Ok(Source {
        name: name.to_owned(),
        text,
        bindings,
        launch,
        align_bytes,
        is_call: false,
        asks_first: None,
    })
}

fn check_dtypes(kernel: &Kernel, dialect: &Dialect) -> Result<(), RenderError> {
    let tape = kernel.tape.iter().map(|inst| inst.dtype);
    let stores = kernel.stores.iter().map(|store| store.to.dtype);
    let missing = |dtype: &DType| dtype.class() == Class::F64 && !dialect.has_f64;
    match tape.chain(stores).find(missing) {
        Some(dtype) => Err(RenderError::DType { language: dialect.language, dtype }),
        None => Ok(()),
    }
}

/// An operand, by the way it is bound.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Operand {
    binding: Binding,
    dtype: DType,
}

/// What the kernel touches: arguments, then outputs, each once.
fn operands(kernel: &Kernel) -> Vec<Operand> {
    let (mut args, mut outs) = (Vec::new(), Vec::new());
    for (binding, access) in accesses(kernel) {
        let all = if matches!(binding, Binding::Arg(_)) { &mut args } else { &mut outs };
        let operand = Operand { binding, dtype: access.dtype };
        if !all.contains(&operand) {
            all.push(operand);
        }
    }
    args.append(&mut outs);
    args
}

fn accesses(kernel: &Kernel) -> impl Iterator<Item = (Binding, &Access)> {
    let loads = kernel.tape.iter().filter_map(|inst| match &inst.op {
        KernelOp::Load(access) => Some((Binding::Arg(access.arg), access)),
        _ => None,
    });
    loads.chain(kernel.stores.iter().map(|store| (Binding::Out(store.to.arg), &store.to)))
}

//! A library call as what a GPU does for it: kernels and products, in order.

use super::{Binding, Dialect, Limits, RenderError, Source};
use crate::{Layout, LibraryCall, Operand};
use metal_candle_graph::DType;

/// What a GPU does for a library call: the parts run one after the other.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    pub parts: Vec<Part>,
    /// Memory that the parts share while they run; its start is aligned to 256 bytes.
    pub workspace_bytes: usize,
}

/// One launch, or one product of the backend's own library.
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    Kernel(Source),
    /// As [`LibraryCall::Gemm`].
    Product {
        alpha: f64,
        accumulate: bool,
        a: Place,
        b: Place,
        out: Place,
    },
}

/// An operand of a product.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    pub binding: Binding,
    pub dtype: DType,
    pub layout: Layout,
}

/// What a run reports: zeroed before its first step, read after its last. The first index out of range wins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Status {
    /// 0 while all is well; else 1 + the number of the operation that met a bad index.
    pub failed: u32,
    pub reserved: u32,
    /// The index, the extent that it must be below, and where it stood among the indices.
    pub index: i64,
    pub extent: i64,
    pub position: i64,
}

/// The parts of `call` on operands `args` and `outs`. Names of kernels begin with the call's.
///
/// # Errors
/// [`RenderError::DType`] for f64 in a language without.
pub fn call(
    call: &LibraryCall,
    args: &[Operand],
    outs: &[Operand],
    dialect: &Dialect,
    limits: &Limits,
) -> Result<Call, RenderError> {
    let _ = (args, outs, limits);
    match call {
        LibraryCall::Gemm { alpha, accumulate } => {
            let place = |binding, o: &Operand| Place { binding, dtype: o.dtype, layout: o.layout };
            let [a, b] = [0, 1].map(|i| place(Binding::Arg(i), &args[i as usize]));
            let out = place(Binding::Out(0), &outs[0]);
            let product = Part::Product { alpha: *alpha, accumulate: *accumulate, a, b, out };
            Ok(Call { parts: vec![product], workspace_bytes: 0 })
        }
        other => Err(RenderError::Call { language: dialect.language, call: other.name() }),
    }
}

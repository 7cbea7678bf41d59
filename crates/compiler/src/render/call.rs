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
#[expect(clippy::large_enum_variant, reason = "a call has a handful of parts")]
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

impl Status {
    /// From memory that the kernels wrote, in the machine's order.
    ///
    /// # Panics
    /// Where there are fewer bytes than it has.
    pub fn from_bytes(bytes: &[u8]) -> Status {
        let eight = |at: usize| *bytes[at..].first_chunk::<8>().expect("a status of 32 bytes");
        let four = |at: usize| *bytes[at..].first_chunk::<4>().expect("a status of 32 bytes");
        Status {
            failed: u32::from_ne_bytes(four(0)),
            reserved: u32::from_ne_bytes(four(4)),
            index: i64::from_ne_bytes(eight(8)),
            extent: i64::from_ne_bytes(eight(16)),
            position: i64::from_ne_bytes(eight(24)),
        }
    }

    /// # Errors
    /// [`metal_candle_graph::Error::IndexOutOfRange`]
    pub fn check(&self) -> metal_candle_graph::Result<()> {
        if self.failed == 0 {
            return Ok(());
        }
        Err(metal_candle_graph::Error::IndexOutOfRange {
            op: "index",
            index: self.index,
            extent: self.extent as usize,
            position: self.position as usize,
        })
    }
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

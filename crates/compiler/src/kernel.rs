//! The kernel IR: an iteration space, affine accesses, and one SSA tape in stages.
//!
//! A kernel knows strides and scalars; it knows no graph, no model and no device. Softmax, norms,
//! cross-entropy, SwiGLU and AdamW are all of this form.
//!
//! ```text
//! for row in rows                       one value per row:  Level::Row
//!   for stage in 0..stages
//!     for col in cols                   one value per element: Level::Col
//!       run the stage's tape
//!     Reduce results of this stage become row values
//! ```
//!
//! The CPU interpreter in `runtime` defines what a kernel means.

use metal_candle_graph::{BinaryOp, DType, Distribution, ReduceOp, Scalar, UnaryOp};
use smallvec::SmallVec;

/// A value on the tape: the index of the instruction that makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reg(pub u32);

impl Reg {
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// Whether a value is one per row or one per element of the row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Level {
    Row,
    Col,
}

/// `offset + Σ index·stride` over the axes of the iteration space, in elements.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Affine {
    pub offset: isize,
    pub strides: SmallVec<[isize; 4]>,
}

/// One operand element per point of the space: argument `arg` (or output `arg` in a [`Store`]) of the step.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Access {
    pub arg: u32,
    pub dtype: DType,
    pub at: Affine,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum KernelOp {
    Load(Access),
    Const(Scalar),
    /// The value of the affine map itself (iota).
    Index(Affine),
    /// Element number `at` of a random tensor; `seed` is an i64 row value.
    Random {
        distribution: Distribution,
        stream: u32,
        seed: Reg,
        at: Affine,
    },
    Unary(UnaryOp, Reg),
    Binary(BinaryOp, Reg, Reg),
    Select(Reg, Reg, Reg),
    /// From the operand's dtype to the instruction's.
    Cast(Reg),
    /// Over all columns of the row; the operand is a column value.
    Reduce(ReduceOp, Reg),
}

impl KernelOp {
    /// The same of other registers, each given by what stands in its place.
    pub(crate) fn with_operands(&self, reg: impl Fn(Reg) -> Reg) -> KernelOp {
        match *self {
            KernelOp::Load(_) | KernelOp::Const(_) | KernelOp::Index(_) => self.clone(),
            KernelOp::Random { distribution, stream, seed, ref at } => {
                KernelOp::Random { distribution, stream, seed: reg(seed), at: at.clone() }
            }
            KernelOp::Unary(f, a) => KernelOp::Unary(f, reg(a)),
            KernelOp::Binary(f, a, b) => KernelOp::Binary(f, reg(a), reg(b)),
            KernelOp::Select(c, a, b) => KernelOp::Select(reg(c), reg(a), reg(b)),
            KernelOp::Cast(a) => KernelOp::Cast(reg(a)),
            KernelOp::Reduce(f, a) => KernelOp::Reduce(f, reg(a)),
        }
    }
}

/// One instruction.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Inst {
    pub op: KernelOp,
    /// The dtype of the value. Registers hold its class (f32, f64, i64): values of bf16, f16, u8 and u32 are
    /// rounded or wrapped at a `Cast` and at a store, and integers also after every arithmetic instruction.
    pub dtype: DType,
    pub level: Level,
    /// The pass over the columns in which the value can first be had. A `Reduce` of stage `s` is a row value
    /// from stage `s + 1` on; row instructions run before their stage's pass.
    pub stage: u32,
}

/// Writes register `reg` to output `to.arg` of the step, rounded to `to.dtype`.
/// A row value is written once a row, with the column strides ignored.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Store {
    pub reg: Reg,
    pub to: Access,
}

/// Which axis a kernel should compute in vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lanes {
    /// The innermost column axis: a map, or a reduction of contiguous rows.
    Cols,
    /// The innermost row axis: many rows side by side, the columns one after the other. For reductions over
    /// an outer dim, and for rows of a few elements.
    Rows,
}

/// A fused kernel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// Extents of the iteration space: `row_axes` row axes, then the column axes. Neighbouring axes that every
    /// access walks alike are merged. A map has its innermost axis (if any) as its only column axis.
    pub space: SmallVec<[usize; 4]>,
    pub row_axes: usize,
    pub lanes: Lanes,
    pub tape: Vec<Inst>,
    /// In the order of the step's outputs.
    pub stores: Vec<Store>,
}

impl Kernel {
    pub fn rows(&self) -> usize {
        self.space[..self.row_axes].iter().product()
    }
    /// Elements of one row; 1 if there are no column axes.
    pub fn cols(&self) -> usize {
        self.space[self.row_axes..].iter().product()
    }
    /// The number of passes over the columns.
    pub fn stages(&self) -> u32 {
        let last = |i: &Inst| i.stage + 1;
        self.tape
            .iter()
            .filter(|i| i.level == Level::Col || matches!(i.op, KernelOp::Reduce(..)))
            .map(last)
            .max()
            .unwrap_or(0)
    }
    pub fn operands(op: &KernelOp) -> SmallVec<[Reg; 3]> {
        match *op {
            KernelOp::Load(_) | KernelOp::Const(_) | KernelOp::Index(_) => SmallVec::new(),
            KernelOp::Random { seed, .. } => [seed].into_iter().collect(),
            KernelOp::Unary(_, a) | KernelOp::Cast(a) | KernelOp::Reduce(_, a) => {
                [a].into_iter().collect()
            }
            KernelOp::Binary(_, a, b) => [a, b].into_iter().collect(),
            KernelOp::Select(c, a, b) => [c, a, b].into_iter().collect(),
        }
    }
}

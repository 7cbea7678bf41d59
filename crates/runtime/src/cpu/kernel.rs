//! The tile interpreter: runs a fused [`Kernel`], and by that defines what one means.
//!
//! A kernel is compiled once, when its plan is made ready: every instruction becomes a call of a loop over a tile of
//! registers, in the widest instruction set of this processor. What lies in memory as in a register is read and
//! written where it is.
//!
//! ```text
//! compile ─ Kernel -> Program: passes, places, what is kept between passes
//! run ───── walks rows and tiles, on one thread or many
//! tile ──── loops over registers     scalar ─ the scalar functions
//! memory ── loads and stores         reduce ─ sums and extremes
//! pair ──── two instructions in one loop
//! ```
//!
//! Vectors lie along the rows or across them:
//!
//! * **along**: a tile is a part of one row. Row values are single registers, reductions keep [`LANES`] partial
//!   results. For reductions of rows, and for maps whose row values are worth computing once a row.
//! * **across**: a tile is a stretch of rows, the columns come one after the other. For reductions over outer dims or
//!   of a few elements; and for maps, where every element is a row of one.
//!
//! [`LANES`]: reduce::LANES

mod compile;
mod emit;
mod memory;
mod pair;
mod reduce;
mod run;
mod scalar;
mod tile;

use memory::{LoadFn, StoreFn};
use metal_candle_compiler::kernel::Kernel;
use metal_candle_graph::{DType, Distribution, Scalar};
use reduce::{DotFn, FoldFn, Reducer};
use smallvec::SmallVec;
use tile::{AheadFn, TileFn};

/// A kernel made ready to run.
pub(crate) struct Program {
    /// The extents of the row axes, then of the column axes; [`Kernel::space`], but that every axis of a map that
    /// is computed across is a row axis.
    space: SmallVec<[usize; 4]>,
    row_axes: usize,
    accesses: Vec<Access>,
    /// What is one for all rows; run once by every task.
    uniform: Vec<Op>,
    passes: Vec<Pass>,
    /// Row values that need the last pass, and what is written once a row.
    last: Vec<Op>,
    split: Split,
    /// Registers in a tile.
    tile_len: usize,
    tile_bytes: usize,
    /// Where the tiles start in the scratch memory, behind what has a fixed place.
    tiles_at: usize,
    scratch_bytes: usize,
    work: usize,
}

/// One walk over the columns.
struct Pass {
    /// Row values that are needed in it.
    before: Vec<Op>,
    body: Vec<Op>,
    reductions: Vec<Reduction>,
}

struct Reduction {
    reducer: Reducer,
    /// The partial results.
    acc: Place,
    /// One register of them; across, the partial results themselves.
    joined: Place,
    /// For a dtype narrower than its registers: what wraps them, and where the row value is then.
    wrap: Option<(TileFn, Place)>,
}

/// How the work is cut into tasks: by its size alone.
#[derive(Clone, Copy)]
enum Split {
    /// So many rows a task.
    Rows(usize),
    /// So many columns of one row a task.
    Columns(usize),
    /// Tiles of runs of so many rows, and so many tiles a task.
    Tiles { run_len: usize, tiles: usize },
}

/// Where registers are.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    /// An unused operand.
    Nowhere,
    /// Bytes into the scratch memory.
    Scratch(usize),
    Tile(u16),
    /// A whole row, kept from pass to pass: its start in bytes into the scratch memory, and the bytes of a register.
    Kept {
        at: usize,
        bytes: usize,
    },
    /// Memory, as this access reaches it.
    Memory(u16),
    /// Memory, as this access reaches it in the next row, or where tiles are rows in the next tile: to be asked for, not read.
    Next(u16),
}

/// How an operand, or the position itself, changes over the space.
struct Access {
    /// The argument, or the output if `is_out`.
    operand: u32,
    is_out: bool,
    elem_bytes: usize,
    register_bytes: usize,
    offset: isize,
    strides: SmallVec<[isize; 4]>,
    /// From one register of a tile to the next.
    step: isize,
    rows: RowWalk,
}

/// How an access finds the start of a tile.
#[derive(Clone, Copy, PartialEq, Eq)]
enum RowWalk {
    /// All row axes are one, of stride `step`.
    Flat,
    /// Axis by axis.
    Axes,
    /// Axis by axis even within a tile: `step` holds only to the end of the innermost row axis.
    Broken,
}

enum Op {
    Const {
        value: Scalar,
        out: Place,
    },
    Load {
        access: u16,
        load: LoadFn,
        out: Place,
    },
    /// The access's offset itself.
    Index {
        access: u16,
        dtype: DType,
        out: Place,
    },
    Random {
        access: u16,
        distribution: Distribution,
        stream: u32,
        seed: Seed,
        dtype: DType,
        out: Place,
    },
    Map {
        f: TileFn,
        ins: [Place; 3],
        out: Place,
    },
    /// A dear map, while which memory that is soon wanted comes nearer.
    MapAhead {
        f: AheadFn,
        ins: [Place; 2],
        ahead: [Place; 2],
        out: Place,
    },
    Fold {
        f: FoldFn,
        acc: Place,
        from: Place,
    },
    /// Of the products of two operands.
    Dot {
        f: DotFn,
        acc: Place,
        from: [Place; 2],
    },
    Store {
        access: u16,
        store: StoreFn,
        from: Place,
    },
}

#[derive(Clone, Copy)]
struct Seed {
    place: Place,
    /// One for the whole tile.
    is_one: bool,
}

impl Program {
    /// `in_place`: an output lies in the memory of an argument.
    pub(crate) fn new(kernel: &Kernel, in_place: bool) -> Program {
        compile::compile(kernel, in_place)
    }

    /// About how many element operations a run takes.
    pub(crate) fn work(&self) -> usize {
        self.work
    }

    fn rows(&self) -> usize {
        self.space[..self.row_axes].iter().product()
    }

    fn cols(&self) -> usize {
        self.space[self.row_axes..].iter().product()
    }
}

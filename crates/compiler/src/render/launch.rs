//! How many threads a kernel is launched with, and which of them work on one row.

use super::{RenderError, accesses, index, operands};
use crate::kernel::{Access, Affine, Kernel, KernelOp, Lanes, Level};
use metal_candle_graph::DType;

/// Lanes of a SIMD group (a warp), on every GPU that the dialects are for.
pub(super) const SIMD: usize = 32;
/// The widest access, in bytes.
const ACCESS_BYTES: usize = 16;
/// Threads of a block, where the kernel leaves the choice.
const BLOCK: usize = 256;
/// The longest row of a SIMD group: 32 elements a lane.
const SIMD_ROW: usize = 1024;
/// Rows that cannot fill a device, and the longest row of a SIMD group then.
const FEW_ROWS: usize = 32;
const FEW_ROWS_SIMD_ROW: usize = 256;
/// How often a grid fills the device: more even out what blocks take, fewer cost less to start.
const WAVES: usize = 4;

/// What a device allows and has, as plain data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Limits {
    /// Threads of a block.
    pub max_block: usize,
    /// Blocks of a grid, in its first dimension.
    pub max_grid: usize,
    /// Memory that a block shares.
    pub max_shared_bytes: usize,
    /// Operands of a kernel.
    pub max_operands: usize,
    /// Threads that run at once, on the whole device.
    pub resident_threads: usize,
    /// How tiles of 16-bit floats are multiplied, if there is a unit for that.
    pub tensor_cores: Option<TensorCores>,
    /// Whether the library's products of 16-bit factors can give f32.
    pub widening_products: bool,
    /// Rows of a product up to which a rendered kernel multiplies instead of the library; 0 for none.
    pub few_rows: usize,
    /// Tiles of a product's result up to which it does so, too.
    pub few_tiles: usize,
    /// What the workspace of a call takes at most, about.
    pub workspace_bytes: usize,
}

/// Units that multiply tiles of 16-bit floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TensorCores {
    /// For a SIMD group, from its registers: `mma` and `ldmatrix`, sm_80 and later.
    Mma,
    /// For four SIMD groups together, too, from the memory that they share, while these go on: `wgmma`, sm_90 alone.
    Wgmma,
}

/// Tiles of a small product that a multiprocessor works on at once.
const TILES: usize = 2;
/// A few matrices of 16 bits that keep a large device busy.
const WORKSPACE_BYTES: usize = 256 << 20;

impl Limits {
    /// Any CUDA device, of this many multiprocessors with so many threads each ("CUDA C++ Programming Guide", table of
    /// technical specifications: compute capability 5.0 and later). Parameters take 4 KiB at most: 512 addresses.
    pub const fn cuda(multiprocessors: usize, threads: usize) -> Limits {
        Limits {
            max_block: 1024,
            max_grid: (1 << 31) - 1,
            max_shared_bytes: 48 << 10,
            max_operands: 512,
            resident_threads: multiprocessors * threads,
            tensor_cores: None,
            widening_products: true,
            few_rows: 4,
            few_tiles: multiprocessors * TILES,
            workspace_bytes: WORKSPACE_BYTES,
        }
    }

    /// The same with what compute capability `major.minor` adds: from 8.0 on, tensor cores that share memory with
    /// asynchronous copies, and more of it for a block that asks ("CUDA C++ Programming Guide", the same table).
    pub const fn of_capability(self, major: u32, minor: u32) -> Limits {
        let shared_kib = match (major, minor) {
            (8, 0 | 7) => 163,
            (8, _) | (12, _) => 99,
            (9..=11, _) => 227,
            _ => 48,
        };
        let tensor_cores = match major {
            0..=7 => None,
            9 => Some(TensorCores::Wgmma),
            _ => Some(TensorCores::Mma),
        };
        Limits { tensor_cores, max_shared_bytes: shared_kib << 10, ..self }
    }

    /// Apple's GPUs ("Metal Feature Set Tables", families Apple4 and later), of so many cores, which are taken to run 1024
    /// threads each: Metal does not tell.
    pub const fn metal(cores: usize) -> Limits {
        Limits {
            max_block: 1024,
            max_grid: (1 << 32) - 1,
            max_shared_bytes: 32 << 10,
            max_operands: 31,
            resident_threads: cores * 1024,
            tensor_cores: None,
            widening_products: false,
            few_rows: 4,
            few_tiles: 0,
            workspace_bytes: WORKSPACE_BYTES,
        }
    }
}

impl Limits {
    /// Whether the library multiplies two `factor`s to an `out`.
    pub(super) fn multiplies(&self, factor: DType, out: DType) -> bool {
        factor == out || (self.widening_products && factor.size_bytes() == 2 && out == DType::F32)
    }
}

/// Who works on a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Team {
    /// No row: every thread computes elements by itself, all of their values.
    Element,
    /// The lanes of one SIMD group.
    Simd,
    /// All threads of a block.
    Block,
    /// So many threads of a block, one below the other; beside each other they have neighbouring rows.
    Column { slices: usize },
}

/// How a kernel is launched: a grid of one dimension, and blocks of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Launch {
    pub team: Team,
    /// Neighbouring elements that a thread computes together, and moves as one where they lie so.
    pub vector: usize,
    /// Blocks; 0 where there is nothing to do, and nothing must be launched.
    pub grid: usize,
    /// Threads of a block (a threadgroup).
    pub block: usize,
    /// Blocks that a multiprocessor is to have room for at once, which limits a thread's registers; 1 leaves them to the compiler.
    pub resident: usize,
    /// Memory that a block shares; a multiple of 16, as Metal wants.
    pub shared_bytes: usize,
}

/// The launch of `kernel` within `limits`.
///
/// # Errors
/// [`RenderError::Operands`] where it has more than can be bound.
pub fn launch(kernel: &Kernel, limits: &Limits) -> Result<Launch, RenderError> {
    let operands = operands(kernel).len();
    if operands > limits.max_operands {
        return Err(RenderError::Operands { operands, limit: limits.max_operands });
    }
    let team = team(kernel);
    let vector = vector(kernel, team);
    let block = match team {
        Team::Element | Team::Simd | Team::Column { .. } => BLOCK,
        // About four accesses a thread; of few rows, as many threads as other kernels have that it may be launched with.
        Team::Block => {
            let least = if kernel.rows() <= FEW_ROWS { BLOCK } else { 128 };
            (kernel.cols() / (4 * vector)).next_power_of_two().clamp(least, 1024)
        }
    };
    let block = block.min(limits.max_block);
    let blocks = match team {
        Team::Element => (kernel.rows() * kernel.cols()).div_ceil(block * vector),
        _ => kernel.rows().div_ceil(rows_at_once(team, block)),
    };
    let most = (WAVES * limits.resident_threads / block).clamp(1, limits.max_grid);
    let shared_bytes = shared_bytes(kernel, team, block);
    assert!(shared_bytes <= limits.max_shared_bytes, "metal-candle bug: {shared_bytes} bytes");
    Ok(Launch { team, vector, grid: blocks.min(most), block, resident: 1, shared_bytes })
}

impl Launch {
    /// Threads that share a row.
    pub(super) fn members(&self) -> usize {
        match self.team {
            Team::Element => 1,
            Team::Simd => SIMD,
            Team::Block => self.block,
            Team::Column { slices } => slices,
        }
    }

    /// Rows that a block works on at once.
    pub(super) fn rows_at_once(&self) -> usize {
        rows_at_once(self.team, self.block)
    }
}

fn rows_at_once(team: Team, block: usize) -> usize {
    match team {
        Team::Element => panic!("metal-candle bug: elements have no rows"),
        Team::Simd => block / SIMD,
        Team::Block => 1,
        Team::Column { slices } => block / slices,
    }
}

fn team(kernel: &Kernel) -> Team {
    let reduces = kernel.tape.iter().any(|inst| matches!(inst.op, KernelOp::Reduce(..)));
    let row_store = |s: &crate::kernel::Store| kernel.tape[s.reg.index()].level == Level::Row;
    if !reduces && (kernel.cols() == 1 || !kernel.stores.iter().any(row_store)) {
        return Team::Element;
    }
    match kernel.lanes {
        // At least eight columns a thread, and 32 rows side by side.
        Lanes::Rows => {
            let most = BLOCK / SIMD;
            Team::Column { slices: (kernel.cols() / 8).next_power_of_two().clamp(1, most) }
        }
        Lanes::Cols if kernel.cols() <= longest_of_simd(kernel) => Team::Simd,
        Lanes::Cols => Team::Block,
    }
}

/// The longest row of a SIMD group: of few rows, whose blocks are idle but for it, one that it reads in one access.
fn longest_of_simd(kernel: &Kernel) -> usize {
    if kernel.rows() <= FEW_ROWS { FEW_ROWS_SIMD_ROW } else { SIMD_ROW }
}

/// The most neighbours along the fastest axis whose widest access is of 16 bytes, and which divide the axis.
fn vector(kernel: &Kernel, team: Team) -> usize {
    let (Some(axis), false) = (index::fast_axis(kernel, team), matches!(team, Team::Column { .. }))
    else {
        return 1;
    };
    let contiguous = || accesses(kernel).map(|(_, a)| a).filter(|a| a.at.strides[axis] == 1);
    let Some(widest) = contiguous().map(|a| a.dtype.size_bytes()).max() else { return 1 };
    let mut vector = ACCESS_BYTES / widest;
    let fits = |n: usize| {
        kernel.space[axis].is_multiple_of(n) && contiguous().any(|a| is_vector(a, axis, n))
    };
    while vector > 1 && !fits(vector) {
        vector /= 2;
    }
    vector
}

/// Whether `n` neighbours along `axis`, from a multiple of `n`, lie as an aligned vector.
pub(super) fn is_vector(access: &Access, axis: usize, n: usize) -> bool {
    let Affine { offset, strides } = &access.at;
    let aligned = |x: &isize| x.unsigned_abs().is_multiple_of(n);
    let mut others = (0..strides.len()).filter(|other| *other != axis);
    strides[axis] == 1 && aligned(offset) && others.all(|other| aligned(&strides[other]))
}

/// One partial result a SIMD group, or a thread.
fn shared_bytes(kernel: &Kernel, team: Team, block: usize) -> usize {
    let partial = match team {
        Team::Element | Team::Simd | Team::Column { slices: 1 } => 0,
        Team::Block => block / SIMD,
        Team::Column { .. } => block,
    };
    let reductions = kernel.tape.iter().filter(|inst| matches!(inst.op, KernelOp::Reduce(..)));
    let register = reductions.map(|inst| super::scalar::register_bytes(inst.dtype)).max();
    (partial * register.unwrap_or(0)).next_multiple_of(16)
}

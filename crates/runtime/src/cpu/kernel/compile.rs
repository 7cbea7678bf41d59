//! From a [`Kernel`] to a [`Program`]: what is computed how often, in which pass, and where it lies.

use super::emit::Emitter;
use super::memory::register_bytes;
use super::{Pass, Place, Program, Split};
use metal_candle_compiler::kernel::{Inst, Kernel, KernelOp, Lanes, Level, Store};
use metal_candle_graph::{BinaryOp, Class, DType, UnaryOp};
use rustc_hash::{FxHashMap, FxHashSet};

/// Element operations of one task: some ten microseconds.
const TASK_WORK: usize = 1 << 17;
/// Bytes that the tiles of a program may take together: they stay in the L1 cache.
const TILES_BYTES: usize = 24 << 10;
/// The shortest and the longest tile, in registers.
const TILE_LEN: [usize; 2] = [128, 2048];
/// Bytes of a row that may be kept from pass to pass: it stays in the L2 cache.
const KEPT_BYTES: usize = 256 << 10;
/// A map is computed row by row if that saves work and rows have this many elements.
const LONG_ROW: usize = 64;
/// Tiles end with the innermost row axis if it has this many elements.
const LONG_RUN: usize = 256;

/// Which axis vectors lie along.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum VectorAxis {
    Along,
    Across,
}

/// How often a value is computed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Rate {
    /// Once a task.
    Uniform,
    /// Once a row: one register along rows, a tile across them.
    Row,
    /// For every element.
    Col,
}

/// How a kernel is going to be computed.
pub(super) struct Strategy<'a> {
    pub(super) kernel: &'a Kernel,
    pub(super) in_place: bool,
    pub(super) axis: VectorAxis,
    is_map: bool,
    pub(super) row_axes: usize,
    /// Whether a tile may go beyond the innermost row axis.
    pub(super) crossing: bool,
    pub(super) rates: Vec<Rate>,
}

/// What one pass computes, and what it finds of the earlier ones.
pub(super) struct PassNeeds {
    /// Column values, in the order of the tape.
    pub(super) computed: Vec<usize>,
    /// The stores and the reductions that it feeds, by their index.
    pub(super) stores: Vec<usize>,
    pub(super) reductions: Vec<usize>,
}

pub(super) fn compile(kernel: &Kernel, in_place: bool) -> Program {
    let strategy = Strategy::new(kernel, in_place);
    let (needs, kept) = strategy.needs();
    let mut e = Emitter::new(&strategy, &kept);
    let uniform = e.at_rate(Rate::Uniform, |_| true);
    let mut passes = Vec::new();
    for (stage, needs) in needs.iter().enumerate() {
        let before = e.at_rate(Rate::Row, |inst| inst.stage as usize == stage);
        let reductions = e.reductions(needs);
        let body = e.body(needs, stage > 0);
        passes.push(Pass { before, body, reductions });
    }
    let mut last = e.at_rate(Rate::Row, |inst| inst.stage as usize >= needs.len());
    last.extend(e.row_stores());
    let width = kernel.tape.iter().map(|i| register_bytes(i.dtype)).max().unwrap_or(4);
    let tile_len = strategy.tile_len(e.tiles() * width);
    let tile_bytes = tile_len * width;
    let tiles_at = e.fixed_bytes();
    Program {
        space: kernel.space.clone(),
        row_axes: strategy.row_axes,
        uniform,
        passes,
        last,
        split: strategy.split(tile_len, e.weight()),
        tile_len,
        tile_bytes,
        tiles_at,
        scratch_bytes: tiles_at + e.tiles() * tile_bytes,
        work: kernel.space.iter().product::<usize>().saturating_mul(e.weight()),
        accesses: e.into_accesses(),
    }
}

impl<'a> Strategy<'a> {
    fn new(kernel: &'a Kernel, in_place: bool) -> Strategy<'a> {
        let is_map = !kernel.tape.iter().any(|i| matches!(i.op, KernelOp::Reduce(..)));
        let axis = match kernel.lanes {
            Lanes::Rows => VectorAxis::Across,
            Lanes::Cols if is_map && !has_row_work(kernel) => VectorAxis::Across,
            Lanes::Cols => VectorAxis::Along,
        };
        let is_flat = is_map && axis == VectorAxis::Across;
        let row_axes = if is_flat { kernel.space.len() } else { kernel.row_axes };
        let inner = kernel.space[..row_axes].last().copied().unwrap_or(1);
        let crossing = axis == VectorAxis::Across && row_axes > 1 && inner < LONG_RUN;
        let rates = rates(kernel, is_flat);
        Strategy { kernel, in_place, axis, is_map, row_axes, crossing, rates }
    }

    /// Whether every element is a row of one.
    pub(super) fn is_flat(&self) -> bool {
        self.is_map && self.axis == VectorAxis::Across
    }

    /// Whether one register of the value stands for a whole tile.
    pub(super) fn is_one(&self, reg: usize) -> bool {
        match self.rates[reg] {
            Rate::Uniform => true,
            Rate::Row => self.axis == VectorAxis::Along,
            Rate::Col => false,
        }
    }

    fn passes(&self) -> usize {
        if self.is_map { 1 } else { self.kernel.stages() as usize }
    }

    /// What a store narrows: of a value that was rounded for it, what it was before, for the store rounds as well.
    pub(super) fn stored(&self, store: &Store) -> usize {
        let reg = store.reg.index();
        let inst = &self.kernel.tape[reg];
        let is_half =
            matches!(inst.dtype, DType::BF16 | DType::F16) && inst.dtype == store.to.dtype;
        match inst.op {
            KernelOp::Cast(from) if is_half => {
                let from = from.index();
                let is_f32 = self.kernel.tape[from].dtype.class() == Class::F32;
                if is_f32 && self.rates[from] == self.rates[reg] { from } else { reg }
            }
            _ => reg,
        }
    }

    /// The pass in whose body a store is made; `None` if it is made once a row.
    pub(super) fn store_pass(&self, store: &Store) -> Option<usize> {
        let reg = self.stored(store);
        if self.is_flat() {
            return Some(0);
        }
        (self.rates[reg] == Rate::Col).then(|| {
            // What is overwritten must have been read by every pass.
            let last = self.passes() - 1;
            if self.in_place { last } else { self.kernel.tape[reg].stage as usize }
        })
    }

    /// What every pass computes, and which rows are kept: `(register, (bytes before it, first pass))`.
    fn needs(&self) -> (Vec<PassNeeds>, FxHashMap<usize, Place>) {
        let (mut kept, mut kept_bytes) = (FxHashMap::default(), 0);
        let mut done: FxHashSet<usize> = FxHashSet::default();
        let mut all = Vec::new();
        for pass in 0..self.passes() {
            let stores = self.kernel.stores.iter().enumerate();
            let stores: Vec<usize> =
                stores.filter(|(_, s)| self.store_pass(s) == Some(pass)).map(|(i, _)| i).collect();
            let is_reduction = |inst: &Inst| {
                inst.stage as usize == pass && matches!(inst.op, KernelOp::Reduce(..))
            };
            let insts = self.kernel.tape.iter().enumerate();
            let reductions: Vec<usize> =
                insts.filter(|(_, inst)| is_reduction(inst)).map(|(i, _)| i).collect();
            let mut stack: Vec<usize> =
                stores.iter().map(|s| self.stored(&self.kernel.stores[*s])).collect();
            stack.extend(reductions.iter().flat_map(|r| self.operands(*r)));
            let mut computed = FxHashSet::default();
            while let Some(reg) = stack.pop() {
                if self.rates[reg] != Rate::Col || kept.contains_key(&reg) {
                    continue;
                }
                let bytes = register_bytes(self.kernel.tape[reg].dtype);
                let row_bytes = (self.cols() * bytes).next_multiple_of(64);
                let fits = kept_bytes + row_bytes <= KEPT_BYTES;
                if done.contains(&reg) && self.is_worth_keeping(reg) && fits {
                    kept.insert(reg, Place::Kept { at: kept_bytes, bytes });
                    kept_bytes += row_bytes;
                } else if computed.insert(reg) {
                    stack.extend(self.operands(reg));
                }
            }
            done.extend(&computed);
            let mut computed: Vec<usize> = computed.into_iter().collect();
            computed.sort_unstable();
            all.push(PassNeeds { computed, stores, reductions });
        }
        (all, kept)
    }

    fn operands(&self, reg: usize) -> impl Iterator<Item = usize> + use<> {
        Kernel::operands(&self.kernel.tape[reg].op).into_iter().map(|r| r.index())
    }

    /// Whether reading a row again costs less than computing it again.
    fn is_worth_keeping(&self, reg: usize) -> bool {
        let along = self.axis == VectorAxis::Along;
        let op = &self.kernel.tape[reg].op;
        let scattered = match op {
            KernelOp::Load(access) => !matches!(access.at.strides.last(), Some(0 | 1)),
            _ => false,
        };
        along && (scattered || is_dear(op))
    }

    pub(super) fn cols(&self) -> usize {
        self.kernel.space[self.row_axes..].iter().product()
    }

    /// The longest tile for which `bytes_per_register` of all tiles together fit.
    fn tile_len(&self, bytes_per_register: usize) -> usize {
        let fits = TILES_BYTES / bytes_per_register.max(1) / 64 * 64;
        let extent = match self.axis {
            VectorAxis::Along => self.kernel.space.last().copied().unwrap_or(1),
            VectorAxis::Across => self.kernel.space[..self.row_axes].iter().product(),
        };
        fits.clamp(TILE_LEN[0], TILE_LEN[1]).min(extent.next_multiple_of(64)).max(64)
    }

    fn split(&self, tile_len: usize, weight: usize) -> Split {
        let cols = self.cols();
        match self.axis {
            VectorAxis::Along => {
                let rows = TASK_WORK / cols.saturating_mul(weight).max(1);
                match rows {
                    0 if self.is_map => {
                        let tiles = TASK_WORK / tile_len.saturating_mul(weight);
                        Split::Columns(tiles.max(1) * tile_len)
                    }
                    _ => Split::Rows(rows.max(1)),
                }
            }
            VectorAxis::Across => {
                let extents = &self.kernel.space[..self.row_axes];
                let run_len = match extents.last() {
                    Some(inner) if !self.crossing => *inner,
                    _ => extents.iter().product(),
                };
                let work = tile_len.saturating_mul(cols).saturating_mul(weight);
                Split::Tiles { run_len, tiles: (TASK_WORK / work.max(1)).max(1) }
            }
        }
    }
}

/// Whether a map computes more than loads once a row of some length.
fn has_row_work(kernel: &Kernel) -> bool {
    let rates = rates(kernel, false);
    let computes =
        |op: &KernelOp| !matches!(op, KernelOp::Load(_) | KernelOp::Const(_) | KernelOp::Index(_));
    let row_work = kernel.tape.iter().zip(&rates).any(|(i, r)| *r == Rate::Row && computes(&i.op));
    let is_long = kernel.space.len() > kernel.row_axes && kernel.cols() >= LONG_ROW;
    row_work && is_long
}

fn rates(kernel: &Kernel, is_flat: bool) -> Vec<Rate> {
    let mut rates: Vec<Rate> = Vec::with_capacity(kernel.tape.len());
    for inst in &kernel.tape {
        let stands = |strides: &[isize]| strides.iter().all(|s| *s == 0);
        let is_still = match &inst.op {
            KernelOp::Load(access) => stands(&access.at.strides),
            KernelOp::Index(at) | KernelOp::Random { at, .. } => stands(&at.strides),
            KernelOp::Reduce(..) => false,
            KernelOp::Const(_)
            | KernelOp::Unary(..)
            | KernelOp::Binary(..)
            | KernelOp::Select(..)
            | KernelOp::Cast(_) => true,
        };
        let mut operands = Kernel::operands(&inst.op).into_iter();
        let is_uniform = is_still && operands.all(|r| rates[r.index()] == Rate::Uniform);
        rates.push(match (inst.level, is_flat) {
            (Level::Row, _) | (_, true) if is_uniform => Rate::Uniform,
            (Level::Row, false) => Rate::Row,
            (Level::Col, _) | (_, true) => Rate::Col,
        });
    }
    rates
}

/// Whether an operation costs several times an addition.
pub(super) fn is_dear(op: &KernelOp) -> bool {
    use UnaryOp::*;
    match op {
        KernelOp::Unary(f, _) => !matches!(f, Neg | Abs | Sign | Sqr | Relu | Floor | Ceil | Round),
        KernelOp::Binary(f, ..) => matches!(f, BinaryOp::Div | BinaryOp::Pow),
        KernelOp::Random { .. } => true,
        KernelOp::Load(_)
        | KernelOp::Const(_)
        | KernelOp::Index(_)
        | KernelOp::Select(..)
        | KernelOp::Cast(_)
        | KernelOp::Reduce(..) => false,
    }
}

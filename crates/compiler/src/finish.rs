//! The last touches on a kernel: axes merged, levels and stages fixed, lanes chosen.

use crate::kernel::{Access, Affine, Inst, Kernel, KernelOp, Lanes, Level, Reg, Store};
use crate::region::Space;
use metal_candle_graph::DType;
use smallvec::SmallVec;

/// A tape under construction, over the axes of a region: rows first, then columns.
pub(crate) struct Tape {
    space: SmallVec<[usize; 4]>,
    row_axes: usize,
    insts: Vec<(KernelOp, DType)>,
    stores: Vec<Store>,
}

impl Tape {
    pub(crate) fn new(space: &Space) -> Tape {
        let rows = space.rows();
        let row_axes = rows.len();
        let columns = space.reduced.iter().map(|axis| space.full[*axis]);
        let space = rows.into_iter().chain(columns).collect();
        Tape { space, row_axes, insts: Vec::new(), stores: Vec::new() }
    }

    /// Appends an instruction, or finds the equal load or constant already there.
    pub(crate) fn push(&mut self, op: KernelOp, dtype: DType) -> Reg {
        let leaf = matches!(op, KernelOp::Load(_) | KernelOp::Const(_) | KernelOp::Index(_));
        let same = |i: &(KernelOp, DType)| i.1 == dtype && i.0 == op;
        if let Some(at) = self.insts.iter().position(same).filter(|_| leaf) {
            return Reg(at as u32);
        }
        self.insts.push((op, dtype));
        Reg(self.insts.len() as u32 - 1)
    }

    pub(crate) fn store(&mut self, reg: Reg, to: Access) {
        self.stores.push(Store { reg, to });
    }

    pub(crate) fn finish(mut self) -> Kernel {
        self.merge_axes();
        let is_map = self.row_axes == self.space.len();
        if is_map {
            // The innermost axis of a map is its row.
            self.row_axes = self.space.len().saturating_sub(1);
        }
        let lanes = self.lanes();
        let mut leveled = Leveled::new(&self);
        for (op, dtype) in &self.insts {
            leveled.push(op, *dtype);
        }
        let stores = self.stores.iter().map(|s| leveled.store(s)).collect();
        let tape = leveled.tape;
        Kernel { space: self.space, row_axes: self.row_axes, lanes, tape, stores }
    }

    fn affines(&mut self) -> impl Iterator<Item = &mut Affine> {
        let insts = self.insts.iter_mut().filter_map(|(op, _)| match op {
            KernelOp::Load(access) => Some(&mut access.at),
            KernelOp::Index(at) | KernelOp::Random { at, .. } => Some(at),
            _ => None,
        });
        insts.chain(self.stores.iter_mut().map(|s| &mut s.to.at))
    }

    /// Merges neighbouring axes of one level that every access walks as one.
    fn merge_axes(&mut self) {
        let mut axis = self.space.len();
        while axis > 1 {
            axis -= 1;
            let (outer, inner) = (axis - 1, axis);
            let extent = self.space[inner] as isize;
            let same_level = inner != self.row_axes;
            let walks = |at: &mut Affine| at.strides[outer] == at.strides[inner] * extent;
            if !same_level || !self.affines().all(walks) {
                continue;
            }
            self.space[outer] *= self.space[inner];
            self.space.remove(inner);
            for at in self.affines() {
                at.strides.remove(outer);
            }
            if inner < self.row_axes {
                self.row_axes -= 1;
            }
        }
    }

    fn lanes(&mut self) -> Lanes {
        let (rows, n) = (self.row_axes, self.space.len());
        if rows == 0 || rows == n {
            return Lanes::Cols;
        }
        let (row, col) = (rows - 1, n - 1);
        let (mut row_contiguous, mut col_contiguous) = (0, 0);
        for at in self.affines() {
            row_contiguous += usize::from(at.strides[row] == 1 && at.strides[col] != 1);
            col_contiguous += usize::from(at.strides[col] == 1);
        }
        let columns: usize = self.space[rows..].iter().product();
        let short = columns <= 8 && self.space[row] >= 4 * columns;
        let across = row_contiguous > col_contiguous && self.space[row] >= 8;
        if short || across { Lanes::Rows } else { Lanes::Cols }
    }
}

/// Gives every instruction its level and its stage.
struct Leveled {
    row_axes: usize,
    columns: usize,
    tape: Vec<Inst>,
    /// Where an instruction of the draft ended up.
    map: Vec<Reg>,
}

impl Leveled {
    fn new(t: &Tape) -> Leveled {
        let columns = t.space[t.row_axes..].iter().product();
        let n = t.insts.len();
        Leveled {
            row_axes: t.row_axes,
            columns,
            tape: Vec::with_capacity(n),
            map: Vec::with_capacity(n),
        }
    }

    fn push(&mut self, op: &KernelOp, dtype: DType) {
        let op = op.with_operands(|reg| self.at(reg));
        let reg = match op {
            KernelOp::Load(ref access) => {
                let level = self.level(&access.at);
                self.inst(op, dtype, level)
            }
            KernelOp::Index(ref at) | KernelOp::Random { ref at, .. } => {
                let level = self.level(at);
                self.inst(op, dtype, level)
            }
            KernelOp::Const(_) => self.inst(op, dtype, Level::Row),
            KernelOp::Unary(..)
            | KernelOp::Binary(..)
            | KernelOp::Select(..)
            | KernelOp::Cast(_) => self.map_inst(op, dtype),
            KernelOp::Reduce(f, a) => {
                let a = self.column(a);
                self.inst(KernelOp::Reduce(f, a), dtype, Level::Row)
            }
        };
        self.map.push(reg);
    }

    fn store(&mut self, store: &Store) -> Store {
        let mut reg = self.at(store.reg);
        // A row value that fills the columns of its output is repeated in every one.
        if self.level(&store.to.at) == Level::Col {
            reg = self.column(reg);
        }
        Store { reg, to: store.to.clone() }
    }

    fn at(&self, reg: Reg) -> Reg {
        self.map[reg.index()]
    }

    fn level(&self, at: &Affine) -> Level {
        let constant = at.strides[self.row_axes..].iter().all(|s| *s == 0);
        if constant || self.columns == 1 { Level::Row } else { Level::Col }
    }

    /// `reg` as a column value.
    fn column(&mut self, reg: Reg) -> Reg {
        let Inst { dtype, level, .. } = self.tape[reg.index()];
        match level {
            Level::Col => reg,
            Level::Row => self.inst(KernelOp::Cast(reg), dtype, Level::Col),
        }
    }

    fn map_inst(&mut self, op: KernelOp, dtype: DType) -> Reg {
        let levels = Kernel::operands(&op).into_iter().map(|r| self.tape[r.index()].level);
        let level = levels.max().unwrap_or(Level::Row);
        self.inst(op, dtype, level)
    }

    fn inst(&mut self, op: KernelOp, dtype: DType, level: Level) -> Reg {
        let ready = |r: Reg| {
            let inst = &self.tape[r.index()];
            inst.stage + u32::from(matches!(inst.op, KernelOp::Reduce(..)))
        };
        let stage = Kernel::operands(&op).into_iter().map(ready).max().unwrap_or(0);
        self.tape.push(Inst { op, dtype, level, stage });
        Reg(self.tape.len() as u32 - 1)
    }
}

//! What a team does for its rows: pass after pass over the columns, and the joining of partial results.

use super::Body;
use crate::kernel::{KernelOp, Level, Reg, Store};
use crate::render::launch::{SIMD, Team};
use crate::render::passes::Pass;
use crate::render::scalar::{identity, reducer, register_type, settled, to_memory};
use crate::render::text::Text;
use metal_candle_graph::ReduceOp;

/// The most chunks of a row whose loop is written out though nothing is kept.
const UNROLLED: usize = 16;

impl<'a> Body<'a> {
    pub(super) fn rows(&mut self) {
        let (rows, at_once, count) = (self.kernel.rows(), self.launch.rows_at_once(), self.count);
        let walk = |name: &str, start: String| {
            format!("for ({count} {name} = {start}; {name} < {rows}; {name} += blocks * {at_once})")
        };
        match self.launch.team {
            Team::Element => unreachable!("elements have no rows"),
            Team::Simd => {
                self.text.line(format!("const u32 lane = tid % {SIMD};"));
                self.text.open(walk("row", format!("block * {at_once} + tid / {SIMD}")));
            }
            Team::Block => {
                let head = format!("for ({count} row = block; row < {rows}; row += blocks)");
                self.text.open(head);
            }
            Team::Column { slices: 1 } => {
                self.text.open(walk("row", format!("block * {at_once} + tid")));
            }
            Team::Column { .. } => {
                self.text.line(format!("const u32 slice = tid / {at_once};"));
                self.text.open(walk("first", format!("block * {at_once}")));
                // Threads beyond the last row go along, for all must meet at the barriers.
                self.text.line(format!("const {count} beside = first + tid % {at_once};"));
                self.text.line(format!("const bool own = beside < {rows};"));
                let last = rows.saturating_sub(1);
                self.text.line(format!("const {count} row = own ? beside : {last};"));
            }
        }
        self.declare(self.row.1.clone());
        let passes = std::mem::take(&mut self.passes.passes);
        for (number, pass) in passes.iter().enumerate() {
            self.pass(pass, number + 1 == passes.len());
        }
        let last = std::mem::take(&mut self.passes.last);
        self.row_values(&last);
        self.row_stores();
        self.text.close();
    }

    fn pass(&mut self, pass: &Pass, is_last: bool) {
        self.row_values(&pass.before);
        let each = match self.launch.vector {
            1 => String::new(),
            vector => format!("[{vector}]"),
        };
        // The body holds nothing that was kept by an earlier pass.
        for reg in pass.body.iter().filter(|reg| self.passes.kept[reg.index()]) {
            let ty = register_type(self.kernel.tape[reg.index()].dtype);
            self.text.line(format!("{ty} v{}[{}]{each};", reg.0, self.chunks));
        }
        for reg in &pass.reductions {
            let (inst, (op, _)) = (&self.kernel.tape[reg.index()], self.reduction(*reg));
            let (ty, start) = (register_type(inst.dtype), identity(op, inst.dtype));
            self.text.line(format!("{ty} r{} = {start};", reg.0));
        }
        if self.kernel.cols() > 0 {
            let idle = self.has_idle_threads();
            if idle {
                self.text.open("if (own)");
            }
            self.columns(pass, is_last);
            if idle {
                self.text.close();
            }
        }
        for reg in &pass.reductions {
            self.join(*reg);
        }
    }

    /// The chunks of a row that are this thread's.
    fn columns(&mut self, pass: &Pass, is_last: bool) {
        let (members, vector, cols) =
            (self.launch.members(), self.launch.vector, self.kernel.cols());
        let member = self.member();
        let times = |x: String| if vector > 1 { format!("({x}) * {vector}") } else { x };
        let inner = self.inner(|body| body.chunk(pass, is_last));
        let indices = self.col.1.iter().filter(|line| inner.mentions(index_name(line)));
        let indices: Vec<String> = indices.cloned().collect();
        let (count, ragged) = (self.count, self.chunks * members * vector > cols);
        if self.chunks > UNROLLED && !self.passes.keeps_any() {
            let start = member.map_or("0".to_owned(), |member| match vector {
                1 => member.to_owned(),
                _ => format!("{member} * {vector}"),
            });
            let step = members * vector;
            self.text.open(format!("for ({count} col = {start}; col < {cols}; col += {step})"));
            self.declare(indices);
            self.text.append(inner);
            return self.text.close();
        }
        self.text.unrolled(format!("for (i32 k = 0; k < {}; ++k)", self.chunks));
        if ragged || !indices.is_empty() || inner.mentions("col") {
            let col = match member {
                Some(member) => times(format!("k * {members} + {member}")),
                None => "k".to_owned(),
            };
            self.text.line(format!("const {count} col = {col};"));
        }
        if ragged {
            self.text.open(format!("if (col < {cols})"));
        }
        self.declare(indices);
        self.text.append(inner);
        if ragged {
            self.text.close();
        }
        self.text.close();
    }

    /// What `write` writes, to be appended.
    fn inner(&mut self, write: impl FnOnce(&mut Body<'a>)) -> Text {
        let outer = std::mem::take(&mut self.text);
        write(self);
        std::mem::replace(&mut self.text, outer)
    }

    /// Which thread of its team this is; `None` where there is only one.
    fn member(&self) -> Option<&'static str> {
        match self.launch.team {
            Team::Element | Team::Column { slices: 1 } => None,
            Team::Simd => Some("lane"),
            Team::Block => Some("tid"),
            Team::Column { .. } => Some("slice"),
        }
    }

    /// Whether some threads of a block have no row, and go along for the barriers' sake.
    fn has_idle_threads(&self) -> bool {
        matches!(self.launch.team, Team::Column { slices: 2.. })
    }

    /// The row value of the team's partial results.
    fn join(&mut self, reg: Reg) {
        let op = reducer(self.reduction(reg).0);
        let x = format!("r{}", reg.0);
        let joined = match self.launch.team {
            Team::Element => unreachable!("elements are not reduced"),
            Team::Simd => format!("simd_reduce<{op}>({x})"),
            Team::Block => {
                format!("block_reduce<{op}, {}>({x}, shared, tid)", self.launch.block / SIMD)
            }
            Team::Column { slices: 1 } => x.clone(),
            Team::Column { slices } => {
                let width = self.launch.rows_at_once();
                format!("column_reduce<{op}, {width}, {slices}>({x}, shared, tid)")
            }
        };
        let settled = settled(self.kernel.tape[reg.index()].dtype, joined);
        if settled != x {
            self.text.line(format!("{x} = {settled};"));
        }
    }

    pub(super) fn reduction(&self, reg: Reg) -> (ReduceOp, Reg) {
        match self.kernel.tape[reg.index()].op {
            KernelOp::Reduce(op, of) => (op, of),
            _ => panic!("metal-candle bug: {reg:?} is no reduction"),
        }
    }

    fn row_stores(&mut self) {
        let kernel = self.kernel;
        let is_row = |s: &&Store| self.passes.level[s.reg.index()] == Level::Row;
        let stores: Vec<&Store> = kernel.stores.iter().filter(is_row).collect();
        if stores.is_empty() {
            return;
        }
        let own = if self.has_idle_threads() { "own && " } else { "" };
        let one = self.member().map(|member| format!("if ({own}{member} == 0)"));
        if let Some(one) = &one {
            self.text.open(one);
        }
        for store in stores {
            let place = format!("out{}[{}]", store.to.arg, self.row.0.offset(&store.to.at, None));
            let x = to_memory(store.to.dtype, &self.row_value(store.reg));
            self.text.line(format!("{place} = {x};"));
        }
        if one.is_some() {
            self.text.close();
        }
    }
}

/// `i2` of `i2 = col % 7`.
fn index_name(line: &str) -> &str {
    line.split(' ').next().unwrap_or(line)
}

//! The text of a kernel.
//!
//! ```text
//! for each row of this team                  for each element, or vector of them, of this thread
//!   row values                                 loads
//!   for each chunk of columns of this thread   values
//!     loads, values, partial results           stores
//!   join the partial results of the team
//!   ... the next pass; the last one stores
//!   row stores, by one thread
//! ```
//!
//! `r7` is one value a row, `v7` one an element: of instruction 7 of the tape.

mod chunk;

use super::dialect::{Dialect, Shared};
use super::index::{Names, axes, count_type, fast_axis};
use super::launch::{Launch, SIMD, Team, is_vector};
use super::passes::{Pass, Passes};
use super::scalar::{expression, identity, reducer, register_type, settled, to_memory};
use super::text::Text;
use super::{Binding, Operand, accesses, scalar};
use crate::kernel::{Access, Affine, Kernel, KernelOp, Level, Reg, Store};
use chunk::Chunk;

/// The most chunks of a row whose loop is written out though nothing is kept.
const UNROLLED: usize = 16;

pub(super) fn render(
    kernel: &Kernel,
    dialect: &Dialect,
    launch: &Launch,
    operands: &[Operand],
    name: &str,
) -> String {
    let mut body = Body::new(kernel, launch);
    body.title();
    body.signature(dialect, operands, name);
    match launch.team {
        Team::Element => body.elements(),
        Team::Simd | Team::Block | Team::Column { .. } => body.rows(),
    }
    body.text.close();
    body.text.finish()
}

/// The bytes that a kernel moves as one, of an operand.
pub(super) fn access_bytes(kernel: &Kernel, launch: &Launch, operand: &Operand) -> usize {
    let fast = fast_axis(kernel, launch.team);
    let own = accesses(kernel).filter(|(binding, _)| *binding == operand.binding);
    let elements = |(_, a): (_, &Access)| match fast {
        Some(axis) if is_vector(a, axis, launch.vector) => launch.vector,
        _ => 1,
    };
    own.map(elements).max().unwrap_or(1) * operand.dtype.size_bytes()
}

struct Body<'a> {
    kernel: &'a Kernel,
    launch: &'a Launch,
    passes: Passes,
    /// What counts rows and elements.
    count: &'static str,
    fast: Option<usize>,
    /// Chunks of a row, for each thread of its team.
    chunks: usize,
    /// The indices of a row (of an element), and of a column, with the lines that compute them.
    row: (Names, Vec<String>),
    col: (Names, Vec<String>),
    text: Text,
}

impl<'a> Body<'a> {
    fn new(kernel: &'a Kernel, launch: &'a Launch) -> Body<'a> {
        let chunks = kernel.cols().div_ceil(launch.members() * launch.vector);
        let passes = Passes::new(kernel, launch, chunks * launch.vector);
        let count = count_type(kernel, launch.grid * launch.block * launch.vector);
        let fast = fast_axis(kernel, launch.team);
        let (all, rows) = (kernel.space.len(), kernel.row_axes);
        let outer = if launch.team == Team::Element { 0..all } else { 0..rows };
        let flat = if launch.team == Team::Element { "i" } else { "row" };
        let mut names = Names::new(kernel);
        let lines = names.split(kernel, &axes(outer, fast), flat);
        let row = (names.clone(), lines);
        let lines = match launch.team {
            Team::Element => Vec::new(),
            _ => names.split(kernel, &axes(rows..all, fast), "col"),
        };
        let (col, text) = ((names, lines), Text::default());
        Body { kernel, launch, passes, count, fast, chunks, row, col, text }
    }

    fn title(&mut self) {
        let (rows, cols, vector) = (self.kernel.rows(), self.kernel.cols(), self.launch.vector);
        let (size, team) = match self.launch.team {
            Team::Element => (format!("{} elements", rows * cols), "a thread each".into()),
            Team::Simd => (format!("{rows} rows of {cols}"), "a SIMD group each".into()),
            Team::Block => (format!("{rows} rows of {cols}"), "a block each".into()),
            Team::Column { slices } => {
                (format!("{rows} rows of {cols}"), format!("{slices} threads each"))
            }
        };
        self.text.line(format!("// {size}, {team}, in accesses of {vector}."));
    }

    fn signature(&mut self, dialect: &Dialect, operands: &[Operand], name: &str) {
        let mut parameters = Vec::new();
        for (n, operand) in operands.iter().enumerate() {
            let (form, name) = match operand.binding {
                Binding::Arg(i) => (dialect.argument, format!("in{i}")),
                Binding::Out(i) => (dialect.output, format!("out{i}")),
                Binding::ArgAt { .. }
                | Binding::OutAt { .. }
                | Binding::Workspace { .. }
                | Binding::Status => {
                    panic!("metal-candle bug: a fused kernel reads arguments, writes outputs")
                }
            };
            let form = form.replace("{type}", scalar::memory_type(operand.dtype));
            parameters.push(form.replace("{name}", &name).replace("{n}", &n.to_string()));
        }
        parameters.extend(dialect.ids.iter().map(|id| (*id).to_owned()));
        let mut first_lines: Vec<&str> = dialect.first_lines.to_vec();
        match dialect.shared {
            _ if self.launch.shared_bytes == 0 => {}
            Shared::Parameter(text) => parameters.push(text.to_owned()),
            Shared::Line(text) => first_lines.push(text),
        }
        let head = dialect.kernel.replace("{block}", &self.launch.block.to_string());
        let parameters = parameters.join(",\n    ");
        self.text.open(format!("{}(\n    {parameters}\n)", head.replace("{name}", name)));
        first_lines.iter().chain(dialect.wait).for_each(|line| self.text.line(line));
    }

    // ---- elements ----

    fn elements(&mut self) {
        let (block, vector) = (self.launch.block, self.launch.vector);
        let number = format!("block * {block} + tid");
        let start = if vector > 1 { format!("({number}) * {vector}") } else { number };
        let total = self.kernel.rows() * self.kernel.cols();
        self.text.open(format!(
            "for ({} i = {start}; i < {total}; i += blocks * {})",
            self.count,
            block * vector
        ));
        self.declare(self.row.1.clone());
        let pass = self.passes.passes.pop().expect("elements have one pass");
        self.row_values(&pass.before);
        self.chunk(&pass, true);
        self.text.close();
    }

    // ---- rows ----

    fn rows(&mut self) {
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

    fn reduction(&self, reg: Reg) -> (metal_candle_graph::ReduceOp, Reg) {
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

    // ---- values ----

    fn declare(&mut self, indices: Vec<String>) {
        if !indices.is_empty() {
            self.text.line(format!("const {} {};", self.count, indices.join(", ")));
        }
    }

    fn row_values(&mut self, regs: &[Reg]) {
        let kernel = self.kernel;
        for reg in regs {
            let inst = &kernel.tape[reg.index()];
            if matches!(inst.op, KernelOp::Const(_)) {
                continue;
            }
            let at = |at: &Affine| self.row.0.offset(at, None);
            let x: Vec<String> =
                Kernel::operands(&inst.op).iter().map(|r| self.row_value(*r)).collect();
            let value = expression(kernel, inst, &x, &place_of(&inst.op, at));
            let name = self.row_name(*reg);
            self.text.line(format!("const {} {name} = {value};", register_type(inst.dtype)));
        }
    }

    fn row_name(&self, reg: Reg) -> String {
        let element = self.launch.team == Team::Element && self.launch.vector == 1;
        format!("{}{}", if element { "v" } else { "r" }, reg.0)
    }

    /// A row value: constants stand where they are used.
    fn row_value(&self, reg: Reg) -> String {
        let inst = &self.kernel.tape[reg.index()];
        if !matches!(inst.op, KernelOp::Const(_)) {
            return self.row_name(reg);
        }
        let literal = expression(self.kernel, inst, &[], "");
        if literal.starts_with('-') { format!("({literal})") } else { literal }
    }

    /// What a thread does for the elements of one vector.
    fn chunk(&mut self, pass: &Pass, is_last: bool) {
        let kernel = self.kernel;
        let mut chunk = Chunk { body: self, arrays: vec![false; kernel.tape.len()] };
        let is_stored = |s: &&Store| {
            let level = chunk.body.passes.level[s.reg.index()];
            is_last && (level == Level::Col || chunk.body.launch.team == Team::Element)
        };
        let stores: Vec<&Store> = kernel.stores.iter().filter(is_stored).collect();
        chunk.run(pass, &stores);
    }
}

/// `i2` of `i2 = col % 7`.
fn index_name(line: &str) -> &str {
    line.split(' ').next().unwrap_or(line)
}

/// `in0[offset]` for a load, the offset itself for what is made from a position.
fn place_of(op: &KernelOp, offset: impl Fn(&Affine) -> String) -> String {
    match op {
        KernelOp::Load(access) => format!("in{}[{}]", access.arg, offset(&access.at)),
        KernelOp::Index(at) | KernelOp::Random { at, .. } => offset(at),
        _ => String::new(),
    }
}

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
mod rows;

use super::dialect::{Dialect, Shared};
use super::index::{Names, axes, count_type, fast_axis};
use super::launch::{Launch, Team, is_vector};
use super::passes::{Pass, Passes};
use super::scalar::{expression, register_type};
use super::text::Text;
use super::{Binding, Operand, accesses, scalar};
use crate::kernel::{Access, Affine, Kernel, KernelOp, Level, Reg, Store};
use chunk::Chunk;

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
        let head = dialect.head(self.launch);
        let parameters = parameters.join(",\n    ");
        self.text.open(format!("{}(\n    {parameters}\n)", head.replace("{name}", name)));
        first_lines.iter().chain(dialect.wait).for_each(|line| self.text.line(line));
    }

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

/// `in0[offset]` for a load, the offset itself for what is made from a position.
fn place_of(op: &KernelOp, offset: impl Fn(&Affine) -> String) -> String {
    match op {
        KernelOp::Load(access) => format!("in{}[{}]", access.arg, offset(&access.at)),
        KernelOp::Index(at) | KernelOp::Random { at, .. } => offset(at),
        _ => String::new(),
    }
}

//! A kernel of a call: what its template is to know, and the call of the template.

use super::super::dialect::{Dialect, Shared};
use super::super::launch::{Launch, Limits, SIMD, Team};
use super::super::text::Text;
use super::super::{Binding, Source, scalar};
use super::Part;
use super::walk::Walk;
use metal_candle_graph::DType;
use rustc_hash::FxHasher;
use std::hash::Hasher;

/// Threads of a block, where nothing asks for another number.
pub(super) const BLOCK: usize = 256;
/// How often a grid fills the device.
const WAVES: usize = 4;

/// What kernels are written for.
#[derive(Clone, Copy)]
pub(super) struct Gpu<'a> {
    pub(super) dialect: &'a Dialect,
    pub(super) limits: &'a Limits,
}

impl Gpu<'_> {
    /// A thread for each of `n` elements, as long as the device has some to spare.
    pub(super) fn elements(&self, n: usize) -> Launch {
        self.launch(Team::Element, n.div_ceil(BLOCK), BLOCK, 0)
    }

    /// A SIMD group for each row.
    pub(super) fn simd_rows(&self, rows: usize) -> Launch {
        self.launch(Team::Simd, rows.div_ceil(BLOCK / SIMD), BLOCK, 0)
    }

    /// A block for each row.
    pub(super) fn block_rows(&self, rows: usize, block: usize, shared_bytes: usize) -> Launch {
        self.launch(Team::Block, rows, block, shared_bytes)
    }

    /// The same with so few rows at a time, a quarter of what can run, that a cache may hold what is read twice.
    pub(super) fn cached_rows(&self, rows: usize, block: usize, shared_bytes: usize) -> Launch {
        let most = (self.limits.resident_threads / 4 / block).max(1);
        self.launch(Team::Block, rows.min(most), block, shared_bytes)
    }

    fn launch(&self, team: Team, blocks: usize, block: usize, shared_bytes: usize) -> Launch {
        let most = WAVES * self.limits.resident_threads / block;
        let grid = blocks.min(most.clamp(1, self.limits.max_grid));
        let shared_bytes = shared_bytes.next_multiple_of(16);
        let fits = block <= self.limits.max_block && shared_bytes <= self.limits.max_shared_bytes;
        assert!(fits, "metal-candle bug: a block of {block} with {shared_bytes} bytes");
        Launch { team, vector: 1, grid, block, resident: 1, shared_bytes }
    }
}

/// A kernel under construction: `template<K>(operands.., thread)`, where `K` holds types, constants and places.
pub(super) struct Draft<'a> {
    gpu: Gpu<'a>,
    call: &'static str,
    template: &'static str,
    /// Its arguments after `K`.
    arguments: Vec<String>,
    operands: Vec<Operand>,
    /// The lines of K.
    types: Vec<String>,
    constants: Vec<String>,
    functions: Vec<String>,
    align_bytes: usize,
    asks_first: Option<Binding>,
}

struct Operand {
    binding: Binding,
    name: &'static str,
    type_name: String,
    written: bool,
}

impl<'a> Draft<'a> {
    /// A kernel of `call`; `template` is a function of the headers.
    pub(super) fn new(gpu: Gpu<'a>, call: &'static str, template: &'static str) -> Draft<'a> {
        Draft {
            gpu,
            call,
            template,
            arguments: Vec::new(),
            operands: Vec::new(),
            types: Vec::new(),
            constants: Vec::new(),
            functions: Vec::new(),
            align_bytes: 1,
            asks_first: None,
        }
    }

    /// Another argument of the template.
    pub(super) fn template(self, argument: usize) -> Draft<'a> {
        self.type_argument(&argument.to_string())
    }

    pub(super) fn type_argument(mut self, argument: &str) -> Draft<'a> {
        self.arguments.push(argument.into());
        self
    }

    pub(super) fn reads(self, binding: Binding, name: &'static str, dtype: DType) -> Draft<'a> {
        self.operand(binding, name, scalar::memory_type(dtype), false)
    }

    /// The template has an argument more where there is such an operand.
    pub(super) fn reads_if(
        self,
        binding: Option<Binding>,
        name: &'static str,
        dtype: DType,
    ) -> Draft<'a> {
        match binding {
            Some(binding) => self.reads(binding, name, dtype),
            None => self,
        }
    }

    pub(super) fn writes(self, binding: Binding, name: &'static str, dtype: DType) -> Draft<'a> {
        self.operand(binding, name, scalar::memory_type(dtype), true)
    }

    /// Where a bad index is reported, as one of this call.
    pub(super) fn reports(self) -> Draft<'a> {
        let number = super::Status::number(self.call);
        self.operand(Binding::Status, "status", "Status", true)
            .constant("OPERATION", i64::from(number))
    }

    pub(super) fn operand(
        mut self,
        binding: Binding,
        name: &'static str,
        type_name: &str,
        written: bool,
    ) -> Draft<'a> {
        self.operands.push(Operand { binding, name, type_name: type_name.into(), written });
        self
    }

    /// Addresses must be a multiple of so many bytes.
    pub(super) fn aligned(mut self, bytes: usize) -> Draft<'a> {
        self.align_bytes = self.align_bytes.max(bytes);
        self
    }

    /// The template's last argument is a function, which it calls before it touches anything but `first`.
    pub(super) fn asks_first(self, first: Binding) -> Draft<'a> {
        Draft { asks_first: Some(first), ..self }
    }

    pub(super) fn typedef(mut self, name: &str, is: &str) -> Draft<'a> {
        self.types.push(format!("typedef {is} {name};"));
        self
    }

    /// What numbers of `dtype` are computed with.
    pub(super) fn numbers(self, dtype: DType) -> Draft<'a> {
        self.typedef("A", scalar::register_type(dtype))
    }

    pub(super) fn constant(mut self, name: &str, value: i64) -> Draft<'a> {
        self.constants.push(format!("{name} = {value}"));
        self
    }

    /// A function of nothing: a number that is no constant of an enum.
    pub(super) fn function(mut self, type_name: &str, name: &str, value: &str) -> Draft<'a> {
        self.functions.push(format!("FN {type_name} {name}() {{ return {type_name}({value}); }}"));
        self
    }

    /// The elements of a walk, and the type that counts them and what is `beyond` its places.
    pub(super) fn walk(mut self, walk: &Walk, beyond: usize) -> Draft<'a> {
        self.functions.extend(walk.functions());
        // A loop counts one step of the whole grid too far before it ends.
        let threads = WAVES * self.gpu.limits.resident_threads + 1024;
        let most = walk.reach().saturating_add(beyond).saturating_add(threads);
        let count = if most < 1 << 31 { "i32" } else { "i64" };
        self.typedef("I", count).constant("ELEMENTS", walk.len() as i64)
    }

    /// The places of another walk.
    pub(super) fn places(mut self, walk: &Walk) -> Draft<'a> {
        self.functions.extend(walk.functions());
        self
    }

    pub(super) fn finish(self, launch: Launch) -> Part {
        let draft = self.constant("BLOCK", launch.block as i64);
        let text = draft.text(&launch);
        let mut hash = FxHasher::default();
        hash.write(text.as_bytes());
        let name = format!("{}_{:016x}", draft.call, hash.finish());
        Part::Kernel(Source {
            text: text.replace("{name}", &name),
            name,
            bindings: draft.operands.iter().map(|operand| operand.binding).collect(),
            launch,
            align_bytes: draft.align_bytes,
            is_call: true,
            asks_first: draft.asks_first,
        })
    }

    /// With `{name}` for the kernel's name.
    fn text(&self, launch: &Launch) -> String {
        let dialect = self.gpu.dialect;
        let parameter = |(n, operand): (usize, &Operand)| {
            let form = if operand.written { dialect.output } else { dialect.argument };
            let form = form.replace("{type}", &operand.type_name).replace("{name}", operand.name);
            form.replace("{n}", &n.to_string())
        };
        let mut parameters: Vec<String> = self.operands.iter().enumerate().map(parameter).collect();
        parameters.extend(dialect.ids.iter().map(|id| (*id).to_owned()));
        let wait = if self.asks_first.is_some() { &[dialect.before] } else { dialect.wait };
        let mut lines: Vec<&str> = [dialect.first_lines, wait].concat();
        match dialect.shared {
            _ if launch.shared_bytes == 0 => {}
            Shared::Parameter(text) => parameters.push(text.to_owned()),
            Shared::Line(text) => lines.push(text),
        }
        let head = dialect.head(launch);
        let mut text = Text::default();
        text.line(format!("// Of {}: {} blocks of {}.", self.call, launch.grid, launch.block));
        text.open(format!("{head}(\n    {}\n)", parameters.join(",\n    ")));
        lines.iter().for_each(|line| text.line(line));
        text.open("struct K");
        self.types.iter().for_each(|line| text.line(line));
        text.line(format!("enum : i64 {{ {} }};", self.constants.join(", ")));
        self.functions.iter().for_each(|line| text.line(line));
        text.end_type();
        let mut operands: Vec<&str> = self.operands.iter().map(|operand| operand.name).collect();
        operands.push("Thread{tid, block, blocks}");
        if launch.shared_bytes > 0 {
            operands.push("shared");
        }
        if self.asks_first.is_some() {
            operands.push("before");
        }
        let more: String = self.arguments.iter().map(|n| format!(", {n}")).collect();
        text.line(format!("{}<K{more}>({});", self.template, operands.join(", ")));
        text.close();
        text.finish()
    }
}

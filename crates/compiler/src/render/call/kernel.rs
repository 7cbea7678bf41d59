//! A kernel of attention: the text around a template.

use super::draft::Gpu;
use crate::Operand;
use crate::render::dialect::{Dialect, Shared};
use crate::render::{Binding, Launch, Source, scalar};
use metal_candle_graph::DType;
use rustc_hash::FxHasher;
use std::hash::Hasher;

/// An operand of a kernel.
pub(super) struct Parameter {
    name: String,
    binding: Binding,
    dtype: DType,
    written: bool,
}

impl Parameter {
    /// `in3`
    pub(super) fn argument(number: usize, operand: &Operand) -> Parameter {
        let binding = Binding::Arg(number as u32);
        Parameter { name: format!("in{number}"), binding, dtype: operand.dtype, written: false }
    }

    /// `out0`
    pub(super) fn output(number: usize, operand: &Operand) -> Parameter {
        let binding = Binding::Out(number as u32);
        Parameter { name: format!("out{number}"), binding, dtype: operand.dtype, written: true }
    }

    /// From byte `offset_bytes` of the workspace on.
    pub(super) fn workspace(
        name: &str,
        offset_bytes: usize,
        dtype: DType,
        written: bool,
    ) -> Parameter {
        let binding = Binding::Workspace { offset_bytes };
        Parameter { name: name.to_owned(), binding, dtype, written }
    }
}

/// What a kernel is made of.
pub(super) struct Kernel<'a> {
    /// What its name begins with; it goes on with a hash of the text, so that equal work has one name, whatever step it is for.
    pub(super) base: &'a str,
    /// The members of the type that the template is specialised by, `{shape}` in the body.
    pub(super) constants: String,
    pub(super) parameters: Vec<Parameter>,
    pub(super) body: [String; 2],
    pub(super) launch: Launch,
}

impl Kernel<'_> {
    pub(super) fn finish(self, gpu: Gpu<'_>) -> Source {
        let text = self.text(gpu.dialect);
        let mut hash = FxHasher::default();
        hash.write(text.as_bytes());
        let name = format!("{}_{:016x}", self.base, hash.finish());
        Source {
            text: text.replace("{name}", &name).replace("{shape}", &format!("Of_{name}")),
            name,
            bindings: self.parameters.iter().map(|p| p.binding).collect(),
            launch: self.launch,
            align_bytes: 16,
            is_call: true,
            asks_first: None,
        }
    }

    /// With `{name}` for the kernel's name, and `{shape}` for the type's.
    fn text(&self, dialect: &Dialect) -> String {
        let form = |(n, p): (usize, &Parameter)| {
            let form = if p.written { dialect.output } else { dialect.argument };
            let form = form.replace("{type}", scalar::memory_type(p.dtype));
            form.replace("{name}", &p.name).replace("{n}", &n.to_string())
        };
        let mut parameters: Vec<String> = self.parameters.iter().enumerate().map(form).collect();
        parameters.extend(dialect.ids.iter().map(|id| (*id).to_owned()));
        let mut lines: Vec<&str> = [dialect.first_lines, dialect.wait].concat();
        match dialect.shared {
            Shared::Parameter(text) => parameters.push(text.to_owned()),
            Shared::Line(text) => lines.push(text),
        }
        // Every block has one piece of work.
        lines.push("(void)blocks;");
        lines.extend(self.body.iter().map(String::as_str));
        let head = dialect.head(&self.launch);
        format!(
            "struct {{shape}} {{\n{}}};\n{head}(\n    {}\n) {{\n    {}\n}}\n",
            self.constants,
            parameters.join(",\n    "),
            lines.join("\n    ")
        )
    }
}

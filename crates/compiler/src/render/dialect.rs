//! What a language calls things.

use super::{Launch, Source};

/// A GPU language, as data.
///
/// In the texts, `{name}`, `{type}`, `{block}` (threads), `{resident}` (blocks) and `{n}` (the number of an operand) are filled in.
#[derive(Debug)]
pub struct Dialect {
    /// For people.
    pub language: &'static str,
    pub has_f64: bool,
    /// What to tell the compiler.
    pub options: &'static [&'static str],
    /// What the kernels rely on, once before all of them: the dialect's own words, then what all dialects share.
    pub(super) headers: [&'static str; 20],
    /// The beginning of a kernel's definition, up to its first parameter.
    pub(super) kernel: &'static str,
    /// A parameter that is read.
    pub(super) argument: &'static str,
    /// A parameter that is written.
    pub(super) output: &'static str,
    /// The parameters that say which thread this is: `tid` in its block, `block`, and how many `blocks` there are.
    pub(super) ids: &'static [&'static str],
    /// The same, as the first lines of the body.
    pub(super) first_lines: &'static [&'static str],
    /// The line after those that waits for the kernel before this one, where kernels are launched early.
    pub(super) wait: &'static [&'static str],
    /// The line in its place in a kernel that asks for something first: what it is to call.
    pub(super) before: &'static str,
    /// The same where it has waited already.
    pub(super) waited: &'static str,
    /// A kernel as a function of `{name}` that is told its block, up to its first operand; and its first line. None where
    /// a kernel's parameters are no function's.
    pub(super) function: Option<[&'static str; 2]>,
    /// Memory that a block shares: a parameter, or a line of the body.
    pub(super) shared: Shared,
}

#[derive(Debug)]
pub(super) enum Shared {
    Parameter(&'static str),
    Line(&'static str),
}

impl Dialect {
    pub const CUDA: &'static Dialect = &super::cuda::DIALECT;
    pub const METAL: &'static Dialect = &super::metal::DIALECT;

    pub(super) const fn headers(
        own: &'static str,
        tensor_cores: [&'static str; 6],
    ) -> [&'static str; 20] {
        let [mma, thin, wgmma, flash_products, flash, flash_grad] = tensor_cores;
        [
            own,
            include_str!("common.h"),
            include_str!("call/common.h"),
            include_str!("call/index.h"),
            include_str!("call/along.h"),
            include_str!("call/rope.h"),
            include_str!("call/gemm.h"),
            include_str!("call/small.h"),
            include_str!("call/low_rank.h"),
            include_str!("call/quant.h"),
            include_str!("call/cross_entropy.h"),
            include_str!("call/attention.h"),
            include_str!("call/attention_few.h"),
            include_str!("call/attention_grad.h"),
            mma,
            thin,
            wgmma,
            flash_products,
            flash,
            flash_grad,
        ]
    }

    /// What comes before the kernels of a source file.
    pub fn header(&self) -> String {
        self.headers.join("\n")
    }

    /// The beginning of a kernel's definition, but for its name.
    pub(super) fn head(&self, launch: &Launch) -> String {
        let resident = match launch.resident {
            1 => String::new(),
            blocks => format!(", {blocks}"),
        };
        let head = self.kernel.replace("{block}", &launch.block.to_string());
        head.replace("{resident}", &resident)
    }

    /// `kernel` as a function of this name that other kernels call; one that asks first is given what to call `before`.
    pub(super) fn as_function(&self, kernel: &Source, name: &str) -> String {
        let [head, line] = self.function.expect("metal-candle bug: kernels that are no functions");
        let own = self.head(&kernel.launch);
        let own = own.replace("{name}", &kernel.name) + "(";
        let mut head = head.replace("{name}", name);
        let mut text = kernel.text.clone();
        if kernel.asks_first.is_some() {
            head = format!("template <typename Before> {head}").replacen(
                '(',
                "(const Before& before, ",
                1,
            );
            text = text.replacen(self.before, "", 1);
        }
        let text = text.replacen(&own, &head, 1);
        let function = text.replacen(self.first_lines[0], line, 1);
        assert!(text != kernel.text && function != text, "metal-candle bug: no kernel\n{text}");
        function
    }

    /// The same kernel, but that it asks for nothing before it has waited.
    pub fn waiting(&self, kernel: &Source) -> Source {
        let name = format!("{}_waiting", kernel.name);
        let waited = format!("{} {}", self.wait.concat(), self.waited);
        let text = kernel.text.replacen(self.before, &waited, 1).replace(&kernel.name, &name);
        Source { name, text, asks_first: None, ..kernel.clone() }
    }

    /// What comes before this kernel alone: a fused one needs no templates of library calls, which take their time to
    /// compile.
    pub fn header_of(&self, source: &Source) -> String {
        const FUSED: usize = 2;
        let len = if source.is_call { self.headers.len() } else { FUSED };
        self.headers[..len].join("\n")
    }
}

//! Indented lines.

/// Source text under construction.
#[derive(Default)]
pub(super) struct Text {
    out: String,
    depth: usize,
}

impl Text {
    pub(super) fn line(&mut self, line: impl AsRef<str>) {
        self.out.extend(std::iter::repeat_n("    ", self.depth));
        self.out.push_str(line.as_ref());
        self.out.push('\n');
    }

    /// `head {`, up to [`Text::close`].
    pub(super) fn open(&mut self, head: impl AsRef<str>) {
        self.line(format!("{} {{", head.as_ref()));
        self.depth += 1;
    }

    pub(super) fn close(&mut self) {
        self.depth -= 1;
        self.line("}");
    }

    /// As [`Text::close`], of a type.
    pub(super) fn end_type(&mut self) {
        self.depth -= 1;
        self.line("};");
    }

    /// A loop whose trip count is known, to be written out.
    pub(super) fn unrolled(&mut self, head: impl AsRef<str>) {
        self.line("#pragma unroll");
        self.open(head);
    }

    /// The lines of another text, as deep as this one is.
    pub(super) fn append(&mut self, inner: Text) {
        inner.finish().lines().for_each(|line| self.line(line));
    }

    /// Whether `name` stands anywhere.
    pub(super) fn mentions(&self, name: &str) -> bool {
        let in_word = |c: char| c.is_alphanumeric() || c == '_';
        self.out.split(|c| !in_word(c)).any(|word| word == name)
    }

    pub(super) fn finish(self) -> String {
        debug_assert_eq!(self.depth, 0, "metal-candle bug: an open block");
        self.out
    }
}

//! Rows of comma-separated values (RFC 4180), with a header.
//!
//! Read here and not by a library: that a quote is never closed, and where, is the error that
//! matters most, and readers made to be lenient swallow the rest of the file instead.

use super::columns::{Fields, Wanted};
use super::{Row, RowProblem};

/// Where a problem is: line and column, from 1.
type At<P> = (usize, usize, P);
type CsvResult<T> = Result<T, At<RowProblem>>;

/// A value, and where it stood.
struct Field {
    line: usize,
    column: usize,
    text: String,
    quoted: bool,
}

/// All rows of a file.
pub(super) fn parse(bytes: &[u8], wanted: &Wanted<'_>) -> CsvResult<Vec<Row>> {
    // Some editors begin a file with a byte order mark.
    let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
    let mut reader = Reader { bytes, at: 0, line: 1, line_start: 0 };
    let Some(header) = reader.record()? else { return Ok(Vec::new()) };
    let columns = columns(&header, wanted)?;
    let names = || header.iter().map(|field| field.text.clone()).collect();
    let mut rows = Vec::new();
    while let Some(mut record) = reader.record()? {
        if record.len() != header.len() {
            let (expected, got) = (header.len(), record.len());
            let at = record.get(expected).unwrap_or(&record[got - 1]);
            return Err((at.line, at.column, RowProblem::CsvColumns { expected, got }));
        }
        let line = record[0].line;
        let mut fields = Fields::default();
        for (i, name) in &columns {
            fields.strings.push((name, std::mem::take(&mut record[*i].text)));
        }
        let content = wanted.content(fields, names).map_err(|problem| (line, 1, problem))?;
        rows.push(Row { line, content });
    }
    Ok(rows)
}

/// Where the wanted columns are.
fn columns<'a>(header: &[Field], wanted: &Wanted<'a>) -> CsvResult<Vec<(usize, &'a str)>> {
    let mut found: Vec<(usize, &str)> = Vec::new();
    for (i, field) in header.iter().enumerate() {
        let Some(name) = wanted.string(&field.text) else { continue };
        if found.iter().any(|(_, other)| *other == name) {
            let problem = RowProblem::CsvDuplicate { name: name.to_owned() };
            return Err((field.line, field.column, problem));
        }
        found.push((i, name));
    }
    Ok(found)
}

struct Reader<'b> {
    bytes: &'b [u8],
    at: usize,
    line: usize,
    line_start: usize,
}

impl Reader<'_> {
    /// The next record that is no blank line.
    fn record(&mut self) -> CsvResult<Option<Vec<Field>>> {
        while self.at < self.bytes.len() {
            let mut fields = vec![self.field()?];
            while self.bytes.get(self.at) == Some(&b',') {
                self.at += 1;
                fields.push(self.field()?);
            }
            self.end_line();
            let is_blank =
                fields.len() == 1 && !fields[0].quoted && fields[0].text.trim().is_empty();
            if !is_blank {
                return Ok(Some(fields));
            }
        }
        Ok(None)
    }

    fn field(&mut self) -> CsvResult<Field> {
        let (line, column) = (self.line, self.column());
        let quoted = self.bytes.get(self.at) == Some(&b'"');
        let bytes = if quoted { self.quoted()? } else { self.plain() };
        let text = String::from_utf8(bytes).map_err(|_| (line, column, RowProblem::Utf8))?;
        Ok(Field { line, column, text, quoted })
    }

    /// Up to a comma or the end of the line.
    fn plain(&mut self) -> Vec<u8> {
        let rest = &self.bytes[self.at..];
        let len = rest.iter().position(|b| matches!(b, b',' | b'\n')).unwrap_or(rest.len());
        self.at += len;
        let is_last = rest.get(len) != Some(&b',');
        let text = &rest[..len];
        // The end of the line may be written with a carriage return.
        if is_last { text.strip_suffix(b"\r").unwrap_or(text).to_vec() } else { text.to_vec() }
    }

    /// Between quotes; two of them are one.
    fn quoted(&mut self) -> CsvResult<Vec<u8>> {
        let opened = (self.line, self.column(), RowProblem::CsvQuote);
        let mut text = Vec::new();
        self.at += 1;
        loop {
            let Some(&byte) = self.bytes.get(self.at) else { return Err(opened) };
            self.at += 1;
            match byte {
                b'"' if self.bytes.get(self.at) == Some(&b'"') => self.at += 1,
                b'"' => break,
                b'\n' => self.start_line(),
                _ => {}
            }
            text.push(byte);
        }
        match self.bytes[self.at..] {
            [] | [b',' | b'\n', ..] => Ok(text),
            [b'\r', b'\n', ..] | [b'\r'] => {
                self.at += 1;
                Ok(text)
            }
            _ => Err((self.line, self.column(), RowProblem::CsvAfterQuote)),
        }
    }

    fn end_line(&mut self) {
        if self.bytes.get(self.at) == Some(&b'\n') {
            self.at += 1;
            self.start_line();
        }
    }

    fn start_line(&mut self) {
        self.line += 1;
        self.line_start = self.at;
    }

    fn column(&self) -> usize {
        self.at - self.line_start + 1
    }
}

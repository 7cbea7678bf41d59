//! What Python writes: `json.dumps`, `repr` and `strftime`.

use std::io::{self, Write};

use minijinja::value::{Value, ValueKind};
use serde::Serialize;
use serde_json::ser::{CharEscape, Formatter};

/// Options of `json.dumps`.
#[derive(Clone, Debug, Default)]
pub(super) struct Json {
    pub(super) indent: Option<usize>,
    pub(super) ensure_ascii: bool,
    pub(super) sort_keys: bool,
    /// Between items, and between key and value.
    pub(super) separators: Option<(String, String)>,
}

impl Json {
    pub(super) fn dumps(&self, value: &impl Serialize) -> serde_json::Result<String> {
        let mut value = serde_json::to_value(value)?;
        if self.sort_keys {
            value.sort_all_objects();
        }
        let default_item = if self.indent.is_some() { "," } else { ", " };
        let (item, key) = match &self.separators {
            Some((item, key)) => (item.as_str(), key.as_str()),
            None => (default_item, ": "),
        };
        let writer = Writer { options: self, item, key, depth: 0, has_value: false };
        let mut out = Vec::new();
        value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, writer))?;
        Ok(String::from_utf8(out).expect("metal-candle bug: JSON was written as no UTF-8"))
    }
}

struct Writer<'a> {
    options: &'a Json,
    item: &'a str,
    key: &'a str,
    depth: usize,
    has_value: bool,
}

impl Writer<'_> {
    fn open<W: ?Sized + Write>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.has_value = false;
        out.write_all(bracket)
    }

    fn close<W: ?Sized + Write>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if self.has_value {
            self.new_line(out)?;
        }
        self.has_value = true;
        out.write_all(bracket)
    }

    fn next<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if !first {
            out.write_all(self.item.as_bytes())?;
        }
        self.has_value = true;
        self.new_line(out)
    }

    fn new_line<W: ?Sized + Write>(&self, out: &mut W) -> io::Result<()> {
        match self.options.indent {
            Some(width) => write!(out, "\n{:1$}", "", width.saturating_mul(self.depth)),
            None => Ok(()),
        }
    }
}

impl Formatter for Writer<'_> {
    fn begin_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"[")
    }

    fn end_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"]")
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.next(out, first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.has_value = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"}")
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.next(out, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(self.key.as_bytes())
    }

    fn write_f64<W: ?Sized + Write>(&mut self, out: &mut W, value: f64) -> io::Result<()> {
        out.write_all(float_repr(value).as_bytes())
    }

    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        out: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        if !self.options.ensure_ascii {
            return out.write_all(fragment.as_bytes());
        }
        for unit in fragment.encode_utf16() {
            match unit {
                0x20..=0x7e => out.write_all(&[unit as u8])?,
                _ => write!(out, "\\u{unit:04x}")?,
            }
        }
        Ok(())
    }

    fn write_char_escape<W: ?Sized + Write>(
        &mut self,
        out: &mut W,
        escape: CharEscape,
    ) -> io::Result<()> {
        // Python leaves the slash alone and so does serde_json; the rest is spelled the same.
        serde_json::ser::CompactFormatter.write_char_escape(out, escape)
    }
}

/// `repr(value)`: the shortest digits, an exponent below 1e-4 and from 1e16 on.
fn float_repr(value: f64) -> String {
    let scientific = format!("{value:e}");
    let (mantissa, exponent) =
        scientific.split_once('e').expect("metal-candle bug: a float printed without exponent");
    let exponent: i32 = exponent.parse().expect("metal-candle bug: an exponent is no number");
    if value == 0.0 || (-4..16).contains(&exponent) {
        return format!("{value:?}");
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.abs())
}

/// `repr(value)` of lists and dicts, and of what is in them.
pub(super) fn repr(value: &Value) -> String {
    let items = |render: &dyn Fn(&Value) -> String| -> String {
        let items = value.try_iter().into_iter().flatten();
        items.map(|item| render(&item)).collect::<Vec<_>>().join(", ")
    };
    match value.kind() {
        ValueKind::Seq => format!("[{}]", items(&repr)),
        ValueKind::Map => {
            let field = |key: &Value| {
                format!("{}: {}", repr(key), repr(&value.get_item(key).unwrap_or_default()))
            };
            format!("{{{}}}", items(&field))
        }
        ValueKind::String => string_repr(value.as_str().unwrap_or_default()),
        _ => value.to_string(),
    }
}

/// In single quotes, or in double ones around a text that has only single ones.
fn string_repr(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\n' => out += "\\n",
            '\r' => out += "\\r",
            '\t' => out += "\\t",
            '\\' => out += "\\\\",
            c if c == quote => out.extend(['\\', c]),
            c if c.is_ascii_control() => out += &format!("\\x{:02x}", c as u32),
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// `datetime.strftime` in UTC, for the directives that chat templates use; or the directive that
/// it does not know.
pub(super) fn strftime(format: &str, unix_seconds: i64) -> Result<String, String> {
    let (days, second) = (unix_seconds.div_euclid(86_400), unix_seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let month_name = MONTHS[month as usize - 1];
    // 1970-01-01 was a Thursday.
    let day_name = DAYS[(days + 4).rem_euclid(7) as usize];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out += &year.to_string(),
            Some('y') => out += &format!("{:02}", year.rem_euclid(100)),
            Some('m') => out += &format!("{month:02}"),
            Some('d') => out += &format!("{day:02}"),
            Some('B') => out += month_name,
            Some('b') => out += &month_name[..3],
            Some('A') => out += day_name,
            Some('a') => out += &day_name[..3],
            Some('H') => out += &format!("{hour:02}"),
            Some('M') => out += &format!("{minute:02}"),
            Some('S') => out += &format!("{:02}", second % 60),
            Some('%') => out.push('%'),
            other => return Err(other.map_or_else(String::new, String::from)),
        }
    }
    Ok(out)
}

/// Year, month and day of a day since 1970-01-01.
///
/// Howard Hinnant, "chrono-compatible low-level date algorithms": years that begin in March, in
/// eras of 400 years.
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_spelled_as_python_spells_them() {
        let cases = [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (-2.5, "-2.5"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.25e-7, "1.25e-07"),
            (123456789012345680.0, "1.2345678901234568e+17"),
        ];
        for (value, expected) in cases {
            assert_eq!(float_repr(value), expected);
        }
    }

    #[test]
    fn strings_are_quoted_as_python_quotes_them() {
        let cases = [
            ("plain é", "'plain é'"),
            ("it's", "\"it's\""),
            ("say \"it's\"", "'say \"it\\'s\"'"),
            ("a\n\t\\\u{1}", "'a\\n\\t\\\\\\x01'"),
        ];
        for (text, expected) in cases {
            assert_eq!(string_repr(text), expected);
        }
    }

    #[test]
    fn dates_are_spelled_as_python_spells_them() {
        let cases = [
            (0, "1970-01-01 Thu 00:00:00"),
            (951_782_399, "2000-02-28 Mon 23:59:59"),
            (951_782_400, "2000-02-29 Tue 00:00:00"),
            (1_735_689_599, "2024-12-31 Tue 23:59:59"),
            (-1, "1969-12-31 Wed 23:59:59"),
        ];
        for (seconds, expected) in cases {
            assert_eq!(strftime("%Y-%m-%d %a %H:%M:%S", seconds).unwrap(), expected);
        }
        assert_eq!(strftime("%d %b %y, %A %B %%", 0).unwrap(), "01 Jan 70, Thursday January %");
        assert_eq!(strftime("%Q", 0), Err("Q".to_owned()));
        assert_eq!(strftime("%", 0), Err(String::new()));
    }
}

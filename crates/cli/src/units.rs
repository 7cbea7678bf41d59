//! Numbers for people.

use std::fmt;

/// A length in bytes, in binary units.
#[derive(Clone, Copy)]
pub(crate) struct Bytes(pub(crate) u64);

/// A number of things, in thousands.
#[derive(Clone, Copy)]
pub(crate) struct Count(pub(crate) u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&scaled(self.0, 1024, " B", [" KiB", " MiB", " GiB", " TiB"]))
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&scaled(self.0, 1000, "", [" k", " M", " B", " T"]))
    }
}

/// The number with one decimal, in the largest unit that is not above it.
fn scaled(n: u64, step: u64, ones: &str, units: [&str; 4]) -> String {
    if n < step {
        return format!("{n}{ones}");
    }
    let mut value = n as f64 / step as f64;
    let mut unit = 0;
    while value >= step as f64 && unit + 1 < units.len() {
        value /= step as f64;
        unit += 1;
    }
    format!("{value:.1}{}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::{Bytes, Count};

    #[test]
    fn numbers_are_in_the_largest_unit_not_above_them() {
        let bytes = [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB")];
        for (n, want) in bytes {
            assert_eq!(Bytes(n).to_string(), want);
        }
        for (n, want) in [(999, "999"), (134_515_008, "134.5 M"), (7_000_000_000, "7.0 B")] {
            assert_eq!(Count(n).to_string(), want);
        }
    }
}

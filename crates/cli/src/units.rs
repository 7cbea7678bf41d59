//! Numbers for people.

use std::fmt;

pub(crate) use metal_candle::plan::Bytes;

/// A number of things, in thousands.
#[derive(Clone, Copy)]
pub(crate) struct Count(pub(crate) u64);

impl fmt::Display for Count {
    /// With one decimal, in the largest unit that is not above it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const STEP: f64 = 1000.0;
        const UNITS: [&str; 4] = ["k", "M", "B", "T"];
        let mut value = self.0 as f64 / STEP;
        if value < 1.0 {
            return f.pad(&self.0.to_string());
        }
        let mut unit = 0;
        while value >= STEP && unit + 1 < UNITS.len() {
            value /= STEP;
            unit += 1;
        }
        f.pad(&format!("{value:.1} {}", UNITS[unit]))
    }
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

//! Rows as lines of text and as JSON.

use super::median;
use super::rows::{Row, Unit};
use serde_json::{Value, json};

/// What one of those who do a row's work gave.
#[derive(Default)]
pub(super) struct Figures {
    /// Medians, one a round.
    pub(super) seconds: Vec<f64>,
    pub(super) peak_bytes: Option<u64>,
    /// Why there are none.
    pub(super) missing: Option<String>,
}

/// A row, measured.
pub(super) struct Measured<'r> {
    pub(super) row: &'r Row,
    pub(super) ours: Figures,
    /// In the order of the row's peers.
    pub(super) peers: Vec<Figures>,
    /// What the ceilings leave, one a round.
    pub(super) floor_seconds: Vec<f64>,
    pub(super) binds: Option<String>,
}

/// The median of ratios, and the least and the greatest of them.
struct Ratio {
    median: f64,
    least: f64,
    most: f64,
}

/// Round by round, so that what slows the machine down slows both.
fn ratio(above: &[f64], below: &[f64]) -> Option<Ratio> {
    let all: Vec<f64> = above.iter().zip(below).map(|(a, b)| a / b).collect();
    let least = all.iter().copied().reduce(f64::min)?;
    let most = all.iter().copied().reduce(f64::max)?;
    Some(Ratio { median: median(&all), least, most })
}

pub(super) fn print_head() {
    println!(
        "\n{:<58} {:>13} {:>9}  {:<26} {:<15} {:>13}  {:>8} {:>15} {:>10}",
        "work",
        "ours",
        "peak GiB",
        "of the ceiling",
        "peer",
        "theirs",
        "ratio",
        "spread",
        "peak GiB"
    );
}

impl Measured<'_> {
    pub(super) fn print(&self) {
        let fraction = ratio(&self.floor_seconds, &self.ours.seconds);
        let ceiling = match (&fraction, &self.binds) {
            (Some(Ratio { median, .. }), Some(name)) => format!("{:.0}% {name}", 100.0 * median),
            _ => "-".to_owned(),
        };
        let ours = self.ours.show(self.row.unit);
        let mut left =
            format!("{:<58} {ours:>13} {:>9}  {ceiling:<26}", self.row.name, self.ours.peak(self));
        for (name, theirs) in self.row.peers.iter().zip(&self.peers) {
            let shown = theirs.show(self.row.unit);
            match ratio(&theirs.seconds, &self.ours.seconds) {
                Some(Ratio { median, least, most }) => println!(
                    "{left} {name:<15} {shown:>13}  {median:>7.2}x {:>15} {:>10}",
                    format!("{least:.2}-{most:.2}"),
                    theirs.peak(self)
                ),
                None => println!("{left} {name:<15} {shown}"),
            }
            left = " ".repeat(left.chars().count());
        }
        if self.peers.is_empty() {
            println!("{left} -");
        }
        if let Some(note) = self.row.note {
            println!("    {note}");
        }
        if let Some(missing) = &self.ours.missing {
            println!("    ours: {missing}");
        }
    }

    pub(super) fn json(&self) -> Value {
        let spread = |r: Option<Ratio>| {
            r.map(|Ratio { median, least, most }| {
                json!({"median": median, "least": least, "most": most})
            })
        };
        let peers = self.row.peers.iter().zip(&self.peers).map(|(name, theirs)| {
            let ratio = spread(ratio(&theirs.seconds, &self.ours.seconds));
            json!({"peer": name, "figures": theirs.json(self.row.unit), "ratio": ratio})
        });
        json!({
            "work": self.row.name,
            "ours": self.ours.json(self.row.unit),
            "ceiling": self.binds,
            "floor_seconds": self.floor_seconds,
            "of_ceiling": spread(ratio(&self.floor_seconds, &self.ours.seconds)),
            "peers": peers.collect::<Vec<_>>(),
            "note": self.row.note,
        })
    }
}

impl Figures {
    pub(super) fn add(&mut self, answer: &Value) {
        match answer["seconds"].as_f64() {
            Some(seconds) => self.seconds.push(seconds),
            None => self.missing = Some(answer["missing"].as_str().unwrap_or("?").to_owned()),
        }
        self.peak_bytes = self.peak_bytes.max(answer["peak_bytes"].as_u64());
    }

    fn show(&self, unit: Unit) -> String {
        if self.seconds.is_empty() {
            return format!("none: {}", self.missing.as_deref().unwrap_or("not measured"));
        }
        let seconds = median(&self.seconds);
        match unit {
            Unit::Tokens(n) => format!("{:.1} tok/s", n / seconds),
            Unit::Texts(n) => format!("{:.1} texts/s", n / seconds),
            Unit::Time if seconds < 1e-3 => format!("{:.1} us", seconds * 1e6),
            Unit::Time => format!("{:.2} ms", seconds * 1e3),
        }
    }

    /// In GiB, where the process did nothing but this row.
    fn peak(&self, of: &Measured<'_>) -> String {
        let peak = self.peak_bytes.filter(|_| of.row.is_model);
        peak.map_or(String::new(), |b| format!("{:.2}", b as f64 / f64::from(1 << 30)))
    }

    fn json(&self, unit: Unit) -> Value {
        let tokens = match unit {
            Unit::Tokens(n) if !self.seconds.is_empty() => Some(n / median(&self.seconds)),
            _ => None,
        };
        json!({
            "seconds": self.seconds,
            "tokens_per_second": tokens,
            "peak_bytes": self.peak_bytes,
            "missing": self.missing,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_taken_round_by_round() {
        let Ratio { median, least, most } = ratio(&[2.0, 40.0, 6.0], &[1.0, 10.0, 2.0]).unwrap();
        assert_eq!((median, least, most), (3.0, 2.0, 4.0));
        assert!(ratio(&[], &[1.0]).is_none());
    }
}

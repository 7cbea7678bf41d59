//! Line charts as SVG.

use std::fmt::Write;

/// One line of a chart.
pub(crate) struct Line {
    /// What stands beside its end.
    pub(crate) label: String,
    /// The CSS class that colours it.
    pub(crate) class: &'static str,
    /// `(step, value)`; not finite where the line breaks.
    pub(crate) points: Vec<(f64, f64)>,
    /// Whether each point is marked.
    pub(crate) dots: bool,
}

/// What a chart shows, and how its numbers are written.
pub(crate) struct Chart {
    /// For those who cannot see it.
    pub(crate) title: String,
    pub(crate) lines: Vec<Line>,
    /// Whether the axis begins at 0.
    pub(crate) from_zero: bool,
    pub(crate) unit: Unit,
    /// The last step of the axis.
    pub(crate) steps: f64,
}

/// How the values of an axis are written.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Unit {
    Plain,
    /// Powers of ten below 0.001.
    Scientific,
    /// Bytes, in binary units.
    Bytes,
}

/// In the SVG's own units, which are about a pixel.
#[derive(Clone, Copy)]
pub(crate) struct Size {
    pub(crate) width: f64,
    pub(crate) height: f64,
}

const TOP: f64 = 10.0;
const BOTTOM: f64 = 24.0;
const LEFT: f64 = 52.0;
/// An average letter.
const LETTER: f64 = 6.7;
/// Room for a label at least.
const LETTERS: usize = 7;
/// Between the baselines of two labels.
const LEADING: f64 = 15.0;

/// Where values are drawn.
struct Frame {
    size: Size,
    right: f64,
    /// The first and the last value of both axes.
    x: (f64, f64),
    y: (f64, f64),
}

impl Frame {
    fn at(&self, (x, y): (f64, f64)) -> (f64, f64) {
        let along = |v: f64, (from, to): (f64, f64)| (v - from) / (to - from);
        let (width, height) = (self.right - LEFT, self.size.height - TOP - BOTTOM);
        (LEFT + along(x, self.x) * width, TOP + (1.0 - along(y, self.y)) * height)
    }
}

impl Chart {
    /// The chart in this size.
    pub(crate) fn svg(&self, size: Size) -> String {
        let values: Vec<f64> = self.lines.iter().flat_map(|l| &l.points).map(|p| p.1).collect();
        let finite = || values.iter().copied().filter(|v| v.is_finite());
        let (mut low, high) =
            (finite().fold(f64::MAX, f64::min), finite().fold(f64::MIN, f64::max));
        if low > high {
            return "<p class=\"none\">nothing to show yet</p>".to_owned();
        }
        if self.from_zero {
            low = low.min(0.0);
        }
        let base = if self.unit == Unit::Bytes { binary_unit(high).0 } else { 1.0 };
        let lines = if size.height < 250.0 { 4 } else { 6 };
        let y = ticks(low / base, high / base, lines);
        let letters = self.lines.iter().map(|l| l.label.chars().count()).max().unwrap_or(0);
        let frame = Frame {
            size,
            // Charts below each other are of one width.
            right: size.width - 12.0 - LETTER * letters.max(LETTERS) as f64,
            x: (0.0, self.steps.max(1.0)),
            y: (y[0] * base, y[y.len() - 1] * base),
        };
        let mut svg = format!(
            "<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\">",
            size.width,
            size.height,
            super::page::escaped(&self.title)
        );
        self.axes(&mut svg, &frame, &y, base);
        for line in &self.lines {
            draw(&mut svg, &frame, line);
        }
        self.labels(&mut svg, &frame);
        svg + "</svg>"
    }

    fn axes(&self, svg: &mut String, frame: &Frame, y: &[f64], base: f64) {
        let step = y.get(1).map_or(1.0, |next| next - y[0]);
        for (i, tick) in y.iter().enumerate() {
            let (_, at) = frame.at((0.0, tick * base));
            let class = if i == 0 { "base" } else { "rule" };
            let label = match self.unit {
                Unit::Bytes if i + 1 == y.len() => {
                    format!("{} {}", decimal(*tick, step), binary_unit(tick * base).1)
                }
                Unit::Scientific => scientific(*tick, step),
                Unit::Plain | Unit::Bytes => decimal(*tick, step),
            };
            let _ = write!(
                svg,
                "<line class=\"{class}\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
                 <text class=\"tick\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
                frame.right,
                LEFT - 8.0,
                at + 4.0,
            );
        }
        let many = ((frame.right - LEFT) / 80.0) as usize;
        let x = ticks(0.0, frame.x.1, many.clamp(2, 8));
        let step = x[1] - x[0];
        for tick in x.iter().filter(|tick| **tick <= frame.x.1 * 1.001 && tick.fract() == 0.0) {
            let (at, _) = frame.at((*tick, frame.y.0));
            let _ = write!(
                svg,
                "<text class=\"tick\" x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                frame.size.height - 6.0,
                decimal(*tick, step),
            );
        }
    }

    /// The labels beside the ends of their lines, pushed apart where they would touch.
    fn labels(&self, svg: &mut String, frame: &Frame) {
        let end = |line: &Line| {
            let last = line.points.iter().rev().find(|point| point.1.is_finite())?;
            Some(frame.at(*last))
        };
        let mut ends: Vec<(f64, f64, &Line)> =
            self.lines.iter().filter_map(|l| end(l).map(|(x, y)| (x, y, l))).collect();
        ends.sort_by(|a, b| a.1.total_cmp(&b.1));
        let lowest = frame.size.height - BOTTOM;
        for i in (0..ends.len()).rev() {
            let limit = if i + 1 == ends.len() { lowest } else { ends[i + 1].1 - LEADING };
            ends[i].1 = ends[i].1.min(limit);
        }
        for i in 1..ends.len() {
            ends[i].1 = ends[i].1.max(ends[i - 1].1 + LEADING);
        }
        for (x, y, line) in ends {
            let _ = write!(
                svg,
                "<text class=\"label {}\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                line.class,
                x + 7.0,
                y + 4.0,
                super::page::escaped(&line.label),
            );
        }
    }
}

/// A path, broken where a value is not finite, and dots on points that stand alone.
fn draw(svg: &mut String, frame: &Frame, line: &Line) {
    let mut path = String::new();
    let mut dots = String::new();
    for run in line.points.split(|point| !point.1.is_finite()) {
        for (i, point) in run.iter().enumerate() {
            let (x, y) = frame.at(*point);
            let _ = write!(path, "{}{x:.1} {y:.1}", if i == 0 { "M" } else { "L" });
            if line.dots || run.len() == 1 {
                let _ = write!(
                    dots,
                    "<circle class=\"{}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.6\">\
                     <title>step {}: {}</title></circle>",
                    line.class, point.0, point.1
                );
            }
        }
    }
    let _ = write!(
        svg,
        "<path fill=\"none\" stroke=\"currentColor\" class=\"{}\" d=\"{path}\"/>{dots}",
        line.class
    );
}

/// Round numbers from at most `low` to at least `high`, about so many, evenly apart (Heckbert 1990).
fn ticks(low: f64, high: f64, many: usize) -> Vec<f64> {
    // A flat line stands in the middle of something.
    let span = match high - low {
        0.0 if high == 0.0 => 1.0,
        0.0 => high.abs() / 2.0,
        span => span,
    };
    let rough = span / many.max(1) as f64;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|m| m * power);
    let step = step.into_iter().find(|step| *step >= rough * 0.999).unwrap_or(10.0 * power);
    let (first, last) = ((low / step + 1e-9).floor(), (high / step - 1e-9).ceil());
    let last = last.max(first + 1.0);
    (0..=(last - first) as usize).map(|i| (first + i as f64) * step).collect()
}

/// With as many decimals as the step needs, and thin spaces between thousands.
pub(crate) fn decimal(value: f64, step: f64) -> String {
    let decimals = (0..8).find(|d| {
        let scaled = step * 10f64.powi(*d);
        (scaled - scaled.round()).abs() < 1e-6 * scaled.abs()
    });
    let text = format!("{value:.*}", decimals.unwrap_or(8) as usize);
    let (whole, rest) =
        text.split_once('.').map_or((&*text, ""), |(whole, _)| (whole, &text[whole.len()..]));
    let digits = whole.trim_start_matches('-').len();
    let mut out = String::new();
    for (i, c) in whole.chars().enumerate() {
        let left = whole.len() - i;
        if digits > 4 && left.is_multiple_of(3) && left < digits {
            out.push('\u{202f}');
        }
        out.push(c);
    }
    out + rest
}

/// `2e-4` where decimals would be many.
pub(crate) fn scientific(value: f64, step: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    if step >= 1e-3 {
        return decimal(value, step);
    }
    let text = format!("{value:.2e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    format!("{}e{exponent}", mantissa.trim_end_matches('0').trim_end_matches('.'))
}

/// The largest binary unit that is not above so many bytes.
fn binary_unit(bytes: f64) -> (f64, &'static str) {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")].map(|(p, name)| (f64::from(1 << p), name));
    units.into_iter().find(|(unit, _)| bytes >= *unit).unwrap_or((1.0, "B"))
}

#[cfg(test)]
mod tests {
    use super::{decimal, scientific, ticks};

    #[test]
    fn ticks_are_round_and_hold_the_values_between_them() {
        assert_eq!(ticks(0.0, 1.0, 4), [0.0, 0.25, 0.5, 0.75, 1.0]);
        assert_eq!(ticks(0.3, 3.9, 5), [0.0, 1.0, 2.0, 3.0, 4.0]);
        assert_eq!(ticks(0.0, 1000.0, 5), [0.0, 200.0, 400.0, 600.0, 800.0, 1000.0]);
        for (low, high) in [(0.0, 0.0), (5.0, 5.0), (-3.0, 7.1), (1e-6, 2e-4), (0.0, 1e12)] {
            for many in 2..9 {
                let ticks = ticks(low, high, many);
                let (first, last) = (ticks[0], ticks[ticks.len() - 1]);
                assert!(first <= low + 1e-12 && last >= high && ticks.len() >= 2, "{ticks:?}");
                assert!(ticks.len() <= many + 3, "{ticks:?}");
            }
        }
    }

    #[test]
    fn numbers_have_the_decimals_of_their_step() {
        assert_eq!((decimal(0.5, 0.25), decimal(3.0, 1.0)), ("0.50".into(), "3".into()));
        assert_eq!(decimal(12000.0, 2000.0), "12\u{202f}000");
        assert_eq!(decimal(1000.0, 200.0), "1000");
        assert_eq!((scientific(2e-4, 5e-5), scientific(0.0, 5e-5)), ("2e-4".into(), "0".into()));
    }
}

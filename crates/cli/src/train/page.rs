//! The run as one HTML page: no script, nothing from the network.

use super::chart::{Chart, Line, Size, Unit, decimal, scientific};
use super::events::step;
use crate::units::{Bytes, Count};
use serde_json::Value;
use std::fmt::Write;

/// What the page says beside the events.
pub(crate) struct Summary {
    pub(crate) model: String,
    pub(crate) iters: u64,
    /// Of a step on the largest batch, by its plan.
    pub(crate) planned_bytes: u64,
    /// Gradients above it are scaled down.
    pub(crate) max_gradient_norm: f64,
    /// Name and value.
    pub(crate) data: Vec<(String, String)>,
    pub(crate) settings: Vec<(String, String)>,
}

const STYLE: &str = include_str!("page.css");
/// Where a page that goes on finds what the earlier one knew.
const EVENTS: &str = "<script type=\"application/json\" id=\"events\">";
const WIDE: Size = Size { width: 900.0, height: 320.0 };
const NARROW: Size = Size { width: 380.0, height: 260.0 };
const SMALL: Size = Size { width: 420.0, height: 220.0 };

/// The page.
pub(crate) fn html(summary: &Summary, events: &[Value]) -> String {
    let title = format!("Fine-tuning {}", escaped(&summary.model));
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>{title}</title><style>{STYLE}</style></head>\n<body><header><h1>{title}</h1>\
         <p>{}</p></header>\n",
        state(summary, events)
    );
    page += &figures(summary, events);
    let loss = loss(summary, events);
    let _ = write!(
        page,
        "<section><h2>Loss <small>nats per trained token, by step</small></h2>\
         <div class=\"wide\">{}</div><div class=\"narrow\">{}</div></section>\n<div class=\"grid\">",
        loss.svg(WIDE),
        loss.svg(NARROW)
    );
    for (name, note, chart) in small_charts(summary, events) {
        let svg = chart.svg(SMALL);
        let _ = writeln!(page, "<section><h2>{name} <small>{note}</small></h2>{svg}</section>");
    }
    page += "</div>\n";
    page += &skipped(events);
    let _ = writeln!(
        page,
        "<div class=\"grid\">{}{}</div>",
        table("Data", &summary.data),
        table("Settings", &summary.settings)
    );
    // Within a script only its end must not appear.
    let json = Value::from(events.to_vec()).to_string().replace("</", "<\\/");
    let version = env!("CARGO_PKG_VERSION");
    let _ = writeln!(
        page,
        "<footer>metal-candle {version}</footer>\n{EVENTS}{json}</script></body></html>"
    );
    page
}

/// The events that a page was drawn from; none where it is no such page.
pub(crate) fn events(page: &str) -> Vec<Value> {
    let json = page.split_once(EVENTS).and_then(|(_, rest)| rest.split_once("</script>"));
    json.and_then(|(json, _)| serde_json::from_str(json).ok()).unwrap_or_default()
}

pub(crate) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn named<'e>(events: &'e [Value], name: &'e str) -> impl DoubleEndedIterator<Item = &'e Value> {
    events.iter().filter(move |event| event["event"] == name)
}

/// `(step, value)` of a field of all events of this name; NaN where the value is not finite.
fn series(events: &[Value], name: &str, field: &str) -> Vec<(f64, f64)> {
    let point = |event: &Value| {
        let value = event.get(field)?;
        Some((step(event) as f64, value.as_f64().unwrap_or(f64::NAN)))
    };
    named(events, name).filter_map(point).collect()
}

fn state(summary: &Summary, events: &[Value]) -> String {
    let last = events.iter().map(step).max().unwrap_or(0);
    let seconds = events.last().and_then(|event| event["seconds"].as_f64()).unwrap_or(0.0) as u64;
    let time = match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    };
    let end = match events.last().map(|event| event["event"].as_str()) {
        Some(Some("stopped")) => ", stopped",
        Some(Some("stale")) => ", ended early: the validation loss no longer fell",
        _ if last < summary.iters => ", running",
        _ => ", done",
    };
    let steps = decimal(last as f64, 1.0);
    format!("Step {steps} of {}{end} &middot; {time}", decimal(summary.iters as f64, 1.0))
}

/// The numbers that are looked for first.
fn figures(summary: &Summary, events: &[Value]) -> String {
    let mut all: Vec<(&str, String, String)> = Vec::new();
    let train = series(events, "train", "loss");
    if let (Some(first), Some(last)) = (train.first(), train.last()) {
        all.push(("Training loss", format!("{:.3}", last.1), format!("from {:.3}", first.1)));
    }
    let valid = series(events, "validation", "loss");
    let best = valid.iter().filter(|p| p.1.is_finite()).min_by(|a, b| a.1.total_cmp(&b.1));
    if let (Some(best), Some(first)) = (best, valid.first()) {
        let note = format!("from {:.3}; at step {}", first.1, best.0);
        all.push(("Best validation loss", format!("{:.3}", best.1), note));
    }
    let mut rates: Vec<f64> =
        series(events, "train", "tokens_per_second").into_iter().map(|p| p.1).collect();
    rates.sort_by(f64::total_cmp);
    if !rates.is_empty() {
        let median = decimal(rates[rates.len() / 2].round(), 1.0);
        all.push(("Tokens per second", median, "median, padding included".to_owned()));
    }
    let peak = events.iter().filter_map(|event| event["peak_resident_bytes"].as_u64()).max();
    let planned = Bytes(summary.planned_bytes).to_string();
    match peak {
        Some(peak) => {
            let note = format!("{planned} of it planned");
            all.push(("Peak memory", Bytes(peak).to_string(), note));
        }
        None => all.push(("Planned memory", planned, "of one step".to_owned())),
    }
    let mut html = "<dl class=\"figures\">".to_owned();
    for (name, value, note) in all {
        let _ = write!(html, "<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>");
    }
    html + "</dl>\n"
}

fn loss(summary: &Summary, events: &[Value]) -> Chart {
    let train = series(events, "train", "loss");
    let valid = series(events, "validation", "loss");
    let last = |points: &[(f64, f64)]| points.last().map_or(f64::NAN, |p| p.1);
    let line = |name: &str, class, points: Vec<(f64, f64)>, dots| {
        let label = format!("{name} {:.3}", last(&points));
        Line { label, class, points, dots }
    };
    let mut lines = vec![line("train", "a", train, false)];
    if !valid.is_empty() {
        lines.push(line("valid", "b", valid, true));
    }
    chart("Loss by step", lines, Unit::Plain, false, summary)
}

fn small_charts(summary: &Summary, events: &[Value]) -> Vec<(&'static str, String, Chart)> {
    let line = |label: String, field| {
        vec![Line { label, class: "a", points: series(events, "train", field), dots: false }]
    };
    let last = |field| series(events, "train", field).last().map_or(f64::NAN, |p| p.1);
    let rate = last("learning_rate");
    let clip = summary.max_gradient_norm;
    let mut norms = line(format!("{:.2}", last("gradient_norm")), "gradient_norm");
    let steps = summary.iters as f64;
    let level = |label: String, value| {
        let points = vec![(0.0, value), (steps, value)];
        Line { label, class: "level", points, dots: false }
    };
    if norms[0].points.iter().any(|point| point.1 > clip) {
        norms.push(level(format!("clip {clip}"), clip));
    }
    let speed = decimal(last("tokens_per_second").round(), 1.0);
    let speed = line(speed, "tokens_per_second");
    let mut memory = line("process".to_owned(), "resident_bytes");
    memory.push(level("plan".to_owned(), summary.planned_bytes as f64));
    let c = |title: &str, lines, unit| chart(title, lines, unit, true, summary);
    vec![
        (
            "Learning rate",
            "by step".to_owned(),
            c(
                "Learning rate by step",
                line(scientific(rate, 1e-9), "learning_rate"),
                Unit::Scientific,
            ),
        ),
        (
            "Gradient norm",
            "before clipping".to_owned(),
            c("Gradient norm by step", norms, Unit::Plain),
        ),
        (
            "Speed",
            "tokens per second, padding included".to_owned(),
            c("Tokens per second by step", speed, Unit::Plain),
        ),
        (
            "Memory",
            "of the process, and a step's peak by its plan".to_owned(),
            c("Memory by step", memory, Unit::Bytes),
        ),
    ]
}

fn chart(title: &str, lines: Vec<Line>, unit: Unit, from_zero: bool, summary: &Summary) -> Chart {
    Chart { title: title.to_owned(), lines, from_zero, unit, steps: summary.iters as f64 }
}

/// The updates that were skipped, if any were.
fn skipped(events: &[Value]) -> String {
    let rows: Vec<(String, String)> = named(events, "skipped")
        .map(|event| {
            let culprit = event["culprit"].as_str().unwrap_or("the loss");
            (format!("Step {}", step(event)), format!("first not finite: {culprit}"))
        })
        .collect();
    if rows.is_empty() { String::new() } else { table("Skipped updates", &rows) }
}

fn table(title: &str, rows: &[(String, String)]) -> String {
    let mut html = format!("<section><h2>{title}</h2><table>");
    for (name, value) in rows {
        let (name, value) = (escaped(name), escaped(value));
        let _ = write!(html, "<tr><th scope=\"row\">{name}</th><td>{value}</td></tr>");
    }
    html + "</table></section>\n"
}

/// A number of tokens or rows, as the page writes it.
pub(crate) fn count(n: usize) -> String {
    if n < 100_000 { decimal(n as f64, 1.0) } else { Count(n as u64).to_string() }
}

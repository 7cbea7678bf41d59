//! Where the time of a plan goes, by kinds of steps.

use metal_candle::Plan;
use std::collections::BTreeMap;

/// How rates are printed, and what a line begins with.
pub(crate) struct Units {
    pub(crate) mark: &'static str,
    /// What so many operations, or bytes, are called.
    pub(crate) scale: f64,
    pub(crate) operations: &'static str,
    pub(crate) bytes: &'static str,
}

/// What steps of one label and one shape of result take together.
#[derive(Default)]
struct Kind {
    steps: usize,
    seconds: f64,
    flops: u64,
    bytes: u64,
}

/// The kinds of steps with what they take, the dearest first. `seconds` are those of every step.
pub(crate) fn print(plan: &Plan, seconds: &[f64], units: &Units) {
    assert_eq!(seconds.len(), plan.steps.len(), "the plan of another run");
    let mut kinds: BTreeMap<String, Kind> = BTreeMap::new();
    for (step, seconds) in plan.steps.iter().zip(seconds) {
        let shape = step.outs.first().map(|out| out.layout.shape.to_string());
        let name = format!("{} -> {}", step.label, shape.unwrap_or_default());
        let kind = kinds.entry(name).or_default();
        kind.steps += 1;
        kind.seconds += seconds;
        kind.flops += step.flops;
        kind.bytes += step.bytes;
    }
    let mut kinds: Vec<_> = kinds.into_iter().collect();
    kinds.sort_by(|a, b| b.1.seconds.total_cmp(&a.1.seconds));
    let Units { mark, scale, operations, bytes } = units;
    println!("{mark}{:.2} ms in {} steps", 1e3 * seconds.iter().sum::<f64>(), plan.steps.len());
    for (name, kind) in kinds.into_iter().take(40) {
        println!(
            "{mark}{:9.3} ms {:4} x {:8.1} {operations} {:7.2} {bytes}  {name}",
            kind.seconds * 1e3,
            kind.steps,
            kind.flops as f64 / kind.seconds / scale,
            kind.bytes as f64 / kind.seconds / scale,
        );
    }
}

//! Where the time of a plan goes: `--steps '{"work": "train", ...}'`, a row as `cargo xtask bench cpu` asks for it.

use super::Failure;
use super::model::{prompted, training};
use super::serve::{number, text};
use metal_candle::generate::{DecodeShape, Generator, KVCache};
use metal_candle::{Plan, Timing};
use serde_json::Value;
use std::collections::BTreeMap;

/// Each step at its best of so many runs: what else the machine does meanwhile is left out.
const RUNS: usize = 7;

pub(crate) fn print(row: &str) -> Result<(), Failure> {
    let row: Value = serde_json::from_str(row)?;
    match text(&row, "work")? {
        "train" => train(&row),
        "prefill" => prefill(&row),
        "decode" => decode(&row),
        other => {
            Err(format!("no plan of {other:?} to look at: expected train, prefill or decode")
                .into())
        }
    }
}

fn train(row: &Value) -> Result<(), Failure> {
    let (mut step, batches, shape) = training(row)?;
    let plan = step.plan(shape)?;
    let mut best = Best::default();
    for i in 0..RUNS {
        let (_, seconds) = step.profile(&batches[i % batches.len()], 1e-4, Timing::Steps)?;
        best.add(&seconds);
    }
    best.print(&plan);
    Ok(())
}

fn prefill(row: &Value) -> Result<(), Failure> {
    let (decoder, generator, ids) = prompted(row)?;
    let capacity = ids.len();
    let mut best = Best::default();
    for _ in 0..RUNS {
        let mut cache = KVCache::new(&decoder, 1, capacity)?;
        best.add(&generator.profile(&ids, &mut cache, Timing::Steps)?.1);
    }
    let shape = DecodeShape { batch: 1, tokens: ids.len(), capacity };
    best.print(&Generator::outline(decoder, shape)?.plan);
    Ok(())
}

fn decode(row: &Value) -> Result<(), Failure> {
    let (decoder, generator, ids) = prompted(row)?;
    let (tokens, mut best) = (number(row, "tokens")?, Best::default());
    let capacity = ids.len() + tokens;
    let mut cache = KVCache::new(&decoder, 1, capacity)?;
    let mut id = generator.best(&ids, &mut cache)?;
    for _ in 0..tokens {
        let (next, seconds) = generator.profile(&[id], &mut cache, Timing::Steps)?;
        best.add(&seconds);
        id = next;
    }
    let shape = DecodeShape { batch: 1, tokens: 1, capacity };
    best.print(&Generator::outline(decoder, shape)?.plan);
    Ok(())
}

/// Seconds of every step.
#[derive(Default)]
struct Best(Vec<f64>);

impl Best {
    fn add(&mut self, seconds: &[f64]) {
        self.0.resize(seconds.len(), f64::INFINITY);
        for (best, seconds) in self.0.iter_mut().zip(seconds) {
            *best = best.min(*seconds);
        }
    }

    /// What the kinds of steps take together, the dearest first.
    fn print(&self, plan: &Plan) {
        assert_eq!(self.0.len(), plan.steps.len(), "the plan of another run");
        let mut kinds: BTreeMap<String, (usize, f64, u64, u64)> = BTreeMap::new();
        for (step, seconds) in plan.steps.iter().zip(&self.0) {
            let shape = step.outs.first().map(|out| out.layout.shape.to_string());
            let kind = kinds.entry(format!("{} -> {}", step.label, shape.unwrap_or_default()));
            let sum = kind.or_default();
            *sum = (sum.0 + 1, sum.1 + seconds, sum.2 + step.flops, sum.3 + step.bytes);
        }
        let mut kinds: Vec<_> = kinds.into_iter().collect();
        kinds.sort_by(|a, b| b.1.1.total_cmp(&a.1.1));
        println!("{:.2} ms in {} steps", 1e3 * self.0.iter().sum::<f64>(), plan.steps.len());
        for (kind, (count, seconds, flops, bytes)) in kinds.into_iter().take(40) {
            println!(
                "{:9.3} ms {count:4} x {:8.1} GFLOP/s {:7.2} GB/s  {kind}",
                seconds * 1e3,
                flops as f64 / seconds / 1e9,
                bytes as f64 / seconds / 1e9,
            );
        }
    }
}

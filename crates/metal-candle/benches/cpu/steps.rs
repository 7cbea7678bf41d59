//! Where the time of a plan goes: `--steps '{"work": "train", ...}'`, a row as `cargo xtask bench cpu` asks for it.

use super::Failure;
use super::embed::model_and_texts;
use super::model::{prompted, training};
use super::serve::{number, text};
use crate::kinds::{self, Units};
use metal_candle::generate::{DecodeShape, Generator, KVCache};
use metal_candle::{Plan, Timing};
use serde_json::Value;

const UNITS: Units = Units { mark: "", scale: 1e9, operations: "GFLOP/s", bytes: "GB/s" };

/// Each step at its best of so many runs: what else the machine does meanwhile is left out.
const RUNS: usize = 7;

pub(crate) fn print(row: &str) -> Result<(), Failure> {
    let row: Value = serde_json::from_str(row)?;
    match text(&row, "work")? {
        "train" => train(&row),
        "prefill" => prefill(&row),
        "decode" => decode(&row),
        "embed" => embed(&row),
        other => {
            let expected = "expected train, prefill, decode or embed";
            Err(format!("no plan of {other:?} to look at: {expected}").into())
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

fn embed(row: &Value) -> Result<(), Failure> {
    let (model, texts) = model_and_texts(row)?;
    let (plan, seconds) = model.profile(&texts, Timing::Steps)?;
    let mut best = Best::default();
    best.add(&seconds);
    for _ in 1..RUNS {
        best.add(&model.profile(&texts, Timing::Steps)?.1);
    }
    best.print(&plan);
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

    fn print(&self, plan: &Plan) {
        kinds::print(plan, &self.0, &UNITS);
    }
}

//! Rotary frequencies and how they are scaled.
//!
//! Every step is rounded to f32 as transformers rounds it: at a position of some thousands a
//! frequency's last bit is seen in the logits.

use crate::Result;
use crate::error::ErrorKind;
use crate::io::RopeScaling;
use std::f32::consts::TAU;
use std::f64::consts::TAU as TAU_F64;

/// The frequency of every pair of dims, `[head_dim / 2]`.
pub(super) fn inverse_frequencies(
    head_dim: usize,
    theta: f64,
    scaling: &RopeScaling,
) -> Result<Vec<f32>> {
    let exponent = |i: usize| f64::from((2 * i) as f32 / head_dim as f32);
    let wave = |i: usize| theta.powf(exponent(i)) as f32;
    let plain = (0..head_dim / 2).map(|i| 1.0 / wave(i));
    Ok(match scaling {
        RopeScaling::None => plain.collect(),
        RopeScaling::Linear { factor } => plain.map(|f| f / *factor as f32).collect(),
        RopeScaling::Divisors(divisors) => {
            let (expected, got) = (head_dim / 2, divisors.len());
            if got != expected {
                return Err(ErrorKind::RopeDivisors { expected, got }.into());
            }
            plain.zip(divisors).map(|(f, divisor)| f / divisor).collect()
        }
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let [factor, low, high, context] =
                [factor, low_freq_factor, high_freq_factor, original_max_position_embeddings]
                    .map(|&x| x as f32);
            plain.map(|f| llama3(f, factor, low, high, context)).collect()
        }
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            truncate,
            attention_factor: _,
        } => {
            // The pair, as a fraction, that turns so many times in the original context.
            let pair = |turns: f64| {
                let wave = original_max_position_embeddings / (turns * TAU_F64);
                head_dim as f64 * wave.ln() / (2.0 * theta.ln())
            };
            let [mut from, mut to] = [pair(*beta_fast), pair(*beta_slow)];
            if *truncate {
                (from, to) = (from.floor(), to.ceil());
            }
            let (from, to) = (from.max(0.0), to.min(head_dim as f64 - 1.0));
            let pairs = 0..head_dim / 2;
            pairs.map(|i| yarn(i, wave(i), *factor as f32, from, to)).collect()
        }
    })
}

/// What multiplies cos and sin.
pub(super) fn attention_factor(scaling: &RopeScaling) -> f64 {
    match scaling {
        RopeScaling::Yarn { attention_factor, .. } => *attention_factor,
        RopeScaling::None
        | RopeScaling::Linear { .. }
        | RopeScaling::Llama3 { .. }
        | RopeScaling::Divisors(_) => 1.0,
    }
}

fn llama3(f: f32, factor: f32, low: f32, high: f32, context: f32) -> f32 {
    let wavelength = TAU / f;
    if wavelength < context / high {
        f
    } else if wavelength > context / low {
        f / factor
    } else {
        let smooth = (context / wavelength - low) / (high - low);
        (1.0 - smooth) * f / factor + smooth * f
    }
}

/// The frequency `1 / wave` of pair `i`: kept up to pair `from`, divided by `factor` from pair `to` on, and something of both
/// between them.
fn yarn(i: usize, wave: f32, factor: f32, from: f64, to: f64) -> f32 {
    // A ramp of no length is a step.
    let to = if from == to { to + 0.001 } else { to };
    let ramp = ((i as f32 - from as f32) / (to - from) as f32).clamp(0.0, 1.0);
    let (kept, divided) = (1.0 / wave, 1.0 / (factor * wave));
    let keep = 1.0 - ramp;
    divided * (1.0 - keep) + kept * keep
}

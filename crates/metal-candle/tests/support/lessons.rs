//! What tiny models are taught, and the adapter that learns it.

use crate::tiny::VOCAB;
use metal_candle::io::LoraConfig;
use metal_candle::io::data::Example;
use metal_candle::io::peft::TargetModules;

/// Rows of different lengths that repeat a pattern, so that there is something to learn.
pub(crate) fn examples(rows: usize, seed: u32) -> Vec<Example> {
    let example = |row: usize| {
        let len = 6 + (row * 7) % 40;
        let id = |i: usize| (seed as usize + row + 3 * i) % (VOCAB - 2);
        Example { ids: (0..len).map(|i| id(i) as u32).collect(), trained: vec![true; len] }
    };
    (0..rows).map(example).collect()
}

/// On every linear layer.
pub(crate) fn lora(dropout: f64) -> LoraConfig {
    LoraConfig {
        r: 4,
        lora_alpha: 8.0,
        lora_dropout: dropout,
        target_modules: TargetModules::AllLinear,
        ..LoraConfig::default()
    }
}

//! What is in use on a GPU is what the plan says and the workspaces that it lists.

#[path = "support/random_model.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod random_model;
#[path = "support/testbed.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod testbed;

use crate::testbed::device;
use candle_core::DType as CandleDType;
use metal_candle::io::LoraConfig;
use metal_candle::io::data::Batch;
use metal_candle::io::peft::TargetModules;
use metal_candle::models::BaseWeights;
use metal_candle::nn::LoRAAdapter;
use metal_candle::train::{AdamWConfig, StepShape, TrainStep};
use metal_candle::{Device, Memory};
use random_model::Sizes;
use std::sync::Arc;

/// 103 million weights: 197 MiB as bf16.
const SIZES: Sizes = Sizes {
    hidden: 1024,
    inner: 2816,
    vocabulary: 32_000,
    layers: 6,
    heads: 16,
    kv_heads: 8,
    context: 512,
};

/// What a pool may lose to the sizes that it gives out memory in: some hundred tensors are at most some KiB larger than
/// they ask for.
const GRANULARITY_BYTES: usize = 4 << 20;

/// Values of up to 64 KiB are counted among the inputs, and again where they wait for a run to take them along.
const SMALL_BYTES: usize = 4 << 20;

#[test]
fn memory_in_use_is_the_plan_and_the_workspaces_that_are_listed() {
    let Some(before) = device().memory().filter(|_| *device() != Device::Cpu) else {
        eprintln!("SKIPPED: {} does not tell what a plan holds of its memory", device());
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    random_model::write(folder.path(), SIZES, CandleDType::BF16, CandleDType::BF16);
    let [batch, seq] = [4, 256];
    let mut step = step(folder.path());
    let plan = step.plan(StepShape { batch, seq, accumulated: 1, packed: false }).unwrap();
    let listed = device().workspaces(&plan).unwrap();
    for round in 0..20 {
        let metrics = step.run(&tokens(batch, seq, round), 1e-4).unwrap();
        assert!(metrics.applied, "{metrics:?}");
    }

    let after = device().memory().unwrap();
    let own: usize = listed.iter().filter(|w| !w.shared).map(|w| w.bytes).sum();
    let expected = plan.peak_bytes() + own;
    let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
    println!("plan                     {:9.3} MiB", mib(plan.peak_bytes()));
    for workspace in &listed {
        let shared = if workspace.shared { ", there before" } else { "" };
        println!("{:24} {:9.3} MiB{shared}", workspace.name, mib(workspace.bytes));
    }
    let of = |memory: Memory| memory.used_bytes - before.used_bytes;
    let (used, peak) = (of(after), after.peak_bytes - before.used_bytes);
    println!("expected                 {:9.3} MiB", mib(expected));
    println!("in use                   {:9.3} MiB, at the peak {:.3}", mib(used), mib(peak));
    // Whoever else uses the device meanwhile is in this number, too.
    let driver = before.free_bytes as i64 - after.free_bytes as i64 - used as i64;
    println!(
        "the driver's own, by what is free (machine code, recorded runs): {} KiB",
        driver >> 10
    );

    assert!(plan.peak_bytes() > 300 << 20, "{plan}");
    assert!(peak >= used, "{peak} {used}");
    assert!(peak <= expected + GRANULARITY_BYTES, "{peak} at the peak, expected {expected}");
    assert!(used + SMALL_BYTES >= expected, "{used} in use, expected {expected}");
}

fn step(folder: &std::path::Path) -> TrainStep {
    let decoder = testbed::decoder(folder, BaseWeights::BF16);
    let config = LoraConfig {
        r: 16,
        lora_alpha: 16.0,
        target_modules: TargetModules::AllLinear,
        ..LoraConfig::default()
    };
    let adapter = LoRAAdapter::new(config, decoder.modules(), 0, device()).unwrap();
    TrainStep::new(Arc::new(decoder), adapter, AdamWConfig::default(), 1.0, 0).unwrap()
}

fn tokens(batch: usize, seq: usize, round: usize) -> Batch {
    let id = |i: usize| ((i * 7919 + round * 104_729) % SIZES.vocabulary) as u32;
    let ids: Vec<u32> = (0..batch * seq).map(id).collect();
    let labels = ids.iter().map(|id| i64::from(*id)).collect();
    Batch { ids, labels, batch, seq, trained: batch * seq, documents: None }
}

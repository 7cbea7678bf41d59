//! Weights that are laid out once for the CPU's products: the same numbers, for more memory.

use super::decoder;
use crate::random_model::{HIDDEN, INNER, model};
use crate::testbed::{self, device};
use candle_core::DType as CandleDType;
use metal_candle::io::LoraConfig;
use metal_candle::io::data::Batch;
use metal_candle::io::peft::TargetModules;
use metal_candle::models::{BaseWeights, Decoder};
use metal_candle::nn::LoRAAdapter;
use metal_candle::train::{AdamWConfig, StepShape, TrainStep};
use metal_candle::{BlockFormat, DType, Device, Workspace};
use std::sync::Arc;

/// As many rows as products want to have panels kept, and long enough for sums of products.
const ROWS: [usize; 2] = [3, 40];

fn step(decoder: &Arc<Decoder>) -> TrainStep {
    let targets = ["q_proj", "v_proj"].map(String::from).into();
    let config = LoraConfig {
        r: 4,
        lora_dropout: 0.1,
        target_modules: TargetModules::Names(targets),
        ..LoraConfig::default()
    };
    let adapter = LoRAAdapter::new(config, decoder.modules(), 3, device()).unwrap();
    let optimizer = AdamWConfig::default();
    TrainStep::new(Arc::clone(decoder), adapter, optimizer, 1.0, 0).unwrap()
}

fn batch() -> Batch {
    let [rows, seq] = ROWS;
    let ids: Vec<u32> = (0..rows * seq).map(|i| (i * 37 % 512) as u32).collect();
    let labels = ids.iter().map(|id| i64::from(*id + 1) % 512).collect();
    Batch { batch: rows, seq, ids, labels, trained: rows * seq, documents: None }
}

/// What is listed beside the plan for prepacked weights.
fn listed(step: &TrainStep) -> Option<usize> {
    let shape = StepShape { batch: ROWS[0], seq: ROWS[1], accumulated: 1, packed: false };
    let (plan, workspaces) = step.plan_with_workspaces(shape).unwrap();
    assert_eq!(plan, step.plan(shape).unwrap());
    let is_of = |workspace: &&Workspace| workspace.name == "prepacked weights";
    workspaces.iter().find(is_of).map(|workspace| workspace.bytes)
}

#[test]
fn steps_with_prepacked_weights_have_the_bits_of_others() {
    let folder = model(CandleDType::BF16, CandleDType::BF16);
    let path = folder.path();
    for (base, activations) in [(BaseWeights::F32, DType::F32), (BaseWeights::BF16, DType::BF16)] {
        let decoder = Arc::new(decoder(path, base).with_activations(activations));
        let (mut plain, mut prepacking) = (step(&decoder), step(&decoder).prepacking());
        for _ in 0..3 {
            let [want, got] = [&mut plain, &mut prepacking].map(|s| s.run(&batch(), 1e-2).unwrap());
            assert_eq!(got, want);
            assert!(want.applied);
        }
        assert_eq!(prepacking.evaluate(&batch()).unwrap(), plain.evaluate(&batch()).unwrap());
        for ((name, got), (_, want)) in prepacking.state().zip(plain.state()) {
            let [got, want] = [got, want].map(|x| x.to_dtype(DType::F32).unwrap());
            assert_eq!(got.to_vec::<f32>().unwrap(), want.to_vec::<f32>().unwrap(), "{name}");
        }
    }
}

#[test]
fn the_memory_of_prepacked_weights_is_listed_with_the_plan() {
    if !testbed::is_on_cpu("the memory of prepacked weights", "others read weights as they lie") {
        return;
    }
    let folder = model(CandleDType::BF16, CandleDType::BF16);
    let load = |base| Arc::new(decoder(folder.path(), base).with_activations(DType::BF16));
    let dense = load(BaseWeights::BF16);
    assert_eq!(listed(&step(&dense)), None);
    // Two layers of q, k, v, o, gate, up and down, in both orders; a last panel may be wider than what it holds.
    let layer = HIDDEN * (2 * HIDDEN + HIDDEN + 3 * INNER);
    let weights = 2 * 2 * 2 * layer;
    let bytes = listed(&step(&dense).prepacking()).unwrap();
    assert!((weights * 9 / 10..2 * weights).contains(&bytes), "{bytes} of {weights}");
    // Weights in blocks are unpacked as they are read.
    let blocks = load(BaseWeights::Quantised { format: BlockFormat::Q8_0, rest: DType::F32 });
    assert_eq!(listed(&step(&blocks).prepacking()), Some(0));
    assert_eq!(*device(), Device::Cpu);
}

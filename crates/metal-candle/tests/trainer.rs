//! The loop around the step: a run that goes on equals one that never stopped, several batches equal one, and what is
//! not finite changes nothing.

#[path = "io/support.rs"]
#[allow(dead_code, reason = "only the GGUF writer is used here")]
mod support;
#[path = "regressions/tiny.rs"]
#[allow(dead_code, reason = "only the decoder is used here")]
mod tiny;

use metal_candle::Device;
use metal_candle::io::LoraConfig;
use metal_candle::io::data::{Batch, Example};
use metal_candle::io::peft::TargetModules;
use metal_candle::nn::LoRAAdapter;
use metal_candle::train::TrainingConfig;
use metal_candle::train::{AdamWConfig, LRScheduler, Report, StepShape, TrainStep, Trainer};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tiny::{Tiny, VOCAB};

/// Rows of different lengths that repeat a pattern, so that there is something to learn.
fn examples(rows: usize, seed: u32) -> Vec<Example> {
    let example = |row: usize| {
        let len = 6 + (row * 7) % 40;
        let id = |i: usize| (seed as usize + row + 3 * i) % (VOCAB - 2);
        Example { ids: (0..len).map(|i| id(i) as u32).collect(), trained: vec![true; len] }
    };
    (0..rows).map(example).collect()
}

fn fresh_adapter(dropout: f64) -> LoRAAdapter {
    let config = LoraConfig {
        r: 4,
        lora_alpha: 8.0,
        lora_dropout: dropout,
        target_modules: TargetModules::AllLinear,
        ..LoraConfig::default()
    };
    LoRAAdapter::new(config, Tiny::new().decoder().modules(), 1, &Device::Cpu).unwrap()
}

fn config(folder: &Path) -> TrainingConfig {
    TrainingConfig {
        iters: 23,
        batch_size: 3,
        max_seq_length: 32,
        schedule: LRScheduler::WarmupCosine { rate: 5e-3, warmup: 3, total: 23, floor: 0.0 },
        steps_per_eval: 5,
        save_every: 4,
        adapter_path: Some(folder.to_owned()),
        ..TrainingConfig::default()
    }
}

/// Trains with a dropout, which must go on with the same masks.
fn train(config: TrainingConfig, mut report: impl FnMut(Report)) -> LoRAAdapter {
    let decoder = Arc::new(Tiny::new().decoder());
    let mut trainer = Trainer::new(decoder, fresh_adapter(0.1), config).unwrap();
    trainer.train(&examples(20, 0), &examples(5, 40), &mut report).unwrap()
}

/// Trains until this many iterations are done, as if by Ctrl-C. The config reports every step.
fn train_until(config: TrainingConfig, step: usize) {
    let decoder = Arc::new(Tiny::new().decoder());
    let stop = Arc::new(AtomicBool::new(false));
    let trainer = Trainer::new(decoder, fresh_adapter(0.1), config).unwrap();
    let mut trainer = trainer.stop_when(Arc::clone(&stop));
    let mut stopped = false;
    trainer
        .train(&examples(20, 0), &examples(5, 40), |report| match report {
            Report::Train { step: done, .. } if done + 1 == step => {
                stop.store(true, Ordering::Relaxed);
            }
            Report::Stopped { step: done } => stopped = done == step,
            _ => {}
        })
        .unwrap();
    assert!(stopped, "training did not stop at {step}");
}

fn adapter_file(folder: &Path) -> Vec<u8> {
    std::fs::read(folder.join("adapter_model.safetensors")).unwrap()
}

#[test]
fn a_run_that_goes_on_equals_one_that_never_stopped_to_the_last_bit() {
    let whole = tempfile::tempdir().unwrap();
    let mut losses = Vec::new();
    train(config(whole.path()), |report| {
        if let Report::Validation { loss, .. } = report {
            losses.push(loss);
        }
    });
    assert!(losses.last() < losses.first(), "{losses:?}");
    for stops in [vec![2], vec![6, 9, 17], vec![22]] {
        let folder = tempfile::tempdir().unwrap();
        let every = TrainingConfig { steps_per_report: 1, ..config(folder.path()) };
        for stop in &stops {
            train_until(TrainingConfig { resume: true, ..every.clone() }, *stop);
        }
        let mut resumed = None;
        train(TrainingConfig { resume: true, ..config(folder.path()) }, |report| {
            if let Report::Resumed { step } = report {
                resumed = Some(step);
            }
        });
        assert_eq!(resumed, stops.last().copied());
        assert_eq!(adapter_file(folder.path()), adapter_file(whole.path()), "{stops:?}");
        assert_eq!(
            adapter_file(&folder.path().join("best")),
            adapter_file(&whole.path().join("best"))
        );
    }
}

#[test]
fn a_checkpoint_of_another_run_is_refused_with_what_differs() {
    let folder = tempfile::tempdir().unwrap();
    train(TrainingConfig { iters: 2, ..config(folder.path()) }, |_| {});
    let other = TrainingConfig { iters: 2, resume: true, seed: 9, ..config(folder.path()) };
    let decoder = Arc::new(Tiny::new().decoder());
    let refused = |config: TrainingConfig, train: &[Example]| {
        let decoder = Arc::clone(&decoder);
        let mut trainer = Trainer::new(decoder, fresh_adapter(0.1), config).unwrap();
        trainer.train(train, &[], |_| {}).unwrap_err().to_string()
    };
    let text = refused(other.clone(), &examples(20, 0));
    assert!(text.contains("training_state.safetensors") && text.contains("seed 0"), "{text}");
    let text = refused(TrainingConfig { seed: 0, ..other.clone() }, &examples(20, 1));
    assert!(text.contains("training data"), "{text}");

    let state = folder.path().join("training_state.safetensors");
    let bytes = std::fs::read(&state).unwrap();
    for cut in [0, 7, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&state, &bytes[..cut]).unwrap();
        let text = refused(TrainingConfig { seed: 0, ..other.clone() }, &examples(20, 0));
        assert!(text.contains("not a checkpoint"), "{text}");
    }
}

/// Rows of `batch` one by one.
fn rows(batch: &Batch) -> Vec<Batch> {
    let row = |i: usize| {
        let at = i * batch.seq..(i + 1) * batch.seq;
        let labels = batch.labels[at.clone()].to_vec();
        let trained = labels.iter().filter(|label| **label >= 0).count();
        Batch { ids: batch.ids[at].to_vec(), labels, batch: 1, seq: batch.seq, trained }
    };
    (0..batch.batch).map(row).collect()
}

fn batch() -> Batch {
    let (batch, seq) = (4, 12);
    let ids: Vec<u32> = (0..batch * seq).map(|i| (i * 17 % 90) as u32).collect();
    let mut labels: Vec<i64> = ids.iter().map(|id| i64::from(id + 1)).collect();
    // Rows count differently: a mean of means would be another number.
    labels[..9].fill(-100);
    Batch { ids, labels, batch, seq, trained: batch * seq - 9 }
}

fn step(max_norm: f64) -> TrainStep {
    let decoder = Arc::new(Tiny::new().decoder());
    let optimizer = AdamWConfig::default();
    TrainStep::new(decoder, fresh_adapter(0.0), optimizer, max_norm, 0, &Device::Cpu).unwrap()
}

#[test]
fn accumulated_batches_equal_one_batch_of_all_their_rows_in_less_memory() {
    let (mut whole, mut parts) = (step(1.0), step(1.0));
    for _ in 0..3 {
        let a = whole.run(&batch(), 1e-2).unwrap();
        let b = parts.run_accumulated(&rows(&batch()), 1e-2).unwrap();
        assert!((a.loss - b.loss).abs() < 1e-5 * a.loss, "{} {}", a.loss, b.loss);
        let (a, b) = (a.gradient_norm, b.gradient_norm);
        assert!((a - b).abs() < 1e-4 * a, "{a} {b}");
    }
    let Batch { batch, seq, .. } = batch();
    let whole = whole.plan(StepShape { batch, seq, accumulated: 1 }).unwrap();
    let parts = parts.plan(StepShape { batch: 1, seq, accumulated: batch }).unwrap();
    assert!(parts.arena_bytes < whole.arena_bytes, "{} {}", parts.arena_bytes, whole.arena_bytes);
}

#[test]
fn a_step_that_is_not_finite_changes_nothing_and_names_the_parameter() {
    let mut step = step(1.0);
    step.run(&batch(), 1e-2).unwrap();
    let (count, mut tensors) = (step.count(), Vec::new());
    let mut poisoned = String::new();
    for (name, tensor) in step.state() {
        let mut values: Vec<f32> = tensor.to_vec().unwrap();
        if name == "parameter.model.layers.1.mlp.up_proj.lora_B.weight" {
            values[0] = f32::INFINITY;
            poisoned.clone_from(&name);
        }
        let dims = tensor.dims().to_vec();
        tensors.push(metal_candle::LazyTensor::from_vec(values, &dims, &Device::Cpu).unwrap());
    }
    assert!(!poisoned.is_empty());
    let before: Vec<Vec<f32>> = tensors.iter().map(|t| t.to_vec().unwrap()).collect();
    step.restore(tensors, count).unwrap();
    let metrics = step.run(&batch(), 1e-2).unwrap();
    assert!(!metrics.applied);
    assert_eq!((step.count().updates, step.count().steps), (1, 2));
    for ((name, after), before) in step.state().zip(&before) {
        assert_eq!(&after.to_vec::<f32>().unwrap(), before, "{name}");
    }
    assert!(step.diagnose(&[batch()]).unwrap().is_some());
}

#[test]
fn training_ends_when_the_validation_loss_no_longer_falls() {
    let folder = tempfile::tempdir().unwrap();
    // A rate of 0 changes nothing, so no validation is better than the first one.
    let config = TrainingConfig {
        schedule: LRScheduler::Constant { rate: 0.0 },
        patience: 2,
        ..config(folder.path())
    };
    let mut ended = None;
    train(config, |report| {
        if let Report::Stale { step } = report {
            ended = Some(step);
        }
    });
    assert_eq!(ended, Some(10));
}

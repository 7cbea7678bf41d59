//! The loop around the step: a run that goes on equals one that never stopped, several batches equal one, and what is
//! not finite changes nothing.

#[path = "support/lessons.rs"]
mod lessons;
#[path = "io/support.rs"]
#[allow(dead_code, reason = "only the GGUF writer is used here")]
mod support;
#[path = "support/testbed.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod testbed;
#[path = "regressions/tiny.rs"]
#[allow(dead_code, reason = "only the decoder is used here")]
mod tiny;

use crate::testbed::device;
use lessons::{examples, lora};
use metal_candle::Device;
use metal_candle::io::LoraConfig;
use metal_candle::io::data::{Batch, BatchOptions, Batcher, Example, Order};
use metal_candle::io::peft::TargetModules;
use metal_candle::nn::LoRAAdapter;
use metal_candle::train::TrainingConfig;
use metal_candle::train::{
    AdamWConfig, LRScheduler, Report, StepMetrics, StepShape, TrainStep, Trainer,
};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tiny::{HIDDEN, Tiny, VOCAB};

fn fresh_adapter(dropout: f64) -> LoRAAdapter {
    LoRAAdapter::new(lora(dropout), Tiny::new().decoder().modules(), 1, device()).unwrap()
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
    goes_on_to_the_last_bit(config);
}

#[test]
fn a_packed_run_goes_on_to_the_last_bit_too() {
    let packed =
        |folder: &Path| TrainingConfig { packing: true, max_seq_length: 64, ..config(folder) };
    goes_on_to_the_last_bit(packed);
}

fn goes_on_to_the_last_bit(config: impl Fn(&Path) -> TrainingConfig) {
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

#[test]
fn another_adapter_or_base_is_refused_with_what_differs() {
    let folder = tempfile::tempdir().unwrap();
    let config = TrainingConfig { iters: 2, resume: true, ..config(folder.path()) };
    let run = |tiny: &Tiny, adapter: LoraConfig| {
        let decoder = Arc::new(tiny.decoder());
        let adapter = LoRAAdapter::new(adapter, decoder.modules(), 1, device()).unwrap();
        let mut trainer = Trainer::new(decoder, adapter, config.clone()).unwrap();
        trainer.train(&examples(20, 0), &[], |_| {}).map(|_| ()).map_err(|e| e.to_string())
    };
    let names = |names: &[&str]| {
        TargetModules::Names(names.iter().map(|name| (*name).to_owned()).collect())
    };
    let lora = LoraConfig { r: 4, target_modules: names(&["q_proj"]), ..LoraConfig::default() };
    run(&Tiny::new(), lora.clone()).unwrap();
    let adapters = [
        ("adapter r 4, this one has 3", LoraConfig { r: 3, ..lora.clone() }),
        ("adapter lora_alpha 8, this one has 9", LoraConfig { lora_alpha: 9.0, ..lora.clone() }),
        ("adapter lora_dropout 0.0", LoraConfig { lora_dropout: 0.5, ..lora.clone() }),
        ("adapter use_rslora false", LoraConfig { use_rslora: true, ..lora.clone() }),
        (
            r#"adapter target_modules ["q_proj"], this one has ["q_proj","v_proj"]"#,
            LoraConfig { target_modules: names(&["q_proj", "v_proj"]), ..lora.clone() },
        ),
        (
            r#"adapter rank_pattern {}, this one has {"q_proj":2}"#,
            LoraConfig { rank_pattern: [("q_proj".to_owned(), 2)].into(), ..lora.clone() },
        ),
    ];
    for (expected, adapter) in adapters {
        let refused = run(&Tiny::new(), adapter).unwrap_err();
        assert!(refused.contains(expected) && refused.contains("training_state"), "{refused}");
    }
    // One weight of one matrix, as a merged adapter would change it.
    let mut merged = Tiny::new();
    merged.weights.get_mut("model.layers.1.self_attn.v_proj.weight").unwrap().1[3] += 0.01;
    for other in [merged, Tiny { window: Some(9), ..Tiny::new() }] {
        let refused = run(&other, lora.clone()).unwrap_err();
        assert!(refused.contains("base model \"qwen2, 2 layers of 16, held as f32"), "{refused}");
    }
    // What the base is called is no difference.
    let renamed = LoraConfig { base_model_name_or_path: Some("other".to_owned()), ..lora };
    run(&Tiny::new(), renamed).unwrap();
}

/// Rows of `batch` one by one.
fn rows(batch: &Batch) -> Vec<Batch> {
    let row = |i: usize| {
        let at = i * batch.seq..(i + 1) * batch.seq;
        let labels = batch.labels[at.clone()].to_vec();
        let trained = labels.iter().filter(|label| **label >= 0).count();
        Batch {
            ids: batch.ids[at].to_vec(),
            labels,
            batch: 1,
            seq: batch.seq,
            trained,
            documents: None,
        }
    };
    (0..batch.batch).map(row).collect()
}

fn batch() -> Batch {
    let (batch, seq) = (4, 12);
    let ids: Vec<u32> = (0..batch * seq).map(|i| (i * 17 % 90) as u32).collect();
    let mut labels: Vec<i64> = ids.iter().map(|id| i64::from(id + 1)).collect();
    // Rows count differently: a mean of means would be another number.
    labels[..9].fill(-100);
    Batch { ids, labels, batch, seq, trained: batch * seq - 9, documents: None }
}

fn step(max_norm: f64) -> TrainStep {
    let decoder = Arc::new(Tiny::new().decoder());
    let optimizer = AdamWConfig::default();
    TrainStep::new(decoder, fresh_adapter(0.0), optimizer, max_norm, 0).unwrap()
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
    if !testbed::is_on_cpu("the memory of so small a model", "buffers start at multiples of more") {
        return;
    }
    let Batch { batch, seq, .. } = batch();
    let whole = whole.plan(StepShape { batch, seq, accumulated: 1, packed: false }).unwrap();
    let parts = parts.plan(StepShape { batch: 1, seq, accumulated: batch, packed: false }).unwrap();
    assert!(parts.arena_bytes < whole.arena_bytes, "{} {}", parts.arena_bytes, whole.arena_bytes);
}

/// The gradients, as the first step's means show them: clipping and the rate leave no trace there.
fn gradients(step: &TrainStep) -> Vec<(String, Vec<f32>)> {
    let means = step.state().filter(|(name, _)| name.starts_with("mean."));
    means.map(|(name, tensor)| (name, tensor.to_vec().unwrap())).collect()
}

#[test]
fn packed_documents_train_as_they_do_in_rows_of_their_own() {
    let options = BatchOptions { batch_size: 3, max_seq_length: 64, order: Order::File };
    let mut packed = Batcher::packed(examples(8, 3), options).unwrap();
    assert_eq!(packed.batches_per_epoch(), 1);
    let packed = packed.next_batch();
    assert!(packed.documents.as_ref().unwrap().segments.iter().any(|segment| *segment >= 3));
    let apart = BatchOptions { batch_size: 8, ..options };
    let apart = Batcher::new(examples(8, 3), apart).unwrap().next_batch();
    assert_eq!(packed.trained, apart.trained);
    assert!(2 * packed.ids.len() < apart.ids.len());

    for window in [None, Some(7)] {
        let decoder = Arc::new(Tiny { window, ..Tiny::new() }.decoder());
        let step = || {
            let (decoder, optimizer) = (Arc::clone(&decoder), AdamWConfig::default());
            TrainStep::new(decoder, fresh_adapter(0.0), optimizer, 1e9, 0).unwrap()
        };
        let (mut a, mut b) = (step(), step());
        let (of_a, of_b) = (a.evaluate(&packed).unwrap(), b.evaluate(&apart).unwrap());
        assert!((of_a - of_b).abs() < 1e-6 * of_b, "{of_a} {of_b}");
        for _ in 0..3 {
            let (of_a, of_b) = (a.run(&packed, 1e-2).unwrap(), b.run(&apart, 1e-2).unwrap());
            assert!((of_a.loss - of_b.loss).abs() < 2e-6 * of_b.loss, "{of_a:?} {of_b:?}");
            for ((name, a), (_, b)) in gradients(&a).iter().zip(gradients(&b)) {
                let scale = b.iter().fold(0f32, |m, x| m.max(x.abs()));
                let error = a.iter().zip(&b).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
                assert!(error <= 2e-5 * scale, "{name}: {error} of {scale}");
            }
        }
        // Accumulated micro-batches carry their documents too.
        let halves = BatchOptions { batch_size: 2, ..options };
        let mut halves = Batcher::packed(examples(8, 3), halves).unwrap();
        let halves = [halves.next_batch(), halves.next_batch()];
        let (of_a, of_b) = (step().run_accumulated(&halves, 1e-2), step().run(&apart, 1e-2));
        let (of_a, of_b) = (of_a.unwrap(), of_b.unwrap());
        assert!((of_a.loss - of_b.loss).abs() < 2e-6 * of_b.loss, "{of_a:?} {of_b:?}");
        let (of_a, of_b) = (of_a.gradient_norm, of_b.gradient_norm);
        assert!((of_a - of_b).abs() < 2e-5 * of_b, "{of_a} {of_b}");
    }
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
        tensors.push(metal_candle::LazyTensor::from_vec(values, &dims, device()).unwrap());
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
fn steps_that_are_submitted_do_what_they_do_one_by_one_to_the_last_bit() {
    let mut tiny = Tiny::new().untied();
    // What has the last token in it is not finite.
    let embedding = &mut tiny.weights.get_mut("model.embed_tokens.weight").unwrap().1;
    embedding[(VOCAB - 1) * HIDDEN..].fill(f32::NAN);
    let decoder = Arc::new(tiny.decoder());
    let step = || {
        let (decoder, optimizer) = (Arc::clone(&decoder), AdamWConfig::default());
        TrainStep::new(decoder, fresh_adapter(0.1), optimizer, 1.0, 3).unwrap()
    };
    // Skipped first, alone, several in a row, and last.
    let good = [false, true, true, false, true, false, false, false, true, true, false];
    let batches = good.map(|good| {
        let mut batch = batch();
        if !good {
            batch.ids[5] = VOCAB as u32 - 1;
        }
        batch
    });
    let (mut one_by_one, mut ahead) = (step(), step());
    let want = batches.iter().map(|batch| one_by_one.run(batch, 1e-2).unwrap());
    let want: Vec<StepMetrics> = want.collect();
    assert_eq!(want.iter().map(|metrics| metrics.applied).collect::<Vec<_>>(), good);

    let mut got = Vec::new();
    for batch in &batches {
        got.extend(ahead.submit(std::slice::from_ref(batch), 1e-2).unwrap());
        assert_eq!(ahead.is_running(), matches!(device(), Device::Cuda(_)));
    }
    assert_eq!((got.len(), ahead.count().steps), (good.len() - 1, good.len()));
    got.extend(ahead.finish().unwrap());
    assert_eq!(ahead.finish().unwrap(), None);
    let bits = |all: &[StepMetrics]| -> Vec<(u32, u32, bool)> {
        let bits = |m: &StepMetrics| (m.loss.to_bits(), m.gradient_norm.to_bits(), m.applied);
        all.iter().map(bits).collect()
    };
    assert_eq!(bits(&got), bits(&want));
    assert_eq!(ahead.count(), one_by_one.count());
    for ((name, a), (_, b)) in ahead.state().zip(one_by_one.state()) {
        assert_eq!(a.to_vec::<f32>().unwrap(), b.to_vec::<f32>().unwrap(), "{name}");
    }
}

#[test]
fn a_loss_that_alone_is_not_finite_changes_nothing_and_blames_no_parameter() {
    // Logits of 1e37 are finite, and so is what flows back from them; the sum over the tokens is not.
    let mut tiny = Tiny::new().untied();
    tiny.weights.get_mut("lm_head.weight").unwrap().1.iter_mut().for_each(|w| *w *= 1e37);
    let decoder = Arc::new(tiny.decoder());
    let config = LoraConfig {
        r: 2,
        lora_alpha: 1e-30,
        target_modules: TargetModules::Regex(r".*\.1\.mlp\.down_proj".to_owned()),
        ..LoraConfig::default()
    };
    let adapter = LoRAAdapter::new(config, decoder.modules(), 1, device()).unwrap();
    let optimizer = AdamWConfig::default();
    let mut step = TrainStep::new(decoder, adapter, optimizer, 1.0, 0).unwrap();
    let values = |step: &TrainStep| -> Vec<Vec<f32>> {
        step.state().map(|(_, tensor)| tensor.to_vec().unwrap()).collect()
    };
    let before = values(&step);
    let metrics = step.run(&batch(), 1e-2).unwrap();
    assert!(!metrics.loss.is_finite() && metrics.gradient_norm.is_finite(), "{metrics:?}");
    assert!(!metrics.applied && metrics.gradient_norm > 0.0, "{metrics:?}");
    assert_eq!(values(&step), before);
    assert_eq!((step.count().updates, step.count().steps), (0, 1));
    assert_eq!(step.diagnose(&[batch()]).unwrap(), None);
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

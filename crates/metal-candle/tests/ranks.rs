//! Several ranks train as one with all their rows: the same losses, the same norms, the same adapter; they skip, stop and
//! fail together.
//!
//! Here the ranks are threads of one process on the CPU; `two_processes.rs` has processes, and GPUs.

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

use lessons::{examples, lora};
use metal_candle::io::data::Batch;
use metal_candle::nn::LoRAAdapter;
use metal_candle::train::{AdamWConfig, LRScheduler, Report, TrainStep, Trainer, TrainingConfig};
use metal_candle::{Device, Rendezvous, Result, World};
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use tiny::{HIDDEN, Tiny, VOCAB};

/// As many ranks, each in a thread of its own.
fn ranks<T: Send>(size: usize, f: impl Fn(Arc<World>) -> T + Sync) -> Vec<T> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let local = Rendezvous::local(size, listener.local_addr().unwrap().port());
    thread::scope(|scope| {
        let (f, listener, local) = (&f, &listener, &local);
        let start = |rank: usize| {
            scope.spawn(move || {
                let meeting = Rendezvous { rank, local_rank: rank, ..local.clone() };
                f(match rank {
                    0 => World::host(listener, &meeting, &Device::Cpu, &mut || true).unwrap(),
                    _ => World::join(&meeting, &Device::Cpu).unwrap(),
                })
            })
        };
        let all: Vec<_> = (0..size).map(start).collect();
        all.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn adapter(dropout: f64) -> LoRAAdapter {
    LoRAAdapter::new(
        lora(dropout),
        Tiny::new().load_on(&Device::Cpu).decoder.modules(),
        1,
        &Device::Cpu,
    )
    .unwrap()
}

fn config(batch_size: usize) -> TrainingConfig {
    TrainingConfig {
        iters: 14,
        batch_size,
        max_seq_length: 32,
        schedule: LRScheduler::Constant { rate: 5e-3 },
        // Most steps are clipped: by all ranks' norm, or the losses would differ.
        max_gradient_norm: 0.3,
        steps_per_report: 1,
        steps_per_eval: 5,
        save_every: 4,
        ..TrainingConfig::default()
    }
}

/// What a run told, and the adapter that it made.
struct Run {
    reports: Vec<Report>,
    adapter: LoRAAdapter,
}

impl Run {
    /// Loss and norm of each step, and the losses of the validations.
    fn numbers(&self) -> Vec<f32> {
        let numbers = self.reports.iter().map(|report| match report {
            Report::Train { loss, gradient_norm, .. } => vec![*loss, *gradient_norm],
            Report::Validation { loss, .. } => vec![*loss],
            _ => vec![],
        });
        numbers.flatten().collect()
    }

    fn weights(&self) -> Vec<f32> {
        let all = self.adapter.parameters();
        all.iter().flat_map(|parameter| parameter.to_vec::<f32>().unwrap()).collect()
    }
}

fn train(world: Option<Arc<World>>, config: TrainingConfig, dropout: f64) -> Result<Run> {
    stopped_at(world, config, dropout, usize::MAX)
}

/// Asked to stop once this step is reported.
fn stopped_at(
    world: Option<Arc<World>>,
    config: TrainingConfig,
    dropout: f64,
    step: usize,
) -> Result<Run> {
    let decoder = Arc::new(Tiny::new().load_on(&Device::Cpu).decoder);
    let stop = Arc::new(AtomicBool::new(false));
    let mut trainer = Trainer::new(decoder, adapter(dropout), config)?;
    if let Some(world) = world {
        trainer = trainer.within(world)?;
    }
    let mut trainer = trainer.stop_when(Arc::clone(&stop));
    let mut reports = Vec::new();
    let adapter = trainer.train(&examples(20, 0), &examples(5, 40), |report| {
        if matches!(report, Report::Train { step: done, .. } if done == step) {
            stop.store(true, Ordering::Relaxed);
        }
        reports.push(report);
    })?;
    Ok(Run { reports, adapter })
}

#[track_caller]
fn are_near(got: &[f32], want: &[f32], relative: f32) {
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= relative * want.abs().max(1e-3), "{got} is not {want}");
    }
}

/// The laws of the module's first line, for `size` ranks of `rows` rows.
fn equals_one(size: usize, rows: usize, change: impl Fn(TrainingConfig) -> TrainingConfig + Sync) {
    let one = train(None, change(config(size * rows)), 0.0).unwrap();
    let clipped = one.reports.iter().filter(
        |report| matches!(report, Report::Train { gradient_norm, .. } if *gradient_norm > 0.3),
    );
    assert!(clipped.count() > 5);
    let all = ranks(size, |world| train(Some(world), change(config(rows)), 0.0).unwrap());
    are_near(&all[0].numbers(), &one.numbers(), 1e-5);
    for run in &all {
        // AdamW divides by what may be near 0: weights are less near than losses.
        are_near(&run.weights(), &one.weights(), 1e-2);
        assert_eq!(run.weights(), all[0].weights());
    }
    let losses = |run: &Run| -> Vec<f32> {
        let train = run.reports.iter().filter_map(|report| match report {
            Report::Train { loss, .. } => Some(*loss),
            _ => None,
        });
        train.collect()
    };
    are_near(&losses(&all[0]), &losses(&one), 1e-6);
    assert!(losses(&one).last() < losses(&one).first());
}

#[test]
fn two_ranks_train_as_one_with_the_rows_of_both() {
    // 20 rows in batches of 6: of an epoch's last one each rank has one row.
    equals_one(2, 3, |config| config);
}

#[test]
fn a_rank_without_a_row_takes_part() {
    // 20 rows in batches of 9: of an epoch's last one the third rank has padding only.
    equals_one(3, 3, |config| config);
}

#[test]
fn accumulated_batches_are_summed_over_ranks_too() {
    equals_one(2, 2, |config| TrainingConfig { grad_accumulation_steps: 3, ..config });
}

#[test]
fn packed_rows_are_dealt_with_their_documents() {
    equals_one(2, 2, |config| TrainingConfig { packing: true, max_seq_length: 64, ..config });
}

#[test]
fn what_is_not_finite_on_one_rank_is_skipped_and_named_on_all() {
    let mut tiny = Tiny::new().untied();
    // The last token's embedding; only rank 1 has a row with it.
    let embedding = &mut tiny.weights.get_mut("model.embed_tokens.weight").unwrap().1;
    embedding[(VOCAB - 1) * HIDDEN..].fill(f32::NAN);
    let decoder = Arc::new(tiny.load_on(&Device::Cpu).decoder);
    let (rows, seq) = (4, 6);
    let mut ids: Vec<u32> = (0..rows * seq).map(|i| (i % 50) as u32).collect();
    let labels: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
    let good = Batch { ids: ids.clone(), labels, batch: rows, seq, trained: 24, documents: None };
    ids[seq] = (VOCAB - 1) as u32;
    let bad = Batch { ids, ..good.clone() };
    let all = ranks(2, |world| {
        let step =
            TrainStep::new(Arc::clone(&decoder), adapter(0.0), AdamWConfig::default(), 1.0, 0);
        let mut step = step.unwrap().within(world).unwrap();
        let first = step.run(&good, 1e-2).unwrap();
        let second = step.run(&bad, 1e-2).unwrap();
        let culprit = step.diagnose(std::slice::from_ref(&bad)).unwrap();
        let third = step.run(&good, 1e-2).unwrap();
        assert!(first.applied && !second.applied && third.applied);
        assert!(!second.loss.is_finite() && third.loss < first.loss, "{second:?}");
        assert_eq!(step.count().updates, 2);
        (first, third, culprit)
    });
    assert_eq!(all[0], all[1]);
    assert!(all[0].2.is_some());
}

#[test]
fn a_run_that_one_rank_stops_goes_on_to_the_same_bits_and_only_rank_0_writes() {
    let folder = tempfile::tempdir().unwrap();
    let path = |run: &str, rank: usize| folder.path().join(run).join(rank.to_string());
    let at = |folder: &Path| TrainingConfig {
        adapter_path: Some(folder.to_owned()),
        resume: true,
        ..config(3)
    };
    let whole = ranks(2, |world| {
        let path = path("whole", world.rank());
        train(Some(world), at(&path), 0.1).unwrap()
    });
    // The second rank is asked, after step 5; both hear of it in step 6.
    let stopped = ranks(2, |world| {
        let step = if world.rank() == 1 { 5 } else { usize::MAX };
        let path = path("parts", world.rank());
        stopped_at(Some(world), at(&path), 0.1, step).unwrap()
    });
    for run in &stopped {
        assert_eq!(run.reports.last(), Some(&Report::Stopped { step: 6 }));
    }
    assert!(!path("whole", 1).exists() && !path("parts", 1).exists());
    let rest = ranks(2, |world| train(Some(world), at(&path("parts", 0)), 0.1).unwrap());
    for (run, whole) in rest.iter().zip(&whole) {
        assert_eq!(run.reports[0], Report::Resumed { step: 6 });
        assert_eq!(run.weights(), whole.weights());
    }
    let validates = |run: &Run| {
        let is_one = |report: &Report| matches!(report, Report::Validation { .. });
        run.reports.iter().any(is_one)
    };
    assert!(validates(&whole[0]) && !validates(&whole[1]));

    // As many rows on one rank are the same run.
    let one = TrainingConfig { batch_size: 6, ..at(&path("parts", 0)) };
    let one = train(None, one, 0.1).unwrap();
    assert_eq!(one.reports, [Report::Resumed { step: 14 }]);
    assert_eq!(one.weights(), whole[0].weights());
}

#[test]
fn all_ranks_end_when_rank_0_sees_that_the_validation_loss_no_longer_falls() {
    let config =
        TrainingConfig { schedule: LRScheduler::Constant { rate: 0.0 }, patience: 2, ..config(2) };
    let all = ranks(2, |world| train(Some(world), config.clone(), 0.0).unwrap());
    for run in all {
        assert_eq!(run.reports.last(), Some(&Report::Stale { step: 10 }));
    }
}

#[test]
fn ranks_that_would_train_different_things_say_so_before_the_first_step() {
    let all = ranks(2, |world| {
        let seed = world.rank() as u64;
        let run = train(Some(world), TrainingConfig { seed, ..config(2) }, 0.0);
        run.map(drop).unwrap_err().to_string()
    });
    for error in all {
        assert!(error.contains("does not train what the others do"), "{error}");
    }
}

#[test]
fn a_rank_that_leaves_ends_the_others_with_an_error() {
    let start = Instant::now();
    let all = ranks(3, |world| {
        let iters = if world.rank() == 1 { 3 } else { 14 };
        let decoder = Arc::new(Tiny::new().load_on(&Device::Cpu).decoder);
        let step = TrainStep::new(decoder, adapter(0.0), AdamWConfig::default(), 1.0, 0).unwrap();
        let mut step = step.within(world).unwrap();
        let ids: Vec<u32> = (0..18).collect();
        let labels = ids.iter().map(|id| i64::from(*id)).collect();
        let batch = Batch { ids, labels, batch: 3, seq: 6, trained: 18, documents: None };
        let done: Result<Vec<_>> = (0..iters).map(|_| step.run(&batch, 1e-3)).collect();
        done.map(|done| done.len()).map_err(|e| e.to_string())
    });
    assert_eq!(all[1], Ok(3));
    for rank in [0, 2] {
        let error = all[rank].as_ref().unwrap_err();
        assert!(error.starts_with("rank 1 has ended"), "{error}");
    }
    assert!(start.elapsed() < Duration::from_secs(60));
}

#[test]
fn rows_that_cannot_be_dealt_evenly_are_refused() {
    let all = ranks(2, |world| {
        let decoder = Arc::new(Tiny::new().load_on(&Device::Cpu).decoder);
        let step = TrainStep::new(decoder, adapter(0.0), AdamWConfig::default(), 1.0, 0).unwrap();
        let mut step = step.within(world).unwrap();
        let (ids, labels) = (vec![1; 18], vec![1; 18]);
        let batch = Batch { ids, labels, batch: 3, seq: 6, trained: 18, documents: None };
        step.run(&batch, 1e-3).unwrap_err().to_string()
    });
    assert!(all[0].contains("3 rows") && all[0].contains("2 ranks"), "{all:?}");
}

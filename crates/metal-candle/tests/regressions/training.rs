//! The trainer: it trained nothing, stepped AdamW once a parameter, never clipped, and its losses
//! ignored masks.

use super::tiny::{LAYERS, MODULES, RANK, SCALE, Tiny, VOCAB, adapter, logits};
use super::{assert_near, randn, tensor, vec};
use crate::testbed::device;
use metal_candle::io::data::Batch;
use metal_candle::nn::{ApplyAdapter, LoRAAdapter};
use metal_candle::train::{AdamWConfig, TrainStep};
use metal_candle::{CrossEntropy, LazyTensor, grad};
use std::sync::Arc;

const TOKENS: [u32; 12] = [5, 40, 7, 7, 90, 13, 2, 61, 33, 8, 5, 71];

/// Two rows of six; the last label of each does not count.
fn batch() -> Batch {
    let mut labels: Vec<i64> = TOKENS[1..].iter().map(|id| i64::from(*id)).collect();
    labels.push(-100);
    labels[5] = -100;
    Batch { ids: TOKENS.to_vec(), labels, batch: 2, seq: 6, trained: 10, documents: None }
}

fn step(lora: &LoRAAdapter, optimizer: AdamWConfig, max_norm: f64) -> TrainStep {
    let decoder = Arc::new(Tiny::new().decoder());
    TrainStep::new(decoder, lora.clone(), optimizer, max_norm, 0).unwrap()
}

const ATTENTION: [&str; 2] = ["self_attn.q_proj", "self_attn.v_proj"];

/// Its losses of five epochs were identical to the last digit.
#[test]
fn losses_fall_and_differ_from_step_to_step() {
    for modules in [&ATTENTION[..], &MODULES.map(|(name, _)| name)] {
        let before = adapter(modules);
        let mut step = step(&before, AdamWConfig::default(), 1.0);
        let losses: Vec<f32> = (0..6).map(|_| step.run(&batch(), 3e-3).unwrap().loss).collect();
        assert!(losses.windows(2).all(|w| w[1] < w[0]), "{losses:?}");
        assert!(losses[5] < 0.99 * losses[0], "{losses:?}");
        let after = step.adapter().unwrap();
        for (before, after) in before.parameters().iter().zip(after.parameters()) {
            assert_ne!(vec(before), vec(&after), "a parameter was not trained");
        }
    }
}

/// The model did not see the trainer's adapter: q and v were no-ops, and `o_proj` was fed something
/// else.
#[test]
fn an_adapter_on_any_module_is_its_merged_weight() {
    let tiny = Tiny::new();
    let mut decoder = tiny.decoder();
    let base = logits(&decoder, &TOKENS, None);
    for (module, [out, input]) in MODULES {
        let lora = adapter(&[module]);
        let got = logits(&decoder, &TOKENS, Some(&lora));
        let moved = got.iter().zip(&base).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(moved > 1e-2, "{module} changes nothing");
        // W + scale B A, in plain loops.
        let mut merged = tiny.clone();
        for i in 0..LAYERS {
            let name = format!("model.layers.{i}.{module}");
            let layer = lora.layer(&name).unwrap();
            let (a, b) = (vec(&layer.a), vec(&layer.b));
            let weight = &mut merged.weights.get_mut(&format!("{name}.weight")).unwrap().1;
            for (o, k) in (0..out).flat_map(|o| (0..input).map(move |k| (o, k))) {
                let product: f32 = (0..RANK).map(|r| b[o * RANK + r] * a[r * input + k]).sum();
                weight[o * input + k] += SCALE * product;
            }
        }
        assert_near(&got, &logits(&merged.decoder(), &TOKENS, None), 2e-4);
        // Put on the model, as its users do, and taken off again.
        decoder.apply_adapter(lora).unwrap();
        assert_eq!(logits(&decoder, &TOKENS, decoder.adapter()), got);
        decoder.remove_adapter().unwrap();
        assert_eq!(logits(&decoder, &TOKENS, decoder.adapter()), base);
    }
}

/// The gradients of the loss at these parameters, outside of any trainer.
fn gradients(lora: &LoRAAdapter) -> Vec<Vec<f32>> {
    let decoder = Tiny::new().decoder();
    let b = batch();
    let ids = LazyTensor::from_vec(b.ids, &[2, 6], device()).unwrap();
    let labels = LazyTensor::from_vec(b.labels, &[2, 6], device()).unwrap();
    let loss = decoder.loss(&ids, &labels, Some(lora)).unwrap();
    let parameters = lora.parameters();
    let found = grad(&loss, &parameters.iter().collect::<Vec<_>>()).unwrap();
    found.iter().map(vec).collect()
}

fn norm(gradients: &[Vec<f32>]) -> f32 {
    gradients.iter().flatten().map(|g| g * g).sum::<f32>().sqrt()
}

/// AdamW as in the paper: one count for all parameters, `updates` of them.
fn reference(
    lora: &LoRAAdapter,
    config: AdamWConfig,
    rate: f32,
    clip: f32,
    updates: i32,
) -> Vec<Vec<f32>> {
    let mut p: Vec<Vec<f32>> = lora.parameters().iter().map(vec).collect();
    let mut m: Vec<Vec<f32>> = p.iter().map(|p| vec![0.0; p.len()]).collect();
    let mut v = m.clone();
    let [beta1, beta2] = [config.beta1, config.beta2].map(|beta| beta as f32);
    for t in 1..=updates {
        let shapes = lora.parameters();
        let values: Vec<LazyTensor> =
            p.iter().zip(&shapes).map(|(p, shape)| tensor(p, shape.dims())).collect();
        let gradients = gradients(&lora.with_parameters(&values).unwrap());
        let factor = (clip / norm(&gradients)).min(1.0);
        for i in 0..p.len() {
            for j in 0..p[i].len() {
                let g = factor * gradients[i][j];
                m[i][j] = beta1 * m[i][j] + (1.0 - beta1) * g;
                v[i][j] = beta2 * v[i][j] + (1.0 - beta2) * g * g;
                let (mean, square) =
                    (m[i][j] / (1.0 - beta1.powi(t)), v[i][j] / (1.0 - beta2.powi(t)));
                let direction = mean / (square.sqrt() + config.eps as f32);
                p[i][j] -= rate * (direction + config.weight_decay as f32 * p[i][j]);
            }
        }
    }
    p
}

fn trained(lora: &LoRAAdapter, config: AdamWConfig, rate: f64, clip: f64) -> Vec<Vec<f32>> {
    let mut step = step(lora, config, clip);
    for _ in 0..3 {
        assert!(step.run(&batch(), rate).unwrap().applied);
    }
    assert_eq!(step.updates(), 3);
    step.adapter().unwrap().parameters().iter().map(vec).collect()
}

/// It counted a step for every parameter: the second one's bias correction was already wrong.
#[test]
fn adamw_counts_one_step_for_all_parameters() {
    let lora = adapter(&ATTENTION);
    // So large an eps that the size of a gradient shows, not only its sign.
    let config = AdamWConfig { eps: 1e-2, weight_decay: 0.1, ..AdamWConfig::default() };
    let want = reference(&lora, config, 1e-2, f32::INFINITY, 3);
    for (got, want) in trained(&lora, config, 1e-2, 1e9).iter().zip(&want) {
        assert_near(got, want, 1e-5);
    }
}

#[test]
fn gradients_are_clipped_to_the_norm_that_was_asked_for() {
    let lora = adapter(&ATTENTION);
    let config = AdamWConfig { eps: 1e-1, weight_decay: 0.0, ..AdamWConfig::default() };
    let full = norm(&gradients(&lora));
    let clip = full / 10.0;
    let clipped = trained(&lora, config, 1e-2, f64::from(clip));
    for (got, want) in clipped.iter().zip(&reference(&lora, config, 1e-2, clip, 3)) {
        assert_near(got, want, 1e-5);
    }
    assert_ne!(clipped, trained(&lora, config, 1e-2, 1e9), "max_gradient_norm changes nothing");
    let metrics = step(&lora, config, f64::from(clip)).run(&batch(), 1e-2).unwrap();
    assert_near(&[metrics.gradient_norm], &[full], 1e-4);
}

#[test]
fn a_step_that_is_not_finite_changes_nothing() {
    let lora = adapter(&ATTENTION);
    let huge: Vec<LazyTensor> =
        lora.parameters().iter().map(|p| p.affine(1e30, 0.0).unwrap()).collect();
    let huge = lora.with_parameters(&huge).unwrap();
    let mut step = step(&huge, AdamWConfig::default(), 1.0);
    let metrics = step.run(&batch(), 1e-2).unwrap();
    assert!(!metrics.applied && step.updates() == 0, "{metrics:?}");
    for (before, after) in huge.parameters().iter().zip(step.adapter().unwrap().parameters()) {
        assert_eq!(vec(before), vec(&after));
    }
}

/// The loss of each row by hand: `-Σ target log p`.
fn row_losses(logits: &[f32], labels: &[i64], classes: usize, smoothing: f32) -> Vec<f32> {
    let row = |(row, label): (&[f32], &i64)| {
        let sum: f32 = row.iter().map(|x| x.exp()).sum();
        let log = |c: usize| row[c] - sum.ln();
        let mean: f32 = (0..classes).map(log).sum::<f32>() / classes as f32;
        -(1.0 - smoothing) * log(*label as usize) - smoothing * mean
    };
    logits.chunks(classes).zip(labels).map(row).collect()
}

/// `ignore_index` crashed, and label smoothing counted rows that the mask leaves out.
#[test]
fn ignored_rows_count_for_nothing_smoothed_or_not() {
    let logits = randn(&[4, 5], 0);
    let labels = [2i64, -100, 0, -100];
    let labels_of =
        |labels: &[i64]| LazyTensor::from_slice(labels, &[labels.len()], device()).unwrap();
    for smoothing in [0.0f32, 0.3] {
        let options = CrossEntropy::new().label_smoothing(f64::from(smoothing));
        let loss = logits.cross_entropy(&labels_of(&labels), options).unwrap();
        let g = grad(&loss, &[&logits]).unwrap().remove(0);
        let kept = row_losses(&vec(&logits), &[2, 0, 0, 0], 5, smoothing);
        assert_near(&vec(&loss), &[(kept[0] + kept[2]) / 2.0], 1e-5);
        for (i, row) in vec(&g).chunks(5).enumerate() {
            assert_eq!(row.iter().any(|g| *g != 0.0), labels[i] >= 0, "row {i}: {row:?}");
        }
        // Through the output layer too.
        let (x, weight) = (randn(&[4, 3], 1), randn(&[5, 3], 2));
        let fused = x.linear_cross_entropy(&weight, &labels_of(&labels), options).unwrap();
        let plain = x.matmul(&weight.t().unwrap()).unwrap();
        let plain = plain.cross_entropy(&labels_of(&labels), options).unwrap();
        assert_near(&vec(&fused), &vec(&plain), 1e-5);
        // Nothing counts: no loss and no NaN.
        let nothing = logits.cross_entropy(&labels_of(&[-100; 4]), options).unwrap();
        let g = grad(&nothing, &[&logits]).unwrap().remove(0);
        assert_eq!((vec(&nothing), vec(&g)), (vec![0.0], vec![0.0; 20]));
    }
}

#[test]
fn the_loss_of_a_batch_counts_only_its_labels() {
    let decoder = Tiny::new().decoder();
    let all = logits(&decoder, &TOKENS[..6], None);
    let labels: Vec<i64> = TOKENS[1..6].iter().map(|id| i64::from(*id)).collect();
    let rows = row_losses(&all[..5 * VOCAB], &labels, VOCAB, 0.0);
    let one = |labels: Vec<i64>| {
        let ids = LazyTensor::from_slice(&TOKENS[..6], &[1, 6], device()).unwrap();
        let labels = LazyTensor::from_vec(labels, &[1, 6], device()).unwrap();
        vec(&decoder.loss(&ids, &labels, None).unwrap())
    };
    let want = rows.iter().sum::<f32>() / 5.0;
    assert_near(&one([&labels[..], &[-100]].concat()), &[want], 1e-4);
    assert_near(&one(vec![-100, labels[1], -100, -100, -100, -100]), &[rows[1]], 1e-4);
}

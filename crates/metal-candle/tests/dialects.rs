//! What a model records (a training step, a prompt, a decoded token, the vectors of texts), in both languages of GPUs, as their backends run it:
//! compiled as C++ and run on the CPU, thread by thread, by the machine of the compiler's tests. No GPU is needed.

#[path = "support/lessons.rs"]
#[allow(dead_code, reason = "only the adapter is used here")]
mod lessons;
#[path = "../../compiler/tests/dialects/machine.rs"]
#[allow(dead_code, reason = "shared with the compiler's tests")]
mod machine;
#[path = "../../compiler/tests/dialects/plans.rs"]
#[allow(dead_code, reason = "shared with the compiler's tests")]
mod plans;
#[path = "../../compiler/tests/dialects/program.rs"]
#[allow(dead_code, reason = "shared with the compiler's tests")]
mod program;
#[path = "io/support.rs"]
#[allow(dead_code, reason = "only the GGUF writer is used here")]
mod support;
#[path = "support/testbed.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod testbed;
#[path = "regressions/tiny.rs"]
#[allow(dead_code, reason = "only the tokenizer is used here")]
mod tiny;
#[path = "support/values.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod values;
#[path = "../../runtime/tests/support/walk.rs"]
mod walk;

use lessons::lora;
use machine::DIALECTS;
use metal_candle::embed::{mean_pool, normalize};
use metal_candle::generate::{Generator, KVCache};
use metal_candle::graph::oracle::{self, Value};
use metal_candle::io::data::{Batch, Documents};
use metal_candle::models::{BaseWeights, Decoder, load_encoder};
use metal_candle::nn::{ApplyAdapter, LoRAAdapter};
use metal_candle::train::{AdamWConfig, TrainStep};
use metal_candle::{DType, LazyTensor, Recording};
use plans::Task;
use std::sync::Arc;
use testbed::device;

/// The learning rate of all steps.
const RATE: f64 = 1e-2;

/// Two layers, two heads to one of keys and values, rotary embedding, RMS norms, SwiGLU.
fn decoder(base: BaseWeights, activations: DType) -> Decoder {
    testbed::decoder(&testbed::file("data/models/llama"), base).with_activations(activations)
}

/// On every linear layer.
fn adapter(decoder: &Decoder, dropout: f64) -> LoRAAdapter {
    LoRAAdapter::new(lora(dropout), decoder.modules(), 1, device()).unwrap()
}

/// 2 x 12 tokens that repeat a pattern, some without a label; packed, of two documents a row.
fn batch(packed: bool) -> Batch {
    let ids: Vec<u32> = (0..24).map(|i| i * 7 % 11 + i % 3).collect();
    let label = |(i, id): (usize, &u32)| if i % 5 == 0 { -100 } else { i64::from(*id) };
    let labels: Vec<i64> = ids.iter().enumerate().map(label).collect();
    let trained = labels.iter().filter(|label| **label >= 0).count();
    let documents = packed.then(|| Documents {
        segments: (0..24).map(|i| 1 + i % 12 / 7).collect(),
        positions: (0..24).map(|i| i % 12 % 7).collect(),
    });
    Batch { ids, labels, batch: 2, seq: 12, trained, documents }
}

/// An adapter that has moved away from nothing, in training.
fn warmed_up(decoder: Decoder, dropout: f64) -> TrainStep {
    let adapter = adapter(&decoder, dropout);
    let optimizer = AdamWConfig::default();
    let mut step = TrainStep::new(Arc::new(decoder), adapter, optimizer, 1.0, 7).unwrap();
    for _ in 0..3 {
        assert!(step.run(&batch(false), RATE).unwrap().applied);
    }
    step
}

/// `tolerance` is in units of each result's largest value.
fn task(name: &str, recording: Recording, tolerance: f64) -> Task {
    let inputs: Vec<Value> = recording.inputs.iter().map(values::value).collect();
    let want = oracle::evaluate(&recording.graph, &inputs).unwrap();
    let largest = |want: &Value| want.data.iter().fold(0f64, |most, x| most.max(x.abs()));
    let tolerances = want.iter().map(|want| tolerance * largest(want)).collect();
    let Recording { graph, donated, .. } = recording;
    Task { name: name.into(), graph, inputs, donated, want, tolerances }
}

/// The step after some others, its state donated: corrections, norm of the gradients, loss, parameters, moments, whether
/// it was applied.
fn training(name: &str, step: &TrainStep, batches: &[Batch], tolerance: f64) -> Task {
    let mut task = task(name, step.recording(batches, RATE).unwrap(), tolerance);
    // By AdamW, what is next to nothing moves a parameter as far as what is large: rounded, it may go the other way.
    let parameters = (task.want.len() - 4) / 3;
    let rounded = tolerance > 1e-2;
    task.tolerances[3..3 + parameters].fill(if rounded { RATE } else { tolerance * RATE });
    // A square is twice as far off as what was squared.
    task.tolerances[3 + 2 * parameters..].iter_mut().for_each(|tolerance| *tolerance *= 2.0);
    assert_eq!(task.donated.iter().filter(|donated| **donated).count(), 3 * parameters + 1);
    task
}

const F32: (BaseWeights, DType, f64) = (BaseWeights::F32, DType::F32, 1e-4);
/// Its activations are rounded after every layer; the oracle's are not.
const BF16: (BaseWeights, DType, f64) = (BaseWeights::BF16, DType::BF16, 8e-2);

fn check(name: &str, tasks: &[Task]) {
    for (_, dialect, limits) in DIALECTS {
        plans::check(name, dialect, limits, tasks, |_| false);
    }
}

#[test]
fn training_steps_equal_the_oracle() {
    let tasks = [F32, BF16].map(|(base, activations, tolerance)| {
        let name = format!("a step in {activations}");
        let step = warmed_up(decoder(base, activations), 0.0);
        training(&name, &step, &[batch(false)], tolerance)
    });
    let dropout = warmed_up(decoder(F32.0, F32.1), 0.1);
    let accumulated = training(
        "a step of two packed batches, with dropout",
        &dropout,
        &[batch(true), batch(true)],
        F32.2,
    );
    check("training", &[&tasks[..], &[accumulated]].concat());
}

/// The prompt, then one token more.
fn decoding((base, activations, tolerance): (BaseWeights, DType, f64)) -> [Task; 2] {
    let trained = warmed_up(decoder(base, activations), 0.0).adapter().unwrap();
    let mut decoder = decoder(base, activations);
    decoder.apply_adapter(trained).unwrap();
    let tokenizer = Arc::new(tiny::Tiny::new().load().tokenizer);
    let mut cache = KVCache::new(&decoder, 1, 64).unwrap();
    let generator = Generator::new(Arc::new(decoder), tokenizer);
    let prompt = [5, 17, 80, 3, 3, 9, 41];
    let task_of = |what: &str, ids: &[u32], cache: &KVCache| {
        let recording = generator.recording(ids, cache).unwrap();
        task(&format!("{what} in {activations}"), recording, tolerance)
    };
    let first = task_of("a prompt", &prompt, &cache);
    generator.logits(&prompt, &mut cache).unwrap();
    [first, task_of("a token after a prompt", &[12], &cache)]
}

#[test]
fn decoded_tokens_equal_the_oracle() {
    check("decoding", &[decoding(F32), decoding(BF16)].concat());
}

/// Of texts of 9, 5 and 1 tokens.
fn embedding((base, activations, tolerance): (BaseWeights, DType, f64)) -> Task {
    let folder = testbed::file("data/embed/bert");
    let encoder = load_encoder(&folder, base, device()).unwrap().with_activations(activations);
    let ids: Vec<u32> = (0..27).map(|i| 2 + i * 7 % 60).collect();
    let mask: Vec<u8> =
        [9, 5, 1].iter().flat_map(|n| (0..9).map(move |i| u8::from(i < *n))).collect();
    let ids = LazyTensor::from_vec(ids, &[3, 9], device()).unwrap();
    let mask = LazyTensor::from_vec(mask, &[3, 9], device()).unwrap();
    let hidden = encoder.hidden(&ids, Some(&mask)).unwrap();
    let vectors = normalize(&mean_pool(&hidden, Some(&mask)).unwrap()).unwrap();
    let recording = LazyTensor::recording(&[&vectors]);
    task(&format!("vectors of texts in {activations}"), recording, tolerance)
}

#[test]
fn vectors_of_texts_equal_the_oracle() {
    check("embedding", &[embedding(F32), embedding(BF16)]);
}

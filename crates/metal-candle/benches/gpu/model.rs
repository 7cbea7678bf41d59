//! Training steps and decoded tokens of models with random weights.

use crate::kinds::{self, Units};
use crate::ops::Ceilings;
use crate::{Context, Failure, Row, median, rounded};
use metal_candle::generate::{Generator, KVCache};
use metal_candle::io::data::Batch;
use metal_candle::io::peft::TargetModules;
use metal_candle::io::{DecoderConfig, LoraConfig, RopeLayout, RopeScaling, Tokenizer};
use metal_candle::models::{BaseWeights, Decoder, random_decoder};
use metal_candle::nn::LoRAAdapter;
use metal_candle::train::{AdamWConfig, StepMetrics, StepShape, TrainStep};
use metal_candle::{BlockFormat, DType, Timing};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::Instant;

/// A model's sizes: SmolLM2-135M's, and those of Llama 3's with 1B and 8B parameters.
#[derive(Clone, Copy)]
struct Size {
    name: &'static str,
    hidden: usize,
    inner: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    vocabulary: usize,
    tied: bool,
}

const SMALL: Size = Size {
    name: "135M",
    hidden: 576,
    inner: 1536,
    layers: 30,
    heads: 9,
    kv_heads: 3,
    vocabulary: 49152,
    tied: true,
};

const MEDIUM: Size = Size {
    name: "1B",
    hidden: 2048,
    inner: 8192,
    layers: 16,
    heads: 32,
    kv_heads: 8,
    vocabulary: 128_256,
    tied: true,
};

const LARGE: Size = Size {
    name: "8B",
    hidden: 4096,
    inner: 14336,
    layers: 32,
    heads: 32,
    kv_heads: 8,
    vocabulary: 128_256,
    tied: false,
};

impl Size {
    fn json(&self) -> Value {
        json!({
            "hidden": self.hidden,
            "inner": self.inner,
            "layers": self.layers,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "vocabulary": self.vocabulary,
            "tied": self.tied,
        })
    }
}

/// Steps are told of beside lines of JSON.
const UNITS: Units = Units { mark: "# ", scale: 1e12, operations: "TFLOP/s", bytes: "TB/s" };

const RANK: usize = 16;
const PROMPT: usize = 128;
const CAPACITY: usize = 512;

/// A model's sizes, and how its linear layers are kept.
type Model = (Size, BaseWeights);

const PLAIN: BaseWeights = BaseWeights::BF16;

pub(crate) fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for (size, batch, seq) in [(SMALL, 16, 1024), (MEDIUM, 4, 2048), (LARGE, 2, 2048)] {
        let sizes = size.json();
        rows.push(Row {
            name: format!("train {} {batch}x{seq} bf16 all-linear r{RANK}", size.name),
            work: json!({
                "work": "train", "size": sizes, "batch": batch, "seq": seq, "rank": RANK,
            }),
            measure: Box::new(move |c, ceilings| train(c, ceilings, (size, PLAIN), [batch, seq])),
        });
        rows.push(Row {
            name: format!("decode {} bf16 batch 1", size.name),
            work: json!({
                "work": "decode", "size": sizes, "prompt": PROMPT, "capacity": CAPACITY,
            }),
            measure: Box::new(move |c, ceilings| decode(c, ceilings, (size, PLAIN))),
        });
    }
    for format in [BlockFormat::Q8_0, BlockFormat::Q4_1, BlockFormat::Q4K, BlockFormat::NF4] {
        let base = BaseWeights::Quantised { format, rest: DType::BF16 };
        let model = (MEDIUM, base);
        rows.push(Row {
            name: format!("train 1B {format:?} base 4x2048 bf16 all-linear r{RANK}"),
            work: Value::Null,
            measure: Box::new(move |c, ceilings| train(c, ceilings, model, [4, 2048])),
        });
        rows.push(Row {
            name: format!("decode 1B {format:?} base batch 1"),
            work: Value::Null,
            measure: Box::new(move |c, ceilings| decode(c, ceilings, model)),
        });
    }
    rows.push(Row {
        name: "memory of 1000 steps, 135M 4x256".into(),
        work: Value::Null,
        measure: Box::new(thousand_steps),
    });
    rows
}

fn decoder(context: &Context, (size, base): Model) -> Result<Decoder, Failure> {
    let config = DecoderConfig {
        architecture: "llama".into(),
        vocab_size: size.vocabulary,
        hidden_size: size.hidden,
        intermediate_size: size.inner,
        num_layers: size.layers,
        num_heads: size.heads,
        num_kv_heads: size.kv_heads,
        head_dim: size.hidden / size.heads,
        rms_norm_eps: 1e-5,
        rope_theta: 5e5,
        rope_scaling: RopeScaling::None,
        rope_layout: RopeLayout::Half,
        max_position_embeddings: 8192,
        sliding_window: None,
        tie_word_embeddings: size.tied,
        attention_bias: false,
        attention_output_bias: false,
        qk_norm: false,
    };
    let decoder = random_decoder(config, base, 0, &context.device)?;
    Ok(decoder.with_activations(DType::BF16))
}

/// AdamW at 1e-4, clipped to 1, LoRA of rank 16 on every linear layer, every token trained.
fn train(
    context: &Context,
    ceilings: &Ceilings,
    model: Model,
    [batch, seq]: [usize; 2],
) -> Result<Value, Failure> {
    let (size, decoder) = (model.0, decoder(context, model)?);
    let weights: usize = decoder.modules().map(|(_, [out, input])| out * input).sum();
    let target_modules = TargetModules::AllLinear;
    let config = LoraConfig { r: RANK, lora_alpha: 16.0, target_modules, ..LoraConfig::default() };
    let adapter = LoRAAdapter::new(config, decoder.modules(), 0, &context.device)?;
    let mut step = TrainStep::new(Arc::new(decoder), adapter, AdamWConfig::default(), 1.0, 0)?;
    let tokens = batch * seq;
    let ids = |round: usize| -> Vec<u32> {
        let word = |i: usize| (i * 7919 + round * 104_729) % size.vocabulary;
        (0..tokens).map(|i| word(i) as u32).collect()
    };
    let mut times = Vec::new();
    for round in 0..13 {
        let ids = ids(round);
        let labels = ids.iter().map(|id| i64::from(*id)).collect();
        let batch = Batch { ids, labels, batch, seq, trained: tokens, documents: None };
        // As training does it: what the step before did is read while this one runs.
        let start = Instant::now();
        let before = step.submit(&[batch], 1e-4)?;
        if round >= 3 {
            times.push(start.elapsed().as_secs_f64());
        }
        applied(before)?;
    }
    let loss = applied(step.finish()?)?.ok_or("no step was run")?;
    let plan = step.plan(StepShape { batch, seq, accumulated: 1, packed: false })?;
    let seconds = median(times);
    // Forward and backward to the input, of the frozen matrices and the output layer.
    let products = 4.0 * tokens as f64 * (weights + size.vocabulary * size.hidden) as f64;
    let floor = products / ceilings.products;
    if context.steps {
        let ids = ids(99);
        let labels = ids.iter().map(|id| i64::from(*id)).collect();
        let batch = Batch { ids, labels, batch, seq, trained: tokens, documents: None };
        let (_, seconds) = step.profile(&batch, 1e-4, Timing::Steps)?;
        kinds::print(&plan, &seconds, &UNITS);
    }
    Ok(json!({
        "tokens_per_second": rounded(tokens as f64 / seconds, 0),
        "step_ms": rounded(seconds * 1e3, 1),
        "loss": rounded(loss, 3),
        "planned_gib": rounded(plan.peak_bytes() as f64 / f64::from(1 << 30), 2),
        "frozen_products_part_of_bf16_ceiling": rounded(floor / seconds, 3),
        "seconds": seconds,
        "floor_seconds": floor,
        "ceiling": "bf16 products",
        "peak_bytes": plan.peak_bytes(),
    }))
}

/// The loss of a step, if it was one that changed something.
fn applied(metrics: Option<StepMetrics>) -> Result<Option<f64>, Failure> {
    match metrics {
        Some(metrics) if !metrics.applied => Err(format!("no update: {metrics:?}").into()),
        metrics => Ok(metrics.map(|metrics| f64::from(metrics.loss))),
    }
}

/// The device's memory over a thousand steps of one size, against what the plan says.
fn thousand_steps(context: &Context, _: &Ceilings) -> Result<Value, Failure> {
    let [batch, seq] = [4, 256];
    let decoder = decoder(context, (SMALL, PLAIN))?;
    let config = LoraConfig {
        r: RANK,
        lora_alpha: 16.0,
        target_modules: TargetModules::AllLinear,
        ..LoraConfig::default()
    };
    let adapter = LoRAAdapter::new(config, decoder.modules(), 0, &context.device)?;
    let mut step = TrainStep::new(Arc::new(decoder), adapter, AdamWConfig::default(), 1.0, 0)?;
    let plan = step.plan(StepShape { batch, seq, accumulated: 1, packed: false })?;
    let used = || context.device.memory().ok_or("the device does not tell its memory");
    let (mut early, start) = (used()?, Instant::now());
    for round in 0..1000 {
        let ids: Vec<u32> = (0..batch * seq)
            .map(|i| ((i * 7919 + round * 104_729) % SMALL.vocabulary) as u32)
            .collect();
        let labels = ids.iter().map(|id| i64::from(*id)).collect();
        step.run(&Batch { ids, labels, batch, seq, trained: batch * seq, documents: None }, 1e-4)?;
        if round == 9 {
            early = used()?;
        }
    }
    let (late, seconds) = (used()?, start.elapsed().as_secs_f64());
    let workspaces = context.device.workspaces(&plan)?;
    let listed: usize = workspaces.iter().map(|workspace| workspace.bytes).sum();
    let beyond = late.peak_bytes as f64 - (plan.peak_bytes() + listed) as f64;
    let workspaces: Map<String, Value> =
        workspaces.iter().map(|held| (held.name.to_owned(), held.bytes.into())).collect();
    Ok(json!({
        "steps": 1000,
        "seconds": seconds,
        "used_bytes_after_10": early.used_bytes,
        "used_bytes_after_1000": late.used_bytes,
        "peak_bytes": late.peak_bytes,
        "planned_peak_bytes": plan.peak_bytes(),
        "workspaces": workspaces,
        "beyond_plan_and_workspaces_mib": rounded(beyond / f64::from(1 << 20), 1),
    }))
}

/// Greedy tokens after a prompt of 128, as a caller gets them: each id comes back and goes there again.
fn decode(context: &Context, ceilings: &Ceilings, model: Model) -> Result<Value, Failure> {
    let (size, decoder) = (model.0, decoder(context, model)?);
    let weights: usize = decoder.modules().map(|(_, [out, input])| out * input).sum();
    let of_weight = match model.1 {
        BaseWeights::Quantised { format, .. } => {
            format.block_bytes() as f64 / format.block_len() as f64
        }
        _ => 2.0,
    };
    let bytes = weights as f64 * of_weight + 2.0 * (size.vocabulary * size.hidden) as f64;
    let decoder = Arc::new(decoder);
    let mut cache = KVCache::new(&decoder, 1, CAPACITY)?;
    let generator = Generator::new(decoder, Arc::new(no_words()?));
    let prompt: Vec<u32> = (0..PROMPT as u32).map(|i| (i * 7919) % 1000).collect();
    let mut next = generator.best(&prompt, &mut cache)?;
    let mut times = Vec::new();
    for token in 0..256 {
        let start = Instant::now();
        next = generator.best(&[next], &mut cache)?;
        if token >= 8 {
            times.push(start.elapsed().as_secs_f64());
        }
    }
    let seconds = median(times);
    let floor = bytes / ceilings.copy;
    Ok(json!({
        "tokens_per_second": rounded(1.0 / seconds, 0),
        "token_us": rounded(seconds * 1e6, 0),
        "weights_part_of_copy_ceiling": rounded(floor / seconds, 3),
        "seconds": seconds,
        "floor_seconds": floor,
        "ceiling": "copy",
    }))
}

/// A tokenizer for a model that never sees text.
fn no_words() -> Result<Tokenizer, Failure> {
    let file = tempfile::Builder::new().suffix(".json").tempfile()?;
    let text = r#"{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}}"#;
    std::fs::write(file.path(), text)?;
    Ok(Tokenizer::from_file(file.path())?)
}

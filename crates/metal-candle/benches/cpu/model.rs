//! Training and generation, by what a user would call.

use super::Failure;
use super::serve::{Prepared, number, text};
use candle_core::Device as CandleDevice;
use metal_candle::generate::{Generated, Generator, GeneratorConfig, KVCache};
use metal_candle::io::LoraConfig;
use metal_candle::io::data::Batch;
use metal_candle::io::peft::TargetModules;
use metal_candle::models::{BaseWeights, Decoder, load, load_decoder};
use metal_candle::nn::LoRAAdapter;
use metal_candle::train::{AdamWConfig, StepShape, TrainStep};
use metal_candle::{BlockFormat, DType, Device, Timing};
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Of the random models; SmolLM2's ids are taken modulo it.
pub(crate) const VOCABULARY: usize = 8192;

/// Of `{"work": "train", "model": PATH, "base": "bf16", "activations": "bf16", "targets": "qv", "batch": 4, "seq": 256,
/// "rank": 8}`: AdamW at 1e-4, clipped to 1, on rows of packed text in file order; with `"prepack": true`, weights are laid
/// out once.
pub(crate) fn train(row: &Value) -> Result<Prepared, Failure> {
    let (mut step, batches, shape) = training(row)?;
    let (plan, workspaces) = step.plan_with_workspaces(shape)?;
    let beside = workspaces.iter().filter(|workspace| !workspace.shared);
    let planned = plan.peak_bytes() + beside.map(|workspace| workspace.bytes).sum::<usize>();
    let mut next = 0;
    let mut prepared = Prepared::new(move || {
        let metrics = step.run(&batches[next % batches.len()], 1e-4)?;
        next += 1;
        if metrics.applied { Ok(()) } else { Err(format!("no update: {metrics:?}").into()) }
    });
    prepared.planned_bytes = Some(planned);
    Ok(prepared)
}

/// The step of such a row, its batches, and their shape.
pub(crate) fn training(row: &Value) -> Result<(TrainStep, Vec<Batch>, StepShape), Failure> {
    let decoder = load_decoder(text(row, "model")?.as_ref(), base(row)?, &Device::Cpu)?;
    let decoder = decoder.with_activations(activations(row)?);
    let (batch, seq) = (number(row, "batch")?, number(row, "seq")?);
    let batches: Vec<Batch> = packed_text(decoder.config.vocab_size)?
        .chunks_exact(batch * seq)
        .map(|ids| rows(ids, seq))
        .collect();
    if batches.is_empty() {
        return Err(format!("{batch} x {seq} tokens: the text has fewer").into());
    }
    let names = |names: [&str; 2]| TargetModules::Names(names.map(String::from).into());
    let target_modules = match text(row, "targets")? {
        "qv" => names(["q_proj", "v_proj"]),
        _ => TargetModules::AllLinear,
    };
    let r = number(row, "rank")?;
    let config = LoraConfig { r, lora_alpha: 16.0, target_modules, ..LoraConfig::default() };
    let adapter = LoRAAdapter::new(config, decoder.modules(), 0, &Device::Cpu)?;
    let optimizer = AdamWConfig::default();
    let mut step = TrainStep::new(Arc::new(decoder), adapter, optimizer, 1.0, 0)?;
    if row.get("prepack").is_some_and(|prepack| *prepack == true) {
        step = step.prepacking();
    }
    Ok((step, batches, StepShape { batch, seq, accumulated: 1, packed: false }))
}

/// Of `{"work": "prefill", "model": PATH, "prompt": 512}`: until the first token is chosen.
pub(crate) fn prefill(row: &Value) -> Result<Prepared, Failure> {
    let generate = generation(row, 1)?;
    Ok(Prepared::timed(move || Ok(generate()?.prefill.as_secs_f64())))
}

/// Of `{"work": "decode", "model": PATH, "prompt": 512, "tokens": 128}`: one token, greedily, the mean
/// of so many.
pub(crate) fn decode(row: &Value) -> Result<Prepared, Failure> {
    let tokens = number(row, "tokens")?;
    let generate = generation(row, tokens)?;
    // The first one belongs to the prefill.
    Ok(Prepared::timed(move || Ok(generate()?.decode.as_secs_f64() / (tokens - 1).max(1) as f64)))
}

/// Of `{"work": "overhead", "model": PATH, "prompt": 512, "tokens": 128}`: what a token takes, chosen and brought to the
/// caller, beside the steps of its plan; the median of so many. What looking at the clock between the steps takes is taken off.
pub(crate) fn overhead(row: &Value) -> Result<Prepared, Failure> {
    let (decoder, generator, ids) = prompted(row)?;
    let tokens = number(row, "tokens")?;
    Ok(Prepared::timed(move || {
        let mut cache = KVCache::new(&decoder, 1, ids.len() + tokens)?;
        let mut id = generator.best(&ids, &mut cache)?;
        let mut beside = Vec::with_capacity(tokens);
        for _ in 0..tokens {
            let start = Instant::now();
            let (next, steps) = generator.profile(&[id], &mut cache, Timing::Steps)?;
            let beside_steps = start.elapsed().as_secs_f64() - steps.iter().sum::<f64>();
            beside.push(beside_steps - steps.len() as f64 * look());
            id = next;
        }
        beside.sort_unstable_by(f64::total_cmp);
        Ok(beside[tokens / 2])
    }))
}

/// What a step's two looks at the clock take beside what they measure, in seconds.
fn look() -> f64 {
    const LOOKS: u32 = 100;
    let start = Instant::now();
    let measured: Duration = (0..LOOKS).map(|_| Instant::now().elapsed()).sum();
    start.elapsed().saturating_sub(measured).as_secs_f64() / f64::from(LOOKS)
}

/// The model of such a row, what generates with it, and its prompt.
pub(crate) fn prompted(row: &Value) -> Result<(Arc<Decoder>, Generator, Vec<u32>), Failure> {
    let model = load(text(row, "model")?.as_ref(), base(row)?, &Device::Cpu)?;
    let wanted = number(row, "prompt")?;
    let ids = packed_text(model.decoder.config.vocab_size)?;
    let ids = ids.get(..wanted).ok_or_else(|| format!("{wanted} tokens: the text has fewer"))?;
    let cache = row.get("cache").map(|_| text(row, "cache")).transpose()?;
    let decoder = Arc::new(match cache {
        Some("bf16") => model.decoder.with_cache(DType::BF16),
        Some("f16") => model.decoder.with_cache(DType::F16),
        _ => model.decoder,
    });
    let generator = Generator::new(Arc::clone(&decoder), Arc::new(model.tokenizer));
    Ok((decoder, generator, ids.to_vec()))
}

fn generation(
    row: &Value,
    tokens: usize,
) -> Result<impl Fn() -> Result<Generated, Failure> + 'static, Failure> {
    let model = load(text(row, "model")?.as_ref(), base(row)?, &Device::Cpu)?;
    let wanted = number(row, "prompt")?;
    let ids = packed_text(model.decoder.config.vocab_size)?;
    let ids = ids.get(..wanted).ok_or_else(|| format!("{wanted} tokens: the text has fewer"))?;
    let prompt = model.tokenizer.decode(ids, false)?;
    let generator = Generator::new(Arc::new(model.decoder), Arc::new(model.tokenizer));
    let config =
        GeneratorConfig { max_tokens: tokens, min_tokens: tokens, ..GeneratorConfig::default() };
    Ok(move || {
        let out = generator.generate(&prompt, &config, |_| ())?;
        let got = (out.prompt_tokens, out.ids.len());
        if got != (wanted, tokens) {
            return Err(
                format!("{got:?} tokens of prompt and text: expected {wanted}, {tokens}").into()
            );
        }
        Ok(out)
    })
}

pub(crate) fn base(row: &Value) -> Result<BaseWeights, Failure> {
    Ok(match text(row, "base")? {
        "f32" => BaseWeights::F32,
        "bf16" => BaseWeights::BF16,
        "q4_1" => BaseWeights::AsStored,
        "q8_0" => BaseWeights::Quantised { format: BlockFormat::Q8_0, rest: DType::F32 },
        other => {
            let expected = "expected f32, bf16, q4_1 or q8_0";
            return Err(format!("a base in {other:?}: {expected}").into());
        }
    })
}

pub(crate) fn activations(row: &Value) -> Result<DType, Failure> {
    Ok(match text(row, "activations")? {
        "bf16" => DType::BF16,
        _ => DType::F32,
    })
}

/// The ids of the text that the tests train SmolLM2 on, which `reference/smollm.py` made: every peer
/// reads the same.
fn packed_text(vocabulary: usize) -> Result<Vec<u32>, Failure> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/smollm.safetensors");
    let tensors = candle_core::safetensors::load(path, &CandleDevice::Cpu)?;
    let ids = tensors["train.ids"].to_dtype(candle_core::DType::I64)?.flatten_all()?;
    Ok(ids.to_vec1::<i64>()?.into_iter().map(|id| id as u32 % vocabulary as u32).collect())
}

/// Every token is trained but the last of a row, whose successor is not there.
fn rows(ids: &[u32], seq: usize) -> Batch {
    let batch = ids.len() / seq;
    let mut labels = Vec::with_capacity(ids.len());
    for row in ids.chunks(seq) {
        labels.extend(row[1..].iter().map(|id| i64::from(*id)));
        labels.push(-100);
    }
    Batch { ids: ids.to_vec(), labels, batch, seq, trained: batch * (seq - 1), documents: None }
}

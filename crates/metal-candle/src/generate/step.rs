//! What one step computes, and the arguments that it takes.

use super::KVCache;
use crate::models::{CacheInput, Decoder, PaddedRows};
use crate::nn::ApplyAdapter;
use crate::{Compiled, DType, Device, LazyTensor, Outline, Recording, Result, compile};
use std::sync::Arc;

/// Prompts are padded to a multiple of this many tokens, so that few plans serve all lengths.
pub(super) const PREFILL_BUCKET: usize = 32;

/// The sizes of one step, to be planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeShape {
    /// Texts at once.
    pub batch: usize,
    /// New tokens of each: 1, or those of a prompt.
    pub tokens: usize,
    /// Positions of the cache.
    pub capacity: usize,
}

/// Arguments before keys and values.
const ONE_ARGS: usize = 3;
const MANY_ARGS: usize = 5;

/// What a step of one text is to say of the token after its last one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// `[logits: f32 [vocabulary]]`
    Logits,
    /// The likeliest token and its logit, `[id: u32 [1], logit: f32 [1]]`: little to bring to the host.
    Best,
}

impl Wanted {
    /// Results before keys and values.
    pub(super) fn results(self) -> usize {
        match self {
            Wanted::Logits => 1,
            Wanted::Best => 2,
        }
    }

    fn of(self, logits: &LazyTensor) -> Result<Vec<LazyTensor>> {
        if self == Wanted::Logits {
            return Ok(vec![logits.to_dtype(DType::F32)?]);
        }
        let id = logits.argmax_keepdim(0)?;
        let logit = logits.index_select(&id, 0)?.to_dtype(DType::F32)?;
        Ok(vec![id, logit])
    }
}

/// One text: `[ids [1, t], position, last, k.., v..]` give what is wanted of the logits of token last, and `[k.., v..]`,
/// the cache updated in place.
pub(super) fn one(decoder: Arc<Decoder>, wanted: Wanted) -> Compiled {
    let layers = decoder.config.num_layers;
    let step = move |args: &[LazyTensor]| {
        let (keys, values) = args[ONE_ARGS..].split_at(layers);
        let cache = CacheInput { keys, values, position: &args[1] };
        let (hidden, keys, values) = decoder.hidden_cached(&args[0], cache, decoder.adapter())?;
        // Only one position's logits are wanted: [1, t, hidden] -> [1, 1, hidden] -> [vocabulary]
        let last = hidden.dynamic_slice(1, &args[2], 1)?;
        let logits = decoder.logits(&last)?.reshape(&[decoder.config.vocab_size])?;
        Ok([wanted.of(&logits)?, keys, values].concat())
    };
    compile(step).donate(ONE_ARGS..ONE_ARGS + 2 * layers)
}

/// Several texts, padded on the left, so that the last token of each is the last one: `[ids [b, t],
/// position, positions [b, t], queries [b, t], keys [b, capacity], k.., v..]` give `[logits [b,
/// vocabulary], k.., v..]`.
pub(super) fn many(decoder: Arc<Decoder>) -> Compiled {
    let layers = decoder.config.num_layers;
    let step = move |args: &[LazyTensor]| {
        let (keys, values) = args[MANY_ARGS..].split_at(layers);
        let cache = CacheInput { keys, values, position: &args[1] };
        let rows = PaddedRows { positions: &args[2], queries: &args[3], keys: &args[4] };
        let (hidden, keys, values) =
            decoder.hidden_padded(&args[0], cache, rows, decoder.adapter())?;
        let [b, t] = [args[0].dims()[0], args[0].dims()[1]];
        let logits = decoder.logits(&hidden.narrow(1, t - 1, 1)?)?;
        let logits = logits.reshape(&[b, decoder.config.vocab_size])?.to_dtype(DType::F32)?;
        Ok([vec![logits], keys, values].concat())
    };
    compile(step).donate(MANY_ARGS..MANY_ARGS + 2 * layers)
}

/// What a step of this shape would run, and on what, if the likeliest token of one text is wanted; nothing is allocated.
pub(super) fn outline(decoder: Arc<Decoder>, shape: DecodeShape) -> Result<Outline> {
    let (c, device) = (decoder.config.clone(), *decoder.device());
    let DecodeShape { batch, tokens, capacity } = shape;
    let hold = |dims: &[usize], dtype| LazyTensor::placeholder(dims, dtype, &device);
    let ids = hold(&[batch, tokens], DType::U32)?;
    let position = hold(&[], DType::I64)?;
    let mut args = match batch {
        1 => vec![ids, position.clone(), position],
        _ => {
            let [row, all] =
                [hold(&[batch, tokens], DType::U32)?, hold(&[batch, capacity], DType::U8)?];
            vec![ids, position, row, hold(&[batch, tokens], DType::U8)?, all]
        }
    };
    let cache = [batch, capacity, c.num_kv_heads, c.head_dim];
    for _ in 0..2 * c.num_layers {
        args.push(hold(&cache, decoder.cache())?);
    }
    let step = if batch == 1 { one(decoder, Wanted::Best) } else { many(decoder) };
    step.outline(&args)
}

/// The arguments of [`one`]; keys and values are taken out of the cache.
pub(super) fn arguments(ids: &[u32], cache: &mut KVCache) -> Result<Vec<LazyTensor>> {
    let mut args = Vec::with_capacity(ONE_ARGS + cache.keys.len() + cache.values.len());
    args.extend(tokens(ids, cache)?);
    args.append(&mut cache.keys);
    args.append(&mut cache.values);
    Ok(args)
}

/// What the step of these tokens would compute, and from what; the cache stays as it is.
pub(super) fn recording(step: &Compiled, ids: &[u32], cache: &KVCache) -> Result<Recording> {
    let args = [&tokens(ids, cache)?[..], &cache.keys, &cache.values].concat();
    step.recording(&args)
}

/// The arguments of [`one`] before keys and values.
fn tokens(ids: &[u32], cache: &KVCache) -> Result<[LazyTensor; ONE_ARGS]> {
    let padded = match ids.len() {
        1 => 1,
        n => n.next_multiple_of(PREFILL_BUCKET).min(cache.capacity() - cache.len()),
    };
    // Padding stands after the prompt: nothing that counts sees it, and later tokens overwrite it.
    let mut row = Vec::with_capacity(padded);
    row.extend_from_slice(ids);
    row.resize(padded, 0);
    Ok([
        LazyTensor::from_vec(row, &[1, padded], cache.device())?,
        scalar(cache.len(), cache.device())?,
        scalar(ids.len() - 1, cache.device())?,
    ])
}

pub(super) fn scalar(value: usize, device: &Device) -> Result<LazyTensor> {
    LazyTensor::from_vec(vec![value as i64], &[], device)
}

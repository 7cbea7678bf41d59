//! Generation: attention saw the future, the cache was never read, settings were ignored, the
//! stream was empty.

use super::tiny::{HIDDEN, LAYERS, Tiny, VOCAB, adapter, ids, logits};
use super::{assert_near, randn, vec};
use crate::testbed::device;
use metal_candle::generate::{
    Finish, Generated, Generator, GeneratorConfig, KVCache, Sampling, SamplingStrategy,
    sample_token,
};
use metal_candle::models::{CacheInput, Decoder};
use metal_candle::nn::ApplyAdapter;
use metal_candle::{Attention, DType, LazyTensor};
use std::sync::Arc;

const TOKENS: [u32; 9] = [5, 40, 7, 7, 90, 13, 2, 61, 33];

/// Between all tokens at once and fewer: sums are made in another order, and this model's large scores magnify that.
const OF_FEWER: f32 = 3e-5;

#[test]
fn no_token_sees_a_later_one() {
    let decoder = Tiny::new().decoder();
    let all = logits(&decoder, &TOKENS, None);
    for changed in 1..TOKENS.len() {
        let mut tokens = TOKENS;
        tokens[changed] = 17;
        let other = logits(&decoder, &tokens, None);
        let (before, after) = (changed * VOCAB, (changed + 1) * VOCAB);
        assert_near(&all[..before], &other[..before], 1e-6);
        assert_ne!(all[before..after], other[before..after], "token {changed} changes nothing");
        assert_near(&logits(&decoder, &TOKENS[..changed], None), &all[..before], OF_FEWER);
    }
}

#[test]
fn a_sliding_window_hides_old_tokens() {
    let decoder = Tiny { window: Some(3), ..Tiny::new() }.decoder();
    let (mut near, mut far) = (TOKENS, TOKENS);
    // Through two layers the last token sees four back.
    (near[4], far[3]) = (17, 17);
    let last = |tokens: &[u32]| logits(&decoder, tokens, None)[8 * VOCAB..].to_vec();
    assert_near(&last(&far), &last(&TOKENS), 1e-6);
    assert_ne!(last(&near), last(&TOKENS));
}

/// Grouped queries: 1.x gave k and v the shapes of q.
#[test]
fn grouped_queries_are_queries_with_repeated_keys() {
    let (q, k, v) = (randn(&[2, 5, 6, 4], 0), randn(&[2, 5, 2, 4], 1), randn(&[2, 5, 2, 3], 2));
    let repeat = |x: &LazyTensor| {
        let d = x.dims()[3];
        x.reshape(&[2, 5, 2, 1, d])?.broadcast_as(&[2, 5, 2, 3, d])?.reshape(&[2, 5, 6, d])
    };
    let (wide_k, wide_v) = (repeat(&k).unwrap(), repeat(&v).unwrap());
    let attention = Attention::new().causal();
    let grouped = attention.forward(&q, &k, &v).unwrap();
    let repeated = attention.forward(&q, &wide_k, &wide_v).unwrap();
    assert_eq!(grouped.dims(), [2, 5, 6, 3]);
    assert_near(&vec(&grouped), &vec(&repeated), 1e-5);
}

fn position(at: usize) -> LazyTensor {
    LazyTensor::from_vec(vec![at as i64], &[], device()).unwrap()
}

/// An empty cache of this many positions, or one of something else.
fn cache(decoder: &Decoder, capacity: usize, value: f64) -> Vec<LazyTensor> {
    let c = &decoder.config;
    let dims = [1, capacity, c.num_kv_heads, c.head_dim];
    let layer = |_| LazyTensor::full(value, &dims, DType::F32, device()).unwrap();
    (0..LAYERS).map(layer).collect()
}

/// The logits of `tokens`, fed in these pieces through a cache that starts with `value` everywhere.
fn cached(decoder: &Decoder, pieces: &[&[u32]], value: f64) -> Vec<f32> {
    let (mut keys, mut values) = (cache(decoder, 16, value), cache(decoder, 16, value));
    let (mut at, mut all) = (0, Vec::new());
    for piece in pieces {
        let start = position(at);
        let input = CacheInput { keys: &keys, values: &values, position: &start };
        let (hidden, k, v) = decoder.hidden_cached(&ids(piece), input, None).unwrap();
        all.extend(vec(&decoder.logits(&hidden).unwrap()));
        (keys, values) = (k, v);
        at += piece.len();
    }
    all
}

#[test]
fn tokens_through_the_cache_are_tokens_at_once() {
    let decoder = Tiny::new().decoder();
    let want = logits(&decoder, &TOKENS, None);
    let one_by_one: Vec<&[u32]> = TOKENS.chunks(1).collect();
    for pieces in [&one_by_one[..], &[&TOKENS[..4], &TOKENS[4..]], &[&TOKENS]] {
        assert_near(&cached(&decoder, pieces, 0.0), &want, OF_FEWER);
        // What lies behind the last token is not looked at.
        assert_near(&cached(&decoder, pieces, 1e3), &want, OF_FEWER);
    }
}

#[test]
fn the_cache_is_read() {
    let decoder = Tiny::new().decoder();
    let start = position(8);
    let last = |value: f64| {
        let (keys, values) = (cache(&decoder, 16, value), cache(&decoder, 16, value));
        let input = CacheInput { keys: &keys, values: &values, position: &start };
        vec(&decoder.hidden_cached(&ids(&TOKENS[8..]), input, None).unwrap().0)
    };
    assert_ne!(last(0.0), last(1.0));
    let cache = KVCache::new(&decoder, 1, 64).unwrap();
    assert_eq!((cache.len(), cache.capacity()), (0, 64));
}

#[test]
fn tied_embeddings_load_and_an_output_layer_is_used_where_there_is_one() {
    let tied = Tiny::new();
    let untied = Tiny::new().untied();
    for (tiny, output) in [(&tied, "model.embed_tokens.weight"), (&untied, "lm_head.weight")] {
        let decoder = tiny.decoder();
        assert_eq!(decoder.config.tie_word_embeddings, output != "lm_head.weight");
        let hidden = vec(&decoder.hidden(&ids(&TOKENS), None).unwrap());
        let output = &tiny.weights[output].1;
        let dot = |row: &[f32], c: usize| -> f32 {
            row.iter().zip(&output[c * HIDDEN..]).map(|(h, w)| h * w).sum()
        };
        let want: Vec<f32> =
            hidden.chunks(HIDDEN).flat_map(|row| (0..VOCAB).map(|c| dot(row, c))).collect();
        assert_near(&logits(&decoder, &TOKENS, None), &want, 1e-4);
    }
}

fn generator(tiny: &Tiny) -> Generator {
    let model = tiny.load();
    Generator::new(Arc::new(model.decoder), Arc::new(model.tokenizer))
}

fn config(sampling: SamplingStrategy, seed: u64) -> GeneratorConfig {
    let sampling = sampling.into();
    GeneratorConfig { max_tokens: 12, sampling, seed, ..GeneratorConfig::default() }
}

fn generate(
    generator: &Generator,
    prompt: &str,
    sampling: SamplingStrategy,
    seed: u64,
) -> Generated {
    let config = config(sampling, seed);
    generator.generate(prompt, &config, |_| {}).unwrap()
}

/// The likeliest continuation by whole forward passes; the prompt is ASCII without spaces.
fn greedy(decoder: &Decoder, prompt: &str, n: usize) -> Vec<u32> {
    let mut tokens: Vec<u32> = prompt.bytes().map(|b| u32::from(b - b'!')).collect();
    let start = tokens.len();
    for _ in 0..n {
        let all = logits(decoder, &tokens, decoder.adapter());
        let next = sample_token(&all[all.len() - VOCAB..], SamplingStrategy::Greedy, 0, 0);
        if next as usize == VOCAB - 1 {
            break;
        }
        tokens.push(next);
    }
    tokens[start..].to_vec()
}

/// Through the cache, whatever the prompt was padded to; padding changed the result.
#[test]
fn generation_is_what_whole_forward_passes_say() {
    let tiny = Tiny::new();
    let (g, decoder) = (generator(&tiny), tiny.decoder());
    let long = "The_quick_brown_fox_jumps_over_the_lazy_dog_and_more";
    for n in [1, 2, 5, 31, 32, 33, 50] {
        let out = generate(&g, &long[..n], SamplingStrategy::Greedy, 0);
        assert_eq!(out.ids, greedy(&decoder, &long[..n], 12), "a prompt of {n} tokens");
        assert_eq!(out.prompt_tokens, n);
    }
}

#[test]
fn generation_uses_the_adapter_that_is_on() {
    let model = Tiny::new().load();
    let mut decoder = model.decoder;
    decoder.apply_adapter(adapter(&["self_attn.o_proj", "mlp.down_proj"])).unwrap();
    let want = greedy(&decoder, "Hello", 12);
    let g = Generator::new(Arc::new(decoder), Arc::new(model.tokenizer));
    assert_eq!(generate(&g, "Hello", SamplingStrategy::Greedy, 0).ids, want);
    assert_ne!(want, greedy(&Tiny::new().decoder(), "Hello", 12));
}

#[test]
fn streamed_text_is_the_text() {
    let g = generator(&Tiny::new());
    let mut streamed = Vec::new();
    let config = GeneratorConfig { max_tokens: 12, ..GeneratorConfig::default() };
    let out = g.generate("Hello", &config, |token| streamed.push(token.clone())).unwrap();
    assert!(!out.ids.is_empty() && !out.text.is_empty());
    assert_eq!(streamed.iter().map(|t| t.id).collect::<Vec<_>>(), out.ids);
    assert_eq!(streamed.iter().map(|t| t.text.as_str()).collect::<String>(), out.text);
    // Every token of this vocabulary is a whole character.
    assert!(streamed.iter().all(|t| !t.text.is_empty()), "{streamed:?}");
}

#[test]
fn temperature_top_k_top_p_and_seed_are_honoured() {
    let g = generator(&Tiny::new());
    let sample = |temperature, top_k, top_p| SamplingStrategy::Sample {
        temperature,
        top_k,
        top_p,
        min_p: 0.0,
    };
    let run = |sampling, seed| generate(&g, "Hello", sampling, seed).ids;
    let greedy = run(SamplingStrategy::Greedy, 0);
    let hot = sample(5.0, 0, 1.0);
    assert_eq!(run(hot, 1), run(hot, 1));
    assert_ne!(run(hot, 1), run(hot, 2));
    assert_ne!(run(hot, 1), greedy);
    assert_eq!(run(sample(1e-4, 0, 1.0), 1), greedy);
    assert_eq!(run(sample(5.0, 1, 1.0), 1), greedy);
    assert_eq!(run(sample(5.0, 0, 1e-6), 1), greedy);
}

/// It divided negative logits too, which made their tokens likelier.
#[test]
fn a_repetition_penalty_makes_no_token_likelier_that_was_seen() {
    let generator = generator(&Tiny::new());
    let first = |repetition_penalty: f64| {
        let sampling = Sampling { repetition_penalty, ..Sampling::default() };
        let config = GeneratorConfig {
            max_tokens: 1,
            min_tokens: 1,
            sampling,
            logprobs: Some(VOCAB),
            ..GeneratorConfig::default()
        };
        let out = generator.generate("abcdefgh", &config, |_| {}).unwrap();
        let mut all = vec![f32::NAN; VOCAB];
        for (id, logprob) in &out.logprobs[0].top {
            all[*id as usize] = *logprob;
        }
        all
    };
    let (plain, penalised) = (first(1.0), first(1.5));
    let seen = |id: usize| (b'a'..=b'h').any(|c| usize::from(c - b'!') == id);
    // Beside a token that was not seen, whose logit stays.
    let other = 0;
    let mut lowered = 0;
    for id in (0..VOCAB - 1).filter(|id| *id != other) {
        let (before, after) = (plain[id] - plain[other], penalised[id] - penalised[other]);
        match seen(id) {
            true => assert!(after <= before + 1e-4, "token {id}: {before} became {after}"),
            false => assert_near(&[after], &[before], 1e-3),
        }
        lowered += usize::from(after < before - 1e-2);
    }
    assert!(lowered >= 4, "only {lowered} of 8 tokens were penalised");
}

#[test]
fn generation_ends_for_a_reason() {
    let g = generator(&Tiny::new());
    let out = generate(&g, "Hello", SamplingStrategy::Greedy, 0);
    assert!(out.ids.len() == 12 && out.finish == Finish::Length || out.finish == Finish::EndOfText);
    let long = "x".repeat(120);
    let config = GeneratorConfig { max_tokens: 50, ..GeneratorConfig::default() };
    let out = g.generate(&long, &config, |_| {}).unwrap();
    assert!(out.ids.len() <= 9, "{} tokens in a context of 128", out.ids.len());
    assert!(g.generate("", &config, |_| {}).is_err());
    assert!(g.generate(&"x".repeat(129), &config, |_| {}).is_err());
}

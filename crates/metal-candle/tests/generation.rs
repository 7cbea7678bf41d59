//! Generation on a tiny model: what ends it, what is streamed, and that awaiting is blocking.

#[path = "support/held.rs"]
mod held;
#[path = "io/support.rs"]
#[allow(dead_code, reason = "only the GGUF writer is used here")]
mod support;
#[path = "support/testbed.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod testbed;
#[path = "regressions/tiny.rs"]
#[allow(dead_code, reason = "only the model is used here")]
mod tiny;

use crate::held::Held;
use crate::testbed::device;
use metal_candle::generate::{
    DecodeShape, Finish, Generated, Generator, GeneratorConfig, KVCache, Sampling,
    SamplingStrategy, Session, StreamToken,
};
use metal_candle::models::{BaseWeights, Decoder, load_decoder};
use metal_candle::nn::ApplyAdapter;
use metal_candle::{DType, ErrorKind};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use tiny::{Tiny, VOCAB};

fn generator() -> Generator {
    let model = Tiny::new().load();
    Generator::new(Arc::new(model.decoder), Arc::new(model.tokenizer))
}

fn config() -> GeneratorConfig {
    let sampling = SamplingStrategy::temperature(5.0).into();
    GeneratorConfig { max_tokens: 12, sampling, seed: 3, ..GeneratorConfig::default() }
}

fn run(g: &Generator, config: &GeneratorConfig) -> (Generated, Vec<StreamToken>) {
    let mut streamed = Vec::new();
    let out = g.generate("Hello", config, |token| streamed.push(token.clone())).unwrap();
    (out, streamed)
}

fn text(tokens: &[StreamToken]) -> String {
    tokens.iter().map(|token| token.text.as_str()).collect()
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(value) => return value,
            Poll::Pending => std::thread::park(),
        }
    }
}

#[test]
fn awaited_tokens_are_the_tokens_and_no_thread_waits_for_them() {
    let g = generator();
    let config = GeneratorConfig { logprobs: Some(2), ..config() };
    let (want, want_streamed) = run(&g, &config);
    let mut tokens = g.stream("Hello", &config).unwrap();
    for want in want_streamed {
        let mut token = pin!(tokens.next());
        let held = Held::back();
        let polled = token.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        assert!(polled.is_pending(), "a step was waited for");
        drop(held);
        assert_eq!(block_on(token).unwrap().unwrap(), want);
    }
    assert!(block_on(tokens.next()).is_none());
    let got = tokens.into_generated();
    assert_eq!((got.ids, got.text, got.finish), (want.ids, want.text, want.finish));
}

/// Log-probabilities ask for all logits; without them the token is chosen where the model is.
#[test]
fn the_best_token_is_the_same_wherever_it_is_chosen() {
    let g = generator();
    let greedy = GeneratorConfig { sampling: Sampling::default(), ..config() };
    let by_logits = run(&g, &GeneratorConfig { logprobs: Some(0), ..greedy.clone() }).0;
    let late = GeneratorConfig { min_tokens: 6, ..greedy.clone() };
    let by_logits_late = run(&g, &GeneratorConfig { logprobs: Some(0), ..late.clone() }).0;
    assert!(!by_logits.ids.is_empty());
    assert_eq!(run(&g, &greedy).0.ids, by_logits.ids);
    assert_eq!(run(&g, &late).0.ids, by_logits_late.ids);
    let mut tokens = g.stream("Hello", &greedy).unwrap();
    block_on(async { while tokens.next().await.transpose().unwrap().is_some() {} });
    assert_eq!(tokens.into_generated().ids, by_logits.ids);

    let decoder = Tiny::new().load().decoder;
    let [mut one, mut other] = [0, 1].map(|_| KVCache::new(&decoder, 1, 32).unwrap());
    let logits = g.logits(&[1, 2, 3], &mut one).unwrap();
    let best = g.best(&[1, 2, 3], &mut other).unwrap();
    assert!(logits.iter().all(|logit| *logit <= logits[best as usize]));
    assert_eq!((one.len(), other.len()), (3, 3));
}

#[test]
fn a_stop_string_over_two_tokens_ends_the_text_and_is_never_streamed() {
    let g = generator();
    let (whole, _) = run(&g, &config());
    // Every token is one character here.
    assert_eq!(whole.text.chars().count(), 12, "{:?}", whole.text);
    let stop: String = whole.text.chars().skip(4).take(2).collect();
    let at = whole.text.find(&stop).unwrap();
    let stopped = GeneratorConfig { stop: vec!["no such text".into(), stop], ..config() };
    let (out, streamed) = run(&g, &stopped);
    assert_eq!(out.finish, Finish::Stop);
    assert_eq!(out.text, whole.text[..at]);
    assert_eq!(text(&streamed), out.text);
    assert!(out.ids.len() <= 6 && whole.ids.starts_with(&out.ids));
}

#[test]
fn text_held_back_comes_out_where_no_stop_string_follows() {
    let g = generator();
    let (whole, _) = run(&g, &config());
    let last = whole.text.chars().last().unwrap();
    let held = GeneratorConfig { stop: vec![format!("{last} and never this")], ..config() };
    let (out, streamed) = run(&g, &held);
    assert_eq!((out.text, out.finish), (whole.text.clone(), Finish::Length));
    assert_eq!(text(&streamed), whole.text);
}

#[test]
fn nothing_ends_a_text_before_its_min_tokens() {
    let g = generator();
    let end = VOCAB as u32 - 1;
    // The end token is all that the model would say.
    let sampling = Sampling { logit_bias: [(end, 1e6)].into(), ..Sampling::default() };
    let ends = |min_tokens| GeneratorConfig { min_tokens, sampling: sampling.clone(), ..config() };
    for min_tokens in [0, 1, 5] {
        let (out, _) = run(&g, &ends(min_tokens));
        assert_eq!((out.ids.len(), out.finish), (min_tokens, Finish::EndOfText));
    }
    let (whole, _) = run(&g, &config());
    let first = whole.text.chars().next().unwrap().to_string();
    let stop = |min_tokens| GeneratorConfig { min_tokens, stop: vec![first.clone()], ..config() };
    assert_eq!(run(&g, &stop(0)).0.text, "");
    assert!(run(&g, &stop(3)).0.ids.len() > 3);
}

#[test]
fn an_extra_end_token_ends_the_text() {
    let g = generator();
    let (whole, _) = run(&g, &config());
    let (out, _) = run(&g, &GeneratorConfig { end_tokens: vec![whole.ids[0]], ..config() });
    assert_eq!((out.ids.len(), out.finish), (0, Finish::EndOfText));
}

#[test]
fn log_probabilities_come_with_each_token_where_asked_for() {
    let g = generator();
    assert!(run(&g, &config()).1.iter().all(|token| token.logprobs.is_none()));
    let greedy = GeneratorConfig { max_tokens: 6, logprobs: Some(3), ..GeneratorConfig::default() };
    let (out, streamed) = run(&g, &greedy);
    assert_eq!(out.logprobs.len(), out.ids.len());
    for ((id, logprobs), token) in out.ids.iter().zip(&out.logprobs).zip(&streamed) {
        assert_eq!(token.logprobs.as_ref(), Some(logprobs));
        assert_eq!((logprobs.top.len(), logprobs.top[0]), (3, (*id, logprobs.chosen)));
        assert!(logprobs.chosen <= 0.0 && logprobs.top.is_sorted_by(|a, b| a.1 >= b.1));
    }
}

#[test]
fn a_penalty_keeps_the_text_from_repeating_itself() {
    let g = generator();
    let strong = Sampling { repetition_penalty: 1e6, repetition_context: 0, ..Sampling::default() };
    let config = GeneratorConfig { max_tokens: 40, sampling: strong, ..GeneratorConfig::default() };
    let (out, _) = run(&g, &config);
    let mut distinct = out.ids.clone();
    distinct.sort_unstable();
    distinct.dedup();
    assert_eq!(distinct.len(), out.ids.len(), "{:?}", out.text);
}

#[test]
fn settings_without_meaning_are_refused_before_anything_runs() {
    let g = generator();
    let refused = |config: GeneratorConfig| g.generate("Hello", &config, |_| {}).unwrap_err();
    let hot = SamplingStrategy::temperature(-1.0).into();
    let error = refused(GeneratorConfig { sampling: hot, ..config() });
    assert!(matches!(error.kind(), ErrorKind::Sampling { name: "temperature", .. }), "{error}");
    let error = refused(GeneratorConfig { stop: vec![String::new()], ..config() });
    assert!(matches!(error.kind(), ErrorKind::EmptyStop), "{error}");
    // More tokens than a machine has memory for: the context ends them.
    let endless = GeneratorConfig { max_tokens: usize::MAX, ..config() };
    assert!(run(&g, &endless).0.ids.len() <= 128);
    assert!(run(&g, &GeneratorConfig { max_tokens: 0, ..config() }).0.ids.is_empty());
}

const PROMPTS: [&str; 4] = ["Hello", "A", "A much longer prompt than any other of them all", "Hi!"];

#[test]
fn a_batch_of_prompts_gives_what_each_gives_alone() {
    for window in [None, Some(6)] {
        let model = Tiny { window, ..Tiny::new() }.load();
        let g = Generator::new(Arc::new(model.decoder), Arc::new(model.tokenizer));
        let greedy = GeneratorConfig { max_tokens: 20, ..GeneratorConfig::default() };
        for config in [greedy.clone(), GeneratorConfig { max_tokens: 20, ..config() }] {
            let mut streamed = vec![String::new(); PROMPTS.len()];
            let batch = g.generate_batch(&PROMPTS, &config, |row, token| {
                streamed[row] += &token.text;
            });
            for ((prompt, got), streamed) in PROMPTS.iter().zip(batch.unwrap()).zip(streamed) {
                let want = g.generate(prompt, &config, |_| {}).unwrap();
                assert_eq!((&got.ids, &got.text, got.finish), (&want.ids, &want.text, want.finish));
                assert_eq!((streamed, got.prompt_tokens), (got.text, want.prompt_tokens));
            }
        }
    }
}

#[test]
fn rows_of_a_batch_end_one_by_one_also_at_the_end_of_the_context() {
    let g = generator();
    let long = "x".repeat(120);
    let prompts = ["Hello", &long, "A"];
    // Some token of the first answer ends it there and may end others elsewhere.
    let (whole, _) = run(&g, &config());
    let end_tokens = vec![whole.ids[5]];
    let config = GeneratorConfig { max_tokens: 300, end_tokens, ..config() };
    let batch = g.generate_batch(&prompts, &config, |_, _| {}).unwrap();
    for (prompt, got) in prompts.iter().zip(&batch) {
        let want = g.generate(prompt, &config, |_| {}).unwrap();
        assert_eq!((&got.ids, got.finish), (&want.ids, want.finish), "{prompt}");
    }
    let none: [&str; 0] = [];
    assert!(g.generate_batch(&none, &config, |_, _| {}).unwrap().is_empty());
    let error = g.generate_batch(&["a", ""], &config, |_, _| {}).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::PromptLength { tokens: 0, .. }), "{error}");
}

#[test]
fn a_session_takes_in_only_what_is_new_and_answers_as_from_scratch() {
    let g = generator();
    let mut session = Session::default();
    let mut said = String::from("Hello");
    let mut kept = 0;
    for turn in 0..6 {
        let got = g.generate_in(&mut session, &said, &config(), |_| {}).unwrap();
        let want = g.generate(&said, &config(), |_| {}).unwrap();
        assert_eq!((&got.ids, &got.text), (&want.ids, &want.text), "turn {turn}");
        assert_eq!((got.cached_tokens, want.cached_tokens), (kept, 0), "turn {turn}");
        said = format!("{said}{}", got.text);
        // Every token is one character. One that the length ended at has not been taken in.
        kept = said.len() - usize::from(got.finish == Finish::Length);
        said += " more";
    }
    // Another beginning: what is no longer said is forgotten.
    let got = g.generate_in(&mut session, "Help", &config(), |_| {}).unwrap();
    assert_eq!(got.cached_tokens, 3);
    assert_eq!(got.ids, g.generate("Help", &config(), |_| {}).unwrap().ids);
    // The same again: its last token is computed once more, for its logits.
    assert_eq!(g.generate_in(&mut session, "Help", &config(), |_| {}).unwrap().cached_tokens, 3);
    g.generate_in(&mut session, "", &config(), |_| {}).unwrap_err();
    assert!(g.generate_in(&mut session, "Help", &config(), |_| {}).is_ok());
}

#[test]
fn a_session_begins_anew_with_another_adapter() {
    let mut g = generator();
    let mut session = Session::default();
    g.generate_in(&mut session, "Hello", &config(), |_| {}).unwrap();
    assert!(!session.is_empty());
    g.apply_adapter(tiny::adapter(&["self_attn.k_proj", "self_attn.v_proj"])).unwrap();
    let got = g.generate_in(&mut session, "Hello", &config(), |_| {}).unwrap();
    assert_eq!(got.cached_tokens, 0);
    assert_eq!(got.ids, g.generate("Hello", &config(), |_| {}).unwrap().ids);
    g.remove_adapter();
    assert_eq!(g.generate_in(&mut session, "Hello", &config(), |_| {}).unwrap().cached_tokens, 0);
}

#[test]
fn an_adapter_is_swapped_under_a_batch_too() {
    let mut g = generator();
    let prompts = ["Hello", "Help me"];
    let ids = |g: &Generator| -> Vec<Vec<u32>> {
        let batch = g.generate_batch(&prompts, &config(), |_, _| {}).unwrap();
        batch.into_iter().map(|generated| generated.ids).collect()
    };
    let base = ids(&g);
    g.apply_adapter(tiny::adapter(&["self_attn.k_proj", "self_attn.v_proj"])).unwrap();
    let adapted = ids(&g);
    for (prompt, ids) in prompts.iter().zip(&adapted) {
        assert_eq!(*ids, g.generate(prompt, &config(), |_| {}).unwrap().ids);
    }
    assert_ne!(base, adapted);
    g.remove_adapter();
    assert_eq!(ids(&g), base);
}

/// The tiny model's context is smaller than the smallest cache.
#[test]
fn a_session_outgrows_its_cache_and_keeps_what_is_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let case = testbed::file("data/models/llama");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(case.join(name), folder.path().join(name)).unwrap();
    }
    let text = std::fs::read_to_string(folder.path().join("config.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    json["max_position_embeddings"] = 1000.into();
    std::fs::write(folder.path().join("config.json"), json.to_string()).unwrap();
    let decoder = load_decoder(folder.path(), BaseWeights::AsStored, device()).unwrap();
    let tokenizer = Tiny::new().load().tokenizer;
    let g = Generator::new(Arc::new(decoder), Arc::new(tokenizer));
    let mut session = Session::default();
    let mut said = "word".repeat(50);
    for turn in 0..3 {
        let got = g.generate_in(&mut session, &said, &config(), |_| {}).unwrap();
        assert_eq!(got.ids, g.generate(&said, &config(), |_| {}).unwrap().ids, "turn {turn}");
        assert_eq!(got.cached_tokens > 0, turn > 0);
        said = format!("{said}{}{}", got.text, "more".repeat(40));
    }
}

/// Keys and values are rounded once, and all else is as it was: so are prompts, single tokens and batches.
#[test]
fn a_cache_in_half_the_bytes_gives_the_logits_within_its_rounding() {
    let ids: Vec<u32> = (0..20).map(|i| (i * 7 + 3) % VOCAB as u32).collect();
    let logits = |decoder: Decoder| {
        let model = Tiny::new().load();
        let decoder = Arc::new(decoder);
        let g = Generator::new(Arc::clone(&decoder), Arc::new(model.tokenizer));
        let mut cache = KVCache::new(&decoder, 1, 32).unwrap();
        let (prompt, tokens) = ids.split_at(12);
        let mut all = g.logits(prompt, &mut cache).unwrap();
        for id in tokens {
            all.extend(g.logits(&[*id], &mut cache).unwrap());
        }
        all
    };
    let want = logits(Tiny::new().load().decoder);
    let largest = want.iter().fold(0f32, |a, b| a.max(b.abs()));
    for (dtype, rounding) in [(DType::F16, 1.0 / 2048.0), (DType::BF16, 1.0 / 256.0)] {
        let decoder = Tiny::new().load().decoder.with_cache(dtype);
        assert_eq!((decoder.cache(), decoder.activations()), (dtype, DType::F32));
        let got = logits(decoder);
        let off = want.iter().zip(&got).fold(0f32, |a, (x, y)| a.max((x - y).abs()));
        assert!(off > 0.0 && off <= 4.0 * rounding * largest, "{dtype}: {off} of {largest}");
    }
}

#[test]
fn a_cache_in_half_the_bytes_serves_batches_alike() {
    let model = Tiny::new().load();
    let decoder = Arc::new(model.decoder.with_cache(DType::F16));
    let g = Generator::new(decoder, Arc::new(model.tokenizer));
    let config = GeneratorConfig { sampling: Sampling::default(), ..config() };
    let prompts = ["Hello", "A longer one"];
    let together = g.generate_batch(&prompts, &config, |_, _| {}).unwrap();
    for (prompt, together) in prompts.iter().zip(&together) {
        assert_eq!(together.ids, g.generate(prompt, &config, |_| {}).unwrap().ids);
    }
    let bytes = |cache| {
        let decoder = Arc::new(Tiny::new().load().decoder.with_cache(cache));
        let shape = DecodeShape { batch: 1, tokens: 1, capacity: 64 };
        let plan = Generator::outline(decoder, shape).unwrap().plan;
        let donated = plan.inputs.iter().filter(|input| input.donated);
        donated.map(|input| input.ty.size_bytes()).sum::<usize>()
    };
    assert_eq!(bytes(DType::F32), 2 * bytes(DType::F16));
}

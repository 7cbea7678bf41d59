//! Generation on a tiny model: what ends it, what is streamed, and that awaiting is blocking.

#[path = "io/support.rs"]
#[allow(dead_code, reason = "only the GGUF writer is used here")]
mod support;
#[path = "regressions/tiny.rs"]
#[allow(dead_code, reason = "only the model is used here")]
mod tiny;

use metal_candle::ErrorKind;
use metal_candle::generate::{
    Finish, Generated, Generator, GeneratorConfig, Sampling, SamplingStrategy, StreamToken,
};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use tiny::{Tiny, VOCAB};

fn generator() -> Generator {
    let model = Tiny::new().load();
    Generator::new(Arc::new(model.decoder), Arc::new(model.tokenizer)).unwrap()
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

/// The future's value, and how often it was not ready.
fn block_on<T>(future: impl Future<Output = T>) -> (T, usize) {
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut pending = 0;
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(value) => return (value, pending),
            Poll::Pending => {
                pending += 1;
                std::thread::park();
            }
        }
    }
}

#[test]
fn awaited_tokens_are_the_tokens_and_no_thread_waits_for_them() {
    let g = generator();
    let config = GeneratorConfig { logprobs: Some(2), ..config() };
    let (want, want_streamed) = run(&g, &config);
    let mut tokens = g.stream("Hello", &config).unwrap();
    let collect = async {
        let mut streamed = Vec::new();
        while let Some(token) = tokens.next().await {
            streamed.push(token.unwrap());
        }
        assert!(tokens.next().await.is_none());
        streamed
    };
    let (streamed, pending) = block_on(collect);
    assert_eq!(streamed, want_streamed);
    assert!(pending > 0, "every step was waited for");
    let got = tokens.into_generated();
    assert_eq!((got.ids, got.text, got.finish), (want.ids, want.text, want.finish));
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

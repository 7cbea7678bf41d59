//! Tokens to be awaited.

use super::generator::Generator;
use super::run::{Run, Scores};
use super::{Generated, KVCache, StreamToken};
use crate::Result;
use futures_core::Stream;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll};

type Step<'g> = dyn Future<Output = Result<(Scores, KVCache)>> + Send + 'g;

/// The tokens of one generation, as they come: a [`Stream`], and usable without any library for
/// such.
///
/// No runtime is needed. While a step runs elsewhere, the polling thread is free; a dropped stream
/// stops after the step that runs.
///
/// ```no_run
/// # use metal_candle::generate::{Generator, GeneratorConfig};
/// # async fn show(generator: &Generator) -> metal_candle::Result<()> {
/// let mut tokens = generator.stream("Once upon a time", &GeneratorConfig::default())?;
/// while let Some(token) = tokens.next().await {
///     print!("{}", token?.text);
/// }
/// println!(" ({:?})", tokens.into_generated().finish);
/// # Ok(())
/// # }
/// ```
#[must_use = "nothing is generated before the stream is polled"]
pub struct TokenStream<'g> {
    generator: &'g Generator,
    run: Run<'g>,
    state: State<'g>,
}

enum State<'g> {
    /// These ids go into the cache next.
    Ready(Vec<u32>, KVCache),
    Running(Pin<Box<Step<'g>>>),
    /// At the end, and after an error.
    Done,
}

impl<'g> TokenStream<'g> {
    pub(super) fn new(
        generator: &'g Generator,
        run: Run<'g>,
        cache: KVCache,
        ids: Vec<u32>,
    ) -> TokenStream<'g> {
        TokenStream { generator, run, state: State::Ready(ids, cache) }
    }

    /// The next token; `None` at the end and after an error.
    pub async fn next(&mut self) -> Option<Result<StreamToken>> {
        poll_fn(|context| self.poll(context)).await
    }

    /// All that came so far, and why it ended if it did.
    pub fn into_generated(self) -> Generated {
        self.run.into_generated()
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<StreamToken>>> {
        while !self.run.is_finished() {
            match std::mem::replace(&mut self.state, State::Done) {
                State::Ready(ids, cache) => {
                    let step = self.generator.step_async(self.run.wants(), ids, cache);
                    self.state = State::Running(Box::pin(step));
                }
                State::Running(mut step) => {
                    let Poll::Ready(result) = step.as_mut().poll(context) else {
                        self.state = State::Running(step);
                        return Poll::Pending;
                    };
                    match self.accept(result) {
                        Ok(None) => {}
                        token => return Poll::Ready(token.transpose()),
                    }
                }
                State::Done => return Poll::Ready(None),
            }
        }
        Poll::Ready(None)
    }

    fn accept(&mut self, result: Result<(Scores, KVCache)>) -> Result<Option<StreamToken>> {
        let (scores, cache) = result?;
        let token = self.run.accept(scores, cache.has_room())?;
        self.state = State::Ready(vec![self.run.last()], cache);
        Ok(token)
    }
}

impl Stream for TokenStream<'_> {
    type Item = Result<StreamToken>;

    fn poll_next(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<StreamToken>>> {
        self.get_mut().poll(context)
    }
}

impl std::fmt::Debug for TokenStream<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenStream").field("run", &self.run).finish_non_exhaustive()
    }
}

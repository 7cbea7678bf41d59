//! Results that are on their way.

use crate::{Buffer, Result};
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// The results of a submitted run: [`wait`](Pending::wait) blocks for them, `.await` suspends.
///
/// Dropping it is safe: a run that has started goes on and its results are dropped, one that has not is left out.
#[must_use = "a run whose Pending is dropped may never start"]
pub struct Pending {
    completion: Arc<Completion>,
}

/// Where a run and its waiter meet.
pub(crate) struct Completion {
    state: Mutex<State>,
    done: Condvar,
}

enum State {
    Running(Option<Waker>),
    Done(Result<Vec<Buffer>>),
    Taken,
}

impl Pending {
    pub(crate) fn new() -> (Pending, Arc<Completion>) {
        let state = Mutex::new(State::Running(None));
        let completion = Arc::new(Completion { state, done: Condvar::new() });
        (Pending { completion: Arc::clone(&completion) }, completion)
    }

    /// Blocks until the run is over.
    ///
    /// # Errors
    /// As [`AsyncGraphExecutor::run`](crate::AsyncGraphExecutor::run).
    pub fn wait(self) -> Result<Vec<Buffer>> {
        let mut state = self.completion.lock();
        while matches!(*state, State::Running(_)) {
            state = self.completion.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        take(&mut state)
    }

    /// Whether the run is over, so that [`wait`](Pending::wait) returns at once.
    pub fn is_ready(&self) -> bool {
        !matches!(*self.completion.lock(), State::Running(_))
    }
}

/// # Panics
/// If the results were taken before, here or by an earlier poll.
fn take(state: &mut State) -> Result<Vec<Buffer>> {
    match std::mem::replace(state, State::Taken) {
        State::Done(results) => results,
        State::Running(_) | State::Taken => panic!("a Pending was polled after it had completed"),
    }
}

impl Future for Pending {
    type Output = Result<Vec<Buffer>>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.completion.lock();
        if let State::Running(waker) = &mut *state {
            match waker {
                Some(waker) => waker.clone_from(context.waker()),
                None => *waker = Some(context.waker().clone()),
            }
            return Poll::Pending;
        }
        Poll::Ready(take(&mut state))
    }
}

impl fmt::Debug for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pending").field("ready", &self.is_ready()).finish()
    }
}

impl Completion {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether anyone can still ask for the results.
    pub(crate) fn is_awaited(self: &Arc<Self>) -> bool {
        Arc::strong_count(self) > 1
    }

    pub(crate) fn complete(&self, results: Result<Vec<Buffer>>) {
        let before = std::mem::replace(&mut *self.lock(), State::Done(results));
        self.done.notify_all();
        // Outside of the lock: a waker may run anything, a poll of this very future included.
        if let State::Running(Some(waker)) = before {
            waker.wake();
        }
    }
}

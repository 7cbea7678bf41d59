//! Threads that help whoever walks a plan.
//!
//! A decoded token is hundreds of steps of some microseconds. So a walk stays on its caller's thread, which shares out the
//! tasks of a step and works on them itself. Helpers that have just finished a step look for the next one for a moment
//! before they sleep. Every thread has a range of the tasks to begin with (`ranges`), but a caller waits for tasks that
//! were taken, never for a helper: one that has not come, or was sent away from its processor in between, delays nobody.
//! One step at a time is helped: where several walks run, they keep the processors busy by themselves.

mod ranges;

use ranges::{Apart, MOST, NUMBERS, Ranges};
use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// So long a helper looks for more before it sleeps: longer than the steps between two that are work for several, as waking
/// it takes as long as such a step. Where processors are wanted by others, looking is what it is first sent away for, in
/// the middle of a later task.
const LOOKS: Duration = Duration::from_micros(100);
/// So long a caller looks for the end of tasks that others have taken before it sleeps: about one task. Its processor
/// may be the one that they are waiting for.
const WAITS: Duration = Duration::from_micros(20);
/// Turns between two looks at the clock.
const SPINS: usize = 16;
/// Helpers that a thread wakes by itself; each of these wakes as many.
const WAKES: usize = 4;

/// Helpers of an executor. They end with it.
pub(crate) struct Team {
    shared: Arc<Shared>,
}

/// A function of the number of a task. It outlives the work.
type Task<'a> = &'a (dyn Fn(usize) + Sync);

struct Shared {
    /// Written once a work.
    open: Apart<Open>,
    ranges: Ranges,
    /// Tasks that are not done.
    left: Apart<AtomicUsize>,
    /// Whether a caller owns the work.
    taken: AtomicBool,
    closed: AtomicBool,
    /// Runs that are being walked.
    walks: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    helpers: Vec<Apart<Helper>>,
    /// The caller, while it sleeps.
    waiting: Mutex<Option<Thread>>,
    is_waiting: AtomicBool,
}

/// The last work that was opened.
#[derive(Default)]
struct Open {
    /// Its number in the upper half, and in the lower one how many threads may take part.
    work: AtomicU64,
    /// What is to be done. Written by the owner of `taken`, while no task is free or being worked on.
    task: AtomicPtr<Task<'static>>,
}

/// A work, as who takes part in it knows it.
#[derive(Clone, Copy, PartialEq)]
struct Work {
    number: u64,
    threads: usize,
}

/// A helper as others see it.
#[derive(Default)]
struct Helper {
    thread: OnceLock<Thread>,
    /// Whether it sleeps, or is about to.
    asleep: AtomicBool,
}

thread_local! {
    /// Who helps this thread.
    static CURRENT: Cell<*const Shared> = const { Cell::new(std::ptr::null()) };
}

impl Team {
    /// The caller's thread and `threads - 1` helpers.
    ///
    /// # Panics
    /// If the system starts no more threads.
    pub(crate) fn new(threads: usize) -> Team {
        let shared = Arc::new(Shared {
            open: Apart::default(),
            ranges: Ranges::new(threads.max(1)),
            left: Apart::default(),
            taken: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            walks: AtomicUsize::new(0),
            panic: Mutex::new(None),
            helpers: (1..threads).map(|_| Apart::default()).collect(),
            waiting: Mutex::new(None),
            is_waiting: AtomicBool::new(false),
        });
        // First the team, so that the helpers end if one cannot be started.
        let team = Team { shared };
        for i in 0..team.shared.helpers.len() {
            let shared = Arc::clone(&team.shared);
            let builder = thread::Builder::new().name(format!("metal-candle-kernel-{}", i + 1));
            let started = builder.spawn(move || shared.help(i + 1));
            started.expect("the system starts no more threads");
        }
        team
    }

    /// Runs `f`, with the team behind [`for_each`] on this thread.
    pub(crate) fn walk<R>(&self, f: impl FnOnce() -> R) -> R {
        struct Walk<'a>(&'a Shared, *const Shared);
        impl Drop for Walk<'_> {
            fn drop(&mut self) {
                CURRENT.set(self.1);
                self.0.walks.fetch_sub(1, Ordering::Relaxed);
            }
        }
        self.shared.walks.fetch_add(1, Ordering::Relaxed);
        let _walk = Walk(&self.shared, CURRENT.replace(Arc::as_ptr(&self.shared)));
        f()
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::SeqCst);
        self.shared
            .helpers
            .iter()
            .filter_map(|helper| helper.0.thread.get())
            .for_each(Thread::unpark);
    }
}

/// The threads of the team behind this one, with it; 1 without a team.
pub(crate) fn threads() -> usize {
    // SAFETY: the team outlives the walk that has set it.
    unsafe { CURRENT.get().as_ref() }.map_or(1, |shared| shared.helpers.len() + 1)
}

/// `f(0), .., f(n - 1)`, in any order, on this thread and whoever helps it.
///
/// # Panics
/// If a task does, once none is being worked on.
pub(crate) fn for_each(n: usize, f: Task<'_>) {
    if n > MOST {
        let each = n.div_ceil(MOST);
        return for_each(n.div_ceil(each), &|i| (i * each..n.min((i + 1) * each)).for_each(f));
    }
    // SAFETY: as above.
    let helped = unsafe { CURRENT.get().as_ref() }.is_some_and(|shared| shared.share(n, f));
    if !helped {
        (0..n).for_each(f);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Works on the tasks with the helpers, unless these have other work; whether it did.
    fn share(&self, n: usize, f: Task<'_>) -> bool {
        let idle = (self.helpers.len() + 1).saturating_sub(self.walks.load(Ordering::Relaxed));
        let seats = idle.min(n.saturating_sub(1));
        if seats == 0 || self.taken.swap(true, Ordering::Acquire) {
            return false;
        }
        // Whoever takes a task reads this while it is not done, and before it is, this function does not return.
        self.open.0.task.store((&raw const f).cast_mut().cast(), Ordering::Relaxed);
        self.left.0.store(n, Ordering::Relaxed);
        let work = Work { number: (self.opened().number + 1) % NUMBERS, threads: seats + 1 };
        self.ranges.open(work.number, n, work.threads);
        self.open.0.work.store(work.number << 32 | work.threads as u64, Ordering::SeqCst);
        self.wake(0, work);
        self.work(0, work);
        self.wait();
        let panic = lock(&self.panic).take();
        self.taken.store(false, Ordering::Release);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
        true
    }

    /// The work that was opened last.
    fn opened(&self) -> Work {
        let work = self.open.0.work.load(Ordering::SeqCst);
        Work { number: work >> 32, threads: work as u32 as usize }
    }

    /// Wakes those helpers who are for this thread to wake: the caller is 0, and its helpers follow.
    fn wake(&self, me: usize, work: Work) {
        let all = self.helpers.get(WAKES * me..work.threads - 1).unwrap_or_default();
        for Apart(helper) in all.iter().take(WAKES) {
            if helper.asleep.load(Ordering::SeqCst)
                && helper.asleep.swap(false, Ordering::SeqCst)
                && let Some(thread) = helper.thread.get()
            {
                thread.unpark();
            }
        }
    }

    /// Takes tasks of a work until none is free.
    fn work(&self, me: usize, Work { number, threads }: Work) {
        let mut done = 0;
        // It may be of a later work already, but then there is no task to take.
        let task = self.open.0.task.load(Ordering::Relaxed);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            while let Some(i) = self.ranges.take(number, me, threads) {
                done += 1;
                // SAFETY: who has opened the work keeps the function until this task is done.
                unsafe { (*task)(i) };
            }
        }));
        if let Err(panic) = outcome {
            done += self.ranges.take_all(number, threads);
            lock(&self.panic).get_or_insert(panic);
        }
        if done > 0
            && self.left.0.fetch_sub(done, Ordering::SeqCst) == done
            && self.is_waiting.load(Ordering::SeqCst)
            && let Some(caller) = lock(&self.waiting).take()
        {
            caller.unpark();
        }
    }

    /// Until every task is done, of which all are taken.
    fn wait(&self) {
        let is_done = || self.left.0.load(Ordering::SeqCst) == 0;
        if spin(WAITS, is_done) {
            return;
        }
        // A helper may have been sent away from its processor in the middle of a task.
        self.is_waiting.store(true, Ordering::SeqCst);
        loop {
            *lock(&self.waiting) = Some(thread::current());
            if is_done() {
                break;
            }
            thread::park();
        }
        self.is_waiting.store(false, Ordering::SeqCst);
        lock(&self.waiting).take();
    }

    /// The life of a helper.
    fn help(&self, me: usize) {
        let Apart(helper) = &self.helpers[me - 1];
        helper.thread.get_or_init(thread::current);
        // None has this number and no threads.
        let mut last = Work { number: 0, threads: 0 };
        while !self.closed.load(Ordering::Relaxed) {
            let is_new = |work: Work| work != last && me < work.threads;
            let work = self.opened();
            if is_new(work) {
                self.wake(me, work);
                self.work(me, work);
                last = work;
                continue;
            }
            let has_news = || is_new(self.opened()) || self.closed.load(Ordering::SeqCst);
            if spin(LOOKS, has_news) {
                continue;
            }
            helper.asleep.store(true, Ordering::SeqCst);
            if !has_news() {
                thread::park();
            }
            helper.asleep.store(false, Ordering::SeqCst);
        }
    }
}

/// Looks for so long whether something is the case.
fn spin(time: Duration, is_so: impl Fn() -> bool) -> bool {
    let mut start = None;
    loop {
        for _ in 0..SPINS {
            if is_so() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.get_or_insert_with(Instant::now).elapsed() >= time {
            return false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    /// How often each of `n` tasks was done.
    fn counts(n: usize) -> Vec<usize> {
        let counts: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
        for_each(n, &|i| {
            counts[i].fetch_add(1, Ordering::Relaxed);
        });
        counts.into_iter().map(AtomicUsize::into_inner).collect()
    }

    #[test]
    fn every_task_is_done_once() {
        for threads in [1, 2, 5, 30] {
            Team::new(threads).walk(|| {
                for n in (0..200).chain([5000]) {
                    assert_eq!(counts(n), vec![1; n], "{threads} threads");
                }
            });
        }
    }

    #[test]
    fn more_tasks_than_are_counted_are_done_several_at_once() {
        let (n, sum) = (3 * MOST + 7, AtomicUsize::new(0));
        Team::new(2).walk(|| {
            for_each(n, &|i| {
                sum.fetch_add(i, Ordering::Relaxed);
            })
        });
        assert_eq!(sum.into_inner(), n * (n - 1) / 2);
    }

    #[test]
    fn helpers_that_sleep_are_woken() {
        for threads in [2, 3, 12] {
            let all_have_begun = Barrier::new(threads);
            Team::new(threads).walk(|| {
                for _ in 0..3 {
                    thread::sleep(10 * LOOKS);
                    // Each waits for the others: with fewer threads, this would last for ever.
                    for_each(threads, &|_| {
                        all_have_begun.wait();
                    });
                }
            });
        }
    }

    #[test]
    fn a_walk_goes_on_while_the_helper_is_busy_with_another() {
        let team = Team::new(2);
        let [both, begun, end] = [0; 3].map(|_| Barrier::new(2));
        thread::scope(|scope| {
            scope.spawn(|| {
                let caller = thread::current().id();
                team.walk(|| {
                    for_each(2, &|_| {
                        both.wait();
                        if thread::current().id() != caller {
                            begun.wait();
                            end.wait();
                        }
                    });
                });
            });
            begun.wait();
            team.walk(|| assert_eq!(counts(100), vec![1; 100]));
            end.wait();
        });
    }

    #[test]
    fn tasks_within_tasks_are_done() {
        let done = AtomicUsize::new(0);
        Team::new(3).walk(|| {
            for_each(20, &|_| {
                done.fetch_add(counts(7).len(), Ordering::Relaxed);
            });
        });
        assert_eq!(done.into_inner(), 140);
    }

    #[test]
    fn walks_beside_each_other_do_their_own_tasks() {
        let team = &Team::new(3);
        thread::scope(|scope| {
            for n in [10, 50, 90] {
                scope.spawn(move || {
                    team.walk(|| (0..300).for_each(|_| assert_eq!(counts(n), vec![1; n])))
                });
            }
        });
        assert_eq!(team.shared.walks.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn the_panic_of_a_task_is_the_callers_and_the_team_goes_on() {
        let team = Team::new(4);
        for bad in [0, 13, 39] {
            let run = || team.walk(|| for_each(40, &|i| assert_ne!(i, bad, "no {bad}")));
            let panic = catch_unwind(AssertUnwindSafe(run)).unwrap_err();
            let message = panic.downcast_ref::<String>().map(String::as_str).unwrap_or_default();
            assert!(message.contains(&format!("no {bad}")), "{message}");
            team.walk(|| assert_eq!(counts(40), vec![1; 40]));
        }
        assert_eq!(threads(), 1, "no team is behind a thread that walks nothing");
    }
}

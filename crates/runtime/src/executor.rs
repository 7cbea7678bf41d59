//! Runs executables: on the calling thread, or on threads of its own for whoever awaits them.

use crate::executable::{Timing, message};
use crate::pending::Completion;
use crate::team::Team;
use crate::{Buffer, Error, Executable, Pending, Result};
use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

/// Runs executables. A handle: clones share the threads.
///
/// The same executable and inputs give the same bits whatever the number of threads.
#[derive(Clone)]
pub struct AsyncGraphExecutor {
    owner: Arc<Owner>,
}

/// Ends the workers with the last handle.
struct Owner {
    shared: Arc<Shared>,
}

struct Shared {
    threads: usize,
    /// Helps whoever walks a plan; none for one thread.
    team: Option<Team>,
    queue: Mutex<Queue>,
    /// A job has come, or the executor is gone.
    news: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    workers: usize,
    idle: usize,
    closed: bool,
}

struct Job {
    executable: Arc<Executable>,
    inputs: Vec<Buffer>,
    completion: Arc<Completion>,
}

impl AsyncGraphExecutor {
    /// The executor of the process, with a thread for each processor: those of its callers, and others that help them.
    pub fn global() -> AsyncGraphExecutor {
        static GLOBAL: OnceLock<AsyncGraphExecutor> = OnceLock::new();
        let processors = || thread::available_parallelism().map_or(1, usize::from);
        GLOBAL.get_or_init(|| AsyncGraphExecutor::with_threads(processors())).clone()
    }

    /// An executor of its own, with `threads` threads (at least one) for the kernels: its caller's and others.
    ///
    /// # Panics
    /// If the system starts no more threads, as [`std::thread::spawn`].
    pub fn with_threads(threads: usize) -> AsyncGraphExecutor {
        let threads = threads.max(1);
        let team = (threads > 1).then(|| Team::new(threads));
        let shared = Shared { threads, team, queue: Mutex::default(), news: Condvar::new() };
        AsyncGraphExecutor { owner: Arc::new(Owner { shared: Arc::new(shared) }) }
    }

    /// The number of threads that kernels run on.
    pub fn threads(&self) -> usize {
        self.owner.shared.threads
    }

    /// Runs the executable and blocks until it is done. `inputs` are in the plan's order, dense; so are the results.
    ///
    /// # Errors
    /// [`Error::InputCount`], [`Error::InputType`] and [`Error::DonatedShared`] for the inputs; [`Error::Graph`]
    /// for an index among the values that is out of range; [`Error::OutOfMemory`]; [`Error::KernelPanic`].
    pub fn run(&self, executable: &Executable, inputs: Vec<Buffer>) -> Result<Vec<Buffer>> {
        executable.run(inputs, self.team())
    }

    pub(crate) fn team(&self) -> Option<&Team> {
        self.owner.shared.team.as_ref()
    }

    /// As [`AsyncGraphExecutor::run`], and the seconds that it took on the device.
    ///
    /// # Errors
    /// As [`AsyncGraphExecutor::run`].
    pub fn profile(
        &self,
        executable: &Executable,
        inputs: Vec<Buffer>,
        timing: Timing,
    ) -> Result<(Vec<Buffer>, Vec<f64>)> {
        executable.profile(inputs, self.team(), timing)
    }

    /// Runs the executable on the executor's threads. Returns at once.
    pub fn submit(&self, executable: Arc<Executable>, inputs: Vec<Buffer>) -> Pending {
        let (pending, completion) = Pending::new();
        self.owner.shared.push(Job { executable, inputs, completion });
        pending
    }
}

impl fmt::Debug for AsyncGraphExecutor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AsyncGraphExecutor").field("threads", &self.threads()).finish()
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // What was submitted is still done; nobody waits here, for this may be an asynchronous task.
        self.shared.lock().closed = true;
        self.shared.news.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(self: &Arc<Self>, job: Job) {
        let mut queue = self.lock();
        queue.jobs.push_back(job);
        if queue.jobs.len() > queue.idle && queue.workers < self.threads {
            self.start_worker(&mut queue);
        }
        drop(queue);
        self.news.notify_one();
    }

    fn start_worker(self: &Arc<Self>, queue: &mut Queue) {
        let shared = Arc::clone(self);
        let name = format!("metal-candle-worker-{}", queue.workers);
        match thread::Builder::new().name(name).spawn(move || shared.work()) {
            Ok(_) => queue.workers += 1,
            // The other workers will come to it; without any, nobody would.
            Err(source) if queue.workers == 0 => {
                let job = queue.jobs.pop_back().expect("metal-candle bug: no job was pushed");
                job.completion.complete(Err(Error::Thread(source)));
            }
            Err(_) => {}
        }
    }

    /// The life of a worker: job after job, until the executor is gone and none is left.
    fn work(&self) {
        loop {
            let mut queue = self.lock();
            let job = loop {
                match queue.jobs.pop_front() {
                    Some(job) => break job,
                    None if queue.closed => return,
                    None => {
                        queue.idle += 1;
                        queue = self.news.wait(queue).unwrap_or_else(PoisonError::into_inner);
                        queue.idle -= 1;
                    }
                }
            };
            drop(queue);
            self.run(job);
        }
    }

    fn run(&self, Job { executable, inputs, completion }: Job) {
        if !completion.is_awaited() {
            return;
        }
        // Steps catch their own panics; this is for what lies around them.
        let later = Arc::clone(&completion);
        let done = Box::new(move |results| later.complete(results));
        let run = AssertUnwindSafe(|| executable.submit(inputs, self.team.as_ref(), done));
        let results = catch_unwind(run).unwrap_or_else(|panic| {
            let label = "around the steps".to_string();
            let step = executable.plan().steps.len();
            Some(Err(Error::KernelPanic { step, label, message: message(&*panic) }))
        });
        drop(executable);
        if let Some(results) = results {
            completion.complete(results);
        }
    }
}

//! The memory of large results that nobody holds any more, kept for the next run.
//!
//! The system zeroes fresh memory page by page as it is first written: for a kernel at the speed of memory that costs two to
//! four times as much as its work. Whoever repeats a run, and has let go of the result of the one before, need not pay for it.

use crate::element::Data;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Of the outputs of one executable: at most one each. Freed with it.
pub(crate) struct Spares {
    by_output: Mutex<Vec<Option<Data>>>,
}

/// The elements of a buffer, and whose spare their memory is once they are dropped.
pub(crate) struct Owned {
    data: Data,
    home: Option<Home>,
}

struct Home {
    /// Gone with the executable.
    spares: Weak<Spares>,
    output: usize,
}

impl Spares {
    pub(crate) fn new(outputs: usize) -> Spares {
        Spares { by_output: Mutex::new((0..outputs).map(|_| None).collect()) }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Option<Data>>> {
        self.by_output.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory for this output, with the elements of an earlier result.
    pub(crate) fn take(&self, output: usize) -> Option<Data> {
        self.lock()[output].take()
    }

    fn give_back(&self, output: usize, data: Data) {
        let surplus = {
            let mut by_output = self.lock();
            let kept = &mut by_output[output];
            if kept.is_none() { kept.replace(data) } else { Some(data) }
        };
        // Not under the lock: the system takes its time.
        drop(surplus);
    }

    pub(crate) fn bytes(&self) -> usize {
        self.lock().iter().flatten().map(Data::size_bytes).sum()
    }
}

impl Owned {
    pub(crate) fn new(data: Data) -> Owned {
        Owned { data, home: None }
    }

    /// A result, whose memory is a spare for this output once the last handle to it is dropped.
    pub(crate) fn lent(data: Data, spares: &Arc<Spares>, output: usize) -> Owned {
        Owned { data, home: Some(Home { spares: Arc::downgrade(spares), output }) }
    }

    /// The elements, whose memory goes along.
    pub(crate) fn into_data(mut self) -> Data {
        self.home = None;
        std::mem::replace(&mut self.data, Data::empty())
    }

    /// The elements for writing: they are given to another run, whose result they become, and do not go back.
    pub(crate) fn given_away(&mut self) -> &mut Data {
        self.home = None;
        &mut self.data
    }
}

impl Deref for Owned {
    type Target = Data;

    fn deref(&self) -> &Data {
        &self.data
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        let Some(Home { spares, output }) = self.home.take() else { return };
        if let Some(spares) = spares.upgrade() {
            spares.give_back(output, std::mem::replace(&mut self.data, Data::empty()));
        }
    }
}

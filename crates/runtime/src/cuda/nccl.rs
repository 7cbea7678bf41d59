//! Sums over the GPUs of several ranks, on the device's stream.
//!
//! A sum waits, on the GPU, for all ranks. One that is gone would be waited for for ever: so every rank watches its links
//! to the others, which the system closes with their processes, and ends what runs if one closes during a run.

mod library;

use super::Gpu;
use crate::world::{Links, tell};
use crate::{Result, World, WorldError};
use cudarc::driver::sys::{CUdeviceptr, CUstream};
use library::{FLOAT32, FLOAT64, Library, UniqueId};
use metal_candle_compiler::Step;
use metal_candle_graph::DType;
use std::ffi::{c_int, c_void};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, sleep};
use std::time::Duration;

/// `ncclComm_t`
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Comm(*mut c_void);

// SAFETY: a handle that any thread may give to the library, one at a time.
unsafe impl Send for Comm {}

/// A rank that closes its link may have ended well, right after the last sum: what runs then comes to its end.
const GRACE: Duration = Duration::from_secs(1);

/// This rank's part in the sums.
pub(crate) struct Nccl {
    shared: Arc<Shared>,
}

struct Shared {
    gpu: Arc<Gpu>,
    library: &'static Library,
    /// `None` once it was ended.
    comm: Mutex<Option<Comm>>,
    links: Mutex<Vec<TcpStream>>,
    /// A rank that is gone.
    lost: OnceLock<usize>,
    /// Runs that began, and that are over.
    begun: AtomicU64,
    over: AtomicU64,
    closing: AtomicBool,
}

impl Nccl {
    /// What can fail before the ranks have met.
    ///
    /// # Errors
    /// [`WorldError::Library`]; as [`Gpu::get`].
    pub(crate) fn prepare(number: u32) -> Result<()> {
        Gpu::get(number)?.bind()?;
        Library::get()?;
        Ok(())
    }

    /// Connects the GPUs of all ranks.
    ///
    /// # Errors
    /// What NCCL says, [`WorldError::Lost`].
    pub(crate) fn new(number: u32, [rank, size]: [usize; 2], mut links: Links) -> Result<Nccl> {
        let (gpu, library) = (Gpu::get(number)?, Library::get()?);
        gpu.bind()?;
        let id = exchange(library, rank, &mut links.0)?;
        let comm = library.init(id, [rank, size])?;
        let failed = |e: std::io::Error| WorldError::Nccl {
            doing: "watching the other ranks",
            message: e.to_string(),
        };
        let readers: std::io::Result<Vec<TcpStream>> =
            links.0.iter().map(TcpStream::try_clone).collect();
        let shared = Arc::new(Shared {
            gpu,
            library,
            comm: Mutex::new(Some(comm)),
            links: Mutex::new(links.0),
            lost: OnceLock::new(),
            begun: AtomicU64::new(0),
            over: AtomicU64::new(0),
            closing: AtomicBool::new(false),
        });
        for (i, link) in readers.map_err(failed)?.into_iter().enumerate() {
            let (shared, peer) = (Arc::clone(&shared), if rank == 0 { 1 + i } else { 0 });
            let thread = thread::Builder::new().name(format!("metal-candle-rank-{peer}"));
            thread.spawn(move || shared.listen(link, rank, peer)).map_err(failed)?;
        }
        let nccl = Nccl { shared };
        nccl.check(size)?;
        Ok(nccl)
    }

    /// The first sum: that of as many ones as there are ranks.
    fn check(&self, size: usize) -> Result<()> {
        let gpu = &self.shared.gpu;
        let memory = gpu.allocate(size_of::<f32>(), "a number")?;
        memory.fill(&1f32.to_ne_bytes())?;
        let watch = self.watch()?;
        // SAFETY: memory of one number, which is there until the wait below.
        unsafe { self.shared.sum(memory.address(), 1, FLOAT32, gpu.raw_stream()) }?;
        let waited = gpu.synchronize();
        watch.end()?;
        waited?;
        let mut bytes = [0; 4];
        memory.read(&mut bytes)?;
        let (got, expected) = (f32::from_ne_bytes(bytes), size as f32);
        if got != expected {
            let message = format!("the first sum is {got}, expected {expected}");
            return Err(WorldError::Nccl { doing: "connecting the GPUs", message }.into());
        }
        Ok(())
    }

    /// Begins a run with sums, which ends with an error if a rank is lost meanwhile.
    ///
    /// # Errors
    /// [`WorldError::Lost`], if one is already.
    pub(crate) fn watch(&self) -> Result<Watch<'_>> {
        // First begun, then looked: either this run sees the loss, or whoever notes it sees this run.
        self.shared.begun.fetch_add(1, Ordering::SeqCst);
        let watch = Watch { shared: &self.shared };
        fence(Ordering::SeqCst);
        self.shared.is_whole()?;
        Ok(watch)
    }
}

/// Rank 0's id, on all ranks.
fn exchange(library: &Library, rank: usize, links: &mut [TcpStream]) -> Result<UniqueId> {
    if rank > 0 {
        let mut id = UniqueId([0; 128]);
        links[0].read_exact(&mut id.0).map_err(|_| WorldError::Lost { rank: 0 })?;
        return Ok(id);
    }
    let id = library.unique_id()?;
    for (rank, link) in (1..).zip(links) {
        link.write_all(&id.0).map_err(|_| WorldError::Lost { rank })?;
    }
    Ok(id)
}

/// A run with sums, from its beginning to its end.
pub(crate) struct Watch<'a> {
    shared: &'a Shared,
}

impl Watch<'_> {
    /// To be called when the stream is through.
    ///
    /// # Errors
    /// [`WorldError::Lost`] if it came through only because the sums were ended.
    pub(crate) fn end(self) -> Result<()> {
        match *self.shared.lock() {
            Some(_) => Ok(()),
            None => self.shared.is_whole(),
        }
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.shared.over.fetch_add(1, Ordering::SeqCst);
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Comm>> {
        self.comm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_whole(&self) -> Result<()> {
        self.lost.get().map_or(Ok(()), |rank| Err(WorldError::Lost { rank: *rank }.into()))
    }

    /// # Safety
    /// As [`Library::all_reduce`].
    unsafe fn sum(
        &self,
        at: CUdeviceptr,
        len: usize,
        dtype: c_int,
        stream: CUstream,
    ) -> Result<()> {
        match *self.lock() {
            // SAFETY: the caller's promise; nobody ends the sums while they are locked.
            Some(comm) => Ok(unsafe { self.library.all_reduce(comm, at, len, dtype, stream) }?),
            None => self.is_whole(),
        }
    }

    /// Waits for the link to `peer` to close, or for rank 0 to tell of another one's.
    fn listen(&self, mut link: TcpStream, rank: usize, peer: usize) {
        let mut told = [0; 4];
        let lost = match link.read_exact(&mut told) {
            Ok(()) => u32::from_le_bytes(told) as usize,
            Err(_) => peer,
        };
        if self.closing.load(Ordering::SeqCst) || self.lost.set(lost).is_err() {
            return;
        }
        fence(Ordering::SeqCst);
        if rank == 0 {
            tell(&mut self.links.lock().unwrap_or_else(PoisonError::into_inner), lost);
        }
        while !self.closing.load(Ordering::SeqCst) {
            let run = self.begun.load(Ordering::SeqCst);
            if self.over.load(Ordering::SeqCst) == run {
                return; // and none begins any more
            }
            sleep(GRACE);
            if self.over.load(Ordering::SeqCst) < run {
                return self.abort();
            }
        }
    }

    fn abort(&self) {
        let Some(comm) = self.lock().take() else { return };
        if self.gpu.bind().is_ok() {
            // SAFETY: nobody has it any more.
            unsafe { self.library.abort(comm) };
        }
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        let shared = &self.shared;
        shared.closing.store(true, Ordering::SeqCst);
        // First, so that whoever still waits for this rank learns that it is gone.
        for link in &*shared.links.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = link.shutdown(Shutdown::Both);
        }
        if shared.lost.get().is_some() {
            return shared.abort();
        }
        let Some(comm) = shared.lock().take() else { return };
        if shared.gpu.bind().is_ok() {
            // SAFETY: nobody has it any more; every run has waited for its sums.
            unsafe { shared.library.destroy(comm) };
        }
    }
}

/// A step that sums over ranks.
pub(super) struct Sum {
    world: Arc<World>,
    dtype: c_int,
    len: usize,
}

impl Sum {
    pub(super) fn new(world: &Arc<World>, step: &Step) -> Sum {
        let out = &step.outs[0];
        let dtype = if out.dtype == DType::F64 { FLOAT64 } else { FLOAT32 };
        Sum { world: Arc::clone(world), dtype, len: out.layout.shape.len() }
    }

    /// # Safety
    /// As [`Library::all_reduce`].
    pub(super) unsafe fn enqueue(&self, at: CUdeviceptr, stream: CUstream) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.world.nccl().shared.sum(at, self.len, self.dtype, stream) }
    }
}

//! NVIDIA's library for sums over GPUs, found when it is first wanted.
//!
//! cudarc's binding would make it a dependency of every build (Candle links CUDA's libraries), and only who trains on
//! several GPUs has it. So these few functions are looked up by name.

use crate::WorldError;
use crate::cuda::nccl::Comm;
use cudarc::driver::sys::{CUdeviceptr, CUstream};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::OnceLock;

/// What the ranks share to find each other: `ncclUniqueId`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct UniqueId(pub(super) [u8; 128]);

/// `ncclFloat32` and `ncclFloat64`.
pub(super) const FLOAT32: c_int = 7;
pub(super) const FLOAT64: c_int = 8;
/// `ncclSum`
const SUM: c_int = 0;

type Outcome = c_int;

/// The functions, as `nccl.h` declares them.
pub(super) struct Library {
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> Outcome,
    comm_init_rank: unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int) -> Outcome,
    comm_destroy: unsafe extern "C" fn(Comm) -> Outcome,
    comm_abort: unsafe extern "C" fn(Comm) -> Outcome,
    all_reduce: unsafe extern "C" fn(
        CUdeviceptr,
        CUdeviceptr,
        usize,
        c_int,
        c_int,
        Comm,
        CUstream,
    ) -> Outcome,
    get_error_string: unsafe extern "C" fn(Outcome) -> *const c_char,
    get_last_error: Option<unsafe extern "C" fn(Comm) -> *const c_char>,
}

impl Library {
    /// # Errors
    /// [`WorldError::Library`] where it is not to be found, or is none.
    pub(super) fn get() -> Result<&'static Library, WorldError> {
        static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
        let library = LIBRARY.get_or_init(Library::load);
        library.as_ref().map_err(|cause| WorldError::Library { cause: cause.clone() })
    }

    fn load() -> Result<Library, String> {
        let name = std::env::var("METAL_CANDLE_NCCL").unwrap_or_else(|_| "libnccl.so.2".into());
        let handle = open(&name)?;
        // SAFETY: functions of these names have had these types since NCCL 2.4.
        unsafe {
            Ok(Library {
                get_unique_id: function(handle, c"ncclGetUniqueId")?,
                comm_init_rank: function(handle, c"ncclCommInitRank")?,
                comm_destroy: function(handle, c"ncclCommDestroy")?,
                comm_abort: function(handle, c"ncclCommAbort")?,
                all_reduce: function(handle, c"ncclAllReduce")?,
                get_error_string: function(handle, c"ncclGetErrorString")?,
                // Since 2.13.
                get_last_error: function(handle, c"ncclGetLastError").ok(),
            })
        }
    }

    pub(super) fn unique_id(&self) -> Result<UniqueId, WorldError> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: room for an id.
        let outcome = unsafe { (self.get_unique_id)(&raw mut id) };
        self.said(outcome, "making an id")?;
        Ok(id)
    }

    /// Waits for the other ranks. The GPU is that of this thread's context.
    pub(super) fn init(&self, id: UniqueId, [rank, size]: [usize; 2]) -> Result<Comm, WorldError> {
        let mut comm = Comm(std::ptr::null_mut());
        // SAFETY: room for a handle.
        let outcome =
            unsafe { (self.comm_init_rank)(&raw mut comm, size as c_int, id, rank as c_int) };
        self.said(outcome, "connecting the GPUs")?;
        Ok(comm)
    }

    /// Asks the stream for the sum, in place, of so many numbers.
    ///
    /// # Safety
    /// The memory at `at` holds them until the stream is through; `comm` is whole.
    pub(super) unsafe fn all_reduce(
        &self,
        comm: Comm,
        at: CUdeviceptr,
        len: usize,
        dtype: c_int,
        stream: CUstream,
    ) -> Result<(), WorldError> {
        // SAFETY: the caller's promise.
        let outcome = unsafe { (self.all_reduce)(at, at, len, dtype, SUM, comm, stream) };
        self.said(outcome, "summing over the GPUs")
    }

    /// Ends whatever of it still runs.
    ///
    /// # Safety
    /// Nobody uses `comm` any more.
    pub(super) unsafe fn abort(&self, comm: Comm) {
        // SAFETY: the caller's promise. A failure can be told to nobody.
        let _ = unsafe { (self.comm_abort)(comm) };
    }

    /// # Safety
    /// As [`Library::abort`].
    pub(super) unsafe fn destroy(&self, comm: Comm) {
        // SAFETY: as above.
        let _ = unsafe { (self.comm_destroy)(comm) };
    }

    fn said(&self, outcome: Outcome, doing: &'static str) -> Result<(), WorldError> {
        if outcome == 0 {
            return Ok(());
        }
        let text = |text: *const c_char| match text.is_null() {
            true => String::new(),
            // SAFETY: both functions give static text, or none.
            false => unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned(),
        };
        // SAFETY: any number will do; no handle is needed.
        let message = text(unsafe { (self.get_error_string)(outcome) });
        let detail = self.get_last_error.map(|last| {
            // SAFETY: as above.
            text(unsafe { last(Comm(std::ptr::null_mut())) })
        });
        let detail = detail.filter(|detail| !detail.is_empty());
        let message = detail.map_or(message.clone(), |detail| format!("{message}: {detail}"));
        Err(WorldError::Nccl { doing, message })
    }
}

/// The function of this name.
///
/// # Safety
/// It has the type `F`, of a pointer to a function.
unsafe fn function<F: Copy>(library: *mut c_void, name: &CStr) -> Result<F, String> {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    let found = symbol_of(library, name);
    let found = found.ok_or_else(|| format!("it has no {}", name.to_string_lossy()))?;
    // SAFETY: the caller's promise; a pointer to a function is as large as one to data.
    Ok(unsafe { std::mem::transmute_copy::<*mut c_void, F>(&found) })
}

#[cfg(target_os = "linux")]
fn open(name: &str) -> Result<*mut c_void, String> {
    let c_name = CString::new(name).map_err(|_| format!("{name:?} is no path"))?;
    // SAFETY: a path that ends. What the library does when it is loaded is NVIDIA's.
    let handle = unsafe { libc::dlopen(c_name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if !handle.is_null() {
        return Ok(handle);
    }
    // SAFETY: the text of the error that this thread has just met, or none.
    let cause = unsafe { libc::dlerror() };
    Err(match cause.is_null() {
        true => name.to_owned(),
        // SAFETY: as above.
        false => unsafe { CStr::from_ptr(cause) }.to_string_lossy().into_owned(),
    })
}

#[cfg(target_os = "linux")]
fn symbol_of(handle: *mut c_void, name: &CStr) -> Option<*mut c_void> {
    // SAFETY: a library that stays, and a name that ends.
    let found = unsafe { libc::dlsym(handle, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}

#[cfg(not(target_os = "linux"))]
fn open(name: &str) -> Result<*mut c_void, String> {
    Err(format!("{name} is for Linux only"))
}

#[cfg(not(target_os = "linux"))]
fn symbol_of(_: *mut c_void, _: &CStr) -> Option<*mut c_void> {
    None
}

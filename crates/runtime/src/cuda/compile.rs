//! Rendered text to machine code: compiled once for a device and a driver, and kept on disk.

use super::Gpu;
use super::gpu::Said;
use crate::{Error, Result};
use cudarc::driver::sys::CUfunction_attribute as Attribute;
use cudarc::driver::{result, sys};
use cudarc::nvrtc;
use metal_candle_compiler::render::{Dialect, Source, TensorCores};
use rayon::prelude::*;
use rustc_hash::{FxHashMap, FxHashSet, FxHasher};
use std::ffi::{CStr, CString, c_char};
use std::hash::Hasher;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::{env, fs, io, process};

/// Memory that a block may share without asking.
const ORDINARY_SHARED_BYTES: usize = 48 << 10;

/// The kernels of a device, by their text. They stay loaded as long as the process lives.
#[derive(Default)]
pub(super) struct Kernels {
    loaded: Mutex<FxHashMap<String, Function>>,
}

/// A kernel that is ready to be launched.
#[derive(Clone, Copy)]
pub(super) struct Function(pub(super) sys::CUfunction);

// SAFETY: a handle that the driver may be given from any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Kernels {
    /// The functions of `sources`, in their order. What is new is compiled, on all processors.
    ///
    /// # Errors
    /// [`Error::Compile`] with the compiler's log; what the driver says.
    pub(super) fn get(&self, gpu: &Gpu, sources: &[&Source]) -> Result<Vec<Function>> {
        let new = {
            let (loaded, mut seen) = (self.lock(), FxHashSet::default());
            let mut is_new = |text| !loaded.contains_key(text) && seen.insert(text);
            let all = sources.iter().copied();
            all.filter(|source| is_new(&source.text)).collect::<Vec<&Source>>()
        };
        // Not under the lock: other plans compile meanwhile, if need be the same kernel.
        let toolchain = Toolchain::of(gpu)?;
        let compiled: Result<Vec<_>> = new.par_iter().map(|s| toolchain.machine_code(s)).collect();
        let compiled = compiled?;
        let mut loaded = self.lock();
        for (source, code) in new.iter().zip(compiled) {
            if !loaded.contains_key(&source.text) {
                loaded.insert(source.text.clone(), load(gpu, source, &code)?);
            }
        }
        Ok(sources.iter().map(|source| loaded[&source.text]).collect())
    }

    fn lock(&self) -> MutexGuard<'_, FxHashMap<String, Function>> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The function of a module that is never unloaded.
fn load(gpu: &Gpu, source: &Source, code: &[u8]) -> Result<Function> {
    gpu.bind()?;
    let doing = || format!("loading the kernel {}", source.name);
    let name = CString::new(source.name.as_str()).said(doing)?;
    // SAFETY: the code is a whole image, as the compiler wrote it.
    let module = unsafe { result::module::load_data(code.as_ptr().cast()) }.said(doing)?;
    // SAFETY: a module that was just loaded.
    let function = unsafe { result::module::get_function(module, name) }.said(doing)?;
    if source.launch.shared_bytes > ORDINARY_SHARED_BYTES {
        let most = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let bytes = source.launch.shared_bytes as i32;
        // SAFETY: a function that was just loaded.
        unsafe { result::function::set_function_attribute(function, most, bytes) }.said(doing)?;
    }
    Ok(Function(function))
}

/// What machine code depends on beside the text.
struct Toolchain {
    /// As NVRTC calls it, with what it alone has where kernels are written for that.
    architecture: String,
    /// The compiler's and the driver's version.
    versions: String,
    folder: Option<PathBuf>,
}

impl Toolchain {
    fn of(gpu: &Gpu) -> Result<Toolchain> {
        let (mut major, mut minor, mut driver) = (0, 0, 0);
        // SAFETY: places to write to.
        unsafe { nvrtc::sys::nvrtcVersion(&raw mut major, &raw mut minor).result() }.map_err(
            |e| Error::Cuda { doing: "starting NVRTC".into(), message: format!("{e:?}") },
        )?;
        // SAFETY: a place to write to.
        unsafe { sys::cuDriverGetVersion(&raw mut driver).result() }
            .said(|| "asking the driver's version".into())?;
        let versions = format!("nvrtc {major}.{minor}, driver {driver}");
        let alone = gpu.limits.tensor_cores == Some(TensorCores::Wgmma);
        let architecture = format!("sm_{}{}", gpu.architecture, if alone { "a" } else { "" });
        Ok(Toolchain { architecture, versions, folder: folder() })
    }

    fn machine_code(&self, source: &Source) -> Result<Vec<u8>> {
        let text = format!("{}\n{}", Dialect::CUDA.header_of(source), source.text);
        let key = format!("// {}, {}\n{text}", self.architecture, self.versions);
        let path = self.folder.as_ref().map(|folder| folder.join(file_name(&key)));
        if let Some(code) = path.as_deref().and_then(|path| read(path, &key)) {
            return Ok(code);
        }
        let code = self.compile(source, &text)?;
        if let Some(path) = &path {
            // The next start compiles again if this fails.
            let _ = write(path, &key, &code);
        }
        Ok(code)
    }

    fn compile(&self, source: &Source, text: &str) -> Result<Vec<u8>> {
        let failed = |log: String| Error::Compile { kernel: source.name.clone(), log };
        let text = CString::new(text).map_err(|e| failed(e.to_string()))?;
        let program =
            nvrtc::result::create_program(&text, None).map_err(|e| failed(format!("{e:?}")))?;
        let architecture = format!("--gpu-architecture={}", self.architecture);
        let options = Dialect::CUDA.options.iter().map(|o| (*o).to_owned());
        let options: Vec<String> = options.chain([architecture]).collect();
        // SAFETY: a program that was just made, and is destroyed below.
        let outcome = unsafe {
            match nvrtc::result::compile_program(program, &options) {
                Ok(()) => cubin(program).map_err(|e| failed(format!("{e:?}"))),
                Err(error) => Err(failed(log(program).unwrap_or_else(|| format!("{error:?}")))),
            }
        };
        // SAFETY: as above.
        let _ = unsafe { nvrtc::result::destroy_program(program) };
        outcome
    }
}

/// # Safety
/// A program that was compiled.
unsafe fn cubin(
    program: nvrtc::sys::nvrtcProgram,
) -> std::result::Result<Vec<u8>, nvrtc::result::NvrtcError> {
    let mut len = 0;
    // SAFETY: the caller's promise; the code has as many bytes as it says.
    unsafe {
        nvrtc::sys::nvrtcGetCUBINSize(program, &raw mut len).result()?;
        let mut code = vec![0u8; len];
        nvrtc::sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast::<c_char>()).result()?;
        Ok(code)
    }
}

/// # Safety
/// A program.
unsafe fn log(program: nvrtc::sys::nvrtcProgram) -> Option<String> {
    // SAFETY: the caller's promise.
    let log = unsafe { nvrtc::result::get_program_log(program) }.ok()?;
    let bytes: Vec<u8> = log.iter().map(|c| *c as u8).collect();
    Some(CStr::from_bytes_until_nul(&bytes).ok()?.to_string_lossy().into_owned())
}

/// `$METAL_CANDLE_KERNELS`, or `metal-candle/kernels` in the user's cache.
fn folder() -> Option<PathBuf> {
    let set = |name| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let cache = || set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
    set("METAL_CANDLE_KERNELS").or_else(|| cache().map(|c| c.join("metal-candle/kernels")))
}

fn file_name(key: &str) -> String {
    let mut hasher = FxHasher::default();
    hasher.write(key.as_bytes());
    format!("{:016x}.cubin", hasher.finish())
}

/// A file holds the key's length, the key, and the code: a hash alone could lie.
fn read(path: &Path, key: &str) -> Option<Vec<u8>> {
    let file = fs::read(path).ok()?;
    let (len, rest) = file.split_first_chunk::<8>()?;
    let len = usize::try_from(u64::from_le_bytes(*len)).ok()?;
    (len == key.len() && rest.get(..len)? == key.as_bytes()).then(|| rest[len..].to_vec())
}

fn write(path: &Path, key: &str, code: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let temporary = path.with_extension(format!("{}.tmp", process::id()));
    let file = [&(key.len() as u64).to_le_bytes(), key.as_bytes(), code].concat();
    fs::write(&temporary, file)?;
    fs::rename(temporary, path)
}

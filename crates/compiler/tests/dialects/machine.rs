//! Compiles rendered kernels as C++ and runs them: see `machine/machine.h` for what they are held to.

use crate::program::{self, Program};
use metal_candle_compiler::render::{Dialect, Source};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Kernels that are compiled together.
pub(crate) struct Unit {
    pub(crate) header: String,
    pub(crate) sources: Vec<Source>,
}

/// Compiled kernels, to be run.
pub(crate) struct Machine {
    folder: PathBuf,
}

impl Machine {
    /// `name` tells programs of one test run apart.
    pub(crate) fn build(dialect: &Dialect, name: &str, units: &[Unit]) -> Machine {
        let folder = folder(name);
        let here = machine_sources();
        let own = ["machine", "program", "tensor_cores"].map(|name| {
            (here.join(name).with_extension("cpp"), folder.join(name).with_extension("o"), false)
        });
        let mut jobs = own.to_vec();
        for (i, unit) in units.iter().enumerate() {
            let path = folder.join(format!("unit{i}.cpp"));
            std::fs::write(&path, unit_text(dialect, unit)).unwrap();
            jobs.push((path, folder.join(format!("unit{i}.o")), true));
        }
        compile_all(&jobs);
        let mut link = compiler();
        link.args(jobs.iter().map(|(_, object, _)| object));
        execute(link.arg("-o").arg(folder.join("machine")));
        Machine { folder }
    }

    /// The buffers after each program, or what it did wrong.
    pub(crate) fn run(&self, programs: &[Program]) -> Vec<Result<Vec<Vec<u8>>, String>> {
        let [file, results] = ["programs", "results"].map(|name| self.folder.join(name));
        std::fs::write(&file, program::encode(programs)).unwrap();
        execute(Command::new(self.folder.join("machine")).arg(&file).arg(&results));
        program::decode(programs, &std::fs::read(&results).unwrap())
    }
}

/// Compiles the units by NVRTC for each architecture: to machine code, without a GPU. Wants the toolkit in `cuda_home`.
pub(crate) fn compile_by_nvrtc(
    cuda_home: &Path,
    architectures: &str,
    dialect: &Dialect,
    units: &[Unit],
) {
    let folder = folder("nvrtc");
    let program = folder.join("nvrtc");
    let mut command = compiler();
    command.arg(machine_sources().join("nvrtc.cpp")).arg("-o").arg(&program);
    command.arg("-I").arg(cuda_home.join("include"));
    let lib = cuda_home.join("lib64");
    command.arg("-L").arg(&lib).arg("-lnvrtc").arg(format!("-Wl,-rpath,{}", lib.display()));
    execute(&mut command);
    let mut nvrtc = Command::new(program);
    nvrtc.arg(architectures).args(dialect.options).arg("--");
    for (i, unit) in units.iter().enumerate() {
        let path = folder.join(format!("unit{i}.cu"));
        let kernels = unit.sources.iter().map(|source| source.text.as_str());
        std::fs::write(&path, unit.header.clone() + &kernels.collect::<String>()).unwrap();
        nvrtc.arg(path);
    }
    execute(&mut nvrtc);
}

fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("dialects").join(name);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

fn machine_sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/dialects/machine")
}

/// A file of C++: the kernels as they are, and how to call them.
fn unit_text(dialect: &Dialect, unit: &Unit) -> String {
    let shim = if dialect.language == "Metal" { "" } else { "#include \"cuda.h\"\n" };
    let mut text = format!("{shim}{}", unit.header);
    for Source { name, text: kernel, .. } in &unit.sources {
        // A qualifier that is a macro of nothing cannot be an attribute, too.
        let kernel = kernel.replace(" [[threadgroup(0)]]", "");
        text += &format!(
            "\n{kernel}static machine::Kernel of_{name}(\"{name}\", [](void* const* p) {{ machine::call({name}, p); }});\n"
        );
    }
    text
}

/// Calls the machine before every access to memory, and where C++ is left.
const CHECKS: &str = "-fsanitize=thread,alignment,bounds,signed-integer-overflow,shift,\
                      integer-divide-by-zero,float-cast-overflow";

/// On every core.
fn compile_all(jobs: &[(PathBuf, PathBuf, bool)]) {
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                while let Some((from, to, checked)) = jobs.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    let mut command = compiler();
                    command.args(checked.then_some(CHECKS));
                    command.arg("-c").arg(from).arg("-o").arg(to);
                    if let Err(error) = run(&mut command) {
                        failed.lock().unwrap().push(error);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// Clang, for its `_Float16` and its sanitizer's calls.
fn compiler() -> Command {
    let asked = std::env::var("METAL_CANDLE_CLANG").ok();
    let known = asked.map_or(vec!["clang++-16".into(), "clang++".into()], |asked| vec![asked]);
    let works = |name: &&String| {
        let mut command = Command::new(name);
        command.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    let Some(found) = known.iter().find(works) else {
        panic!(
            "none of {known:?} runs: the rendered kernels are compiled by clang 16 or later; install it (Debian: \
             apt-get install clang-16, macOS: xcode-select --install), or name it in METAL_CANDLE_CLANG"
        )
    };
    let mut command = Command::new(found);
    command.args(["-std=c++20", "-O1", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Werror"]);
    // Accesses stay as they are written.
    command.args(["-fno-vectorize", "-fno-slp-vectorize"]);
    let known_noise = [
        // Metal's.
        "unknown-attributes",
        // The headers hold more than every kernel needs.
        "unused-function",
        "unused-parameter",
        // What is written out already.
        "pass-failed",
        // A tape may compare a value with itself.
        "tautological-compare",
        // `tid` has no sign, rows and columns have.
        "sign-compare",
    ];
    command.args(known_noise.map(|noise| format!("-Wno-{noise}")));
    command.arg("-I").arg(machine_sources());
    command
}

#[track_caller]
fn execute(command: &mut Command) {
    run(command).unwrap_or_else(|error| panic!("{error}"));
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{command:?} failed:\n{errors}")) }
}

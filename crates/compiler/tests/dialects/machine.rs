//! Compiles rendered kernels as C++ and runs them: see `machine/machine.h` for what they are held to.

use crate::program::{self, Program};
use metal_candle_compiler::render::{Dialect, Limits, Source};
use std::collections::HashSet;
use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// So few threads at once that grids go round several times.
pub(crate) const CUDA: Limits = Limits::cuda(1, 512);
pub(crate) const METAL: Limits = Limits::metal(1);

pub(crate) const DIALECTS: [(&str, &Dialect, Limits); 2] =
    [("cuda", Dialect::CUDA, CUDA), ("metal", Dialect::METAL, METAL)];

/// Files for the kernels of a machine at most, and kernels of one at least: clang takes as long for the headers as for a
/// dozen kernels, and cores want work.
const UNITS: usize = 8;
const KERNELS_OF_UNIT: usize = 12;

/// Kernels that are compiled together.
pub(crate) struct Unit {
    pub(crate) header: String,
    pub(crate) sources: Vec<Source>,
}

/// The kernels of all sources, each once, in units of about the same size.
pub(crate) fn units<'a>(
    sources: impl IntoIterator<Item = &'a Source>,
    dialect: &Dialect,
) -> Vec<Unit> {
    let mut known = HashSet::new();
    let sources: Vec<&Source> =
        sources.into_iter().filter(|source| known.insert(&source.name)).collect();
    let n = (sources.len() / KERNELS_OF_UNIT).clamp(2, UNITS);
    let unit = |i: usize| {
        let sources = sources.iter().skip(i).step_by(n).map(|source| (*source).clone()).collect();
        Unit { header: dialect.header(), sources }
    };
    (0..n).map(unit).collect()
}

/// Compiled kernels, to be run.
pub(crate) struct Machine {
    folder: PathBuf,
}

impl Machine {
    /// `name` tells programs of one test run apart.
    pub(crate) fn build(dialect: &Dialect, name: &str, units: &[Unit]) -> Machine {
        let folder = folder(name);
        let (own, new) = own_objects(&folder);
        let mut jobs: Vec<Job> = new.iter().map(|(job, _)| job.clone()).collect();
        for (i, unit) in units.iter().enumerate() {
            let from = folder.join(format!("unit{i}.cpp"));
            std::fs::write(&from, unit_text(dialect, unit)).unwrap();
            jobs.push(Job { to: from.with_extension("o"), from, checked: true });
        }
        compile_all(&jobs);
        for (job, kept) in &new {
            // As a whole or not at all: other tests may look for it now.
            std::fs::rename(&job.to, kept).unwrap();
        }
        let kernels = jobs[new.len()..].iter().map(|job| &job.to);
        let mut link = compiler();
        link.args(own.iter().chain(kernels));
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
    // Tests of other crates have it, too.
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../compiler/tests/dialects/machine")
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

/// A file to be compiled.
#[derive(Clone)]
struct Job {
    from: PathBuf,
    to: PathBuf,
    /// Whether it is made of kernels.
    checked: bool,
}

/// The objects of the machine itself, which all tests share; and those that are yet to be compiled, to `folder`, with
/// the places where they are kept.
fn own_objects(folder: &Path) -> (Vec<PathBuf>, Vec<(Job, PathBuf)>) {
    let here = machine_sources();
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(&here).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let mut hash = DefaultHasher::new();
    files.iter().for_each(|file| hash.write(&std::fs::read(file).unwrap()));
    let kept = self::folder(&format!("machine-{:016x}", hash.finish()));
    let objects = ["machine", "program", "tensor_cores"];
    let job = |name: &&str| {
        let (from, to) = (here.join(name).with_extension("cpp"), folder.join(name));
        (
            Job { from, to: to.with_extension("o"), checked: false },
            kept.join(name).with_extension("o"),
        )
    };
    let jobs = objects.iter().map(job);
    let new = jobs.filter(|(_, kept)| !kept.exists()).collect();
    (objects.iter().map(|name| kept.join(name).with_extension("o")).collect(), new)
}

/// Calls the machine before every access to memory, and where C++ is left.
const CHECKS: &str = "-fsanitize=thread,alignment,bounds,signed-integer-overflow,shift,\
                      integer-divide-by-zero,float-cast-overflow";

/// On every core.
fn compile_all(jobs: &[Job]) {
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let Job { from, to, checked } = job;
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

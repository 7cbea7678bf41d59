//! Whether the kernels for 64-bit ARM give what the others give, on any system that can emulate one.

use crate::command::{cargo, execute, output, program, works};
use anyhow::Result;
use std::path::Path;

const TARGET: &str = "aarch64-unknown-linux-gnu";
const LINKER: &str = "aarch64-linux-gnu-gcc";
/// What runs the tests, and where the libraries of the target are.
const EMULATOR: [&str; 3] = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"];

/// The tests beside the kernels: others would take an emulator too long.
const TESTS: [&str; 3] = ["cpu::quant", "cpu::attention", "cpu::math"];

/// Runs them, natively or emulated, or says why they cannot be run here.
pub(crate) fn run() -> Result<()> {
    if cfg!(target_arch = "aarch64") {
        println!("skipped: all tests run on this processor anyway");
        return Ok(());
    }
    if let Some(missing) = missing()? {
        println!("skipped: there is no {missing}");
        return Ok(());
    }
    let mut command = cargo();
    command.args(["test", "--package", "metal-candle-runtime", "--lib", "--target", TARGET]);
    command.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", LINKER);
    command.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER", EMULATOR.join(" "));
    execute(command.arg("--").args(TESTS))
}

/// What it takes that this machine has not.
fn missing() -> Result<Option<&'static str>> {
    let mut folder = program("rustc");
    let folder = output(folder.args(["--print", "target-libdir", "--target", TARGET]))?;
    let needed = [
        ("standard library for the target", Path::new(folder.trim()).is_dir()),
        (LINKER, works(program(LINKER).arg("--version"))),
        (EMULATOR[0], works(program(EMULATOR[0]).arg("--version"))),
    ];
    Ok(needed.into_iter().find(|(_, is_there)| !is_there).map(|(what, _)| what))
}

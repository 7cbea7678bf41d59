//! Whether the Metal backend's types hold, on any system: no Apple computer is needed to check them, nor can one be replaced
//! where it comes to linking and running.

use crate::command::{cargo, execute, output, program, works};
use anyhow::Result;

/// What has a Metal backend.
const PACKAGE: [&str; 4] = ["--package", "metal-candle-runtime", "--features", "metal"];

/// The target of every Apple computer with a GPU of Apple's.
const TARGET: &str = "aarch64-apple-darwin";

/// Checks the backend with warnings as errors, or says why it cannot be checked here.
pub(crate) fn run() -> Result<()> {
    let mut command = cargo();
    command.args(["clippy", "--target", TARGET]).args(PACKAGE);
    if let Err(reason) = get_target() {
        println!("skipped: {TARGET} cannot be had here ({reason:#})");
        return Ok(());
    }
    execute(command.args(["--", "--deny", "warnings"]))
}

/// The target's standard library, as a component of the toolchain.
fn get_target() -> Result<()> {
    let mut list = program("rustup");
    list.args(["target", "list", "--installed"]);
    if works(&mut list) && output(&mut list)?.lines().any(|line| line == TARGET) {
        return Ok(());
    }
    execute(program("rustup").args(["target", "add", TARGET]))
}

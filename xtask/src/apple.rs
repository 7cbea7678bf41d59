//! Whether the Metal backend's types hold, on any system: that takes no Apple computer. Linking and running do.

use crate::command::{cargo, execute, output, program};
use anyhow::{Context, Result};
use std::path::Path;

/// What has a Metal backend, and the command that is built on it: without the hub, whose TLS wants a C compiler for Apple's
/// systems, and which knows no device.
const PACKAGES: [&[&str]; 2] = [
    &["--package", "metal-candle-runtime", "--features", "metal"],
    &["--package", "metal-candle-cli", "--no-default-features", "--features", "metal"],
];

/// The target of every Apple computer with a GPU of Apple's.
const TARGET: &str = "aarch64-apple-darwin";

/// Checks the backend with warnings as errors, or says why it cannot be checked here.
pub(crate) fn run() -> Result<()> {
    if let Err(reason) = get_target() {
        println!("skipped: {TARGET} cannot be had here ({reason:#})");
        return Ok(());
    }
    for package in PACKAGES {
        let mut command = cargo();
        command.args(["clippy", "--target", TARGET]).args(package);
        execute(command.args(["--", "--deny", "warnings"]))?;
    }
    Ok(())
}

/// The target's standard library, as a component of the toolchain, if it is not there already.
fn get_target() -> Result<()> {
    let mut folder = program("rustc");
    let folder = output(folder.args(["--print", "target-libdir", "--target", TARGET]))?;
    if Path::new(folder.trim()).is_dir() {
        return Ok(());
    }
    execute(program("rustup").args(["target", "add", TARGET])).context("its standard library")
}

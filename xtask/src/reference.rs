//! `cargo xtask reference`: the vectors of `crates/metal-candle/tests/reference`, made anew.

use crate::command::{execute, program, works};
use crate::model;
use anyhow::{Result, bail};
use std::path::PathBuf;

pub(crate) fn run() -> Result<()> {
    let python = environment("reference", "reference/requirements.lock")?;
    execute(program(&python).arg("reference/ops.py"))
}

/// The Python of a virtual environment outside the checkout that holds what `lock` lists.
pub(crate) fn environment(name: &str, lock: &str) -> Result<PathBuf> {
    let folder = model::cache()?.join(name);
    let python = folder.join("bin/python");
    if !works(program(&python).arg("--version")) {
        if !works(program("python3").args(["-c", "import ensurepip, venv"])) {
            bail!("python3 with venv is needed (on Debian and Ubuntu: apt install python3-venv)");
        }
        execute(program("python3").args(["-m", "venv"]).arg(&folder))?;
    }
    let install = ["-m", "pip", "install", "--quiet", "--requirement", lock];
    execute(program(&python).args(install))?;
    Ok(python)
}

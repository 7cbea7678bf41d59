//! `cargo xtask bench`: eager Candle against this library, in one process.

use crate::command::{cargo, execute};
use anyhow::Result;

pub(crate) fn run(args: &[&str]) -> Result<()> {
    execute(
        cargo()
            .args(["bench", "--package", "metal-candle", "--bench", "lazy_vs_eager", "--"])
            .args(args),
    )
}

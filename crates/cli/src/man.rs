//! `metal-candle man`

use anyhow::{Context, Result};
use std::io::Write;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Write metal-candle.1 and a page for every command into this folder
    #[arg(long)]
    dir: Option<PathBuf>,
}

pub(crate) fn run(args: &Args, command: clap::Command) -> Result<()> {
    match &args.dir {
        Some(dir) => {
            let at = || format!("cannot write to {}", dir.display());
            std::fs::create_dir_all(dir).with_context(at)?;
            clap_mangen::generate_to(command, dir).with_context(at)
        }
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(command).render(&mut page)?;
            Ok(std::io::stdout().write_all(&page)?)
        }
    }
}

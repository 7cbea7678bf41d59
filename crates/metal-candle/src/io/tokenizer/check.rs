//! What the library takes for granted of a vocabulary and its merges, checked before it looks.

use std::collections::HashMap;
use std::path::Path;

use serde::Deserialize;

use super::{Error, Problem, Result, in_file};

/// What of a `tokenizer.json` can make the library panic.
#[derive(Deserialize)]
struct Json {
    model: JsonModel,
}

#[derive(Deserialize)]
struct JsonModel {
    #[serde(default, rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    vocab: serde_json::Value,
    #[serde(default)]
    merges: Vec<JsonMerge>,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum JsonMerge {
    Line(String),
    Pair(String, String),
}

/// Holds the merges of a BPE `tokenizer.json` against its vocabulary, before the library does.
pub(super) fn json(path: &Path, bytes: &[u8]) -> Result<()> {
    let json: Json = serde_json::from_slice(bytes)
        .map_err(|cause| Error::Json { path: path.to_owned(), cause })?;
    // The library unwraps what it takes for JSON that was looked at, also where the above skips it.
    serde_json::from_slice::<serde_json::Value>(bytes)
        .map_err(|cause| Error::Json { path: path.to_owned(), cause })?;
    let model = json.model;
    let Some(vocab) = model.vocab.as_object() else { return Ok(()) };
    if model.kind.is_some_and(|kind| kind != "BPE") {
        return Ok(());
    }
    let vocab: HashMap<&str, ()> = vocab.keys().map(|token| (token.as_str(), ())).collect();
    let prefix = model.continuing_subword_prefix.unwrap_or_default();
    let mut pairs = Vec::with_capacity(model.merges.len());
    for (index, merge) in model.merges.iter().enumerate() {
        pairs.push(match merge {
            JsonMerge::Pair(left, right) => (left.as_str(), right.as_str()),
            // A header line that old files carry and the library skips.
            JsonMerge::Line(line) if line.starts_with("#version") => continue,
            JsonMerge::Line(line) => split_merge(index, line).map_err(in_file(path))?,
        });
    }
    merges(&vocab, &pairs, &prefix).map_err(in_file(path))
}

/// The two tokens of a merge written as `left right`.
pub(super) fn split_merge(index: usize, merge: &str) -> std::result::Result<(&str, &str), Problem> {
    match merge.split_once(' ') {
        Some((left, right)) if !left.is_empty() && !right.is_empty() && !right.contains(' ') => {
            Ok((left, right))
        }
        _ => Err(Problem::Merge { index, merge: merge.to_owned() }),
    }
}

/// Both sides of every merge and what they make are in the vocabulary.
///
/// The library copies the two sides into a buffer of the longest token's size before it looks, and
/// panics where they do not fit.
pub(super) fn merges<V>(
    vocab: &HashMap<&str, V>,
    merges: &[(&str, &str)],
    prefix: &str,
) -> std::result::Result<(), Problem> {
    let mut made = String::new();
    for (index, &(left, right)) in merges.iter().enumerate() {
        made.clear();
        made.push_str(left);
        // A right side too short for its prefix makes a token that no vocabulary has.
        made.push_str(right.strip_prefix(prefix).unwrap_or("\0"));
        for token in [left, right, &made] {
            if !vocab.contains_key(token) {
                return Err(Problem::MergeToken { index, token: token.to_owned() });
            }
        }
    }
    Ok(())
}

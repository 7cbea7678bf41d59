//! `cargo xtask tidy`: the rules of ARCHITECTURE.md that no compiler checks, and no loose ends.

mod files;
mod layers;
mod source;

use crate::command::{output, program, root};
use anyhow::{Context, Result, bail};
use std::fmt;

/// A file of the tree, if it is text. `path` is relative to the root, with slashes.
pub(crate) struct File {
    path: String,
    text: String,
}

/// Where a rule does not hold, and what it says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Offence {
    path: String,
    line: usize,
    rule: String,
}

/// A rule over all files.
type Rule = fn(&[File]) -> Vec<Offence>;

const RULES: [Rule; 11] = [
    layers::graph_knows_no_backend,
    layers::unsafe_is_in_runtime_only,
    layers::models_know_no_runtime,
    layers::dependencies_go_one_way,
    layers::backends_are_in_runtime_only,
    layers::few_exhaustive_matches,
    files::files_are_short,
    files::root_is_small,
    files::named_paths_exist,
    files::nothing_is_left_open,
    files::no_path_of_a_machine,
];

pub(crate) fn run() -> Result<()> {
    let files = tree()?;
    let offences: Vec<Offence> = RULES.iter().flat_map(|rule| rule(&files)).collect();
    for offence in &offences {
        println!("{offence}");
    }
    if !offences.is_empty() {
        bail!("{} offences", offences.len());
    }
    println!("tidy: {} files, {} rules", files.len(), RULES.len());
    Ok(())
}

/// What git tracks, or would with `git add --all`.
fn tree() -> Result<Vec<File>> {
    let all = ["ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate"];
    let names = output(program("git").args(all)).context("tidy looks at what git tracks")?;
    let mut files = Vec::new();
    for path in names.split_terminator('\0') {
        let on_disk = root().join(path);
        if !on_disk.is_file() {
            continue; // deleted, and not yet staged
        }
        let bytes = std::fs::read(&on_disk).with_context(|| path.to_owned())?;
        // A binary file has a name, and no lines to look at.
        let text = String::from_utf8(bytes).unwrap_or_default();
        files.push(File { path: path.to_owned(), text });
    }
    Ok(files)
}

impl File {
    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// Its lines with their numbers, from 1.
    fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        numbered(&self.text)
    }

    fn offence(&self, line: usize, rule: impl Into<String>) -> Offence {
        Offence { path: self.path.clone(), line, rule: rule.into() }
    }
}

fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(i, line)| (i + 1, line))
}

impl fmt::Display for Offence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path, self.line, self.rule)
    }
}

/// For the tests of the rules.
#[cfg(test)]
fn file(path: &str, text: &str) -> File {
    File { path: path.to_owned(), text: text.to_owned() }
}

#[cfg(test)]
#[track_caller]
fn assert_offences(rule: Rule, path: &str, text: &str, lines: &[usize]) {
    let found: Vec<usize> = rule(&[file(path, text)]).iter().map(|o| o.line).collect();
    assert_eq!(found, lines, "{path}: {text}");
}

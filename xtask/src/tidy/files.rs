//! What may be in a file, and which files there are.

use super::source::is_word;
use super::{File, Offence};
use std::collections::BTreeSet;

/// Longer ones want dividing.
const MOST_LINES: usize = 800;

/// All that stands in the root.
const ROOT: [&str; 20] = [
    ".cargo",
    ".ci",
    ".config",
    ".github",
    ".gitignore",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "MIGRATION.md",
    "README.md",
    "SECURITY.md",
    "crates",
    "docs",
    "reference",
    "rustfmt.toml",
    "xtask",
];

/// A Rust file has at most 800 lines.
pub(super) fn files_are_short(files: &[File]) -> Vec<Offence> {
    let long = |f: &&File| f.is_rust() && f.lines().count() > MOST_LINES;
    let rule = format!("longer than {MOST_LINES} lines: a room that wants dividing");
    files.iter().filter(long).map(|f| f.offence(MOST_LINES + 1, rule.as_str())).collect()
}

/// Nothing stands in the root but what a visitor expects there.
pub(super) fn root_is_small(files: &[File]) -> Vec<Offence> {
    let strange = |f: &&File| {
        let top = f.path.split('/').next().unwrap_or_default();
        !ROOT.contains(&top)
    };
    files.iter().filter(strange).map(|f| f.offence(1, "not for the root")).collect()
}

/// Every path that ARCHITECTURE.md names is there.
pub(super) fn named_paths_exist(files: &[File]) -> Vec<Offence> {
    let mut paths = BTreeSet::new();
    for file in files {
        let mut path = file.path.as_str();
        paths.insert(path);
        while let Some((folder, _)) = path.rsplit_once('/') {
            paths.insert(folder);
            path = folder;
        }
    }
    let mut offences = Vec::new();
    for file in files.iter().filter(|f| f.path == "ARCHITECTURE.md") {
        for (line, text) in file.lines() {
            for path in named_paths(text, &paths) {
                if !paths.contains(path.trim_end_matches('/')) {
                    offences.push(file.offence(line, format!("there is no {path}")));
                }
            }
        }
    }
    offences
}

/// What looks like a path: in backticks with a slash, or beginning with a folder of the root.
fn named_paths<'a>(line: &'a str, paths: &BTreeSet<&str>) -> Vec<&'a str> {
    let quoted = line.split('`').skip(1).step_by(2);
    let quoted = quoted.filter(|q| q.contains('/') && !q.contains(char::is_whitespace));
    let is_path = |c: char| is_word(c) || "/-.".contains(c);
    let plain = line.split(|c| !is_path(c)).map(|word| word.trim_end_matches('.'));
    let plain = plain.filter(|w| w.split_once('/').is_some_and(|(top, _)| paths.contains(top)));
    let mut found: Vec<&str> = quoted.chain(plain).collect();
    found.sort_unstable();
    found.dedup();
    found
}

/// No code is left for later, no test switched off.
pub(super) fn nothing_is_left_open(files: &[File]) -> Vec<Offence> {
    // Put together, so that this file does not hold them.
    let open = [["todo", "!("], ["unimplemented", "!("], ["#[", "ignore"]].map(|w| w.concat());
    find(
        files,
        |f| f.is_rust(),
        |line| {
            let found = open.iter().find(|word| line.contains(*word))?;
            Some(format!("left open: {found}"))
        },
    )
}

/// No line names a folder that only one machine has.
pub(super) fn no_path_of_a_machine(files: &[File]) -> Vec<Offence> {
    let folders = ["work", "root", "home", "Users"].map(|folder| format!("/{folder}/"));
    find(
        files,
        |_| true,
        |line| {
            let found = folders.iter().find(|folder| {
                let mut at = line.match_indices(folder.as_str()).map(|(at, _)| at);
                // The beginning of a path, not its middle.
                at.any(|at| !line[..at].ends_with(|c| is_word(c) || ".-~}*".contains(c)))
            })?;
            Some(format!("{found} is the path of one machine"))
        },
    )
}

fn find(
    files: &[File],
    of: impl Fn(&File) -> bool,
    fault: impl Fn(&str) -> Option<String>,
) -> Vec<Offence> {
    let mut offences = Vec::new();
    for file in files.iter().filter(|f| of(f)) {
        let lines = file.lines();
        offences.extend(lines.filter_map(|(n, line)| Some(file.offence(n, fault(line)?))));
    }
    offences
}

#[cfg(test)]
mod tests {
    use super::super::{assert_offences, file};
    use super::*;

    #[test]
    fn a_file_of_801_lines_is_too_long() {
        let rule = files_are_short;
        assert_offences(rule, "crates/a.rs", &"\n".repeat(801), &[801]);
        assert_offences(rule, "crates/a.rs", &"\n".repeat(800), &[]);
        assert_offences(rule, "reference/a.py", &"\n".repeat(801), &[]);
    }

    #[test]
    fn strangers_in_the_root_are_found() {
        let paths = ["README.md", "PLAN.md", "crates/a.rs", "notes/a.md"];
        let files: Vec<File> = paths.iter().map(|path| file(path, "")).collect();
        let found: Vec<String> = root_is_small(&files).into_iter().map(|o| o.path).collect();
        assert_eq!(found, ["PLAN.md", "notes/a.md"]);
    }

    #[test]
    fn paths_that_are_not_there_are_found() {
        let page =
            "`crates/a.rs`, `crates/b.rs`\n  plain crates/c.rs.\n`docs/` 1/2 `x + y / z` crates/\n";
        let files = [file("ARCHITECTURE.md", page), file("crates/a.rs", "")];
        let rules: Vec<(usize, String)> =
            named_paths_exist(&files).into_iter().map(|o| (o.line, o.rule)).collect();
        let missing = [(1, "crates/b.rs"), (2, "crates/c.rs"), (3, "docs/")];
        assert_eq!(rules, missing.map(|(line, path)| (line, format!("there is no {path}"))));
    }

    #[test]
    fn loose_ends_are_found() {
        let text = ["fn a() { todo", "!() }\n#[", "ignore = \"slow\"]\n// to do\n"].concat();
        assert_offences(nothing_is_left_open, "crates/a.rs", &text, &[1, 2]);
    }

    #[test]
    fn paths_of_a_machine_are_found() {
        let text = ["see /ro", "ot/x\n~/wo", "rk/x src/ro", "ot/x\n\"/ho", "me/me/x\"\n"].concat();
        assert_offences(no_path_of_a_machine, "README.md", &text, &[1, 3]);
    }
}

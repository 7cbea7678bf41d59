//! What each crate may know.

use super::source::{Keep, is_word, line_of, matches, strip, words};
use super::{File, Offence, numbered};

/// The crates, each of which may depend on those before it.
const CRATES: [&str; 5] = [
    "metal-candle-graph",
    "metal-candle-compiler",
    "metal-candle-runtime",
    "metal-candle",
    "metal-candle-cli",
];

/// The files that say something of every operation: its name, its type, its gradient, its meaning and
/// its attributes in print. Lowering asks by kind, and has defaults.
const MATCHES: [&str; 5] = [
    "crates/graph/src/operation.rs",
    "crates/graph/src/infer.rs",
    "crates/graph/src/autodiff/vjp.rs",
    "crates/graph/src/oracle.rs",
    "crates/graph/src/print.rs",
];

/// The graph and the compiler know neither Candle nor a device.
pub(super) fn graph_knows_no_backend(files: &[File]) -> Vec<Offence> {
    let mut offences = Vec::new();
    for (folder, name) in [("crates/graph/", "the graph"), ("crates/compiler/", "the compiler")] {
        for word in ["candle_core", "candle_nn", "metal_candle_runtime", "Device"] {
            let rule = format!("{name} knows no {word}");
            offences.extend(word_in(files, |path| path.starts_with(folder), word, &rule));
        }
    }
    offences
}

/// Only the runtime holds `unsafe`.
pub(super) fn unsafe_is_in_runtime_only(files: &[File]) -> Vec<Offence> {
    let elsewhere = |path: &str| !path.starts_with("crates/runtime/");
    word_in(files, elsewhere, "unsafe", "unsafe belongs to the runtime")
}

/// Layers and models use lazy tensors, and nothing of the runtime.
pub(super) fn models_know_no_runtime(files: &[File]) -> Vec<Offence> {
    let of_models = |path: &str| {
        let inside = path.strip_prefix("crates/metal-candle/src/").unwrap_or_default();
        ["nn.rs", "models.rs"].contains(&inside)
            || ["nn/", "models/"].iter().any(|folder| inside.starts_with(folder))
    };
    word_in(files, of_models, "metal_candle_runtime", "models know nothing of the runtime")
}

/// graph <- compiler <- runtime <- metal-candle <- cli
pub(super) fn dependencies_go_one_way(files: &[File]) -> Vec<Offence> {
    let mut offences = Vec::new();
    let place = |name: &str| CRATES.iter().position(|c| *c == name);
    for file in files.iter().filter(|f| f.path.ends_with("/Cargo.toml")) {
        let (mut section, mut own) = ("", None);
        for (line, text) in file.lines() {
            let text = text.trim();
            if text.starts_with('[') {
                section = text.trim_matches(['[', ']']);
                // [dependencies.name]
                let (table, name) = section.rsplit_once('.').unwrap_or(("", ""));
                check(table, name, line, own, &mut offences, file);
            } else if section == "package" && text.starts_with("name") {
                own = text.split('"').nth(1).and_then(place);
            } else {
                let end = text.find(|c| !is_word(c) && c != '-').unwrap_or(text.len());
                check(section, &text[..end], line, own, &mut offences, file);
            }
        }
    }
    fn check(
        table: &str,
        name: &str,
        line: usize,
        own: Option<usize>,
        offences: &mut Vec<Offence>,
        file: &File,
    ) {
        let Some(other) = CRATES.iter().position(|c| *c == name) else { return };
        if table.ends_with("dependencies") && own.is_some_and(|own| other >= own) {
            offences.push(file.offence(line, format!("{name} stands above this crate")));
        }
    }
    offences
}

/// What depends on a backend being compiled in is in the runtime.
pub(super) fn backends_are_in_runtime_only(files: &[File]) -> Vec<Offence> {
    let mut offences = Vec::new();
    let elsewhere = |f: &&File| f.is_rust() && !f.path.starts_with("crates/runtime/");
    for file in files.iter().filter(elsewhere) {
        for (line, text) in numbered(&strip(&file.text, Keep::CodeAndStrings)) {
            let text: String = text.split_whitespace().collect();
            for backend in ["cuda", "metal"] {
                if text.contains(&format!("feature=\"{backend}\"")) {
                    let rule = format!("the feature {backend} is asked for in the runtime only");
                    offences.push(file.offence(line, rule));
                }
            }
        }
    }
    offences
}

/// A new operation breaks the build in five files, where thought is needed, and in tests.
pub(super) fn few_exhaustive_matches(files: &[File]) -> Vec<Offence> {
    let mut offences = Vec::new();
    for file in files.iter().filter(|f| f.is_rust() && f.path.contains("/src/")) {
        let code = strip(&file.text, Keep::Code);
        let mut lines = matches(&code)
            .into_iter()
            .filter(|m| is_exhaustive(&m.patterns))
            .map(|m| line_of(&code, m.at))
            .peekable();
        if MATCHES.contains(&file.path.as_str()) {
            if lines.peek().is_none() {
                offences.push(file.offence(1, "no match on every Operation: tidy's list is stale"));
            }
            continue;
        }
        let rule = format!("every Operation is matched in {} files, and not here", MATCHES.len());
        offences.extend(lines.map(|line| file.offence(line, rule.as_str())));
    }
    offences
}

/// Whether the patterns name operations and none of them catches the rest.
fn is_exhaustive(patterns: &[&str]) -> bool {
    let operation = |p: &str| p.trim_start_matches(['&', '(']).starts_with("Operation::");
    patterns.iter().any(|p| operation(p)) && !patterns.iter().any(|p| catches_all(p))
}

/// `_`, a name, or a tuple of such.
fn catches_all(pattern: &str) -> bool {
    let inner = pattern.strip_prefix('(').and_then(|p| p.strip_suffix(')')).unwrap_or(pattern);
    let name = |part: &str| {
        let part = part.trim();
        part.chars().all(is_word) && !part.starts_with(char::is_uppercase)
    };
    inner.split(',').all(name)
}

/// Where `word` stands in the code of the Rust files that `of` chooses.
fn word_in(files: &[File], of: impl Fn(&str) -> bool, word: &str, rule: &str) -> Vec<Offence> {
    let mut offences = Vec::new();
    for file in files.iter().filter(|f| f.is_rust() && of(&f.path)) {
        let code = strip(&file.text, Keep::Code);
        offences.extend(words(&code, word).map(|at| file.offence(line_of(&code, at), rule)));
    }
    offences
}

#[cfg(test)]
mod tests {
    use super::super::assert_offences;
    use super::*;

    #[test]
    fn graph_and_compiler_name_no_backend() {
        let text = "// candle_core is below\nuse candle_core::Tensor;\nfn f(d: &Device) {}\n";
        let rule = graph_knows_no_backend;
        assert_offences(rule, "crates/graph/src/a.rs", text, &[2, 3]);
        assert_offences(rule, "crates/compiler/src/a.rs", text, &[2, 3]);
        assert_offences(rule, "crates/runtime/src/a.rs", text, &[]);
    }

    #[test]
    fn unsafe_is_found_outside_of_the_runtime() {
        let text = "#![deny(unsafe_code)]\n// unsafe\nlet x = unsafe { *p };\n";
        let rule = unsafe_is_in_runtime_only;
        assert_offences(rule, "crates/metal-candle/src/lazy.rs", text, &[3]);
        assert_offences(rule, "crates/runtime/src/cpu.rs", text, &[]);
    }

    #[test]
    fn models_do_not_reach_into_the_runtime() {
        let text = "\nuse metal_candle_runtime::Buffer;\n";
        let rule = models_know_no_runtime;
        assert_offences(rule, "crates/metal-candle/src/nn/lora.rs", text, &[2]);
        assert_offences(rule, "crates/metal-candle/src/models.rs", text, &[2]);
        assert_offences(rule, "crates/metal-candle/src/lazy.rs", text, &[]);
    }

    #[test]
    fn a_crate_depends_on_lower_ones_only() {
        let toml = |name: &str| {
            format!(
                "[package]\nname = \"{name}\"\n[dependencies]\nmetal-candle-compiler.workspace = \
                 true\n[dev-dependencies.metal-candle]\npath = \"..\"\n"
            )
        };
        let rule = dependencies_go_one_way;
        let path = "crates/a/Cargo.toml";
        assert_offences(rule, path, &toml("metal-candle-graph"), &[4, 5]);
        assert_offences(rule, path, &toml("metal-candle-runtime"), &[5]);
        assert_offences(rule, path, &toml("metal-candle-cli"), &[]);
    }

    #[test]
    fn backend_features_are_found_outside_of_the_runtime() {
        let text = "#[cfg(feature = \"metal\")]\n#[cfg(feature = \"async-exec\")]\n";
        let rule = backends_are_in_runtime_only;
        assert_offences(rule, "crates/cli/src/main.rs", text, &[1]);
        assert_offences(rule, "crates/runtime/src/lib.rs", text, &[]);
    }

    #[test]
    fn a_sixth_exhaustive_match_is_found() {
        let all = "\nmatch op {\n Operation::Dot => 1,\n Operation::Cast(_) | Operation::Select => 2,\n}\n";
        let rule = few_exhaustive_matches;
        assert_offences(rule, "crates/compiler/src/lower.rs", all, &[2]);
        assert_offences(rule, "crates/graph/src/infer.rs", all, &[]);
        for rest in ["_ => 2", "op => 2", "(op, _) => 2"] {
            let some = format!("match op {{ Operation::Dot => 1, {rest} }}");
            assert_offences(rule, "crates/compiler/src/lower.rs", &some, &[]);
            // A list that names a file without such a match is stale.
            assert_offences(rule, "crates/graph/src/infer.rs", &some, &[1]);
        }
    }
}

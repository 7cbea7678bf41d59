//! Runs that cannot be: one clear line, an exit code that says so, and nothing half-written.
#![cfg(unix)]

#[path = "../../metal-candle/tests/io/support.rs"]
#[allow(dead_code, reason = "only the GGUF writer is used here")]
mod support;
#[path = "../../metal-candle/tests/support/testbed.rs"]
#[allow(dead_code, reason = "only the files are used here")]
mod testbed;
#[path = "../../metal-candle/tests/regressions/tiny.rs"]
#[allow(dead_code, reason = "only the model's file is used here")]
mod tiny;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tiny::Tiny;

const TEMPLATE: &str = "{% for m in messages %}{{ m.role + ':' + m.content + ';' }}{% endfor %}\
                        {% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}";

/// A folder with a model and data, and where the adapter goes.
struct Case {
    folder: tempfile::TempDir,
    adapter: PathBuf,
}

impl Case {
    fn new(tiny: &Tiny, rows: &str) -> Case {
        let folder = tempfile::tempdir().unwrap();
        std::fs::rename(tiny.write(folder.path()), folder.path().join("tiny.gguf")).unwrap();
        std::fs::create_dir(folder.path().join("data")).unwrap();
        std::fs::write(folder.path().join("data/train.jsonl"), rows).unwrap();
        let adapter = folder.path().join("adapter");
        Case { folder, adapter }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `train`, in a shell that first runs `limits`.
    fn train_within(&self, limits: &str, more: &[&str]) -> Output {
        let mut command = Command::new("sh");
        command.arg("-c").arg(format!("{limits} exec \"$0\" \"$@\""));
        command.arg(env!("CARGO_BIN_EXE_metal-candle")).arg("train");
        command.arg("--model").arg(self.path("tiny.gguf")).arg("--data").arg(self.path("data"));
        command.arg("--adapter-path").arg(&self.adapter);
        command.args(["--iters", "4", "--batch-size", "2", "--max-seq-length", "32"]);
        command.args(["--target-modules", "all-linear", "--save-every", "2"]);
        command.args(more).env_remove("RUST_BACKTRACE").output().unwrap()
    }

    fn train(&self, more: &[&str]) -> Output {
        self.train_within("", more)
    }

    /// The adapter's files with what is in them.
    fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let Ok(entries) = std::fs::read_dir(&self.adapter) else { return BTreeMap::new() };
        let file = |path: PathBuf| {
            (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(path).unwrap())
        };
        entries.map(|entry| file(entry.unwrap().path())).collect()
    }
}

fn rows() -> String {
    (0..12).map(|i| format!("{{\"text\": \"{} {}\"}}\n", i * 7, "ab ".repeat(1 + i % 5))).collect()
}

/// Exit code 1, and on standard error one line that begins with `error: ` and has all `parts`.
#[track_caller]
fn fails(output: &Output, parts: &[&str]) {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let errors: Vec<&str> = stderr.lines().filter(|line| line.contains("error")).collect();
    assert!(matches!(errors[..], [line] if line.starts_with("error: ")), "{stderr}");
    assert!(stderr.lines().last() == errors.last().copied() && !stderr.contains("panicked"));
    for part in parts {
        assert!(errors[0].contains(part), "{part:?} is not in {:?}", errors[0]);
    }
}

#[test]
fn an_empty_data_set_is_refused() {
    for text in ["", "\n \n"] {
        let case = Case::new(&Tiny::new(), text);
        fails(&case.train(&[]), &["train.jsonl: no rows"]);
        assert!(!case.adapter.exists());
    }
}

#[test]
fn rows_without_a_token_to_train_are_refused() {
    let row = r#"{"messages": [{"role": "user", "content": "hello"}]}"#;
    let case =
        Case::new(&Tiny { template: Some(TEMPLATE), ..Tiny::new() }, &format!("{row}\n{row}\n"));
    let parts = ["train.jsonl: none of the 2 rows has a token to train on"];
    fails(&case.train(&["--mask-prompt"]), &parts);
    assert!(!case.adapter.exists());
    assert!(case.train(&[]).status.success());
}

#[test]
fn a_folder_that_cannot_be_written_is_refused_before_the_first_step() {
    let mut case = Case::new(&Tiny::new(), &rows());
    std::fs::create_dir(&case.adapter).unwrap();
    std::fs::set_permissions(&case.adapter, PermissionsExt::from_mode(0o555)).unwrap();
    if std::fs::write(case.adapter.join("probe"), "").is_ok() {
        // Root may write anywhere but beneath a file.
        case.adapter = case.path("tiny.gguf").join("adapter");
    }
    let output = case.train(&[]);
    fails(&output, &[case.adapter.to_str().unwrap()]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "it trained before it said so");
    let log = case.path("tiny.gguf").join("log.jsonl");
    for flag in ["--log", "--report"] {
        fails(&case.train(&[flag, log.to_str().unwrap()]), &["log.jsonl"]);
    }
}

#[test]
fn a_full_disk_leaves_what_was_there_and_no_rest() {
    let case = Case::new(&Tiny::new(), &rows());
    // No file may grow beyond some blocks, and that is an error of the write, not the end.
    let limit = "trap '' XFSZ; ulimit -f 8;";
    fails(&case.train_within(limit, &[]), &["adapter_model.safetensors"]);
    assert_eq!(case.files().keys().collect::<Vec<_>>(), Vec::<&String>::new());

    assert!(case.train(&[]).status.success());
    let whole = case.files();
    assert_eq!(whole.len(), 3);
    fails(&case.train_within(limit, &["--seed", "5"]), &["adapter_model.safetensors"]);
    assert!(case.files() == whole, "{:?}", case.files().keys());
}

#[test]
fn a_log_that_cannot_grow_ends_training_after_the_step_and_saves() {
    if !Path::new("/dev/full").exists() {
        return;
    }
    let case = Case::new(&Tiny::new(), &rows());
    let more = ["--log", "/dev/full", "--steps-per-report", "1"];
    fails(&case.train(&more), &["training was stopped and saved: /dev/full: ", "space"]);
    assert!(case.adapter.join("training_state.safetensors").exists());
    assert!(!std::fs::metadata("/dev/full").unwrap().is_file());
    fails(&case.train(&["--report", "/dev/full"]), &["/dev/full: expected a file"]);
}

#[test]
fn a_nan_in_the_weights_is_named_and_nothing_is_written() {
    let mut tiny = Tiny::new();
    tiny.weights.get_mut("model.layers.1.mlp.up_proj.weight").unwrap().1[7] = f32::NAN;
    let case = Case::new(&tiny, &rows());
    fails(&case.train(&[]), &["model.layers.1.mlp.up_proj"]);
    assert!(case.files().is_empty());
}

#[test]
fn log_and_report_tell_the_whole_run_also_after_a_resume() {
    let case = Case::new(&Tiny::new(), &rows());
    std::fs::copy(case.path("data/train.jsonl"), case.path("data/valid.jsonl")).unwrap();
    let (log, page) = (case.path("log.jsonl"), case.path("report.html"));
    let more = ["--log", log.to_str().unwrap(), "--report", page.to_str().unwrap()];
    let more =
        [&more[..], &["--resume", "--steps-per-report", "1", "--steps-per-eval", "2"]].concat();
    assert!(case.train(&more).status.success());
    let events = || -> Vec<(String, u64)> {
        let text = std::fs::read_to_string(&log).unwrap();
        let events = text.lines().map(|line| serde_json::from_str(line).unwrap());
        let event = |e: serde_json::Value| {
            (e["event"].as_str().unwrap().to_owned(), e["step"].as_u64().unwrap())
        };
        events.map(event).collect()
    };
    let named = |name: &str| -> Vec<u64> {
        events().into_iter().filter(|(event, _)| event == name).map(|(_, step)| step).collect()
    };
    assert_eq!(named("train"), [1, 2, 3, 4]);
    assert_eq!((named("validation"), named("saved")), (vec![0, 2, 4], vec![2, 4]));
    // The run is over; going on adds that it was, and loses nothing.
    assert!(case.train(&more).status.success());
    assert_eq!((named("train"), named("resumed")), (vec![1, 2, 3, 4], vec![4]));
    let html = std::fs::read_to_string(&page).unwrap();
    let parts =
        ["<svg", "valid ", "Learning rate", "Gradient norm", "Memory", "Settings", "12 rows"];
    for part in parts {
        assert!(html.contains(part), "{part:?} is not in the page");
    }
    for outside in ["http:", "https:", "src=", "href=", "url(", "@import"] {
        assert!(!html.contains(outside), "the page asks for {outside:?}");
    }
    let json = html.split_once("id=\"events\">").unwrap().1.split_once("</script>").unwrap().0;
    let drawn: Vec<serde_json::Value> = serde_json::from_str(json).unwrap();
    assert_eq!(drawn.len(), events().len());
}

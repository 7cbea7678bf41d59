//! The command from outside: what it prints, where, and with which exit code.

#[path = "../../../metal-candle/tests/io/support.rs"]
#[allow(dead_code, reason = "only the GGUF writer is used here")]
mod support;
#[path = "../../../metal-candle/tests/support/testbed.rs"]
#[allow(dead_code, reason = "only the files are used here")]
mod testbed;
#[path = "../../../metal-candle/tests/regressions/tiny.rs"]
#[allow(dead_code, reason = "only the model's file is used here")]
mod tiny;

mod basics;
mod chat;
mod config;
mod device;
mod embed;
mod generate;
#[cfg(feature = "hub")]
mod hub;
mod plan;
mod quantize;
mod ranks;
mod training;

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// What could make a test depend on the machine.
const ENVIRONMENT: [&str; 11] = [
    "RUST_BACKTRACE",
    "NO_COLOR",
    "HF_HUB_OFFLINE",
    "HF_HUB_CACHE",
    "HF_TOKEN",
    "HF_ENDPOINT",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
];

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_metal-candle"));
    command.args(args);
    for name in ENVIRONMENT {
        command.env_remove(name);
    }
    command
}

fn run(args: &[&str]) -> Output {
    command(args).output().unwrap()
}

/// With this on standard input.
fn run_with(args: &[&str], input: &str) -> Output {
    let mut command = command(args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // A command that ends before it has read all closes the pipe.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Exit code 0; what is on standard output.
#[track_caller]
fn succeeds(args: &[&str]) -> String {
    let output = run(args);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    text(&output.stdout)
}

/// Exit code 1, nothing on standard output, and one line that contains `parts`.
#[track_caller]
fn fails(args: &[&str], parts: &[&str]) {
    is_one_line(&run(args), 1, parts);
}

/// That exit code, nothing on standard output, and one line that contains `parts`; before it may stand the device that
/// the model was loaded to.
#[track_caller]
fn is_one_line(output: &Output, code: i32, parts: &[&str]) {
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert_eq!(text(&output.stdout), "");
    let said: Vec<&str> = stderr.lines().filter(|line| !line.starts_with("device: ")).collect();
    let is_one = said.iter().filter(|line| !line.is_empty()).count() == 1;
    assert!(is_one && said[0].starts_with("error: "), "{stderr}");
    for part in parts {
        assert!(stderr.contains(part), "{part:?} is not in {stderr:?}");
    }
}

/// Exit code 2, and a message that contains `part`.
#[track_caller]
fn is_no_usage(args: &[&str], part: &str) {
    let output = run(args);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains(part), "{part} is not in {stderr:?}");
}

fn write(folder: &Path, name: &str, content: &[u8]) -> String {
    let path = folder.join(name);
    std::fs::write(&path, content).unwrap();
    path.to_str().unwrap().to_owned()
}

/// The tiny model's file, with a chat template.
fn model(folder: &Path) -> String {
    let template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}\
                    {% if add_generation_prompt %}assistant:{% endif %}";
    let model = tiny::Tiny { template: Some(template), ..tiny::Tiny::new() };
    let path = folder.join("tiny.gguf");
    std::fs::rename(model.write(folder), &path).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Rows of a few tokens.
fn data(folder: &Path) -> String {
    let row = |i: usize| format!("{{\"text\": \"{}\"}}\n", "12 34 ".repeat(1 + i % 5));
    let rows: String = (0..20).map(row).collect();
    write(folder, "train.jsonl", rows.as_bytes())
}

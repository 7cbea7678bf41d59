//! A training run that is killed again and again, and goes on, ends where one ends that never was.
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

use std::fmt::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const KILLS: u64 = 10;
const ITERS: &str = "300";

fn data(folder: &Path) {
    let mut rows = String::new();
    for i in 0..40 {
        let words: Vec<String> = (0..3 + i % 9).map(|w| format!("{}", i * 7 + w)).collect();
        writeln!(rows, "{{\"text\": \"{}\"}}", words.join(" ")).unwrap();
    }
    std::fs::write(folder.join("train.jsonl"), rows).unwrap();
}

fn train(folder: &Path, adapter: &Path) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_metal-candle"));
    command.arg("train").arg("--model").arg(folder.join("tiny.gguf"));
    command.arg("--data").arg(folder).arg("--adapter-path").arg(adapter);
    command.args(["--iters", ITERS, "--batch-size", "2", "--max-seq-length", "32"]);
    command.args(["--lora-dropout", "0.1", "--learning-rate", "1e-3", "--save-every", "3"]);
    command.args(["--target-modules", "all-linear", "--resume"]);
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

fn weights(adapter: &Path) -> Vec<u8> {
    std::fs::read(adapter.join("adapter_model.safetensors")).unwrap()
}

#[test]
fn a_run_killed_at_random_moments_ends_in_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let file = tiny::Tiny::new().write(folder.path());
    std::fs::rename(file, folder.path().join("tiny.gguf")).unwrap();
    data(folder.path());

    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    let started = std::time::Instant::now();
    assert!(train(folder.path(), &whole).wait().unwrap().success());
    let whole_time = started.elapsed();

    let mut kills = 0;
    for i in 0..KILLS {
        let mut child = train(folder.path(), &killed);
        // Somewhere between the start and the end, another place each time.
        let percent = 25 + u32::try_from(i * 37 % 60).unwrap();
        std::thread::sleep(
            whole_time.mul_f64(f64::from(percent) / 100.0).max(Duration::from_millis(5)),
        );
        kills += u32::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert!(kills > 0, "every run ended before it was killed");
    assert!(train(folder.path(), &killed).wait().unwrap().success());
    assert!(weights(&whole) == weights(&killed), "the adapters differ after {kills} kills");
}

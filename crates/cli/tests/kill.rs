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

/// Until the run has written its adapter so often, or is over.
fn await_saves(child: &mut Child, adapter: &Path, saves: u64) {
    let written = || {
        let file = std::fs::metadata(adapter.join("adapter_model.safetensors")).ok()?;
        file.modified().ok()
    };
    let (mut seen, mut last) = (0, written());
    while seen < saves && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_micros(300));
        let now = written();
        seen += u64::from(now != last);
        last = now;
    }
}

#[test]
fn a_run_killed_at_random_moments_ends_in_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let file = tiny::Tiny::new().write(folder.path());
    std::fs::rename(file, folder.path().join("tiny.gguf")).unwrap();
    data(folder.path());

    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    assert!(train(folder.path(), &whole).wait().unwrap().success());

    let mut kills = 0;
    for i in 0..KILLS {
        let mut child = train(folder.path(), &killed);
        // After some of the saves that are left, and a moment: another place each time, however fast the machine is.
        await_saves(&mut child, &killed, 1 + i * 37 % 6);
        std::thread::sleep(Duration::from_micros(i * 613 % 4000));
        kills += u32::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert!(kills > 0, "every run ended before it was killed");
    assert!(train(folder.path(), &killed).wait().unwrap().success());
    assert!(weights(&whole) == weights(&killed), "the adapters differ after {kills} kills");
}

//! What ends a training.
#![cfg(unix)]

use crate::{command, data, model, run, text};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

#[test]
fn ctrl_c_saves_ends_with_130_and_the_run_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = (model(folder.path()), data(folder.path()));
    let adapter = folder.path().join("adapter");
    let args = ["train", "--model", &model, "--data", &data, "--iters", "100000"];
    let more = ["--steps-per-report", "1", "--adapter-path", adapter.to_str().unwrap()];
    let args = [&args[..], &more].concat();
    let mut child = command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().starts_with("step 1:"));
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let rest: Vec<String> = lines.map(Result::unwrap).collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest:?}");
    assert!(rest.last().unwrap().contains("stopped; --resume goes on"), "{rest:?}");
    assert!(adapter.join("training_state.safetensors").exists());

    let stopped = rest
        .iter()
        .rev()
        .find_map(|line| line.strip_suffix(": stopped; --resume goes on from here"));
    let first = {
        let mut child = command(&[&args[..], &["--resume"]].concat())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let first = BufReader::new(child.stdout.take().unwrap()).lines().next().unwrap().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        first
    };
    assert!(first.starts_with(&format!("{}: going on", stopped.unwrap())), "{first}");
    let other = run(&[&args[..], &["--resume", "--seed", "9"]].concat());
    assert_eq!(other.status.code(), Some(1), "{}", text(&other.stderr));
}

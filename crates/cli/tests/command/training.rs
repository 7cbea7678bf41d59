//! What a training begins with, and what ends it.
#![cfg(unix)]

use crate::{command, data, fails, model, run, succeeds, text};
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

#[test]
fn an_adapter_is_trained_further_whoever_wrote_it() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = (model(folder.path()), data(folder.path()));
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let train = |to: &str, flags: &[&str]| {
        let all = ["train", "--model", &model, "--data", &data, "--adapter-path", to];
        succeeds(&[&all[..], flags].concat());
        std::fs::read(format!("{to}/adapter_model.safetensors")).unwrap()
    };
    let layers = ["--target-modules", "all-linear", "--num-layers", "1", "--lora-rank", "3"];
    let steps = ["--iters", "2", "--learning-rate", "1e-2"];
    let first = train(&at("first"), &[&layers[..], &steps].concat());
    let mlx = at("mlx");
    let convert = ["adapter", "convert", "--adapter-path", &at("first"), "--to", "mlx"];
    succeeds(&[&convert[..], &["--save-path", &mlx]].concat());
    // A step that changes nothing: what is saved is what it began with.
    let still = ["--iters", "1", "--learning-rate", "1e-30"];
    for from in [at("first"), mlx.clone(), format!("{mlx}/adapters.safetensors")] {
        let flags = ["--resume-adapter-file", &from];
        let again = train(&at("again"), &[&flags[..], &still].concat());
        assert_eq!(again, first, "{from}");
    }
    let flags = ["--resume-adapter-file", &at("first")];
    assert_ne!(train(&at("further"), &[&flags[..], &steps].concat()), first);
    let plan =
        |flags: &[&str]| succeeds(&[&["plan", "--full", "--model", &model][..], flags].concat());
    assert_eq!(plan(&flags), plan(&layers));
    assert_eq!(
        plan(&[&flags[..], &["--device", "cuda"]].concat()),
        plan(&[&layers[..], &["--device", "cuda"]].concat())
    );
    let gone = at("gone");
    let more = ["train", "-q", "--model", &model, "--data", &data, "--resume-adapter-file", &gone];
    fails(&more, &["cannot load the adapter", "gone"]);
}

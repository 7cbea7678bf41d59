//! Several processes that train one adapter, as a launcher starts them.

use crate::{command, data, is_no_usage, is_one_line, model, run, text};
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A port that is free.
fn port() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port().to_string()
}

fn rank(args: &[&str], rank: usize, size: usize, port: &str) -> Command {
    let mut command = command(args);
    command.env("RANK", rank.to_string()).env("WORLD_SIZE", size.to_string());
    command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// What a process said on standard error, once it has ended, and with which code.
fn end(mut child: Child) -> (Option<i32>, String) {
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > Duration::from_secs(30) {
            child.kill().unwrap();
            panic!("a rank goes on for ever");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    (child.wait().unwrap().code(), said)
}

/// Loss and gradient norm of each step.
fn numbers(log: &Path) -> Vec<[f64; 2]> {
    let text = std::fs::read_to_string(log).unwrap();
    let events = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let steps = events.filter(|event| event["event"] == "train");
    steps.map(|e| ["loss", "gradient_norm"].map(|name| e[name].as_f64().unwrap())).collect()
}

#[test]
fn two_processes_train_as_one_with_the_rows_of_both_and_the_first_alone_speaks() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = (model(folder.path()), data(folder.path()));
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let train = |name: &str, batch: &str| {
        let (adapter, log) = (path(name), path(&format!("{name}.jsonl")));
        let args = ["train", "--model", &model, "--data", &data, "--iters", "12"];
        let more = ["--steps-per-report", "1", "--learning-rate", "1e-3", "--batch-size", batch];
        let paths = ["--adapter-path", &adapter, "--log", &log];
        [&args[..], &more, &paths].concat().iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let one = train("one", "4");
    let one: Vec<&str> = one.iter().map(String::as_str).collect();
    assert!(run(&one).status.success());

    let two = train("two", "2");
    let two: Vec<&str> = two.iter().map(String::as_str).collect();
    let port = port();
    // The second comes first, and waits.
    let second = rank(&two, 1, 2, &port).spawn().unwrap();
    let first = rank(&two, 0, 2, &port).output().unwrap();
    let second = second.wait_with_output().unwrap();
    assert!(first.status.success() && second.status.success(), "{}", text(&second.stderr));
    assert_eq!((text(&second.stdout), text(&second.stderr)), (String::new(), String::new()));
    assert!(text(&first.stdout).lines().count() >= 12);

    let numbers = ["one", "two"].map(|name| numbers(&folder.path().join(format!("{name}.jsonl"))));
    assert_eq!(numbers[0].len(), 12);
    for ([loss, norm], [want_loss, want_norm]) in numbers[1].iter().zip(&numbers[0]) {
        assert!((loss - want_loss).abs() <= 1e-6 * want_loss, "{loss} is not {want_loss}");
        assert!((norm - want_norm).abs() <= 1e-5 * want_norm, "{norm} is not {want_norm}");
    }
    assert_eq!(numbers[1].len(), 12);
}

#[test]
fn a_rank_that_is_killed_ends_the_other_with_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = (model(folder.path()), data(folder.path()));
    let adapter = folder.path().join("adapter");
    let args = ["train", "--model", &model, "--data", &data, "--iters", "1000000"];
    let more = ["--steps-per-report", "1", "--adapter-path", adapter.to_str().unwrap()];
    let args = [&args[..], &more].concat();
    for (killed, said) in [(1, "error: rank 1 has ended"), (0, "error: rank 1: rank 0 has ended")] {
        let port = port();
        let mut all = [0, 1].map(|number| rank(&args, number, 2, &port).spawn().unwrap());
        // Not before they train. What is said after that is read, so that nobody waits for it.
        let mut lines = BufReader::new(all[0].stdout.take().unwrap()).lines();
        assert!(lines.next().unwrap().unwrap().starts_with("step 1:"));
        let reader = std::thread::spawn(move || lines.for_each(drop));
        let [first, second] = all;
        let (mut gone, left) = if killed == 0 { (first, second) } else { (second, first) };
        gone.kill().unwrap();
        gone.wait().unwrap();
        let (code, stderr) = end(left);
        assert_eq!(code, Some(1), "{stderr}");
        assert!(stderr.contains(said), "{stderr}");
        reader.join().unwrap();
    }
}

#[test]
fn ranks_that_cannot_meet_say_why() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = (model(folder.path()), data(folder.path()));
    let adapter = folder.path().join("adapter");
    let args = ["train", "--model", &model, "--data", &data, "--adapter-path"];
    let args = [&args[..], &[adapter.to_str().unwrap()]].concat();

    let port_of_two = port();
    let first = rank(&args, 0, 2, &port_of_two).spawn().unwrap();
    let second = rank(&args, 1, 3, &port_of_two).spawn().unwrap();
    let (first, second) = (end(first), end(second));
    assert_eq!((first.0, second.0), (Some(1), Some(1)));
    assert!(first.1.contains("rank 1 was told of 3 ranks, rank 0 of 2"), "{}", first.1);
    assert!(second.1.contains("WORLD_SIZE must be the same"), "{}", second.1);

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = listener.local_addr().unwrap().port().to_string();
    let output = rank(&args, 0, 2, &taken).output().unwrap();
    is_one_line(&output, 1, &["cannot listen on 127.0.0.1", &taken, "another MASTER_PORT"]);

    let output = command(&args).env("RANK", "1").output().unwrap();
    is_one_line(&output, 1, &["RANK=1", "no WORLD_SIZE"]);
    let output = rank(&args, 2, 2, "1").output().unwrap();
    is_one_line(&output, 1, &["RANK=2", "below WORLD_SIZE"]);
    let output = rank(&[&args[..], &["--gpus", "3"]].concat(), 0, 2, "1").output().unwrap();
    is_one_line(&output, 1, &["--gpus 3", "leave --gpus out"]);
    assert!(!adapter.exists());
}

#[test]
fn gpus_are_those_of_this_machine() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = (model(folder.path()), data(folder.path()));
    let train = ["train", "--model", &model, "--data", &data, "--gpus"];
    let output = run(&[&train[..], &["2", "--device", "cpu"]].concat());
    is_one_line(&output, 1, &["--gpus 2", "expected --device auto or cuda, got cpu"]);
    let output = run(&[&train[..], &["99"]].concat());
    is_one_line(&output, 1, &["cuda:98"]);
    is_no_usage(&[&train[..], &["0"]].concat(), "--gpus");
}

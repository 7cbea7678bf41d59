//! What needs no model: what is printed, where, and with which exit code.

use crate::{fails, is_no_usage, run, testbed, text, write};

#[test]
fn a_model_that_is_not_there_is_one_line_with_its_path() {
    let folder = tempfile::tempdir().unwrap();
    let gone = folder.path().join("gone.gguf");
    let gone = gone.to_str().unwrap();
    let data = write(folder.path(), "data.jsonl", b"{\"text\": \"a\"}\n");
    fails(&["generate", "--model", gone, "--prompt", "a"], &[gone]);
    fails(&["chat", "--model", gone], &[gone]);
    fails(&["perplexity", "--model", gone, "--data", &data], &[gone]);
    fails(&["info", gone], &[gone]);
    fails(&["data", "inspect", "--model", gone, "--data", &data], &[gone]);
}

#[test]
fn a_file_that_is_no_model_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = write(folder.path(), "text.gguf", b"this is not a model at all");
    fails(&["info", &file], &["text.gguf"]);
    fails(&["generate", "--model", &file, "--prompt", "a"], &["text.gguf"]);
    fails(&["info", folder.path().to_str().unwrap()], &["adapter_config.json", "config.json"]);
}

#[test]
fn a_bad_line_of_data_is_named_by_file_line_and_column() {
    let folder = tempfile::tempdir().unwrap();
    let rows = b"{\"text\": \"good\"}\n\n{\"text\": }\n";
    let data = write(folder.path(), "rows.jsonl", rows);
    fails(&["perplexity", "--model", "unread.gguf", "--data", &data], &["rows.jsonl:3:10: "]);
    let data = write(folder.path(), "rows.jsonl", b"{\"words\": \"none\"}\n");
    let parts = ["rows.jsonl:1:1: ", "words", "messages"];
    fails(&["perplexity", "--model", "unread.gguf", "--data", &data], &parts);
}

#[test]
fn a_flag_with_a_value_that_means_nothing_is_exit_code_2() {
    let generate = ["generate", "--model", "m", "--prompt", "a"];
    let bad = [
        ("--temp", "-1"),
        ("--temp", "NaN"),
        ("--top-p", "0"),
        ("--top-p", "1.5"),
        ("--min-p", "2"),
        ("--top-k", "many"),
        ("--repetition-penalty", "0"),
        ("--logit-bias", "7"),
        ("--max-tokens", "x"),
    ];
    for (flag, value) in bad {
        let value = format!("{flag}={value}");
        is_no_usage(&[&generate[..], &[value.as_str()]].concat(), flag);
    }
    // What was expected is said, also where the value looks like a flag.
    is_no_usage(&[&generate[..], &["--temp", "-1"]].concat(), "expected a number of 0 or more");
    is_no_usage(&["generate", "--model", "m"], "--prompt");
    is_no_usage(&["train", "--model", "m", "--data", "d", "--lr-schedule", "zigzag"], "zigzag");
    is_no_usage(&["perplexity", "--model", "m", "--data", "d", "--batch-size", "0"], "batch-size");
    is_no_usage(&["dance"], "dance");
}

fn safetensors(entries: &str) -> Vec<u8> {
    [&(entries.len() as u64).to_le_bytes(), entries.as_bytes()].concat()
}

#[test]
fn info_reads_a_model_folder_by_its_headers() {
    let folder = tempfile::tempdir().unwrap();
    let config = br#"{"model_type": "llama", "hidden_size": 8, "vocab_size": 100}"#;
    write(folder.path(), "config.json", config);
    let header = r#"{"__metadata__": {"format": "pt"},
        "a": {"dtype": "BF16", "shape": [100, 8], "data_offsets": [0, 1600]},
        "b": {"dtype": "F32", "shape": [8], "data_offsets": [1600, 1632]}}"#;
    write(folder.path(), "model.safetensors", &safetensors(header));
    let path = folder.path().to_str().unwrap();
    let output = run(&["info", path]);
    let stdout = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    for part in ["llama", "808 in 2 tensors, 1.6 KiB", "BF16", "F32", "tokenizer.json"] {
        assert!(stdout.contains(part), "{part:?} is not in {stdout:?}");
    }
    write(folder.path(), "model.safetensors", &u64::MAX.to_le_bytes());
    fails(&["info", path], &["model.safetensors", "18446744073709551615"]);
}

#[test]
fn info_reads_an_adapter() {
    let adapter = testbed::file("data/peft_adapter");
    let output = run(&["info", adapter.to_str().unwrap()]);
    let stdout = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    for part in ["rank            3, alpha 6", "4 layers: down_proj x 2, q_proj x 2", "376, "] {
        assert!(stdout.contains(part), "{part:?} is not in {stdout:?}");
    }
}

#[test]
fn completions_name_every_command() {
    for shell in ["bash", "zsh", "fish"] {
        let output = run(&["completions", shell]);
        assert_eq!(output.status.code(), Some(0));
        for command in ["generate", "perplexity", "inspect"] {
            assert!(text(&output.stdout).contains(command), "{command} for {shell}");
        }
    }
    is_no_usage(&["completions", "dos"], "dos");
}

#[test]
fn help_and_version_are_no_failures() {
    for args in [&["--help"][..], &["--version"], &["generate", "--help"], &["data", "--help"]] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(0));
        assert!(!output.stdout.is_empty() && output.stderr.is_empty());
    }
}

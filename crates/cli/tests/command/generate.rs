//! One prompt and many; settings from the model's folder; what is quiet and what is coloured.

use std::path::Path;

use crate::{command, data, fails, model, run, succeeds, testbed, text, write};

#[test]
fn many_prompts_get_the_answers_that_each_gets_alone() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let generate = |more: &[&str]| {
        let flags = ["generate", "--model", &model, "--max-tokens", "9", "--temp", "2"];
        succeeds(&[&flags[..], more].concat())
    };
    let prompts = ["Hi", "Something longer", "A"];
    let alone = prompts.map(|prompt| generate(&["--prompt", prompt]));
    let together = generate(&["-p", prompts[0], "-p", prompts[1], "-p", prompts[2]]);
    let rows: Vec<serde_json::Value> =
        together.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.len(), 3);
    for ((row, prompt), alone) in rows.iter().zip(prompts).zip(alone) {
        assert_eq!(
            (&row["prompt"], format!("{}\n", row["completion"].as_str().unwrap())),
            (&prompt.into(), alone)
        );
    }
    let lines = prompts.map(|prompt| format!("{{\"prompt\": \"{prompt}\"}}\n")).concat();
    let file = write(folder.path(), "prompts.jsonl", lines.as_bytes());
    for size in ["1", "2", "8"] {
        assert_eq!(generate(&["--prompts-file", &file, "--batch-size", size]), together);
    }
    let file = write(folder.path(), "bad.jsonl", b"{\"prompt\": \"a\"}\n{\"text\": \"b\"}\n");
    fails(&["generate", "--model", "unread", "--prompts-file", &file], &["bad.jsonl:2", "prompt"]);
}

#[test]
fn quiet_says_results_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = (model(folder.path()), data(folder.path()));
    let args = ["generate", "--model", &model, "--prompt", "Hi", "--max-tokens", "4"];
    let (loud, quiet) = (run(&args), run(&[&args[..], &["--quiet"]].concat()));
    assert!(text(&loud.stderr).contains("tok/s"));
    assert_eq!((text(&quiet.stderr).as_str(), quiet.stdout), ("", loud.stdout));
    let adapter = folder.path().join("adapter");
    let args = ["-q", "train", "--model", &model, "--data", &data, "--iters", "2"];
    let train = run(&[&args[..], &["--adapter-path", adapter.to_str().unwrap()]].concat());
    assert_eq!(train.status.code(), Some(0));
    assert_eq!((text(&train.stdout).as_str(), text(&train.stderr).as_str()), ("", ""));
    assert!(adapter.join("adapter_model.safetensors").exists());
}

#[test]
fn colours_come_only_where_they_are_asked_for_or_seen() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = (model(folder.path()), data(folder.path()));
    let args = ["data", "inspect", "--model", &model, "--data", &data];
    let colored = |more: &[&str]| succeeds(&[&args[..], more].concat()).contains('\x1b');
    assert!(!colored(&[]) && !colored(&["--color", "never"]) && colored(&["--color", "always"]));
    // What is asked for on the command line counts for more than the environment.
    let mut always = command(&[&args[..], &["--color=always"]].concat());
    assert!(text(&always.env("NO_COLOR", "1").output().unwrap().stdout).contains('\x1b'));
}

#[test]
fn pages_of_the_manual_name_every_command_and_exit_code() {
    let page = succeeds(&["man"]);
    assert!(page.contains(".TH metal") && page.contains("130"), "{page}");
    let folder = tempfile::tempdir().unwrap();
    let pages = folder.path().join("man1");
    succeeds(&["man", "--dir", pages.to_str().unwrap()]);
    for name in ["", "-train", "-plan", "-data-inspect", "-chat"] {
        assert!(pages.join(format!("metal-candle{name}.1")).exists(), "{name}");
    }
    assert!(!succeeds(&["--help"]).contains("  man "));
}

/// A Hugging Face folder whose every token is one printable character.
pub(super) fn folder(folder: &Path) -> String {
    let llama = testbed::file("data/models/llama");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(llama.join(name), folder.join(name)).unwrap();
    }
    let tokens = (b'!'..=b'~').map(|b| char::from(b).to_string()).chain(["\u{120}".to_owned()]);
    let vocab: serde_json::Map<String, serde_json::Value> =
        tokens.enumerate().map(|(id, token)| (token, id.into())).collect();
    let level = serde_json::json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
    });
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": level, "post_processor": null, "decoder": level,
        "model": { "type": "BPE", "vocab": vocab, "merges": [] },
    });
    write(folder, "tokenizer.json", tokenizer.to_string().as_bytes());
    folder.to_str().unwrap().to_owned()
}

#[test]
fn a_model_is_run_as_its_makers_mean_it_unless_flags_say_otherwise() {
    let scratch = tempfile::tempdir().unwrap();
    let model = folder(scratch.path());
    let config = |json: &str| {
        write(scratch.path(), "generation_config.json", json.as_bytes());
    };
    let generate = |more: &[&str]| {
        let flags =
            ["generate", "-q", "--model", &model, "--prompt", "Hello", "--max-tokens", "12"];
        succeeds(&[&flags[..], more].concat())
    };
    let greedy = generate(&[]);
    let hot = generate(&["--temp", "5", "--top-k", "20"]);
    assert_ne!(greedy, hot);
    // Filters and temperature are nothing where tokens are not drawn.
    config(r#"{"temperature": 5.0, "top_k": 20}"#);
    assert_eq!(generate(&[]), greedy);
    config(r#"{"do_sample": true, "temperature": 5.0, "top_k": 20}"#);
    assert_eq!(generate(&[]), hot);
    assert_eq!(generate(&["--temp", "0"]), greedy);
    let third = greedy.as_bytes()[2];
    let first = greedy.bytes().position(|b| b == third).unwrap();
    config(&format!("{{\"eos_token_id\": [500, {}]}}", third - b'!'));
    assert_eq!(generate(&[]), format!("{}\n", &greedy[..first]));
    config("{");
    fails(&["generate", "--model", &model, "--prompt", "a"], &["generation_config.json"]);
}

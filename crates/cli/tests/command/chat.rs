//! Conversations, as a script holds them.

use crate::{is_one_line, model, run_with, succeeds, text};
use std::process::Output;

fn chat(model: &str, lines: &[&str]) -> Output {
    let args = ["chat", "--model", model, "--max-tokens", "6", "--system-prompt", "Be"];
    run_with(&args, &(lines.join("\n") + "\n"))
}

/// One answer for each line that is no command.
#[track_caller]
fn answers(output: &Output) -> Vec<String> {
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    text(&output.stdout).lines().map(str::to_owned).collect()
}

#[test]
fn a_later_answer_is_the_one_that_the_whole_conversation_gets_from_scratch() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let output = chat(&model, &["Hi", "/stats", "And", "/stats", "Yes"]);
    let got = answers(&output);
    let mut prompt = String::from("system:Be;");
    for (question, answer) in ["Hi", "And", "Yes"].into_iter().zip(&got) {
        prompt += &format!("user:{question};assistant:");
        let args = ["generate", "--model", &model, "--ignore-chat-template", "--max-tokens", "6"];
        let scratch = succeeds(&[&args[..], &["--prompt", &prompt]].concat());
        assert_eq!(scratch.trim_end_matches('\n'), answer, "after {prompt:?}");
        prompt += &format!("{answer};");
    }
    // The second turn took in only what was new.
    let stderr = text(&output.stderr);
    let stats: Vec<&str> = stderr.lines().filter(|line| line.contains("generation: ")).collect();
    let kept = stats.iter().filter(|line| line.contains("of them kept")).count();
    assert!(kept >= 1 && stderr.contains("tok/s"), "{stderr}");
}

#[test]
fn what_is_taken_back_was_never_said() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let plain = answers(&chat(&model, &["Hi", "And"]));
    let undone = answers(&chat(&model, &["Hi", "What", "/undo", "And"]));
    assert_eq!([&undone[0], &undone[2]], [&plain[0], &plain[1]]);
    let reset = answers(&chat(&model, &["Other", "/reset", "Hi", "And"]));
    assert_eq!(reset[1..], plain);
    is_one_line(&chat(&model, &["/undo"]), 1, &["nothing to take back"]);
    is_one_line(&chat(&model, &["/stats"]), 1, &["no answer yet"]);
}

#[test]
fn a_saved_conversation_is_a_row_to_train_on() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let file = folder.path().join("talk.jsonl");
    let save = format!("/save {}", file.display());
    let got = answers(&chat(&model, &["Hi", &save, "And", &save]));
    let rows = std::fs::read_to_string(&file).unwrap();
    let rows: Vec<serde_json::Value> =
        rows.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.len(), 2);
    let messages = rows[1]["messages"].as_array().unwrap();
    assert_eq!(messages.len(), 5);
    assert_eq!(messages[4], serde_json::json!({ "role": "assistant", "content": got[1] }));
    let page = succeeds(&["data", "inspect", "--model", &model, "--data", file.to_str().unwrap()]);
    assert!(page.contains("2 rows"), "{page}");
    is_one_line(&chat(&model, &["/save x"]), 1, &["nothing was said"]);
}

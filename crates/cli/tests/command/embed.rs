//! Vectors of texts: where texts come from, where vectors go.

use crate::{fails, is_no_usage, run, run_with, succeeds, testbed, text, write};
use metal_candle::Device;
use metal_candle::embed::EmbeddingModel;
use metal_candle::models::BaseWeights;
use serde_json::Value;

const TEXTS: [&str; 3] = ["the cat sat", "", "a red dog on the mat"];

fn folder() -> String {
    testbed::file("data/embed/bert").to_str().unwrap().to_owned()
}

/// The texts and vectors of JSON lines.
fn rows(lines: &str) -> Vec<(String, Vec<f64>)> {
    let row = |line: &str| {
        let row: Value = serde_json::from_str(line).unwrap();
        let vector = row["embedding"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap());
        (row["text"].as_str().unwrap().to_owned(), vector.collect())
    };
    lines.lines().map(row).collect()
}

#[test]
fn texts_come_from_flags_from_a_file_or_from_standard_input() {
    let model = folder();
    let own = EmbeddingModel::load(model.as_ref(), BaseWeights::F32, &Device::Cpu).unwrap();
    let own = own.encode(&TEXTS).unwrap();
    let flags = [&["embed", "--model", &model][..], &TEXTS].concat();
    let out = run(&flags);
    let (stdout, stderr) = (text(&out.stdout), text(&out.stderr));
    let got = rows(&stdout);
    assert_eq!(got.len(), 3, "{stderr}");
    for ((got, vector), (want, row)) in got.iter().zip(TEXTS.iter().zip(own.rows())) {
        assert_eq!(got, want);
        let row: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
        assert!(row.iter().zip(vector).all(|(a, b)| (a - b).abs() < 1e-6), "{vector:?}");
    }
    assert!(stderr.contains("3 texts, 32 numbers each") && stderr.contains("0 cut to 24"));

    let temporary = tempfile::tempdir().unwrap();
    let lines = TEXTS.map(|text| format!("{text}\n")).concat();
    let file = write(temporary.path(), "lines.txt", lines.as_bytes());
    assert_eq!(succeeds(&["embed", "--model", &model, "--file", &file]), stdout);
    for args in [&["embed", "--model", &model][..], &["embed", "--model", &model, "--file", "-"]] {
        assert_eq!(text(&run_with(args, &lines).stdout), stdout);
    }
}

#[test]
fn vectors_go_to_json_lines_or_to_a_tensor() {
    let (model, folder) = (folder(), tempfile::tempdir().unwrap());
    let embed = [&["embed", "--model", &model][..], &TEXTS].concat();
    let want = succeeds(&embed);
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (lines, tensor) = (path("out.jsonl"), path("out.safetensors"));
    assert_eq!(succeeds(&[&embed[..], &["--output", &lines]].concat()), "");
    assert_eq!(std::fs::read_to_string(&lines).unwrap(), want);
    assert_eq!(succeeds(&[&embed[..], &["-o", &tensor]].concat()), "");
    let bytes = std::fs::read(&tensor).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let entry: Value = serde_json::from_slice(&bytes[8..header]).unwrap();
    assert_eq!(entry["embeddings"]["shape"], serde_json::json!([3, 32]));
    assert_eq!(entry["embeddings"]["dtype"], "F32");
    let values = bytes[header..].chunks_exact(4).map(|x| f32::from_le_bytes(x.try_into().unwrap()));
    let values: Vec<f64> = values.map(f64::from).collect();
    let want: Vec<f64> = rows(&want).into_iter().flat_map(|(_, vector)| vector).collect();
    assert!(values.len() == 96 && values.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-6));
    // Beside them lies nothing.
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
}

#[test]
fn what_cannot_be_embedded_is_one_line() {
    let (model, folder) = (folder(), tempfile::tempdir().unwrap());
    let embed = |more: &[&'static str]| [&["embed", "--model", "unread"][..], more].concat();
    fails(&embed(&["a", "--output", "out.txt"]), &["out.txt", ".safetensors or .jsonl"]);
    fails(&embed(&["--file", "gone.txt"]), &["gone.txt"]);
    let empty = write(folder.path(), "empty.txt", b"");
    fails(&["embed", "--model", "unread", "--file", &empty], &["no texts"]);
    let latin = write(folder.path(), "latin.txt", b"caf\xe9\n");
    fails(&["embed", "--model", "unread", "--file", &latin], &["latin.txt", "UTF-8"]);
    let nowhere = folder.path().join("gone/out.jsonl");
    let nowhere = nowhere.to_str().unwrap();
    fails(&["embed", "--model", &model, "a", "-q", "--output", nowhere], &["out.jsonl"]);
    fails(&["embed", "--model", folder.path().to_str().unwrap(), "a"], &["config.json"]);
    let decoder = testbed::file("data/models/llama");
    let parts = ["config.json", "\"llama\"", "an encoder"];
    fails(&["embed", "--model", decoder.to_str().unwrap(), "a"], &parts);
    is_no_usage(&embed(&["a", "--file", "lines.txt"]), "--file");
    is_no_usage(&embed(&["a", "--batch-size", "0"]), "--batch-size");
}

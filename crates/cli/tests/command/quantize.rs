//! `--quantize`, and checkpoints of bitsandbytes.

use crate::{data, fails, is_no_usage, model, succeeds, testbed};
use std::path::Path;

/// A checkpoint of bitsandbytes' with a tokenizer.
fn nf4(folder: &Path) -> String {
    let path = super::generate::folder(folder);
    let from = testbed::file("data/nf4/double");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(from.join(name), folder.join(name)).unwrap();
    }
    path
}

/// What of `plan` says how much the weights take.
fn weights(flags: &[&str]) -> String {
    let page = succeeds(&[&["plan", "--max-seq-length", "32"][..], flags].concat());
    page.lines().find(|line| line.trim_start().starts_with("weights")).unwrap().to_owned()
}

#[test]
fn an_adapter_is_trained_on_nf4_and_generates_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let (model, data) = (nf4(folder.path()), data(scratch.path()));
    let adapter = scratch.path().join("adapter");
    let adapter = adapter.to_str().unwrap();
    let base = ["--model", &model];
    let flags = ["--data", &data, "--iters", "2", "--batch-size", "1", "--max-seq-length", "32"];
    let more = ["--adapter-path", adapter, "--quantize", "nf4"];
    succeeds(&[&["train"][..], &base, &flags, &more].concat());
    let flags = ["--adapter-path", adapter, "--prompt", "a", "--max-tokens", "2"];
    succeeds(&[&["generate"][..], &base, &flags].concat());
    // As it is stored, 73,728 weights in 4.5 bits and an embedding of 24,576 bytes; as floats.
    let stored = weights(&base);
    assert_eq!(stored, weights(&[&base[..], &["--quantize", "nf4"]].concat()));
    assert!(stored.contains("KiB"), "{stored}");
    assert_ne!(stored, weights(&[&base[..], &["--dequantize"]].concat()));
}

/// The rows of `embed`.
fn embedded(flags: &[&str]) -> Vec<Vec<f64>> {
    let lines = succeeds(&[&["embed", "a red dog", "the cat sat"][..], flags].concat());
    let row = |line: &str| {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        row["embedding"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
    };
    lines.lines().map(row).collect()
}

#[test]
fn texts_are_embedded_by_quantised_weights() {
    let folder = testbed::file("data/embed/bert");
    let flags = ["--device", "cpu", "--model", folder.to_str().unwrap()];
    let want = embedded(&flags);
    for (format, least) in [("q8_0", 0.999), ("q4_1", 0.95), ("q4_0", 0.94)] {
        let got = embedded(&[&flags[..], &["--quantize", format]].concat());
        assert_ne!(got, want, "{format}");
        for (got, want) in got.iter().zip(&want) {
            // Both are of length 1.
            let cosine: f64 = got.iter().zip(want).map(|(a, b)| a * b).sum();
            assert!(cosine >= least, "{format}: {cosine}");
        }
    }
    let nf4 = [&["embed", "a", "--quantize", "nf4"][..], &flags].concat();
    fails(&nf4, &["query.weight", "NF4", "rows of 32", "64"]);
}

#[test]
fn what_cannot_be_quantised_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let gguf = model(folder.path());
    let flags = ["plan", "--model", &gguf, "--quantize"];
    // Its rows are of 16 weights.
    fails(&[&flags[..], &["nf4"]].concat(), &["q_proj.weight", "NF4", "rows of 16", "64"]);
    is_no_usage(&[&flags[..], &["fp4"]].concat(), "nf4");
    is_no_usage(&[&flags[..], &["nf4", "--dequantize"]].concat(), "--dequantize");
}

//! `metal-candle adapter`, `fuse` and `info` from outside, on small files that PEFT, mlx-lm and
//! gguf-py made.

#[path = "../../metal-candle/tests/support/testbed.rs"]
#[allow(dead_code, reason = "only the files are used here")]
mod testbed;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn run(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_metal-candle"));
    command.args(args).env_remove("RUST_BACKTRACE").output().unwrap()
}

fn data(name: &str) -> String {
    testbed::file("data").join(name).to_str().unwrap().to_owned()
}

/// Standard output of a command that succeeds.
#[track_caller]
fn succeeds(args: &[&str]) -> String {
    let output = run(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// Exit code 1 and one line that contains `parts`.
#[track_caller]
fn fails(args: &[&str], parts: &[&str]) {
    let output = run(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
    parts.iter().for_each(|part| assert!(stderr.contains(part), "{part:?} is not in {stderr:?}"));
}

fn path(folder: &Path, name: &str) -> (PathBuf, String) {
    let path = folder.join(name);
    (path.clone(), path.to_str().unwrap().to_owned())
}

fn convert<'a>(from: &'a str, format: &'a str, to: &'a str) -> Vec<&'a str> {
    vec!["adapter", "convert", "--adapter-path", from, "--to", format, "--save-path", to]
}

#[test]
fn an_adapter_is_converted_there_and_back() {
    let folder = tempfile::tempdir().unwrap();
    let base = data("adapters/base.gguf");
    let (_, gguf) = path(folder.path(), "lora.gguf");
    let (_, mlx) = path(folder.path(), "mlx");
    let (peft_path, peft) = path(folder.path(), "peft");
    let model = ["--model", &base];
    let first = convert(&data("adapters/peft"), "gguf", &gguf).join("\n");
    let first: Vec<&str> = first.split('\n').chain(model).collect();
    assert!(succeeds(&first).contains("14 modules, from PEFT's format to llama.cpp's"));
    succeeds(&[&convert(&gguf, "mlx", &mlx)[..], &model].concat());
    succeeds(&convert(&mlx, "peft", &peft));
    let read = |path: PathBuf| std::fs::read(path.join("adapter_model.safetensors")).unwrap();
    assert_eq!(read(peft_path), {
        let peft = metal_candle::io::PeftAdapter::load(data("adapters/peft")).unwrap();
        let (again, _) = path(folder.path(), "again");
        peft.save(&again).unwrap();
        read(again)
    });
}

#[test]
fn what_cannot_be_converted_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let (out_path, out) = path(folder.path(), "out");
    let (peft, gguf) = (data("adapters/peft"), data("adapters/lora.gguf"));
    fails(&convert(&peft, "gguf", &out), &["--model"]);
    fails(&convert(&gguf, "peft", &out), &["lora.gguf", "--model"]);
    let qwen = data("models/qwen3");
    let wrong = [&convert(&peft, "mlx", &out)[..], &["--model", &qwen]].concat();
    fails(&wrong, &["tiny-llama"]);
    fails(&convert(&data("models/llama"), "mlx", &out), &["models/llama", "adapters.safetensors"]);
    assert!(!out_path.exists());
}

#[test]
fn info_tells_whose_adapter_it_is() {
    let peft = succeeds(&["info", &data("adapters/peft")]);
    let mlx = succeeds(&["info", &data("adapters/mlx")]);
    let gguf = succeeds(&["info", &data("adapters/lora.gguf")]);
    for (page, format, parts) in [
        (peft, "PEFT's format", ["rank            3, alpha 6", "14 layers"]),
        (mlx, "mlx-lm's format", ["rank            4, alpha 10", "3 layers"]),
        (gguf, "llama.cpp's format", ["rank            3, alpha 6", "14 layers"]),
    ] {
        assert!(page.contains(format), "{page}");
        parts.iter().for_each(|part| assert!(page.contains(part), "{part:?} is not in {page:?}"));
    }
}

#[test]
fn a_fused_model_says_what_the_adapted_one_says() {
    let folder = tempfile::tempdir().unwrap();
    let (_, fused) = path(folder.path(), "fused");
    let (base, adapter) = (data("adapters/base.gguf"), data("adapters/lora.gguf"));
    let inputs = ["--model", &base, "--adapter-path", &adapter];
    let to = [&["fuse"], &inputs[..], &["--save-path", &fused]].concat();
    assert!(succeeds(&to).contains("14 of 21 tensors merged"));
    fails(&to, &["config.json", "another folder"]);
    let gguf = [&to[..], &["--export-gguf", "--dequantize=f16", "--gguf-path", "f.gguf"]].concat();
    assert!(succeeds(&gguf).contains("f.gguf: 14 of 21 tensors merged"));
    let ask = ["--prompt", "Hello", "--max-tokens", "12", "--quiet"];
    let generate = |model: &[&str]| succeeds(&[&["generate"], model, &ask].concat());
    let (adapted, plain) = (generate(&inputs), generate(&inputs[..2]));
    assert_eq!(generate(&["--model", &fused]), adapted);
    assert_eq!(generate(&["--model", &format!("{fused}/f.gguf")]), adapted);
    assert_ne!(plain, adapted);
}

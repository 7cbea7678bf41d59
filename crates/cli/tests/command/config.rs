//! Flags from a file.

use crate::{is_no_usage, is_one_line, model, run, succeeds, text, write};
use std::path::Path;

/// What `plan` says with these flags: settings that matter change it.
fn plan(model: &str, flags: &[&str]) -> String {
    succeeds(&[&["plan", "--full", "--model", model][..], flags].concat())
}

const FLAGS: [&str; 10] = [
    "--batch-size",
    "3",
    "--max-seq-length",
    "24",
    "--lora-rank",
    "5",
    "--lora-dropout",
    "0.25",
    "--target-modules",
    "q_proj,up_proj",
];

#[test]
fn a_file_says_what_flags_say() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let want = plan(&model, &FLAGS);
    let toml = "batch_size = 3\nmax-seq-length = 24\nlora_rank = 5\nlora-dropout = 0.25\n\
                target_modules = [\"q_proj\", \"up_proj\"]\nmask_prompt = true\nresume = false\n";
    let yaml = "batch-size: 3\nmax_seq_length: 24\nlora_rank: 5\nlora_dropout: 2.5e-1\n\
                target-modules:\n- q_proj\n- up_proj\ndata: null\n";
    let json = r#"{"batch_size": 3, "max_seq_length": 24, "lora_rank": 5, "lora_dropout": 0.25,
                   "target_modules": "q_proj,up_proj"}"#;
    for (name, content) in [("a.toml", toml), ("a.yaml", yaml), ("a.json", json)] {
        let file = write(folder.path(), name, content.as_bytes());
        assert_eq!(plan(&model, &["-c", &file]), want, "{name}");
    }
    // Also the flag that must be there.
    let file = write(folder.path(), "b.toml", format!("model = {model:?}\n{toml}").as_bytes());
    assert_eq!(succeeds(&["plan", "--full", "--config", &file]), want);
    assert_eq!(succeeds(&["--config", &file, "plan", "--full"]), want);
}

#[test]
fn the_command_line_wins() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let other = "batch_size: 7\nlora_rank: 1\ntarget_modules: [k_proj]\nmodel: nowhere.gguf\n\
                 max_seq_length: 24\n";
    let file = write(folder.path(), "a.yaml", other.as_bytes());
    let args = [&["--config", &file][..], &FLAGS].concat();
    assert_eq!(plan(&model, &args), plan(&model, &FLAGS));
    // The opposite of a flag is a flag's value.
    let file_of_pairs = write(folder.path(), "n.yaml", b"packing: true\ndtype: bf16\n");
    let packed = plan(&model, &["--packing", "--dtype", "bf16"]);
    assert_eq!(plan(&model, &["-c", &file_of_pairs]), packed);
    let unpacked = plan(&model, &["--dtype", "f32"]);
    let args = ["-c", &file_of_pairs, "--no-packing", "--dtype", "f32"];
    assert_eq!(plan(&model, &args), unpacked);
    assert_ne!(packed, unpacked);
    // What the command line excludes is not there, either.
    let prompts = write(folder.path(), "p.jsonl", b"{\"prompt\": \"a\"}\n");
    let file = write(folder.path(), "g.yaml", b"prompt: [b, c]\nmax_tokens: 2\n");
    let args = ["generate", "--model", &model, "-c", &file];
    let rows = succeeds(&[&args[..], &["--prompts-file", &prompts]].concat());
    assert!(rows.lines().count() == 1 && rows.contains("\"prompt\":\"a\""), "{rows}");
    assert_eq!(succeeds(&args).lines().count(), 2);
}

#[track_caller]
fn refused(folder: &Path, name: &str, content: &str, parts: &[&str]) {
    let file = write(folder, name, content.as_bytes());
    let output = run(&["train", "--model", "m", "--data", "d", "-c", &file]);
    is_one_line(&output, 2, &[&[name], parts].concat());
}

#[test]
fn what_is_no_flag_or_no_value_is_refused_with_the_file_s_name() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |name: &str, content: &str, parts: &[&str]| {
        refused(folder.path(), name, content, parts);
    };
    refused("a.yaml", "itters: 3\n", &["itters", "metal-candle train", "did you mean --iters?"]);
    refused("a.toml", "temp = 1.0\n", &["unknown key \"temp\""]);
    refused("a.yaml", "config: b.yaml\n", &["unknown key \"config\""]);
    refused("a.yaml", "iters: many\n", &["many", "--iters"]);
    refused("a.yaml", "lr_schedule: zigzag\n", &["zigzag", "cosine"]);
    refused("a.yaml", "iters: [1, 2]\n", &["iters", "one value, got 2"]);
    refused("a.yaml", "resume: 3\n", &["resume", "true or false"]);
    refused("a.yaml", "iters: {a: 1}\n", &["iters"]);
    refused("a.yaml", "- 1\n", &["expected keys and values"]);
    refused("a.yaml", "iters: [1\n", &["a.yaml"]);
    refused("a.ini", "iters = 3\n", &[".toml"]);
    let gone = folder.path().join("gone.toml");
    let output = run(&["plan", "--model", "m", "-c", gone.to_str().unwrap()]);
    is_one_line(&output, 2, &["gone.toml"]);
    // A mistake on the command line is clap's to explain.
    let file = write(folder.path(), "a.yaml", b"iters: 3\n");
    is_no_usage(&["train", "-c", &file, "--data", "d"], "--model");
    is_no_usage(&["train", "-c", &file, "--model", "m", "--data", "d", "--seed", "x"], "--seed");
}

/// The example that mlx-lm ships, but for the model and the data.
const MLX: &str = r#"
model: "MODEL"
train: true
fine_tune_type: lora
optimizer: adamw
data: "DATA"
seed: 0
num_layers: 1
batch_size: 3
iters: 2
val_batches: 25
learning_rate: 1e-5
steps_per_report: 1
steps_per_eval: 200
resume_adapter_file: null
adapter_path: "ADAPTER"
save_every: 100
test: false
test_batches: 100
max_seq_length: 24
grad_checkpoint: false
lora_parameters:
  keys: ["self_attn.q_proj", "mlp.up_proj"]
  rank: 5
  scale: 20.0
  dropout: 0.25
lr_schedule:
  name: cosine_decay
  warmup: 1
  warmup_init: 1e-7
  arguments: [1e-5, 1000, 1e-7]
"#;

#[test]
fn a_file_of_mlx_lm_s_trains_what_it_says() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let data = crate::data(folder.path());
    let adapter = folder.path().join("adapter");
    let content = MLX.replace("MODEL", &model).replace("DATA", &data);
    let content = content.replace("ADAPTER", adapter.to_str().unwrap());
    let file = write(folder.path(), "lora_config.yaml", content.as_bytes());
    let output = run(&["train", "-c", &file]);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{err}");
    assert!(err.contains("warm-up begins at 0"), "{err}");
    // The second update is the first after the warm-up.
    assert!(out.contains("step 2") && out.contains("learning rate 1.00e-5"), "{out}");
    let config = std::fs::read_to_string(adapter.join("adapter_config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!((&config["r"], config["lora_alpha"].as_f64()), (&5.into(), Some(100.0)));
    assert_eq!(config["target_modules"][0], "self_attn.q_proj");
    assert_eq!(config["layers_to_transform"], serde_json::json!([1]));
    for (from, to, part) in [
        ("fine_tune_type: lora", "fine_tune_type: dora", "fine_tune_type is \"dora\""),
        ("num_layers: 1", "num_layers: 0", "expected a number of layers, or -1 for all"),
        ("optimizer: adamw", "optimizer: sgd", "optimizer is \"sgd\""),
        ("  dropout", "  drop", "lora_parameters.drop"),
        ("cosine_decay", "step_decay", "step_decay"),
    ] {
        let file = write(folder.path(), "bad.yaml", content.replace(from, to).as_bytes());
        is_one_line(&run(&["train", "-q", "-c", &file]), 2, &["bad.yaml", part]);
    }
}

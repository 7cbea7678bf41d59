//! What is planned is what is done.

use crate::{data, fails, model, run, succeeds, text};
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;

#[test]
fn the_plan_of_a_training_is_the_one_that_it_makes() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = (model(folder.path()), data(folder.path()));
    let adapter = folder.path().join("adapter");
    let adapter = adapter.to_str().unwrap();
    let flags = ["--model", &model, "--data", &data, "--batch-size", "2", "--lora-rank", "3"];
    let more = ["--target-modules", "all-linear", "--iters", "1", "--max-seq-length", "64"];
    let more = [&more[..], &["--grad-accumulation-steps", "2", "--adapter-path", adapter]].concat();
    let flags = [&flags[..], &more].concat();
    for held in [&[][..], &["--packing"], &["--packing", "--dtype", "bf16"]] {
        let trained = succeeds(&[&["train", "--show-plan"][..], &flags, held].concat());
        let planned = succeeds(&[&["plan", "--full"][..], &flags, held].concat());
        let is_same = planned.lines().count() > 20 && trained.starts_with(&planned);
        assert!(is_same, "{held:?}:\n{planned}\n{trained}");
    }
}

/// The number before `unit` in the line that begins with `name`.
fn number(page: &str, name: &str, unit: &str) -> u64 {
    let line = page.lines().find(|line| line.trim_start().starts_with(name)).unwrap();
    let before = line[..line.find(unit).unwrap()].trim();
    before.rsplit(' ').next().unwrap().parse().unwrap()
}

#[test]
fn the_summary_says_the_exact_peak_and_what_takes_most() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let page = succeeds(&["plan", "--model", &model, "--batch-size", "2", "--lora-rank", "4"]);
    let parts = ["weights", "adapter", "optimizer state", "arena", "peak", "operations", "largest"];
    for part in parts {
        assert!(page.contains(part), "{part} is not in {page}");
    }
    let small = number(&page, "peak", " bytes exactly");
    let more = succeeds(&["plan", "--model", &model, "--batch-size", "4", "--lora-rank", "4"]);
    assert!(number(&more, "peak", " bytes exactly") > small, "{page}\n{more}");
    assert_eq!(number(&page, "weights", " tensors"), number(&more, "weights", " tensors"));
}

#[test]
fn the_last_layers_alone_take_less() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let plan = |flags: &[&str]| {
        let all = ["plan", "--model", &model, "--target-modules", "all-linear"];
        succeeds(&[&all[..], flags].concat())
    };
    let (all, last) = (plan(&[]), plan(&["--num-layers", "1"]));
    assert!(all.contains("on 14 layers") && last.contains("on 7 layers"), "{all}\n{last}");
    for (what, unit) in [("peak", " bytes exactly"), ("adapter", " tensors")] {
        assert!(number(&last, what, unit) < number(&all, what, unit), "{all}\n{last}");
    }
    assert_eq!(plan(&["--num-layers", "-1"]), all);
    let more = ["plan", "--model", &model, "--num-layers", "3"];
    fails(&more, &["--num-layers: the last 3 layers of a base that has 2"]);
}

#[test]
fn a_training_says_at_its_start_and_in_its_report_what_memory_it_takes() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = (model(folder.path()), data(folder.path()));
    let [adapter, report] = ["adapter", "report.html"].map(|name| folder.path().join(name));
    let flags = ["train", "--model", &model, "--data", &data, "--iters", "1", "--device", "cpu"];
    let paths =
        [["--adapter-path", adapter.to_str().unwrap()], ["--report", report.to_str().unwrap()]];
    let output = run(&[&flags[..], &paths.concat()].concat());
    let said = text(&output.stderr);
    assert!(output.status.success(), "{said}");
    let line = said.lines().find(|line| line.starts_with("memory: ")).unwrap();
    assert!(line.contains(" by the plan of a step"), "{line}");
    let page = std::fs::read_to_string(report).unwrap();
    assert!(page.contains("Planned scratch memory") && page.contains("Workspaces beside it"));
}

#[test]
fn a_step_of_generation_is_planned_with_its_cache() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let plan = |more: &[&str]| {
        let flags = ["plan", "--decode", "--model", &model, "--max-seq-length", "64"];
        succeeds(&[&flags[..], more].concat())
    };
    let one = plan(&["--batch-size", "1"]);
    assert!(one.contains("1 x 1 new tokens, 1 x 64 in the cache"), "{one}");
    // 2 layers of keys and values, [1, 64, 2, 4] of f32.
    assert!(one.contains("cache              8.0 KiB  4 tensors"), "{one}");
    let half = plan(&["--batch-size", "1", "--cache-type", "f16"]);
    assert!(half.contains("cache              4.0 KiB  4 tensors"), "{half}");
    let three = plan(&["--batch-size", "3", "--new-tokens", "32"]);
    assert!(three.contains("cache             24.0 KiB"), "{three}");
    let flags = ["plan", "--decode", "--model", &model, "--max-seq-length", "8"];
    fails(&[&flags[..], &["--new-tokens", "9"]].concat(), &["--new-tokens", "8 tokens, got 9"]);
}

#[test]
fn planning_reads_no_weights() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let whole = succeeds(&["plan", "--model", &model]);
    // The same header, and zeros for weights: only what is read could tell.
    let bytes = std::fs::read(&model).unwrap();
    let header = bytes.len() / 2;
    std::fs::write(&model, [&bytes[..header], &vec![0; bytes.len() - header][..]].concat())
        .unwrap();
    assert_eq!(succeeds(&["plan", "--model", &model]), whole);
    let output = run(&["plan", "--model", &model, "--target-modules", "no_such_layer"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("no_such_layer"));
}

/// A folder of a Llama of one layer of 64 features, its weights a file with a header and a hole: enough to be planned.
fn headers(folder: &Path) -> String {
    let config = r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 96, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256, "tie_word_embeddings": true}"#;
    std::fs::write(folder.join("config.json"), config).unwrap();
    let layer = [
        ("input_layernorm", vec![64]),
        ("post_attention_layernorm", vec![64]),
        ("self_attn.q_proj", vec![64, 64]),
        ("self_attn.k_proj", vec![64, 64]),
        ("self_attn.v_proj", vec![64, 64]),
        ("self_attn.o_proj", vec![64, 64]),
        ("mlp.gate_proj", vec![160, 64]),
        ("mlp.up_proj", vec![160, 64]),
        ("mlp.down_proj", vec![64, 160]),
    ];
    let layer = layer.map(|(name, dims)| (format!("model.layers.0.{name}.weight"), dims));
    let outer = [("embed_tokens", vec![96, 64]), ("norm", vec![64])];
    let outer = outer.map(|(name, dims)| (format!("model.{name}.weight"), dims));
    let mut end = 0;
    let tensors = outer.into_iter().chain(layer).map(|(name, shape)| {
        let start = end;
        end += 2 * shape.iter().product::<u64>();
        let tensor = json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]});
        (name, tensor)
    });
    let header = Value::Object(tensors.collect()).to_string();
    let mut file = std::fs::File::create(folder.join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + end).unwrap();
    folder.to_str().unwrap().to_owned()
}

#[test]
fn prepacked_weights_are_listed_beside_the_same_plan() {
    let folder = tempfile::tempdir().unwrap();
    let model = headers(folder.path());
    let flags = ["plan", "--model", &model, "--dtype", "bf16", "--device"];
    let plain = succeeds(&[&flags[..], &["cpu"]].concat());
    let prepacking = succeeds(&[&flags[..], &["cpu", "--prepack-weights"]].concat());
    assert!(!plain.contains("prepacked weights"), "{plain}");
    // Both orders of four matrices, and one of q, k and v, before which nothing is trained, in KiB.
    let weights = (2 * (2 * (64 * 64 + 3 * 64 * 160) + 3 * 64 * 64)) >> 10;
    let listed = prepacking.lines().find(|line| line.contains("prepacked weights")).unwrap();
    let words: Vec<&str> = listed.split_whitespace().collect();
    let [.., size, "KiB"] = words[..] else { panic!("{listed}") };
    let listed: f64 = size.parse().unwrap();
    // Twice as much where bf16 is widened to be multiplied.
    assert!((weights as f64..2.5 * weights as f64).contains(&listed), "{listed} for {weights}");
    let peak = |page: &str| number(page, "peak", " bytes exactly");
    assert_eq!(peak(&prepacking), peak(&plain));
    let elsewhere = [&flags[..], &["cuda", "--prepack-weights"]].concat();
    fails(&elsewhere, &["--prepack-weights", "cpu", "got cuda"]);
}

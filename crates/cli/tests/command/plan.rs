//! What is planned is what is done.

use crate::{data, fails, model, run, succeeds, text};

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

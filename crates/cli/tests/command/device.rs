//! Where it computes.

use crate::{data, fails, is_no_usage, is_one_line, model, run, succeeds, text, write};

#[test]
fn the_device_is_said_and_may_be_chosen() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let flags = ["generate", "--model", &model, "--prompt", "12", "--max-tokens", "2"];
    let cpu = run(&[&flags[..], &["--device", "cpu"]].concat());
    assert_eq!(cpu.status.code(), Some(0), "{}", text(&cpu.stderr));
    let said = text(&cpu.stderr);
    assert!(said.starts_with("device: ") && said.lines().next().unwrap().ends_with("(cpu)"));
    let auto = run(&[&flags[..], &["--device", "auto"]].concat());
    assert_eq!(text(&run(&flags).stderr).lines().next(), text(&auto.stderr).lines().next());
}

#[test]
fn a_device_that_is_not_here_is_an_error_that_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = (model(folder.path()), data(folder.path()));
    for device in ["cuda:99", "metal:99"] {
        let flags = ["--model", &model, "--device", device];
        let output = run(&[&["generate", "--prompt", "12"][..], &flags].concat());
        is_one_line(&output, 1, &[device]);
        let said = text(&output.stderr);
        assert!(said.contains("--features") || said.contains("this machine has"), "{said}");
        fails(&[&["train", "--data", &data][..], &flags].concat(), &[device]);
        fails(&[&["perplexity", "--data", &data][..], &flags].concat(), &[device]);
    }
    for device in ["gpu", "cuda:x", "cpu:1"] {
        let flags = ["generate", "--prompt", "12", "--model", &model, "--device", device];
        is_no_usage(&flags, "expected auto, cpu, cuda, cuda:N or metal");
    }
}

#[test]
fn a_file_of_flags_names_the_device() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let config = write(folder.path(), "run.toml", b"device = \"metal:99\"\n");
    let flags = ["generate", "--prompt", "12", "--model", &model, "--config", &config];
    fails(&flags, &["metal:99"]);
    succeeds(&[&flags[..], &["--max-tokens", "1", "--device", "cpu"]].concat());
}

/// A plan is data: the kernels of a GPU are planned without one.
#[test]
fn a_step_is_planned_for_a_device_that_is_not_here() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    for device in ["cuda:7", "metal"] {
        let page = succeeds(&["plan", "--model", &model, "--device", device]);
        assert!(page.contains("peak"), "{page}");
        // What its calls and libraries would want beside the plan, only the device can say.
        let unknown = "workspaces: not known here, where there is no ";
        assert!(page.contains(unknown) && page.contains(device), "{page}");
        succeeds(&["plan", "--decode", "--model", &model, "--device", device]);
    }
}

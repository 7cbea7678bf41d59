use std::collections::BTreeMap;
use std::path::Path;

use indexmap::IndexMap;
use metal_candle::io::peft::{
    Bias, InitLoraWeights, LoraConfig, LoraPair, OneOrMany, Problem, TargetModules,
};
use metal_candle::io::{Error, PeftAdapter};
use safetensors::tensor::{Dtype, TensorView};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::support::{data_folder, vectors};

fn object(value: Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

fn config(value: Value) -> Result<LoraConfig, Problem> {
    LoraConfig::from_json(&object(value))
}

/// A config with `peft_type`, targets and what is added.
fn with(extra: Value) -> Result<LoraConfig, Problem> {
    let mut json = object(json!({"peft_type": "LORA", "target_modules": ["q_proj"]}));
    json.extend(object(extra));
    LoraConfig::from_json(&json)
}

#[derive(Deserialize)]
struct Targets {
    modules: IndexMap<String, [usize; 2]>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    config: Value,
    /// Rank and scale by module.
    targets: IndexMap<String, (usize, f64)>,
}

#[test]
fn modules_ranks_and_scales_are_those_that_peft_chooses() {
    let Targets { modules, cases } = vectors("targets.json");
    assert!(cases.len() >= 14);
    for case in cases {
        let config = config(case.config.clone()).unwrap();
        let targets = config.targets(modules.keys().map(String::as_str)).unwrap();
        let targets: IndexMap<String, (usize, f64)> =
            targets.into_iter().map(|t| (t.module, (t.rank, t.scale))).collect();
        assert_eq!(targets, case.targets, "{}", case.config);
    }
}

#[test]
fn an_adapter_of_pefts_loads_and_comes_back_as_it_was() {
    let adapter = PeftAdapter::load(data_folder().join("peft_adapter")).unwrap();
    assert_eq!((adapter.config.r, adapter.config.lora_alpha), (3, 6.0));
    assert_eq!(adapter.config.init_lora_weights, InitLoraWeights::Default(false));
    assert_eq!(adapter.modules.len(), 4);
    let q = &adapter.modules["model.layers.1.self_attn.q_proj"];
    assert_eq!((q.rank, q.inputs, q.outputs), (2, 16, 16));
    assert_eq!((q.a.len(), q.b.len()), (32, 32));
    let down = &adapter.modules["model.layers.0.mlp.down_proj"];
    assert_eq!((down.rank, down.inputs, down.outputs), (3, 20, 16));
    assert!(down.b.iter().any(|&b| b != 0.0));
    let Targets { modules, .. } = vectors("targets.json");
    let base: BTreeMap<String, [usize; 2]> = modules.into_iter().collect();
    adapter.check_base(&base).unwrap();
    let folder = tempfile::tempdir().unwrap();
    adapter.save(folder.path().join("new/folder")).unwrap();
    let again = PeftAdapter::load(folder.path().join("new/folder")).unwrap();
    assert_eq!(again, adapter);
}

#[test]
fn the_file_has_pefts_keys_shapes_and_metadata() {
    let folder = tempfile::tempdir().unwrap();
    let adapter = PeftAdapter::load(data_folder().join("peft_adapter")).unwrap();
    adapter.save(folder.path()).unwrap();
    let read = |folder: &Path| std::fs::read(folder.join("adapter_model.safetensors")).unwrap();
    let (ours, theirs) = (read(folder.path()), read(&data_folder().join("peft_adapter")));
    let describe = |bytes: &[u8]| -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
        let file = safetensors::SafeTensors::deserialize(bytes).unwrap();
        file.iter()
            .map(|(k, v)| (k.to_owned(), (v.dtype(), v.shape().to_vec(), v.data().to_vec())))
            .collect()
    };
    assert_eq!(describe(&ours), describe(&theirs));
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&ours).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
}

#[test]
fn a_config_comes_back_as_it_was() {
    let configs = [
        LoraConfig::default(),
        LoraConfig {
            base_model_name_or_path: Some("base".into()),
            r: 16,
            lora_alpha: 24.5,
            lora_dropout: 0.05,
            use_rslora: true,
            target_modules: TargetModules::Names(vec!["q_proj".into(), "v_proj".into()]),
            exclude_modules: Some(OneOrMany::Many(vec!["x".into()])),
            layers_to_transform: Some(OneOrMany::Many(vec![1, 2])),
            layers_pattern: Some(OneOrMany::One("layers".into())),
            rank_pattern: IndexMap::from([("b".into(), 2), ("a".into(), 3)]),
            alpha_pattern: IndexMap::from([("z".into(), 1.5), ("y".into(), 2.0)]),
            init_lora_weights: InitLoraWeights::Named("gaussian".into()),
            ..LoraConfig::default()
        },
        LoraConfig {
            target_modules: TargetModules::Regex(r".*\.q".into()),
            ..LoraConfig::default()
        },
    ];
    for config in configs {
        let json = config.to_json();
        assert_eq!(json["peft_type"], "LORA");
        let again = LoraConfig::from_json(&json).unwrap();
        assert_eq!(again, config);
        assert!(again.rank_pattern.keys().eq(config.rank_pattern.keys()), "the first match counts");
    }
    assert_eq!(LoraConfig::default().to_json()["lora_alpha"], json!(8));
    assert_eq!(LoraConfig::default().to_json()["target_modules"], json!("all-linear"));
}

#[test]
fn the_smallest_config_has_pefts_defaults() {
    let config = config(json!({"peft_type": "LORA", "target_modules": ["q_proj"]})).unwrap();
    assert_eq!((config.r, config.lora_alpha, config.lora_dropout), (8, 8.0, 0.0));
    assert_eq!(config.bias, Bias::None);
    assert!(!config.use_rslora);
}

#[test]
fn options_that_change_the_meaning_are_refused_with_the_reason() {
    let refused = [
        json!({"use_dora": true}),
        json!({"use_qalora": true}),
        json!({"fan_in_fan_out": true}),
        json!({"lora_bias": true}),
        json!({"bias": "all"}),
        json!({"bias": "lora_only"}),
        json!({"modules_to_save": ["lm_head"]}),
        json!({"trainable_token_indices": [1]}),
        json!({"target_parameters": ["experts.w"]}),
        json!({"layer_replication": [[0, 2]]}),
        json!({"alora_invocation_tokens": [3]}),
        json!({"loftq_config": {"bits": 4}}),
        json!({"init_lora_weights": "pissa"}),
        json!({"init_lora_weights": "olora"}),
        json!({"option_of_next_year": true}),
    ];
    for extra in refused {
        let error = with(extra.clone()).unwrap_err();
        assert!(matches!(error, Problem::Unsupported { .. }), "{extra}: {error}");
    }
    let accepted = [
        json!({"use_dora": false, "modules_to_save": null, "loftq_config": {}, "bias": "none"}),
        json!({"peft_version": "9", "inference_mode": true, "qalora_group_size": 16}),
        json!({"option_of_next_year": null, "another": false, "list": [], "text": ""}),
        json!({"init_lora_weights": "gaussian"}),
    ];
    for extra in accepted {
        with(extra.clone()).unwrap_or_else(|error| panic!("{extra}: {error}"));
    }
}

#[test]
fn values_out_of_range_are_refused() {
    for extra in [
        json!({"r": 0}),
        json!({"rank_pattern": {"q_proj": 0}}),
        json!({"lora_dropout": 1.0}),
        json!({"lora_dropout": -0.1}),
        json!({"target_modules": "all-linear", "layers_to_transform": [1]}),
        json!({"target_modules": null}),
    ] {
        let error = with(extra.clone()).unwrap_err();
        assert!(matches!(error, Problem::Option { .. }), "{extra}: {error}");
    }
    for extra in
        [json!({"r": -1}), json!({"r": 1.5}), json!({"target_modules": 3}), json!({"bias": "some"})]
    {
        let error = with(extra.clone()).unwrap_err();
        assert!(matches!(error, Problem::Json { .. }), "{extra}: {error}");
    }
    for kind in [json!({}), json!({"peft_type": "IA3"}), json!({"peft_type": null})] {
        assert!(matches!(config(kind), Err(Problem::PeftType { .. })));
    }
}

#[test]
fn the_last_layers_are_a_list_and_all_linear_the_names_in_them() {
    let names = ["0.self_attn.q_proj", "0.mlp.up_proj", "1.self_attn.q_proj", "1.mlp.up_proj"];
    let names = names.map(|name| format!("model.layers.{name}"));
    let linear = || names.iter().map(String::as_str).chain(["lm_head"]);
    let of = |target_modules: TargetModules, count| {
        let config = LoraConfig { target_modules, ..LoraConfig::default() };
        config.for_last_layers(count, linear())
    };
    let chosen = |config: &LoraConfig| -> Vec<String> {
        config.targets(linear()).unwrap().into_iter().map(|target| target.module).collect()
    };
    let last = of(TargetModules::AllLinear, 1).unwrap();
    let short = TargetModules::Names(vec!["q_proj".into(), "up_proj".into()]);
    assert_eq!(last.target_modules, short);
    assert_eq!(last.layers_to_transform, Some(OneOrMany::Many(vec![1])));
    assert_eq!(chosen(&last), names[2..]);
    assert_eq!(LoraConfig::from_json(&last.to_json()).unwrap(), last);
    let q = TargetModules::Names(vec!["q_proj".into()]);
    assert_eq!(chosen(&of(q.clone(), 1).unwrap()), names[2..3]);
    assert_eq!(chosen(&of(TargetModules::AllLinear, 2).unwrap()), names);
    for count in [0, 3] {
        let error = of(q.clone(), count).unwrap_err();
        assert!(matches!(error, Problem::LastLayers { layers: 2, .. }), "{error}");
    }
    let error = of(TargetModules::Regex(".*q_proj".into()), 1).unwrap_err();
    assert!(matches!(error, Problem::Option { .. }), "{error}");
    // Layers are what they are for the selection.
    let by = |pattern: &str| {
        let layers_pattern = Some(OneOrMany::One(pattern.into()));
        LoraConfig { layers_pattern, ..LoraConfig::default() }.for_last_layers(1, linear())
    };
    assert_eq!(chosen(&by("layers").unwrap()), names[2..]);
    assert!(matches!(by("blocks"), Err(Problem::LastLayers { layers: 0, .. })));
    assert!(matches!(by("("), Err(Problem::Regex { .. })));
}

#[test]
fn bad_patterns_and_targets_that_match_nothing_are_refused() {
    let linear = ["model.layers.0.self_attn.q_proj", "lm_head"];
    for extra in [
        json!({"target_modules": "("}),
        json!({"exclude_modules": "["}),
        json!({"rank_pattern": {"*": 2}}),
        json!({"layers_to_transform": 0, "layers_pattern": "(?"}),
    ] {
        let error = with(extra.clone()).unwrap().targets(linear).unwrap_err();
        assert!(matches!(error, Problem::Regex { .. }), "{extra}: {error}");
    }
    for extra in [
        json!({"target_modules": ["k_proj"]}),
        json!({"target_modules": []}),
        json!({"target_modules": "q_proj"}),
        json!({"exclude_modules": ["q_proj"]}),
        json!({"layers_to_transform": 7}),
    ] {
        let error = with(extra.clone()).unwrap().targets(linear).unwrap_err();
        assert!(matches!(error, Problem::NoTarget { modules: 2, .. }), "{extra}: {error}");
    }
}

fn base() -> BTreeMap<String, [usize; 2]> {
    let modules: IndexMap<String, [usize; 2]> = vectors::<Targets>("targets.json").modules;
    modules.into_iter().collect()
}

#[test]
fn an_adapter_of_another_base_is_refused_with_what_differs() {
    let adapter = || PeftAdapter::load(data_folder().join("peft_adapter")).unwrap();
    let q = "model.layers.0.self_attn.q_proj".to_owned();
    let mut wider = base();
    wider.insert(q.clone(), [32, 16]);
    let error = adapter().check_base(&wider).unwrap_err();
    assert!(
        matches!(&error, Problem::BaseShape { module, expected: [32, 16], got: [16, 16] } if *module == q),
        "{error}"
    );
    let mut deeper = base();
    deeper.insert("model.layers.2.self_attn.q_proj".to_owned(), [16, 16]);
    assert!(
        matches!(adapter().check_base(&deeper), Err(Problem::Missing { modules }) if modules.len() == 1)
    );
    let mut shallower = base();
    shallower.retain(|name, _| !name.contains("layers.1"));
    let error = adapter().check_base(&shallower).unwrap_err();
    assert!(matches!(&error, Problem::Unexpected { modules } if modules.len() == 2), "{error}");
    let mut other_rank = adapter();
    other_rank.config.rank_pattern.clear();
    let error = other_rank.check_base(&base()).unwrap_err();
    assert!(matches!(error, Problem::Rank { expected: 3, got: 2, .. }), "{error}");
}

/// Key, dtype, shape and bytes.
type Raw<'a> = (&'a str, Dtype, &'a [usize], &'a [u8]);

/// An adapter folder with these tensors.
fn folder_with(tensors: &[Raw]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let views = tensors.iter().map(|(key, dtype, shape, bytes)| {
        (*key, TensorView::new(*dtype, shape.to_vec(), bytes).unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.path().join("adapter_model.safetensors"), bytes).unwrap();
    let config = json!({"peft_type": "LORA", "target_modules": ["q"]}).to_string();
    std::fs::write(folder.path().join("adapter_config.json"), config).unwrap();
    folder
}

fn load_problem(folder: &Path) -> Problem {
    match PeftAdapter::load(folder) {
        Err(Error::Adapter { problem, .. }) => problem,
        other => panic!("expected a problem with the adapter, got {other:?}"),
    }
}

const A: &str = "base_model.model.l.q.lora_A.weight";
const B: &str = "base_model.model.l.q.lora_B.weight";

#[test]
fn every_float_dtype_is_read_as_f32() {
    let half: Vec<u8> =
        [0.5f32, -2.0].iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect();
    let brain: Vec<u8> =
        [0.5f32, -2.0].iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect();
    let double: Vec<u8> = [0.5f64, -2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    for (dtype, bytes) in [(Dtype::F16, half), (Dtype::BF16, brain), (Dtype::F64, double)] {
        let folder = folder_with(&[(A, dtype, &[1, 2], &bytes), (B, dtype, &[2, 1], &bytes)]);
        let pair = &PeftAdapter::load(folder.path()).unwrap().modules["l.q"];
        let expected =
            LoraPair { a: vec![0.5, -2.0], b: vec![0.5, -2.0], rank: 1, inputs: 2, outputs: 2 };
        assert_eq!(*pair, expected);
    }
}

#[test]
fn tensors_that_are_no_pairs_are_refused() {
    let f = Dtype::F32;
    let cases: [(&[Raw], &str); 8] = [
        (&[(A, f, &[1, 1], &[0; 4])], "lacks lora_B"),
        (&[(B, f, &[1, 1], &[0; 4])], "lacks lora_A"),
        (&[(A, f, &[1, 2], &[0; 8]), (B, f, &[1, 2], &[0; 8])], "expected [r, in], [out, r]"),
        (&[(A, f, &[2], &[0; 8]), (B, f, &[1, 2], &[0; 8])], "expected [r, in], [out, r]"),
        (&[(A, f, &[0, 2], &[]), (B, f, &[2, 0], &[])], "expected [r, in], [out, r]"),
        (&[(A, Dtype::I32, &[1, 1], &[0; 4])], "I32"),
        (&[("l.q.lora_a", f, &[1, 1], &[0; 4])], "base_model.model."),
        (&[("base_model.model.l.q.lora_magnitude_vector", f, &[1], &[0; 4])], "DoRA"),
    ];
    for (tensors, expected) in cases {
        let problem = load_problem(folder_with(tensors).path());
        assert!(problem.to_string().contains(expected), "{expected}: {problem}");
    }
}

#[test]
fn a_truncated_or_damaged_adapter_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let adapter = PeftAdapter::load(data_folder().join("peft_adapter")).unwrap();
    adapter.save(folder.path()).unwrap();
    let weights = folder.path().join("adapter_model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    for len in (0..whole.len()).step_by(7).chain([whole.len() - 1]) {
        std::fs::write(&weights, &whole[..len]).unwrap();
        let problem = load_problem(folder.path());
        assert!(matches!(problem, Problem::SafeTensors { .. }), "cut at {len}: {problem}");
    }
    let mut hostile = whole.clone();
    hostile[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(&weights, &hostile).unwrap();
    assert!(matches!(load_problem(folder.path()), Problem::SafeTensors { .. }));
    std::fs::write(&weights, &whole).unwrap();
    std::fs::write(folder.path().join("adapter_config.json"), "{\"r\": }").unwrap();
    assert!(matches!(PeftAdapter::load(folder.path()), Err(Error::Json { .. })));
    std::fs::remove_file(folder.path().join("adapter_config.json")).unwrap();
    assert!(matches!(PeftAdapter::load(folder.path()), Err(Error::File { .. })));
}

#[test]
fn a_pair_whose_lengths_contradict_its_shape_is_not_written() {
    let mut adapter = PeftAdapter::load(data_folder().join("peft_adapter")).unwrap();
    adapter.modules.values_mut().next().unwrap().a.pop();
    let folder = tempfile::tempdir().unwrap();
    let error = adapter.save(folder.path()).unwrap_err();
    assert!(
        matches!(error, Error::Adapter { problem: Problem::SafeTensors { .. }, .. }),
        "{error}"
    );
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

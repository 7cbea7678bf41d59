//! Every format is read as its own tool reads it, and written so that it reads the same.

use super::{assert_same, data, decoder, error, logits, vectors};
use crate::testbed::device;

use metal_candle::io::gguf::GgufFile;
use metal_candle::io::peft::Problem;
use metal_candle::io::{AdapterFormat, Error, PeftAdapter, adapter};
use metal_candle::nn::LoRAAdapter;
use safetensors::SafeTensors;
use serde_json::Value;

const FILES: [(&str, &str, AdapterFormat); 3] = [
    ("adapters/peft", "peft", AdapterFormat::Peft),
    ("adapters/mlx", "mlx", AdapterFormat::Mlx),
    ("adapters/lora.gguf", "gguf", AdapterFormat::Gguf),
];

fn peft() -> PeftAdapter {
    PeftAdapter::load(data("adapters/peft")).unwrap()
}

#[test]
fn every_tools_adapter_gives_its_tools_logits() {
    let (decoder, vectors) = (decoder(), vectors("adapters/logits.safetensors"));
    let plain = logits(&decoder, None);
    for (path, name, format) in FILES {
        assert_eq!(AdapterFormat::detect(data(path)).unwrap(), format);
        let adapter = LoRAAdapter::load(data(path), &decoder.config, device()).unwrap();
        let expected: Vec<f32> = vectors[name].flatten_all().unwrap().to_vec1().unwrap();
        let got = logits(&decoder, Some(&adapter));
        let error = error(&got, &expected);
        println!("{name}: relative error {error:.1e}");
        assert!(error < 1e-4, "{name}: relative error {error:.1e}");
        assert!(super::error(&got, &plain) > 0.1, "{name} changes nothing");
    }
}

#[test]
fn an_adapter_goes_through_every_format_and_comes_back_with_the_same_bits() {
    let (folder, config) = (tempfile::tempdir().unwrap(), decoder().config);
    for (from, ..) in FILES {
        let original = adapter::load(data(from), Some(&config)).unwrap();
        for format in [AdapterFormat::Peft, AdapterFormat::Mlx, AdapterFormat::Gguf] {
            let path = folder.path().join(from.replace('/', "_") + &format!("{format:?}"));
            adapter::save(&original, &path, format, Some(&config)).unwrap();
            assert_eq!(AdapterFormat::detect(&path).unwrap(), format);
            let again = adapter::load(&path, Some(&config)).unwrap();
            assert_same(&again, &original);
            let name = &again.config.base_model_name_or_path;
            assert_eq!(*name, original.config.base_model_name_or_path, "{from} by {format:?}");
        }
    }
}

#[test]
fn an_mlx_adapter_has_mlx_lms_keys_and_layout() {
    let folder = tempfile::tempdir().unwrap();
    let theirs = adapter::load(data("adapters/mlx"), None).unwrap();
    adapter::save(&theirs, folder.path(), AdapterFormat::Mlx, None).unwrap();
    let read = |path| std::fs::read(path).unwrap();
    let ours = read(folder.path().join("adapters.safetensors"));
    let theirs = read(data("adapters/mlx/adapters.safetensors"));
    let (ours, theirs) =
        (SafeTensors::deserialize(&ours).unwrap(), SafeTensors::deserialize(&theirs).unwrap());
    assert_eq!(ours.len(), theirs.len());
    for (key, view) in theirs.iter() {
        let same = ours.tensor(key).unwrap();
        assert_eq!((same.shape(), same.data()), (view.shape(), view.data()), "{key}");
    }
    let config: Value =
        serde_json::from_slice(&read(folder.path().join("adapter_config.json"))).unwrap();
    let parameters = &config["lora_parameters"];
    assert_eq!((&parameters["rank"], &parameters["scale"]), (&4.into(), &2.5.into()));
    assert_eq!(parameters["keys"][0], "model.layers.1.mlp.down_proj");
    assert_eq!((&config["fine_tune_type"], &config["num_layers"]), (&"lora".into(), &1.into()));
}

/// Byte for byte what gguf-py wrote, rows of q and k permuted.
#[test]
fn a_gguf_adapter_is_what_gguf_py_writes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ours.gguf");
    adapter::save(&peft(), &path, AdapterFormat::Gguf, Some(&decoder().config)).unwrap();
    let (ours, theirs) =
        (GgufFile::open(&path).unwrap(), GgufFile::open(data("adapters/lora.gguf")).unwrap());
    assert_eq!(ours.tensors().len(), theirs.tensors().len());
    for tensor in theirs.tensors() {
        let bytes = |file: &GgufFile| file.tensor_bytes(&tensor.name).unwrap();
        assert_eq!(bytes(&ours), bytes(&theirs), "{}", tensor.name);
    }
    for key in ["general.architecture", "general.type", "adapter.type"] {
        assert_eq!(ours.str(key).unwrap(), theirs.str(key).unwrap());
    }
    assert_eq!(ours.f64("adapter.lora.alpha").unwrap(), 6.0);
    assert_eq!(ours.str("general.base_model.0.name").unwrap(), "tiny-llama");
}

#[test]
fn rslora_and_patterns_move_where_the_format_can_say_them() {
    let (folder, base) = (tempfile::tempdir().unwrap(), decoder().config);
    let try_all = |adapter: &PeftAdapter| {
        [AdapterFormat::Mlx, AdapterFormat::Gguf].map(|format| {
            let path = folder.path().join(format!("{format:?}"));
            let saved = adapter::save(adapter, &path, format, Some(&base));
            saved.map(|()| assert_same(&adapter::load(&path, Some(&base)).unwrap(), adapter))
        })
    };
    let varies = |result: &metal_candle::io::Result<()>, what| {
        let error = result.as_ref().unwrap_err();
        let is_so = matches!(error, Error::Adapter { problem: Problem::Varies { what: w, .. }, .. }
            if *w == what);
        assert!(is_so, "{error}");
    };
    let mut rslora = peft();
    rslora.config.use_rslora = true;
    // 6 / sqrt(3) is one scale for all, and times 3 one alpha.
    rslora.config.lora_alpha = 9.0;
    let scale = rslora.targets().unwrap()[0].scale;
    assert!((scale - 9.0 / 3f64.sqrt()).abs() < 1e-12);
    let path = folder.path().join("rslora");
    adapter::save(&rslora, &path, AdapterFormat::Mlx, None).unwrap();
    let again = adapter::load(&path, None).unwrap();
    assert!((again.targets().unwrap()[0].scale - scale).abs() < 1e-9);

    let mut alphas = peft();
    alphas.config.alpha_pattern.insert("q_proj".into(), 12.0);
    let [mlx, gguf] = try_all(&alphas);
    varies(&mlx, "scale");
    varies(&gguf, "alpha");

    // Another rank with the same alpha is another scale, which llama.cpp works out per pair.
    let mut ranks = peft();
    ranks.config.rank_pattern.insert("down_proj".into(), 2);
    for (module, pair) in &mut ranks.modules {
        if module.ends_with("down_proj") {
            pair.rank = 2;
            pair.a.truncate(2 * pair.inputs);
            pair.b.truncate(2 * pair.outputs);
        }
    }
    let [mlx, gguf] = try_all(&ranks);
    varies(&mlx, "rank");
    gguf.unwrap();
}

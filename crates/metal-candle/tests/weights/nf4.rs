//! NF4: the numbers of bitsandbytes, its checkpoints, and models that are quantised as they are loaded.

use super::{distance, logits, random_model};
use crate::testbed::{decoder, device, file, is_on_cpu};
use candle_core::{DType as CandleDType, Device as CandleDevice, Tensor};
use metal_candle::generate::{DecodeShape, Generator};
use metal_candle::graph::TensorType;
use metal_candle::io::data::Batch;
use metal_candle::io::gguf::{Encoding, StoredTensor};
use metal_candle::io::peft::TargetModules;
use metal_candle::io::{HfFolder, LoraConfig};
use metal_candle::models::fuse::fuse_to_folder;
use metal_candle::models::{BaseWeights, Decoder, load_decoder, load_outline};
use metal_candle::nn::{ApplyAdapter, LoRAAdapter};
use metal_candle::plan::{Plan, Slot};
use metal_candle::train::{AdamWConfig, StepShape, TrainStep};
use metal_candle::{BlockFormat, DType, InputSource, LazyTensor};
use random_model::Sizes;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use tempfile::TempDir;

const NF4: BaseWeights = BaseWeights::Quantised { format: BlockFormat::NF4, rest: DType::F32 };
/// Its smallest linear layer is larger than whatever lies between its layers.
const SIZES: Sizes = Sizes {
    hidden: 256,
    inner: 384,
    vocabulary: 512,
    layers: 2,
    heads: 4,
    kv_heads: 2,
    context: 64,
};
const KV: usize = SIZES.hidden / SIZES.heads * SIZES.kv_heads;

fn tensors(path: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path, &CandleDevice::Cpu).unwrap()
}

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

fn random() -> TempDir {
    let folder = TempDir::new().unwrap();
    random_model::write(folder.path(), SIZES, CandleDType::F32, CandleDType::F32);
    folder
}

fn is_linear(name: &str) -> bool {
    name.contains("_proj.")
}

/// The weights of a decoder as they are held.
fn held(decoder: &Arc<Decoder>) -> BTreeMap<String, TensorType> {
    let shape = DecodeShape { batch: 1, tokens: 1, capacity: 64 };
    let outline = Generator::outline(Arc::clone(decoder), shape).unwrap();
    let inputs = outline.inputs.iter().zip(&outline.plan.inputs);
    let named = |(source, input): (&InputSource, &metal_candle::plan::PlanInput)| match source {
        InputSource::Captured(Some(name)) => Some((name.clone(), input.ty)),
        _ => None,
    };
    inputs.filter_map(named).collect()
}

/// Whether a linear layer is `[rows, cols]` in blocks of this format.
fn in_blocks(ty: TensorType, format: BlockFormat, [rows, cols]: [usize; 2]) -> bool {
    ty.dtype == DType::U8 && Some(ty.size_bytes()) == format.bytes_for(rows * cols)
}

/// The same model, its linear layers holding what their blocks of NF4 mean.
fn rounded(folder: &Path) -> TempDir {
    let to = TempDir::new().unwrap();
    fs::copy(folder.join("config.json"), to.path().join("config.json")).unwrap();
    let round = |(name, x): (String, Tensor)| {
        if !is_linear(&name) {
            return (name, x);
        }
        let encoding = Encoding::Blocks(BlockFormat::NF4);
        let stored = StoredTensor::encode(&values(&x), x.dims(), encoding).unwrap();
        (name, stored.dequantize().unwrap())
    };
    let weights = tensors(&folder.join("model.safetensors")).into_iter().map(round);
    let weights: HashMap<String, Tensor> = weights.collect();
    candle_core::safetensors::save(&weights, to.path().join("model.safetensors")).unwrap();
    to
}

#[test]
fn numbers_become_the_blocks_that_bitsandbytes_makes_of_them() {
    let vectors = tensors(&file("data/nf4/numbers.safetensors"));
    let codes: Vec<u8> = vectors["codes"].flatten_all().unwrap().to_vec1().unwrap();
    let magnitudes = values(&vectors["absmax"]);
    let blocks = magnitudes.iter().zip(codes.chunks(32));
    let blocks: Vec<u8> =
        blocks.flat_map(|(m, codes)| [&m.to_le_bytes(), codes].concat()).collect();
    let x = &vectors["x"];
    let encoding = Encoding::Blocks(BlockFormat::NF4);
    let got = StoredTensor::encode(&values(x), x.dims(), encoding).unwrap();
    assert_eq!(*got.bytes, *blocks);
    let want = values(&vectors["values"]);
    assert_eq!(values(&got.dequantize().unwrap()), want);
    let blocks = LazyTensor::from_vec(blocks, &[got.bytes.len()], device()).unwrap();
    let [rows, cols] = x.dims() else { panic!("a matrix") };
    let run = blocks.dequantize(BlockFormat::NF4, *rows, *cols).unwrap();
    assert_eq!(run.to_vec::<f32>().unwrap(), want);
}

#[test]
fn a_checkpoint_of_bitsandbytes_is_read_with_and_without_double_quantisation() {
    let vectors = tensors(&file("data/nf4/vectors.safetensors"));
    for name in ["plain", "double"] {
        let path = file("data/nf4").join(name);
        let open = HfFolder::open(&path).unwrap();
        let folder = open.weights();
        // Two matrices of other kinds, seven linear layers; nothing that belongs to them.
        assert_eq!(folder.weight_names().count(), 11);
        let k_proj = folder.weight("model.layers.0.self_attn.k_proj.weight").unwrap();
        assert_eq!(k_proj.encoding, Encoding::Blocks(BlockFormat::NF4));
        assert_eq!(
            values(&k_proj.dequantize().unwrap()),
            values(&vectors[&format!("{name}.k_proj")])
        );
        let want = values(&vectors[&format!("{name}.logits")]);
        // As it is stored, with the magnitudes of a few rows exact; and taken apart.
        for base in [BaseWeights::AsStored, NF4, BaseWeights::F32] {
            let decoder = Arc::new(load_decoder(&path, base, device()).unwrap());
            let down_proj = held(&decoder)["model.layers.0.mlp.down_proj.weight"];
            let is_nf4 = in_blocks(down_proj, BlockFormat::NF4, [64, 320]);
            assert_eq!(is_nf4, base != BaseWeights::F32, "{down_proj}");
            let ids = LazyTensor::from_slice(&[3u32, 41, 59, 26], &[1, 4], device()).unwrap();
            let got = decoder.logits(&decoder.hidden(&ids, None).unwrap()).unwrap();
            let error = distance(&got.to_vec().unwrap(), &want);
            assert!(error < 1e-5, "{name} as {base:?}: {error}");
        }
    }
}

#[test]
fn linear_layers_are_quantised_as_they_are_loaded_and_nothing_else_is() {
    let folder = random();
    let exact = logits(&decoder(rounded(folder.path()).path(), BaseWeights::F32));
    for rest in [DType::F32, DType::BF16] {
        let base = BaseWeights::Quantised { format: BlockFormat::NF4, rest };
        let quantised = Arc::new(decoder(folder.path(), base));
        let held = held(&quantised);
        assert_eq!(held["model.embed_tokens.weight"].dtype, rest);
        assert_eq!(held["model.norm.weight"].dtype, DType::F32);
        let linear = held.iter().filter(|(name, _)| is_linear(name));
        assert_eq!(linear.filter(|(_, ty)| ty.dtype == DType::U8).count(), 14, "{held:?}");
        // Eight rows, whose products round to bf16 where the processor multiplies it.
        let error = distance(&logits(&quantised), &exact);
        assert!(error < 2e-2, "{rest}: {error}");
    }
    let of_floats = logits(&decoder(folder.path(), BaseWeights::F32));
    assert!(distance(&of_floats, &exact) > 2e-2, "nothing was quantised");
    for format in [BlockFormat::Q8_0, BlockFormat::Q4_1, BlockFormat::Q4_0] {
        let base = BaseWeights::Quantised { format, rest: DType::F32 };
        let quantised = Arc::new(decoder(folder.path(), base));
        let up_proj = held(&quantised)["model.layers.1.mlp.up_proj.weight"];
        assert!(in_blocks(up_proj, format, [SIZES.inner, SIZES.hidden]), "{up_proj}");
        let error = distance(&logits(&quantised), &of_floats);
        let most = if format == BlockFormat::Q8_0 { 3e-2 } else { 0.5 };
        assert!(error < most, "{format:?}: {error}");
    }
}

fn adapter(decoder: &Decoder) -> LoRAAdapter {
    let target_modules = TargetModules::AllLinear;
    let config = LoraConfig { r: 2, target_modules, ..LoraConfig::default() };
    LoRAAdapter::new(config, decoder.modules(), 0, device()).unwrap()
}

fn batch() -> Batch {
    let ids = vec![3, 41, 59, 26, 5, 35, 63, 9];
    let labels = ids.iter().skip(1).map(|id| i64::from(*id)).chain([-100]).collect();
    Batch { ids, labels, batch: 1, seq: 8, trained: 7, documents: None }
}

#[test]
fn an_adapter_trains_on_blocks_as_on_what_they_mean_and_is_kept() {
    let folder = random();
    let rounded = rounded(folder.path());
    let train = |path: &Path, base| {
        let decoder = Arc::new(decoder(path, base));
        let lora = adapter(&decoder);
        let mut step =
            TrainStep::new(Arc::clone(&decoder), lora, AdamWConfig::default(), 1.0, 0).unwrap();
        let losses = (0..6).map(|_| step.run(&batch(), 4e-3).unwrap().loss);
        let losses: Vec<f32> = losses.collect();
        (losses, step, decoder)
    };
    let (exact, ..) = train(rounded.path(), BaseWeights::F32);
    let (losses, step, trained) = train(folder.path(), NF4);
    assert!(losses[5] < 0.8 * losses[0], "{losses:?}");
    assert!(distance(&losses, &exact) < 2e-2, "{losses:?}, in f32 {exact:?}");
    // What was saved is what was trained.
    let to = TempDir::new().unwrap();
    let lora = step.adapter().unwrap();
    lora.save(to.path()).unwrap();
    let with = |lora: LoRAAdapter| {
        let mut decoder = Decoder::clone(&trained);
        decoder.apply_adapter(lora).unwrap();
        logits(&decoder)
    };
    let saved = LoRAAdapter::load(to.path(), &trained.config, device()).unwrap();
    assert_eq!(with(saved), with(lora));
}

/// That no step makes anything of the size of a linear layer.
fn has_no_dense_weight(plan: &Plan) {
    let smallest = KV * SIZES.hidden;
    assert!(!plan.steps.is_empty());
    for step in &plan.steps {
        for out in step.outs.iter().filter(|out| !matches!(out.slot, Slot::Input(_))) {
            let len = out.layout.shape.len();
            assert!(len < smallest, "{} makes {len} elements:\n{plan}", step.label);
        }
    }
    assert!(plan.arena_bytes < 4 * smallest * 7, "{}", plan.arena_bytes);
}

#[test]
fn neither_training_nor_decoding_makes_a_dense_weight_and_both_are_planned_from_headers() {
    let folder = random();
    let linear: usize =
        [SIZES.hidden * (2 * SIZES.hidden + 2 * KV), 3 * SIZES.hidden * SIZES.inner]
            .iter()
            .sum::<usize>()
            * SIZES.layers;
    let shape = DecodeShape { batch: 1, tokens: 1, capacity: 64 };
    let weights = |base| {
        let outlined = Arc::new(load_outline(folder.path(), base, device()).unwrap());
        let real = Arc::new(decoder(folder.path(), base));
        let planned = Generator::outline(Arc::clone(&outlined), shape).unwrap();
        assert_eq!(planned, Generator::outline(Arc::clone(&real), shape).unwrap());
        let step = StepShape { batch: 1, seq: 8, accumulated: 1, packed: false };
        let plan = |decoder: Arc<Decoder>| {
            let lora = adapter(&decoder);
            TrainStep::outline(decoder, &lora, AdamWConfig::default(), 1.0, step).unwrap().plan
        };
        let training = plan(outlined);
        assert_eq!(training, plan(real));
        if base == NF4 {
            has_no_dense_weight(&planned.plan);
            has_no_dense_weight(&training);
        }
        planned.plan.inputs.iter().map(|input| input.ty.size_bytes()).sum::<usize>()
    };
    let (blocks, floats) = (weights(NF4), weights(BaseWeights::F32));
    assert_eq!(floats - blocks, 4 * linear - linear / 64 * 36);
}

#[test]
fn a_checkpoint_of_bitsandbytes_is_fused_into_floats() {
    if !is_on_cpu("fuse", "files are fused on the CPU") {
        return;
    }
    let scratch = TempDir::new().unwrap();
    let [from, to] = ["adapter", "fused"].map(|name| scratch.path().join(name));
    let path = file("data/nf4/double");
    let base = decoder(&path, BaseWeights::F32);
    // It changes nothing yet.
    adapter(&base).save(&from).unwrap();
    let fused = fuse_to_folder(&path, &from, &to, None).unwrap();
    assert_eq!((fused.fused, fused.tensors), (7, 11));
    let config = fs::read_to_string(to.join("config.json")).unwrap();
    assert!(!config.contains("quantization_config"), "{config}");
    let ids = LazyTensor::from_slice(&[3u32, 41], &[1, 2], device()).unwrap();
    let logits = |decoder: &Decoder| -> Vec<f32> {
        decoder.logits(&decoder.hidden(&ids, None).unwrap()).unwrap().to_vec().unwrap()
    };
    let after = Arc::new(decoder(&to, BaseWeights::AsStored));
    assert_eq!(held(&after)["model.layers.0.mlp.up_proj.weight"].dtype, DType::F32);
    assert_eq!(logits(&after), logits(&base));
}

/// A copy of the checkpoint, with `change` made to its tensors.
fn changed(change: impl FnOnce(&mut HashMap<String, Tensor>)) -> TempDir {
    let folder = TempDir::new().unwrap();
    let from = file("data/nf4/plain");
    fs::copy(from.join("config.json"), folder.path().join("config.json")).unwrap();
    let mut all = tensors(&from.join("model.safetensors"));
    change(&mut all);
    candle_core::safetensors::save(&all, folder.path().join("model.safetensors")).unwrap();
    folder
}

fn refused(path: &Path, base: BaseWeights, parts: &[&str]) {
    for result in [load_decoder(path, base, device()), load_outline(path, base, device())] {
        let error = result.unwrap_err().to_string();
        for part in parts {
            assert!(error.contains(part), "{part:?} is not in {error:?}");
        }
    }
}

#[test]
fn what_bitsandbytes_writes_otherwise_is_refused_with_what_is_supported() {
    const LAYER: &str = "model.layers.0.mlp.up_proj.weight";
    const STATE: &str = ".quant_state.bitsandbytes__nf4";
    let refused = |parts: &[&str], change: &dyn Fn(&mut HashMap<String, Tensor>)| {
        let folder = changed(|all| change(all));
        refused(folder.path(), BaseWeights::AsStored, &[parts, &["model.safetensors"]].concat());
    };
    let state = |text: &str| Tensor::new(text.as_bytes(), &CandleDevice::Cpu).unwrap();
    let says = |json: &'static str| {
        move |all: &mut HashMap<String, Tensor>| {
            all.insert(format!("{LAYER}{STATE}"), state(json));
        }
    };
    let fp4 = r#"{"quant_type": "fp4", "blocksize": 64, "dtype": "float32", "shape": [320, 64]}"#;
    refused(&[LAYER, "quant_type is fp4: expected nf4", "NF4 is supported"], &says(fp4));
    let short = r#"{"quant_type": "nf4", "blocksize": 32, "dtype": "float32", "shape": [320, 64]}"#;
    refused(&[LAYER, "blocksize is 32: expected a multiple of 64"], &says(short));
    let ragged =
        r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [640, 32]}"#;
    refused(&[LAYER, "shape is [640, 32]", "multiple of 64"], &says(ragged));
    let other =
        r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [320, 128]}"#;
    refused(&[LAYER, "length is 10240 bytes: expected 20480"], &says(other));
    refused(&[STATE, "line 1 column"], &says("nonsense"));
    refused(&[LAYER, ".absmax", "dtype is BF16: expected F32"], &|all| {
        let absmax = all[&format!("{LAYER}.absmax")].to_dtype(CandleDType::BF16).unwrap();
        all.insert(format!("{LAYER}.absmax"), absmax);
    });
    refused(&["no tensor", "up_proj.weight.absmax"], &|all| {
        all.remove(&format!("{LAYER}.absmax"));
    });
    refused(&["quant_map is [0.0", "expected NF4's: [-1.0"], &|all| {
        let map = all[&format!("{LAYER}.quant_map")].zeros_like().unwrap();
        all.insert(format!("{LAYER}.quant_map"), map);
    });
    refused(&[LAYER, "has dtype U8", "bitsandbytes' NF4"], &|all| {
        all.remove(&format!("{LAYER}{STATE}"));
    });
}

#[test]
fn a_config_of_another_quantisation_is_refused() {
    let folder = changed(|_| {});
    let path = folder.path().join("config.json");
    let config = fs::read_to_string(&path).unwrap();
    for (from, to, got) in [
        ("\"load_in_4bit\": true", "\"load_in_4bit\": false", "bitsandbytes, not in 4 bits"),
        ("\"nf4\"", "\"fp4\"", "bitsandbytes, fp4"),
        ("\"nf4\"", "null", "bitsandbytes, fp4"),
    ] {
        // `_load_in_4bit` is another key.
        let other = config.replace(&format!(" {from}"), &format!(" {to}"));
        assert_ne!(other, config);
        fs::write(&path, other).unwrap();
        let parts = ["config.json", got, "bitsandbytes' NF4, or a GGUF"];
        refused(folder.path(), BaseWeights::AsStored, &parts);
    }
}

#[test]
fn a_weight_that_cannot_be_quantised_is_named() {
    // Rows of 160 weights.
    let ragged = random_model::model(CandleDType::F32, CandleDType::F32);
    let parts = ["layers.0.mlp.down_proj.weight", "NF4", "rows of 160", "multiple of the 64"];
    refused(ragged.path(), NF4, &parts);
    let q8_0 = BaseWeights::Quantised { format: BlockFormat::Q8_0, rest: DType::F32 };
    refused(&file("data/nf4/plain"), q8_0, &["q_proj.weight", "Q8_0", "in blocks of NF4"]);
    let folder = random();
    let integers = BaseWeights::Quantised { format: BlockFormat::NF4, rest: DType::I64 };
    refused(folder.path(), integers, &["held as i64", "expected f32, bf16 or f16"]);
    let path = folder.path().join("model.safetensors");
    let mut all = tensors(&path);
    let name = "model.layers.1.self_attn.o_proj.weight";
    let infinite = all[name].affine(0.0, f64::INFINITY).unwrap();
    all.insert(name.into(), infinite);
    candle_core::safetensors::save(&all, &path).unwrap();
    let error = load_decoder(folder.path(), NF4, device()).unwrap_err().to_string();
    let is_named = [name, "NF4", "inf", "finite"].iter().all(|part| error.contains(part));
    assert!(is_named, "{error}");
}

//! LoRA adapters as llama.cpp's `--lora` takes them: a GGUF file with `general.type` `adapter`.
//!
//! As `convert_lora_to_gguf.py` and `llama-adapter.cpp` of llama.cpp have it: a pair is
//! `<weight>.lora_a` `[r, in]` and `<weight>.lora_b` `[out, r]`, its scale `adapter.lora.alpha / r`
//! with the pair's own r. What the converter does to the rows of a weight of the base it does to the
//! rows of B: those of q and k of a Llama are permuted for neighbours to be rotated.

use std::path::Path;

use metal_candle_graph::DType;

use super::decoder::{architecture_of, permuted_heads};
use super::{Encoding, GgufFile, GgufWriter, StoredTensor, gguf_name, hf_name};
use crate::io::peft::pair::{Halves, Orientation, Side};
use crate::io::peft::{LoraConfig, LoraPair, PeftAdapter, Problem};
use crate::io::{DecoderConfig, Error, Result};

const A: &str = ".lora_a";
const B: &str = ".lora_b";
const ALPHA: &str = "adapter.lora.alpha";
const BASE_NAME: &str = "general.base_model.0.name";

/// Reads an adapter for `base`, which may be left out unless llama.cpp permuted its rows.
///
/// # Errors
/// [`Error::File`], [`Error::Gguf`]; [`Error::Adapter`] for a file that is no LoRA adapter, for one
/// of another architecture than the base's, and [`Problem::NeedsBase`].
pub fn load(path: impl AsRef<Path>, base: Option<&DecoderConfig>) -> Result<PeftAdapter> {
    read(path.as_ref(), |architecture, module| permuted_heads(architecture, module, base), base)
}

/// As [`load`] without a base, the rows of B as they lie in the file: to look at, not to apply.
///
/// # Errors
/// As [`load`].
pub fn load_as_stored(path: impl AsRef<Path>) -> Result<PeftAdapter> {
    read(path.as_ref(), |_, _| None, None)
}

/// `permuted` says of an architecture and a module whether the rows are permuted, and within how
/// many heads, if that is known.
fn read(
    path: &Path,
    permuted: impl Fn(&str, &str) -> Option<Option<usize>>,
    base: Option<&DecoderConfig>,
) -> Result<PeftAdapter> {
    let file = GgufFile::open(path)?;
    let failed = |problem| Error::Adapter { path: path.to_owned(), problem };
    check_kind(&file)?.map_err(failed)?;
    let architecture = file.str("general.architecture")?;
    if let Some(base) = base.filter(|base| architecture_of(base) != architecture) {
        let (got, base) = (architecture.to_owned(), architecture_of(base).to_owned());
        return Err(failed(Problem::Architecture { got, base }));
    }
    let mut halves = Halves::default();
    for tensor in file.tensors() {
        let (module, side) = parse_name(&tensor.name).map_err(failed)?;
        let mut stored = file.tensor_bytes(&tensor.name)?;
        if side == Side::B
            && let Some(heads) = permuted(architecture, &module)
        {
            let heads = heads.ok_or_else(|| failed(Problem::NeedsBase))?;
            let outputs = stored.shape.first().copied().unwrap_or(0);
            let wrong = |_| failed(Problem::Heads { module: module.clone(), outputs, heads });
            stored.unpermute_rope_rows(heads).map_err(wrong)?;
        }
        halves.insert(&module, side, &tensor.shape, floats(&file, &stored)?);
    }
    let modules = halves.pairs(Orientation::OutIn).map_err(failed)?;
    // llama.cpp takes no alpha for alpha = r.
    let scale = match file.f64_opt(ALPHA)?.unwrap_or(0.0) {
        0.0 => None,
        alpha => Some(alpha),
    };
    let config = LoraConfig {
        base_model_name_or_path: file.str_opt(BASE_NAME)?.map(str::to_owned),
        ..LoraConfig::describing(&modules, |rank| scale.map_or(1.0, |alpha| alpha / rank as f64))
    };
    config.check().map_err(failed)?;
    Ok(PeftAdapter { config, modules })
}

/// Writes an adapter for `base`, in f32 and in one step.
///
/// # Errors
/// [`Error::File`]; as [`PeftAdapter::check_base`]; [`Problem::Varies`] where alpha, which is scale
/// times rank, is not the same for all modules.
pub fn save(adapter: &PeftAdapter, path: impl AsRef<Path>, base: &DecoderConfig) -> Result<()> {
    let path = path.as_ref();
    let failed = |problem| Error::Adapter { path: path.to_owned(), problem };
    adapter.check_base(&base.modules()).map_err(failed)?;
    let alpha = alpha(adapter).map_err(failed)?;
    let architecture = architecture_of(base);
    let mut writer = GgufWriter::default();
    writer.str("general.architecture", architecture);
    writer.str("general.type", "adapter");
    writer.str("adapter.type", "lora");
    writer.f32(ALPHA, alpha as f32);
    if let Some(name) = &adapter.config.base_model_name_or_path {
        writer.u32("general.base_model.count", 1);
        writer.str(BASE_NAME, name);
    }
    let mut tensors = Vec::with_capacity(2 * adapter.modules.len());
    for (module, pair) in &adapter.modules {
        let Some(name) = gguf_name(&format!("{module}.weight")) else {
            let (module, architecture) = (module.clone(), architecture.to_owned());
            return Err(failed(Problem::GgufName { module, architecture }));
        };
        let LoraPair { a, b, rank, inputs, outputs } = pair;
        let mut b = dense(&[*outputs, *rank], b);
        if let Some(heads) = permuted_heads(architecture, module, Some(base)).flatten() {
            let gguf = |problem| Error::Gguf { path: path.to_owned(), problem };
            b.permute_rope_rows(heads).map_err(gguf)?;
        }
        tensors.push((format!("{name}{A}"), dense(&[*rank, *inputs], a)));
        tensors.push((format!("{name}{B}"), b));
    }
    for (name, tensor) in &tensors {
        writer.tensor(name, &tensor.shape, tensor.encoding);
    }
    writer.write(path, |i| Ok::<_, Error>(tensors[i].1.clone()))
}

/// Whether the file is a LoRA adapter.
fn check_kind(file: &GgufFile) -> Result<std::result::Result<(), Problem>> {
    let expected = [
        ("general.type", "adapter", "\"adapter\"; is it a model instead?"),
        ("adapter.type", "lora", "\"lora\""),
    ];
    for (key, value, expected) in expected {
        let got = file.str_opt(key)?;
        if got != Some(value) {
            let got = got.map_or("absent".to_owned(), |got| format!("{got:?}"));
            return Ok(Err(Problem::Option { option: key.to_owned(), got, expected }));
        }
    }
    let tokens = "adapter.alora.invocation_tokens";
    if file.metadata().contains_key(tokens) {
        let reason = "activated LoRA starts only after its invocation tokens";
        let (option, value) = (tokens.to_owned(), "set".to_owned());
        return Ok(Err(Problem::Unsupported { option, value, reason }));
    }
    Ok(Ok(()))
}

/// The module by Hugging Face's name, and which factor.
fn parse_name(name: &str) -> std::result::Result<(String, Side), Problem> {
    let refuse = |reason| Err(Problem::Key { key: name.to_owned(), reason });
    let (weight, side) = match (name.strip_suffix(A), name.strip_suffix(B)) {
        (Some(weight), _) => (weight, Side::A),
        (_, Some(weight)) => (weight, Side::B),
        _ if name.ends_with("_norm.weight") => return refuse("changed norms are not supported"),
        _ => return refuse("expected a name that ends with \".lora_a\" or \".lora_b\""),
    };
    match hf_name(weight) {
        Some(hf) if hf.ends_with(".weight") && hf.starts_with("model.layers.") => {
            Ok((hf.trim_end_matches(".weight").to_owned(), side))
        }
        _ => refuse("no linear module of a layer that this program knows"),
    }
}

fn floats(file: &GgufFile, stored: &StoredTensor) -> Result<Vec<f32>> {
    let gguf = |problem| Error::Gguf { path: file.path().to_owned(), problem };
    let values = stored.dequantize().map_err(gguf)?.flatten_all();
    let values = values.and_then(|values| values.to_vec1());
    values.map_err(|cause| gguf(super::Problem::Candle { cause }))
}

fn dense(shape: &[usize], values: &[f32]) -> StoredTensor {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    StoredTensor {
        encoding: Encoding::Dense(DType::F32),
        shape: shape.to_vec(),
        bytes: bytes.into(),
    }
}

/// The alpha of all modules: rank times scale.
fn alpha(adapter: &PeftAdapter) -> std::result::Result<f64, Problem> {
    let targets = adapter.targets()?;
    let alpha = |i: usize| targets[i].scale * targets[i].rank as f64;
    for (i, target) in targets.iter().enumerate() {
        if target.scale == 0.0 {
            return Err(Problem::NoScale { scale: target.scale });
        }
        // Rounding of alpha / r · r is no difference.
        if (alpha(i) - alpha(0)).abs() > 1e-9 * alpha(0).abs() {
            return Err(Problem::Varies {
                what: "alpha",
                first: targets[0].module.clone(),
                first_value: alpha(0),
                other: target.module.clone(),
                other_value: alpha(i),
                format: "a GGUF adapter",
            });
        }
    }
    Ok(alpha(0))
}

//! A random model of the Llama family in a Hugging Face folder.

use candle_core::{DType as CandleDType, Tensor};
use metal_candle::models::{BaseWeights, Decoder, load_decoder};
use metal_candle::{DType, Device, LazyTensor};
use std::collections::HashMap;
use std::fs;
use std::path::Path;
use tempfile::TempDir;

pub(crate) const HIDDEN: usize = 64;
pub(crate) const INNER: usize = 160;
const VOCABULARY: usize = 512;
const LAYERS: usize = 2;

/// A random model whose matrices hold numbers of `matrices`, written as `stored`.
pub(crate) fn model(matrices: CandleDType, stored: CandleDType) -> TempDir {
    let folder = TempDir::new().unwrap();
    let config = format!(
        r#"{{"model_type": "llama", "vocab_size": {VOCABULARY}, "hidden_size": {HIDDEN},
        "intermediate_size": {INNER}, "num_hidden_layers": {LAYERS}, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": true}}"#
    );
    fs::write(folder.path().join("config.json"), config).unwrap();
    let mut tensors: HashMap<String, Tensor> = HashMap::new();
    let mut put = |name: String, dims: &[usize], scale: f64| {
        let seed = tensors.len() as u64;
        let x = LazyTensor::randn(dims, DType::F32, seed, &Device::Cpu).unwrap();
        let x = x.affine(scale, f64::from(dims.len() == 1)).unwrap().eval().unwrap();
        let x = if dims.len() == 2 { x.to_dtype(matrices).unwrap() } else { x };
        tensors.insert(name, x.to_dtype(stored).unwrap());
    };
    put("model.embed_tokens.weight".into(), &[VOCABULARY, HIDDEN], 0.5);
    put("model.norm.weight".into(), &[HIDDEN], 0.0);
    for i in 0..LAYERS {
        let mut layer = |module: &str, dims: &[usize], scale: f64| {
            put(format!("model.layers.{i}.{module}.weight"), dims, scale);
        };
        for (module, dims) in [
            ("self_attn.q_proj", [HIDDEN, HIDDEN]),
            ("self_attn.k_proj", [HIDDEN / 2, HIDDEN]),
            ("self_attn.v_proj", [HIDDEN / 2, HIDDEN]),
            ("self_attn.o_proj", [HIDDEN, HIDDEN]),
            ("mlp.gate_proj", [INNER, HIDDEN]),
            ("mlp.up_proj", [INNER, HIDDEN]),
            ("mlp.down_proj", [HIDDEN, INNER]),
        ] {
            layer(module, &dims, 1.0 / (dims[1] as f64).sqrt());
        }
        layer("input_layernorm", &[HIDDEN], 0.0);
        layer("post_attention_layernorm", &[HIDDEN], 0.0);
    }
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
    folder
}

pub(crate) fn decoder(folder: &Path, base: BaseWeights) -> Decoder {
    load_decoder(folder, base, &Device::Cpu).unwrap()
}

//! Random models of the Llama family in Hugging Face folders.

use candle_core::{DType as CandleDType, Tensor};
use metal_candle::{DType, Device, LazyTensor};
use std::collections::HashMap;
use std::fs;
use std::path::Path;
use tempfile::TempDir;

pub(crate) const HIDDEN: usize = 64;
pub(crate) const INNER: usize = 160;

/// The sizes of a model.
#[derive(Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) hidden: usize,
    pub(crate) inner: usize,
    pub(crate) vocabulary: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) context: usize,
}

/// A small one.
const TINY: Sizes = Sizes {
    hidden: HIDDEN,
    inner: INNER,
    vocabulary: 512,
    layers: 2,
    heads: 4,
    kv_heads: 2,
    context: 64,
};

/// A random model whose matrices hold numbers of `matrices`, written as `stored`.
pub(crate) fn model(matrices: CandleDType, stored: CandleDType) -> TempDir {
    let folder = TempDir::new().unwrap();
    write(folder.path(), TINY, matrices, stored);
    folder
}

/// [`model`] of these sizes, into this folder.
pub(crate) fn write(folder: &Path, sizes: Sizes, matrices: CandleDType, stored: CandleDType) {
    let Sizes { hidden, inner, vocabulary, layers, heads, kv_heads, context } = sizes;
    let config = format!(
        r#"{{"model_type": "llama", "vocab_size": {vocabulary}, "hidden_size": {hidden},
        "intermediate_size": {inner}, "num_hidden_layers": {layers}, "num_attention_heads": {heads},
        "num_key_value_heads": {kv_heads}, "max_position_embeddings": {context}, "tie_word_embeddings": true}}"#
    );
    fs::write(folder.join("config.json"), config).unwrap();
    let mut tensors: HashMap<String, Tensor> = HashMap::new();
    let mut put = |name: String, dims: &[usize], scale: f64| {
        let seed = tensors.len() as u64;
        let x = LazyTensor::randn(dims, DType::F32, seed, &Device::Cpu).unwrap();
        let x = x.affine(scale, f64::from(dims.len() == 1)).unwrap().eval().unwrap();
        let x = if dims.len() == 2 { x.to_dtype(matrices).unwrap() } else { x };
        tensors.insert(name, x.to_dtype(stored).unwrap());
    };
    put("model.embed_tokens.weight".into(), &[vocabulary, hidden], 0.5);
    put("model.norm.weight".into(), &[hidden], 0.0);
    let kv = hidden / heads * kv_heads;
    for i in 0..layers {
        let mut layer = |module: &str, dims: &[usize], scale: f64| {
            put(format!("model.layers.{i}.{module}.weight"), dims, scale);
        };
        for (module, dims) in [
            ("self_attn.q_proj", [hidden, hidden]),
            ("self_attn.k_proj", [kv, hidden]),
            ("self_attn.v_proj", [kv, hidden]),
            ("self_attn.o_proj", [hidden, hidden]),
            ("mlp.gate_proj", [inner, hidden]),
            ("mlp.up_proj", [inner, hidden]),
            ("mlp.down_proj", [hidden, inner]),
        ] {
            layer(module, &dims, 1.0 / (dims[1] as f64).sqrt());
        }
        layer("input_layernorm", &[hidden], 0.0);
        layer("post_attention_layernorm", &[hidden], 0.0);
    }
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
}

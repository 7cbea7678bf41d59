//! A small random decoder with grouped-query attention, by way of a GGUF file.

use super::support::{GgufBuilder, Meta};
use crate::testbed::device;
use metal_candle::graph::{Distribution, random_f64};
use metal_candle::io::peft::{LoraPair, PeftAdapter, TargetModules};
use metal_candle::io::{LoraConfig, gguf::gguf_name};
use metal_candle::models::{BaseWeights, Decoder, LoadedModel, load_gguf};
use metal_candle::nn::LoRAAdapter;
use metal_candle::{Device, LazyTensor};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub(crate) const HIDDEN: usize = 16;
const INNER: usize = 24;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 4;
pub(crate) const LAYERS: usize = 2;
/// Printable ASCII, the space, and the end.
pub(crate) const VOCAB: usize = 94 + 2;
const CONTEXT: u32 = 128;
pub(crate) const MODULES: [(&str, [usize; 2]); 7] = [
    ("self_attn.q_proj", [HEADS * HEAD_DIM, HIDDEN]),
    ("self_attn.k_proj", [KV_HEADS * HEAD_DIM, HIDDEN]),
    ("self_attn.v_proj", [KV_HEADS * HEAD_DIM, HIDDEN]),
    ("self_attn.o_proj", [HIDDEN, HEADS * HEAD_DIM]),
    ("mlp.gate_proj", [INNER, HIDDEN]),
    ("mlp.up_proj", [INNER, HIDDEN]),
    ("mlp.down_proj", [HIDDEN, INNER]),
];

/// The weights by Hugging Face's names, and what else the file says.
#[derive(Clone)]
pub(crate) struct Tiny {
    pub(crate) weights: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    pub(crate) window: Option<u32>,
    /// The chat template in the file.
    pub(crate) template: Option<&'static str>,
}

/// Normal numbers; `stream` tells tensors apart.
pub(crate) fn normal(stream: usize, n: usize, scale: f64) -> Vec<f32> {
    let draw = |i| (scale * random_f64(Distribution::Normal, 5, stream as u32, i)) as f32;
    (0..n as u64).map(draw).collect()
}

impl Tiny {
    pub(crate) fn new() -> Tiny {
        let mut shapes = vec![("model.embed_tokens".to_string(), vec![VOCAB, HIDDEN], 1.0)];
        for i in 0..LAYERS {
            for (module, dims) in MODULES {
                let scale = 2.0 / (dims[1] as f64).sqrt();
                shapes.push((format!("model.layers.{i}.{module}"), dims.to_vec(), scale));
            }
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                shapes.push((format!("model.layers.{i}.{norm}"), vec![HIDDEN], 1.0));
            }
        }
        shapes.push(("model.norm".into(), vec![HIDDEN], 1.0));
        let weights = shapes.into_iter().enumerate().map(|(stream, (name, dims, scale))| {
            let values = normal(stream, dims.iter().product(), scale);
            (format!("{name}.weight"), (dims, values))
        });
        Tiny { weights: weights.collect(), window: None, template: None }
    }

    /// Without an output layer the embedding is the output layer.
    pub(crate) fn untied(mut self) -> Tiny {
        let values = normal(999, VOCAB * HIDDEN, 1.0);
        self.weights.insert("lm_head.weight".into(), (vec![VOCAB, HIDDEN], values));
        self
    }

    pub(crate) fn load(&self) -> LoadedModel {
        self.load_on(device())
    }

    pub(crate) fn load_on(&self, device: &Device) -> LoadedModel {
        let folder = tempfile::tempdir().unwrap();
        load_gguf(&self.write(folder.path()), BaseWeights::F32, device).unwrap()
    }

    /// Writes the model's file into a folder.
    pub(crate) fn write(&self, folder: &Path) -> PathBuf {
        self.file().write(folder)
    }

    pub(crate) fn decoder(&self) -> Decoder {
        self.load().decoder
    }

    fn file(&self) -> GgufBuilder {
        let size = |x: usize| Meta::U32(x as u32);
        let mut tokens: Vec<String> = (b'!'..=b'~').map(|b| char::from(b).to_string()).collect();
        tokens.extend(["\u{120}".to_string(), "<end>".to_string()]);
        let mut types = vec![1; VOCAB];
        types[VOCAB - 1] = 3;
        let mut file = GgufBuilder::default()
            .meta("general.architecture", Meta::Str("qwen2".into()))
            .meta("qwen2.embedding_length", size(HIDDEN))
            .meta("qwen2.feed_forward_length", size(INNER))
            .meta("qwen2.block_count", size(LAYERS))
            .meta("qwen2.attention.head_count", size(HEADS))
            .meta("qwen2.attention.head_count_kv", size(KV_HEADS))
            .meta("qwen2.attention.key_length", size(HEAD_DIM))
            .meta("qwen2.attention.layer_norm_rms_epsilon", Meta::F32(1e-5))
            .meta("qwen2.context_length", Meta::U32(CONTEXT))
            .meta("tokenizer.ggml.model", Meta::Str("gpt2".into()))
            .meta("tokenizer.ggml.pre", Meta::Str("smollm".into()))
            .meta("tokenizer.ggml.tokens", Meta::Strs(tokens))
            .meta("tokenizer.ggml.token_type", Meta::I32s(types))
            .meta("tokenizer.ggml.merges", Meta::Strs(Vec::new()))
            .meta("tokenizer.ggml.eos_token_id", size(VOCAB - 1));
        if let Some(window) = self.window {
            file = file.meta("qwen2.attention.sliding_window", Meta::U32(window));
        }
        if let Some(template) = self.template {
            file = file.meta("tokenizer.chat_template", Meta::Str(template.into()));
        }
        for (name, (dims, values)) in &self.weights {
            let dims: Vec<u64> = dims.iter().map(|d| *d as u64).collect();
            file = file.f32_tensor(&gguf_name(name).unwrap(), &dims, values);
        }
        file
    }
}

pub(crate) const RANK: usize = 2;
pub(crate) const SCALE: f32 = 1.5;

/// An adapter of random A and B on these modules (`self_attn.q_proj`, ..) of every layer.
pub(crate) fn adapter(modules: &[&str]) -> LoRAAdapter {
    let config = LoraConfig {
        r: RANK,
        lora_alpha: f64::from(SCALE) * RANK as f64,
        target_modules: TargetModules::AllLinear,
        ..LoraConfig::default()
    };
    let mut pairs = BTreeMap::new();
    for i in 0..LAYERS {
        for (at, (module, [outputs, inputs])) in MODULES.into_iter().enumerate() {
            if modules.contains(&module) {
                let stream = 2_000 + 100 * i + 10 * at;
                let a = normal(stream, RANK * inputs, 0.3);
                let b = normal(stream + 1, outputs * RANK, 0.3);
                let pair = LoraPair { a, b, rank: RANK, inputs, outputs };
                pairs.insert(format!("model.layers.{i}.{module}"), pair);
            }
        }
    }
    LoRAAdapter::from_peft(PeftAdapter { config, modules: pairs }, device()).unwrap()
}

pub(crate) fn ids(ids: &[u32]) -> LazyTensor {
    LazyTensor::from_slice(ids, &[1, ids.len()], device()).unwrap()
}

/// `[t, vocabulary]`
pub(crate) fn logits(decoder: &Decoder, tokens: &[u32], lora: Option<&LoRAAdapter>) -> Vec<f32> {
    let hidden = decoder.hidden(&ids(tokens), lora).unwrap();
    decoder.logits(&hidden).unwrap().to_vec().unwrap()
}

use metal_candle::io::gguf::Problem;
use metal_candle::io::{RopeLayout, RopeScaling};

use super::gguf::{open, opened_problem};
use super::support::{GgufBuilder, Meta};

/// A decoder of one layer with as few tensors as the config reads.
fn decoder(architecture: &str) -> GgufBuilder {
    let key = |name: &str| format!("{architecture}.{name}");
    GgufBuilder::default()
        .meta("general.architecture", Meta::Str(architecture.into()))
        .meta(&key("block_count"), Meta::U32(1))
        .meta(&key("context_length"), Meta::U32(64))
        .meta(&key("embedding_length"), Meta::U32(8))
        .meta(&key("feed_forward_length"), Meta::U32(12))
        .meta(&key("attention.head_count"), Meta::U32(2))
        .meta(&key("attention.head_count_kv"), Meta::U32(1))
        .meta(&key("attention.layer_norm_rms_epsilon"), Meta::F32(1e-5))
        .f32_tensor("token_embd.weight", &[3, 8], &[0.5; 24])
        .f32_tensor("blk.0.attn_q.weight", &[8, 1], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
        .f32_tensor("blk.0.attn_k.weight", &[4, 1], &[0.0, 1.0, 2.0, 3.0])
        .f32_tensor("blk.0.attn_v.weight", &[4, 1], &[0.0, 1.0, 2.0, 3.0])
        .f32_tensor("blk.0.attn_k.bias", &[4], &[0.0, 1.0, 2.0, 3.0])
}

#[test]
fn a_decoder_config_is_read_with_defaults_where_the_format_has_them() {
    let config = open(&decoder("llama")).unwrap().decoder_config().unwrap();
    assert_eq!((config.vocab_size, config.hidden_size, config.intermediate_size), (3, 8, 12));
    assert_eq!((config.num_layers, config.num_heads, config.num_kv_heads), (1, 2, 1));
    assert_eq!((config.head_dim, config.max_position_embeddings), (4, 64));
    assert_eq!((config.rope_theta, config.rms_norm_eps), (10_000.0, f64::from(1e-5_f32)));
    assert_eq!(config.rope_layout, RopeLayout::Half);
    assert!(config.tie_word_embeddings && !config.attention_bias && !config.qk_norm);
    assert_eq!(config.sliding_window, None);
    let more = decoder("qwen3")
        .meta("qwen3.attention.key_length", Meta::U32(6))
        .meta("qwen3.rope.freq_base", Meta::F32(1e6))
        .meta("qwen3.attention.sliding_window", Meta::U32(16))
        .f32_tensor("output.weight", &[1], &[1.0])
        .f32_tensor("blk.0.attn_q.bias", &[1], &[1.0])
        .f32_tensor("blk.0.attn_q_norm.weight", &[1], &[1.0]);
    let config = open(&more).unwrap().decoder_config().unwrap();
    assert_eq!((config.head_dim, config.rope_theta), (6, 1e6));
    assert_eq!(config.sliding_window, Some(16));
    assert!(!config.tie_word_embeddings && config.attention_bias && config.qk_norm);
}

fn scaled(builder: GgufBuilder, kind: &str) -> GgufBuilder {
    builder.meta("llama.rope.scaling.type", Meta::Str(kind.into()))
}

#[test]
fn rope_scaling_is_read_as_llama_cpp_writes_it() {
    let scaling =
        |builder: GgufBuilder| open(&builder).unwrap().decoder_config().unwrap().rope_scaling;
    let factor = |builder: GgufBuilder| builder.meta("llama.rope.scaling.factor", Meta::F32(4.0));
    let llama = || decoder("llama");
    assert_eq!(scaling(llama()), RopeScaling::None);
    assert_eq!(scaling(factor(scaled(llama(), "none"))), RopeScaling::None);
    assert_eq!(scaling(factor(llama())), RopeScaling::Linear { factor: 4.0 });
    assert_eq!(scaling(factor(scaled(llama(), "linear"))), RopeScaling::Linear { factor: 4.0 });
    let divided = llama().f32_tensor("rope_freqs.weight", &[2], &[1.0, 8.0]);
    assert_eq!(scaling(divided), RopeScaling::Divisors(vec![1.0, 8.0]));
    let yarn = factor(scaled(llama(), "yarn"))
        .meta("llama.rope.scaling.original_context_length", Meta::U32(16));
    assert_eq!(
        scaling(yarn),
        RopeScaling::Yarn {
            factor: 4.0,
            original_max_position_embeddings: 16.0,
            attention_factor: 0.1 * 4f64.ln() + 1.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
        }
    );
}

#[test]
fn weights_have_the_names_and_the_row_order_of_hugging_face() {
    let values = |architecture: &str, name: &str| {
        let stored = open(&decoder(architecture)).unwrap().weight(name).unwrap();
        stored.dequantize().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let q = "model.layers.0.self_attn.q_proj.weight";
    let k = "model.layers.0.self_attn.k_proj.weight";
    let k_bias = "model.layers.0.self_attn.k_proj.bias";
    let v = "model.layers.0.self_attn.v_proj.weight";
    assert_eq!(values("llama", q), [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
    assert_eq!(values("llama", k), [0.0, 2.0, 1.0, 3.0]);
    assert_eq!(values("llama", k_bias), [0.0, 2.0, 1.0, 3.0]);
    assert_eq!(values("llama", v), [0.0, 1.0, 2.0, 3.0]);
    assert_eq!(values("qwen2", k), [0.0, 1.0, 2.0, 3.0]);
    let file = open(&decoder("llama")).unwrap();
    assert!(matches!(
        opened_problem(file.weight("blk.0.attn_q.weight")),
        Problem::WeightName { .. }
    ));
    assert!(matches!(opened_problem(file.weight("lm_head.weight")), Problem::NoTensor { .. }));
    assert_eq!(file.weight_names().count(), 5);
}

#[test]
fn what_would_compute_another_model_is_refused() {
    let refused = |builder: GgufBuilder| opened_problem(open(&builder).unwrap().decoder_config());
    let llama = || decoder("llama");
    let without = |key: &str| {
        let mut builder = llama();
        builder.metadata.retain(|(k, _)| k != key);
        builder
    };
    let cases = [
        (decoder("mamba"), "expected one of"),
        (without("general.architecture"), "no key"),
        (without("llama.block_count"), "no key"),
        (llama().meta("llama.block_count", Meta::U32(0)), "positive"),
        (llama().meta("llama.attention.head_count", Meta::U32(0)), "positive"),
        (llama().meta("llama.attention.head_count_kv", Meta::U32(3)), "divisor"),
        (llama().meta("llama.attention.head_count_kv", Meta::I32s(vec![1])), "an array of 1"),
        (llama().meta("llama.attention.key_length", Meta::U32(5)), "even"),
        (llama().meta("llama.rope.dimension_count", Meta::U32(2)), "width of a head, 4"),
        (scaled(llama(), "yarn"), "no key \"llama.rope.scaling.factor\""),
        (scaled(llama(), "longrope"), "longrope"),
        (
            scaled(llama(), "linear").meta("llama.rope.scaling.factor", Meta::F32(0.0)),
            "a positive number, got 0",
        ),
        (
            scaled(llama(), "yarn").meta("llama.rope.scaling.yarn_log_multiplier", Meta::F32(0.1)),
            "yarn_log_multiplier is set",
        ),
        (llama().meta("llama.context_length", Meta::U32(u32::MAX)), "at most 2097152"),
        (llama().meta("llama.expert_count", Meta::U32(8)), "expert_count is 8"),
        (llama().meta("llama.embedding_length", Meta::U32(16)), "token_embd"),
        (llama().f32_tensor("rope_freqs.weight", &[1], &[1.0]), "[2], half the width of a head"),
        (
            scaled(llama(), "linear").f32_tensor("rope_freqs.weight", &[2], &[1.0, 2.0]),
            "linear beside rope_freqs.weight",
        ),
    ];
    for (builder, expected) in cases {
        let problem = refused(builder);
        assert!(problem.to_string().contains(expected), "{expected}: {problem}");
    }
}

//! What llama.cpp and Hugging Face call the same weight: one table, read in both directions.

const GLOBAL: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// Modules of one layer, after `blk.N.` and `model.layers.N.`.
const LAYER: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// `blk.0.attn_q.weight` -> `model.layers.0.self_attn.q_proj.weight`.
pub fn hf_name(gguf: &str) -> Option<String> {
    rename(gguf, "blk.", "model.layers.", |(gguf, hf)| (gguf, hf))
}

/// `model.layers.0.self_attn.q_proj.weight` -> `blk.0.attn_q.weight`.
pub fn gguf_name(hf: &str) -> Option<String> {
    rename(hf, "model.layers.", "blk.", |(gguf, hf)| (hf, gguf))
}

type Pair = (&'static str, &'static str);

/// `direction` turns a row of the table into (from, to).
fn rename(name: &str, from: &str, to: &str, direction: fn(Pair) -> Pair) -> Option<String> {
    let lookup = |table: &[Pair], module: &str| {
        table.iter().map(|&row| direction(row)).find(|row| row.0 == module).map(|row| row.1)
    };
    let (path, suffix) = name.rsplit_once('.')?;
    if !matches!(suffix, "weight" | "bias") {
        return None;
    }
    let Some(rest) = path.strip_prefix(from) else {
        return Some(format!("{}.{suffix}", lookup(&GLOBAL, path)?));
    };
    let (layer, module) = rest.split_once('.')?;
    // Only the canonical spelling is a layer: `07` and `+7` would come back as another name.
    let index: usize = layer.parse().ok()?;
    if index.to_string() != layer {
        return None;
    }
    Some(format!("{to}{layer}.{}.{suffix}", lookup(&LAYER, module)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_maps_there_and_back() {
        let rows = GLOBAL.iter().map(|(a, b)| (format!("{a}.weight"), format!("{b}.weight")));
        let layer = LAYER
            .iter()
            .map(|(a, b)| (format!("blk.31.{a}.bias"), format!("model.layers.31.{b}.bias")));
        for (gguf, hf) in rows.chain(layer) {
            assert_eq!(hf_name(&gguf).as_deref(), Some(hf.as_str()));
            assert_eq!(gguf_name(&hf).as_deref(), Some(gguf.as_str()));
        }
    }

    #[test]
    fn other_names_map_to_nothing() {
        for name in [
            "",
            ".",
            "weight",
            "blk.weight",
            "blk.x.attn_q.weight",
            "blk.07.attn_q.weight",
            "blk.0.attn_q",
            "blk.0.attn_q.scale",
            "rope_freqs.weight",
            "output_norm",
        ] {
            assert_eq!(hf_name(name), None, "{name}");
            assert_eq!(gguf_name(name), None, "{name}");
        }
    }
}

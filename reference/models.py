"""Tiny random decoders of every family that the crate metal-candle loads, with the logits that
transformers gives them: crates/metal-candle/tests/data/models, for tests/models.rs.

    pip install torch transformers safetensors && python reference/models.py

A case is a folder as the hub has them: config.json as written below (the older files say
rope_scaling and rope_theta, the newer ones rope_parameters) and model.safetensors. A case that only
scales llama's rope has no weights of its own: it takes llama's.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

FOLDER = Path(__file__).parent.parent / "crates/metal-candle/tests/data/models"
PROMPT, GREEDY = 24, 12

BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def llama(**more):
    return BASE | {"model_type": "llama", "rope_theta": 10000.0} | more


WITH_WEIGHTS = {
    "llama": llama(),
    "llama_bias": llama(attention_bias=True, tie_word_embeddings=True, num_key_value_heads=2),
    "mistral": BASE | {
        "model_type": "mistral", "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "sliding_window": 5, "rope_parameters": {"rope_theta": 1e6},
    },
    "qwen2": BASE | {
        "model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2,
        "tie_word_embeddings": True, "rope_theta": 1e6, "use_sliding_window": False,
        "sliding_window": 4, "max_window_layers": 1,
    },
    "qwen3": BASE | {
        "model_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 14,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    },
}

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
        "rope_theta": 10000.0}
MSCALE = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.2,
          "mscale_all_dim": 0.7, "beta_fast": 4, "beta_slow": 0.5, "truncate": False}
LLAMAS_WEIGHTS = {
    "llama_linear": llama(rope_scaling={"type": "linear", "factor": 3.0}),
    "llama_llama3": llama(rope_scaling=LLAMA3),
    "llama_yarn": BASE | {"model_type": "llama", "rope_parameters": YARN},
    "llama_yarn_mscale": llama(rope_theta=500.0, rope_scaling=MSCALE),
}


def random_weights(model, seed):
    """Large enough that attention is far from uniform and every bias and norm is seen."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() == 2:
            p.data = noise * (1.6 / p.shape[1] ** 0.5)
        else:
            p.data = 0.3 * noise + (0.0 if name.endswith("bias") else 1.0)


def write(name, config, seed, weights=None):
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float().eval()
    if weights is None:
        random_weights(model, seed)
        weights = {k: v.contiguous() for k, v in model.state_dict().items()}
        if config["tie_word_embeddings"]:
            del weights["lm_head.weight"]
        save_file(weights, folder / "model.safetensors")
    else:
        model.load_state_dict(weights)
    return model, weights


def vectors(name, model, ids, out):
    with torch.no_grad():
        out[f"{name}.logits"] = model(ids).logits[0].contiguous()
        row = ids
        for _ in range(GREEDY):
            best = model(row, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            row = torch.cat([row, best], 1)
    out[f"{name}.greedy"] = row[0, PROMPT:].to(torch.int32)
    print(name, out[f"{name}.logits"].abs().max().item(), out[f"{name}.greedy"].tolist())


def main():
    ids = torch.randint(0, 96, (1, PROMPT), generator=torch.Generator().manual_seed(7))
    out = {"ids": ids[0].to(torch.int32)}
    llamas = None
    for seed, (name, config) in enumerate(WITH_WEIGHTS.items()):
        model, weights = write(name, config, seed)
        llamas = llamas or weights
        vectors(name, model, ids, out)
    for name, config in LLAMAS_WEIGHTS.items():
        model, _ = write(name, config, 0, llamas)
        vectors(name, model, ids, out)
    save_file(out, FOLDER / "logits.safetensors")


main()

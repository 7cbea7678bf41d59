"""A LoRA adapter that PEFT wrote for a tiny Llama, and which modules PEFT chooses."""

import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

COMMON = {"task_type": "CAUSAL_LM"}
CONFIGS = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.k_proj"]},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.0\..*"},
    {"target_modules": r".*\.(q|down)_proj"},
    {"target_modules": r"model\.layers\.1\.(?!mlp).*_proj"},
    {"target_modules": "all-linear"},
    {"target_modules": "All-Linear", "exclude_modules": ["down_proj"]},
    {"target_modules": ["lm_head", "proj", "_proj", "up_proj"]},
    {"target_modules": ["q_proj", "o_proj", "up_proj"], "r": 4, "lora_alpha": 6,
     "rank_pattern": {"layers.1.self_attn.q_proj": 2, "^model.layers.0.*up_proj": 3, "q_proj": 5},
     "alpha_pattern": {"o_proj": 1, r"layers\.\d\.mlp\.up_proj": 9}},
    {"target_modules": ["q_proj"], "r": 4, "lora_alpha": 6, "use_rslora": True,
     "rank_pattern": {"0.self_attn.q_proj": 9}},
]


def base() -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    ))


def linear_modules(model: LlamaForCausalLM) -> dict:
    return {name: list(module.weight.shape) for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)}


def targets() -> dict:
    cases = []
    for options in CONFIGS:
        model = get_peft_model(base(), LoraConfig(**COMMON, **options))
        layers = {name.removeprefix("base_model.model."): module
                  for name, module in model.named_modules() if hasattr(module, "lora_A")}
        cases.append({"config": {"peft_type": "LORA", **options}, "targets": {
            name: [layer.r["default"], layer.scaling["default"]] for name, layer in layers.items()}})
    return {"modules": linear_modules(base()), "cases": cases}


def write(folder: Path) -> None:
    config = LoraConfig(**COMMON, r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"],
                        rank_pattern={"1.self_attn.q_proj": 2}, init_lora_weights=False)
    model = get_peft_model(base(), config)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()

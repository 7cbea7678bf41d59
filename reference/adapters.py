"""One adapter in each format, made by the tool whose format it is, with the logits that this tool
gives: crates/metal-candle/tests/data/adapters, for tests/adapters.rs of the crate metal-candle.

    pip install torch transformers peft mlx-lm[cpu] gguf llama-cpp-python && python reference/adapters.py

The base is the tiny Llama of reference/models.py. PEFT writes `peft`, mlx-lm writes `mlx`, and
gguf-py writes `lora.gguf` from PEFT's adapter, as llama.cpp's convert_lora_to_gguf.py would: its
logits come from llama.cpp, on `base.gguf`, which is as convert_hf_to_gguf.py would write it.
"""

import json
import shutil
from pathlib import Path

import gguf
import llama_cpp
import mlx.core as mx
import numpy as np
import torch
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

TESTS = Path(__file__).parent.parent / "crates/metal-candle/tests/data"
BASE, OUT = TESTS / "models/llama", TESTS / "adapters"
IDS = load_file(TESTS / "models/logits.safetensors")["ids"].tolist()
CONFIG = json.loads((BASE / "config.json").read_text())
HEADS = {"q_proj": CONFIG["num_attention_heads"], "k_proj": CONFIG["num_key_value_heads"]}
ALPHA, RANK = 6, 3
NAMES = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down"}
GLOBAL = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
          "lm_head.weight": "output.weight"}


def peft(out):
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(BASE)).float()
    base.load_state_dict(load_file(BASE / "model.safetensors"))
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear",
                        init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape) * 0.2
    with torch.no_grad():
        out["peft"] = model(torch.tensor([IDS])).logits[0].contiguous()
    model.peft_config["default"].base_model_name_or_path = "tiny-llama"
    model.save_pretrained(OUT / "peft")
    (OUT / "peft/README.md").unlink()


def mlx(out):
    """The last layer only, with a scale of its own kind."""
    mx.random.seed(2)
    mx.set_default_device(mx.cpu)
    model, _ = load_model(BASE)
    parameters = {"rank": 4, "scale": 2.5, "dropout": 0.0,
                  "keys": ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]}
    model.freeze()
    linear_to_lora_layers(model, 1, parameters)
    weights = {name: 0.2 * mx.random.normal(p.shape)
               for name, p in tree_flatten(model.trainable_parameters())}
    model.load_weights(list(weights.items()), strict=False)
    out["mlx"] = torch.from_numpy(np.array(model(mx.array([IDS]))[0]).astype(np.float32))
    folder = OUT / "mlx"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"model": "tiny-llama", "fine_tune_type": "lora", "num_layers": 1, "optimizer": "adam",
              "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=4) + "\n")


def permute(rows, heads):
    """Neighbours are pairs: row s * d/2 + i of a head becomes row 2i + s."""
    shape = rows.shape
    halves = rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(shape))


def gguf_name(name):
    if name in GLOBAL:
        return GLOBAL[name]
    _, _, layer, module = name.split(".", 3)
    return f"blk.{layer}.{NAMES[module.removesuffix('.weight')]}.weight"


def rows(name, values):
    heads = HEADS.get(name.split(".")[-2])
    return permute(values, heads) if heads else values


def write(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def base_gguf(path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_rope_freq_base(CONFIG["rope_theta"])
    writer.add_vocab_size(CONFIG["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = [chr(33 + i) for i in range(93)] + ["\u0120", "He", "<end>"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 95 + [3])
    writer.add_token_merges(["H e"])
    writer.add_eos_token_id(95)
    for name, values in load_file(BASE / "model.safetensors").items():
        writer.add_tensor(gguf_name(name), rows(name, values.numpy()))
    write(writer)


def lora_gguf(path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, ALPHA)
    for key, values in load_file(OUT / "peft/adapter_model.safetensors").items():
        name = key.removeprefix("base_model.model.")
        values = values.numpy()
        if ".lora_A." in name:
            name = name.replace(".lora_A", "")
            writer.add_tensor(gguf_name(name) + ".lora_a", values)
        else:
            name = name.replace(".lora_B", "")
            writer.add_tensor(gguf_name(name) + ".lora_b", rows(name, values))
    write(writer)


def llama(out):
    lora = OUT / "lora.gguf"
    lora_gguf(lora)
    base = OUT / "base.gguf"
    base_gguf(base)
    f32 = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(str(base), lora_path=str(lora), logits_all=True, n_ctx=64, type_k=f32,
                            type_v=f32, verbose=False, n_threads=1)
    model.eval(IDS)
    out["gguf"] = torch.from_numpy(model.scores[: len(IDS)].copy())


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    out = {}
    peft(out)
    mlx(out)
    llama(out)
    print({name: values.abs().max().item() for name, values in out.items()})
    print("llama.cpp differs from PEFT by", (out["gguf"] - out["peft"]).abs().max().item())
    save_file(out, OUT / "logits.safetensors")


main()

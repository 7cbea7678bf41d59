"""Vectors of a real model: SmolLM2-135M-Instruct through transformers and PEFT.

    smollm.py MODEL_FOLDER TRAIN.jsonl OUT.safetensors

Writes, for tests/smollm.rs of the crate metal-candle:

* logits of five prompts (every 16th of the last position, and the best token of every position),
* 64 greedy tokens after each, the end token forbidden, so that none of them ends early,
* the first two's logits again from the model in bf16,
* the losses of 20 PEFT training steps (r 8, alpha 16, AdamW 1e-4, decay 0.01, clip 1.0, 4 rows of 256 packed
  tokens in file order) from the initial adapter that our seed 0 gives, for q,v and for all linear layers.
"""
import json, os, sys

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER, TRAIN, OUT = sys.argv[1:4]
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODULES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
PROMPTS = ["The capital of France is", "def fibonacci(n):\n    ",
           "<|im_start|>user\nName three primes above 100.<|im_end|>\n<|im_start|>assistant\n",
           "Im Jahr 1905 veröffentlichte Albert Einstein",
           "SELECT name, COUNT(*) FROM orders\nWHERE total > 100\nGROUP BY"]
M32, M64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


def philox(index, key):
    """Word 0 of Philox 4x32-10 for counters (index, 0, 0, 0)."""
    c = [index.astype(np.uint64), np.zeros_like(index, np.uint64), np.zeros_like(index, np.uint64),
         np.zeros_like(index, np.uint64)]
    k = [np.uint64(key & M32), np.uint64(key >> 32)]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        lo, hi = np.uint64(M32), np.uint64(32)
        c = [(b >> hi) ^ c[1] ^ k[0], b & lo, (a >> hi) ^ c[3] ^ k[1], a & lo]
        k = [(k[0] + np.uint64(0x9E3779B9)) & lo, (k[1] + np.uint64(0xBB67AE85)) & lo]
    return c[0]


def initial_a(rank, columns, stream, seed=0):
    """Our Kaiming-uniform A: uniform in +-1/sqrt(in), from the layer's own stream."""
    key = (seed * 0x9E3779B97F4A7C15 + stream) & M64
    unit = (philox(np.arange(rank * columns), key) >> np.uint64(8)).astype(np.float64) / 2**24
    bound = 1 / np.sqrt(columns)
    a = unit.astype(np.float32) * np.float32(2 * bound) + np.float32(-bound)
    return torch.from_numpy(a.reshape(rank, columns))


def load(dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=GGUF, dtype=torch.float32).to(dtype)


def logits(tokenizer, out):
    model = load().eval()
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            y = model(ids).logits[0]
        out[f"prompt{i}.ids"] = ids[0].to(torch.int64)
        out[f"prompt{i}.logits"] = y[-1, ::16].clone()
        out[f"prompt{i}.best"] = y.argmax(-1)
        print(i, ids.shape, tokenizer.decode(y[-1].argmax()))
        mask = torch.ones_like(ids)
        with torch.no_grad():
            y = model.generate(ids, attention_mask=mask, max_new_tokens=64, min_new_tokens=64, do_sample=False)
        out[f"prompt{i}.greedy"] = y[0, ids.shape[1]:].to(torch.int32)
        print(tokenizer.decode(out[f"prompt{i}.greedy"]))
    model = load(torch.bfloat16).eval()
    for i in range(2):
        with torch.no_grad():
            y = model(out[f"prompt{i}.ids"][None]).logits[0]
        out[f"prompt{i}.logits.bf16"] = y[-1, ::16].float().clone()


def losses(tokenizer, target):
    model = load()
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=target, task_type="CAUSAL_LM"))
    layers = model.config.num_hidden_layers
    names = [f"layers.{i}.{m}" for i in range(layers) for m in MODULES]
    for name, p in model.named_parameters():
        if "lora_A" in name:
            stream = next(i for i, n in enumerate(names) if f".{n}." in name)
            p.data.copy_(initial_a(8, p.shape[1], stream))
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.01)
    text = "\n".join(json.loads(line)["text"] for line in open(TRAIN))
    ids = torch.tensor(tokenizer(text)["input_ids"])
    result = []
    model.train()
    for i in range(20):
        x = ids[i * 1024:(i + 1) * 1024].view(4, 256)
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        result.append(loss.item())
        print(target, i, result[-1], flush=True)
    return ids[:20 * 1024].to(torch.int64), torch.tensor(result, dtype=torch.float64)


def main():
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, gguf_file=GGUF)
    out = {}
    logits(tokenizer, out)
    out["train.ids"], out["losses.qv"] = losses(tokenizer, ["q_proj", "v_proj"])
    _, out["losses.all"] = losses(tokenizer, "all-linear")
    out["train.ids"] = out["train.ids"].to(torch.int32)
    save_file(out, OUT)
    print(OUT, os.path.getsize(OUT))


main()

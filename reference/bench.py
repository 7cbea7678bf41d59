"""What a user would pick instead, for `cargo xtask bench cpu`.

    bench.py WHO THREADS

WHO is one of WHOS below. Reads rows on standard input, a JSON line each, and answers each with a JSON line, as
`crates/metal-candle/benches/cpu/serve.rs` does: the median of the calls of so many seconds, or why there is none.
Every row's inputs, tokens and settings are those of ours.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

WHOS = [
    "torch",
    "torch.compile",
    "torch out=",
    "PEFT",
    "PEFT + compile",
    "transformers",
    "llama.cpp",
    "sentence-transformers",
    "sentence-transformers int8",
]
WHO, THREADS = sys.argv[1], int(sys.argv[2])
VECTORS = Path(__file__).parent.parent / "crates/metal-candle/tests/data/smollm.safetensors"


class Missing(Exception):
    """Why this one has no figure for a row."""


def packed_text():
    from safetensors import safe_open

    with safe_open(VECTORS, "pt") as file:
        return file.get_tensor("train.ids").flatten().long()


def peak_bytes():
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def clocked(work):
    """A call of which everything counts."""

    def call():
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return call


def operation(row):
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(THREADS)
    work, dims, dtype = row["work"], row["dims"], getattr(torch, {"f32": "float32"}.get(row["dtype"], "bfloat16"))
    randn = lambda *dims: torch.randn(*dims).to(dtype)
    x = randn(*dims[:2])
    if len(dims) == 3:
        w = randn(*dims[1:])
        a, b = randn(dims[1], row["rank"]), randn(row["rank"], dims[2])
    else:
        w = randn(dims[1])
    if WHO == "torch out=":
        out = torch.empty(dims[0], dims[-1], dtype=dtype)
        known = {
            "softmax": lambda: torch.softmax(x, -1, out=out),
            "softmax in place": lambda: torch.softmax(x, -1, out=out),
            "matmul": lambda: torch.mm(x, w, out=out),
        }
        if work not in known:
            raise Missing("torch has no out= for it")
    else:
        known = {
            "softmax": lambda: torch.softmax(x, -1),
            "rms_norm": lambda: F.rms_norm(x, (dims[1],), w, 1e-6),
            "silu(x)*x": lambda: F.silu(x) * x,
            "relu(gelu(2x+1)*x+x)": lambda: torch.relu(F.gelu(x * 2 + 1) * x + x),
            "matmul": lambda: x @ w,
            "lora branch": lambda: (x @ a @ b) * 2.0,
            "base+lora": lambda: x @ w + (x @ a @ b) * 2.0,
        }
    if work not in known:
        raise Missing("torch does it out of place only")
    f = known[work]
    return clocked(torch.compile(f) if WHO == "torch.compile" else f)


def decoder(row, dtype):
    """The model in this dtype; transformers takes GGUF blocks apart."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    path = Path(row["model"]).absolute()
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=getattr(torch, dtype))


def train(row):
    import torch
    from peft import LoraConfig, get_peft_model

    model = decoder(row, "float32" if row["base"] == "f32" else "bfloat16")
    torch.manual_seed(0)
    targets = {"qv": ["q_proj", "v_proj"], "all": "all-linear"}[row["targets"]]
    config = LoraConfig(r=row["rank"], lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    if WHO == "PEFT + compile":
        for layer in model.base_model.model.model.layers:
            layer.compile()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=True)
    batch, seq = row["batch"], row["seq"]
    ids = packed_text()
    batches = ids[: len(ids) // (batch * seq) * batch * seq].view(-1, batch, seq)
    step = 0
    model.train()

    def work():
        nonlocal step
        x = batches[step % len(batches)]
        step += 1
        model(input_ids=x, labels=x).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return clocked(work)


def by_transformers(row):
    import torch

    model = decoder(row, "bfloat16").eval()
    prompt = packed_text()[: row["prompt"]][None]

    @torch.no_grad()
    def call():
        start = time.perf_counter()
        out = model(prompt, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        prefill = time.perf_counter() - start
        if row["work"] == "prefill":
            return prefill
        start = time.perf_counter()
        for _ in range(row["tokens"] - 1):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
        return (time.perf_counter() - start) / (row["tokens"] - 1)

    return call


def by_llama_cpp(row):
    from llama_cpp import Llama

    model = Llama(row["model"], n_ctx=1024, n_batch=512, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)
    prompt = packed_text()[: row["prompt"]].tolist()

    def call():
        model.reset()
        start = time.perf_counter()
        model.eval(prompt)
        token = model.sample(temp=0.0)
        prefill = time.perf_counter() - start
        if row["work"] == "prefill":
            return prefill
        start = time.perf_counter()
        for _ in range(row["tokens"] - 1):
            model.eval([token])
            token = model.sample(temp=0.0)
        return (time.perf_counter() - start) / (row["tokens"] - 1)

    return call


def embed(row):
    """Texts of so many tokens, the lengths spread evenly and in no order: as many words that are one token each,
    between the two of every text."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(THREADS)
    # Blocks of GGUF are none of its formats: its answer to them is f32, or int8 as PyTorch has it.
    dtype = torch.bfloat16 if row["base"] == "bf16" else torch.float32
    model = SentenceTransformer(row["model"], device="cpu", model_kwargs={"dtype": dtype})
    if WHO == "sentence-transformers int8":
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    words = ["the", "house", "river", "light", "green", "stone", "music", "paper"]
    count, shortest, longest = row["texts"], row["shortest"], row["longest"]
    lens = [shortest + (longest - shortest) * (i * 37 % count) // (count - 1) for i in range(count)]
    texts = [" ".join(words[(i + j * j) % len(words)] for j in range(n - 2)) for i, n in enumerate(lens)]
    got = [len(ids) for ids in model.tokenizer(texts)["input_ids"]]
    if got != lens:
        raise Missing(f"texts of {got} tokens")
    return clocked(lambda: model.encode(texts, batch_size=row["batch"]))


def prepare(row):
    if row["work"] == "train":
        return train(row)
    if row["work"] == "embed":
        return embed(row)
    if row["work"] in ("prefill", "decode"):
        return by_llama_cpp(row) if WHO == "llama.cpp" else by_transformers(row)
    return operation(row)


def measure(call, seconds, calls):
    times, start = [], time.perf_counter()
    while len(times) < max(calls, 1) or time.perf_counter() - start < seconds and len(times) < 20_000:
        times.append(call())
    return {"seconds": sorted(times)[len(times) // 2], "calls": len(times), "peak_bytes": peak_bytes()}


def main():
    if WHO not in WHOS:
        sys.exit(f"nobody is called {WHO!r}: expected one of {', '.join(WHOS)}")
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    known = call = None
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if question["row"] != known:
                known = call = None
                call = prepare(question["row"])
                known = question["row"]
                for _ in range(question["warmup"]):
                    call()
            answer = measure(call, question["seconds"], question["calls"])
        except Exception as why:  # whatever a peer may raise is why it has no figure
            known = None
            text = str(why).strip().splitlines() or [type(why).__name__]
            answer = {"missing": text[0][:200]}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()

"""What a user would pick instead on a GPU, for `cargo xtask bench cuda`.

    bench_gpu.py WHO DEVICE

WHO is one of WHOS below, DEVICE cuda:0 or the like (cpu shows that a row works). Reads questions on standard input, a
JSON line each, and answers each with a JSON line: the median of the calls, or why there is none. A question's `row` is
what `crates/metal-candle/benches/gpu.rs --list` says of it.
"""

import inspect
import json
import os
import sys
import time

WHOS = [
    "torch", "torch.compile", "torch.compile + graph",
    "PEFT", "PEFT + compile", "PEFT + Liger", "PEFT + Liger + compile",
    "transformers", "transformers + compile",
]  # fmt: skip
WHO, DEVICE = sys.argv[1], sys.argv[2]
ON_GPU = DEVICE.startswith("cuda")


class Missing(Exception):
    """Why this one has no figure for a row."""


def wait():
    import torch

    if ON_GPU:
        torch.cuda.synchronize()


def on_the_clock(work):
    """A call as the caller waits for it."""

    def call():
        wait()
        start = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - start

    return call


def on_the_device(work):
    """A call by the device's own clock, as ours is timed."""
    import torch

    if not ON_GPU:
        return on_the_clock(work)

    def call():
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        wait()
        before.record()
        work()
        after.record()
        wait()
        return before.elapsed_time(after) / 1e3

    return call


def recorded(work):
    """The work as a CUDA graph: what it takes without the launches."""
    import torch

    if not ON_GPU:
        raise Missing("a CUDA graph wants a GPU")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def operation(row):
    import torch
    import torch.nn.functional as F

    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[row["dtype"]]
    dims = row["dims"]
    randn = lambda *dims: torch.randn(*dims, device=DEVICE).to(dtype)
    x = randn(*dims[:2])
    if len(dims) == 3:
        w, a, b = randn(*dims[1:]), randn(dims[1], row["rank"]), randn(row["rank"], dims[2])
        bias = randn(dims[2])
    else:
        w = randn(dims[1])
    known = {
        "softmax": lambda: torch.softmax(x, -1),
        "rms_norm": lambda: F.rms_norm(x, (dims[1],), w, 1e-6),
        "silu(x)*x": lambda: F.silu(x) * x,
        "relu(gelu(2x+1)*x+x)": lambda: torch.relu(F.gelu(x * 2 + 1) * x + x),
        "lora branch": lambda: (x @ a @ b) * 2.0,
        "base+lora": lambda: x @ w + (x @ a @ b) * 2.0,
        "linear": lambda: torch.addmm(bias, x, w),
    }
    f = known[row["work"]]
    if "compile" in WHO:
        torch._dynamo.reset()
        f = torch.compile(f)
    if "graph" in WHO:
        f = recorded(f)
    return on_the_device(f)


def decoder(size):
    """A model with random weights in bf16, made on the device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size["vocabulary"],
        hidden_size=size["hidden"],
        intermediate_size=size["inner"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv_heads"],
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        tie_word_embeddings=size["tied"],
    )
    if "Liger" in WHO:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def train(row):
    """As ours: AdamW at 1e-4, clipped to 1, LoRA on every linear layer, every token trained."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=row["rank"], lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(decoder(row["size"]), config)
    if "compile" in WHO:
        for layer in model.base_model.model.model.layers:
            layer.compile()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=ON_GPU)
    tokens = row["batch"] * row["seq"]
    places = torch.arange(tokens)
    step = 0
    model.train()

    def work():
        nonlocal step
        ids = (places * 7919 + step * 104_729) % row["size"]["vocabulary"]
        ids = ids.view(row["batch"], row["seq"]).to(DEVICE)
        step += 1
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        # Ours comes back with the loss, too.
        loss.item()

    return on_the_clock(work)


def decode(row):
    """Greedy tokens one by one, in a cache of fixed size; each comes back to the host."""
    import torch
    from transformers import StaticCache

    model = decoder(row["size"]).eval()
    cache = StaticCache(config=model.config, max_cache_len=row["capacity"])
    takes = inspect.signature(model.forward).parameters
    named = "past_key_values" if "past_key_values" in takes else "cache"
    forward = model.forward
    if "compile" in WHO:
        forward = torch.compile(forward, mode="reduce-overhead" if ON_GPU else "default")
    prompt = (torch.arange(row["prompt"]) * 7919 % 1000)[None].to(DEVICE)
    at, token = row["capacity"], None

    def run(f, ids, start):
        places = torch.arange(start, start + ids.shape[1], device=DEVICE)
        own = {"cache_position": places} if "cache_position" in takes else {}
        out = f(ids, position_ids=places[None], use_cache=True, logits_to_keep=1, **{named: cache}, **own)
        return out.logits[:, -1].argmax(-1, keepdim=True).clone()

    @torch.no_grad()
    def call():
        nonlocal at, token
        if at == row["capacity"]:
            cache.reset()
            token, at = run(model.forward, prompt, 0), row["prompt"]
            wait()
        start = time.perf_counter()
        token = run(forward, token, at)
        token.item()
        at += 1
        return time.perf_counter() - start

    return call


def measure(call, seconds, calls):
    import torch

    times, start = [], time.perf_counter()
    while len(times) < max(calls, 1) or time.perf_counter() - start < seconds and len(times) < 20_000:
        times.append(call())
    peak = torch.cuda.max_memory_allocated() if ON_GPU else None
    return {"seconds": sorted(times)[len(times) // 2], "calls": len(times), "peak_bytes": peak}


def answer(question):
    import torch

    row = question["row"]
    if ON_GPU:
        torch.cuda.set_device(DEVICE)
    call = {"train": train, "decode": decode}.get(row["work"], operation)(row)
    for _ in range(question["warmup"]):
        call()
    return measure(call, question["seconds"], question["calls"])


def main():
    if WHO not in WHOS:
        sys.exit(f"nobody is called {WHO!r}: expected one of {', '.join(WHOS)}")
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as why:  # whatever a peer may raise is why it has no figure
            text = str(why).strip().splitlines() or [type(why).__name__]
            reply = {"missing": text[0][:200]}
        print(json.dumps(reply), file=answers)


if __name__ == "__main__":
    main()

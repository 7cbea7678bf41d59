"""Adapters against the real tools: PEFT, llama.cpp and mlx-lm, on SmolLM2-135M-Instruct.

    peers.py make BASE.gguf FOLDER       PEFT writes an adapter of its own into FOLDER/theirs, and
                                         gguf-py the base in f32 (base.gguf)
    peers.py compare BASE.gguf FOLDER    everybody's logits for the adapters in FOLDER

`cargo xtask peers` runs both, and makes the rest of FOLDER between them: our adapter as PEFT's folder
(ours), as GGUF (ours.gguf) and in mlx-lm's format (ours-mlx), PEFT's as GGUF (theirs.gguf), base.gguf
fused with our adapter (fused.gguf), and our logits for all of them (*.f32).

A difference is that of the largest logits, in parts of the largest logit. `of delta` is the same of
what the adapter changes, in parts of the largest change.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

IDS = [504, 3575, 282, 4649, 314, 7042, 30, 378, 314, 260, 4764, 3030]


def base_model(gguf):
    from transformers import AutoModelForCausalLM

    path = Path(gguf).resolve()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval()


def dequantised(path, out):
    """The base in f32: llama.cpp rounds activations to 8 bits before a product with 4-bit weights."""
    import gguf

    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make(gguf, folder):
    dequantised(gguf, folder / "base.gguf")
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(4)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, use_rslora=True,
                        target_modules=["q_proj", "k_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(base_model(gguf), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = 0.02 * torch.randn(p.shape)
    model.peft_config["default"].base_model_name_or_path = "SmolLM2-135M-Instruct"
    model.save_pretrained(folder / "theirs")


def save_base(model, folder):
    """The base as a folder for mlx-lm: transformers itself saves no model that came from a GGUF."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    weights = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads(model.config.to_json_string())
    config.pop("quantization_config", None)
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))


def peft_logits(gguf, folder):
    """PEFT's, and the base as a folder."""
    from peft import PeftModel

    base = base_model(gguf)
    save_base(base, folder / "base")
    ids = torch.tensor([IDS])
    with torch.no_grad():
        yield "base", base(ids).logits[0].numpy()
        for name in ["ours", "theirs"]:
            model = PeftModel.from_pretrained(base, folder / name).eval()
            yield name, model(ids).logits[0].numpy()
            base = model.unload()


def llama_logits(model, lora=None):
    import llama_cpp

    f32 = llama_cpp.GGML_TYPE_F32
    llama = llama_cpp.Llama(str(model), lora_path=lora and str(lora), logits_all=True, n_ctx=256,
                            type_k=f32, type_v=f32, verbose=False)
    llama.eval(IDS)
    return llama.scores[: len(IDS)].copy()


def mlx_logits(folder):
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(folder / "base")
    load_adapters(model, str(folder / "ours-mlx"))
    return np.array(model(mx.array([IDS]))[0])


def compare(gguf, folder):
    ours = lambda name: np.fromfile(folder / f"{name}.f32", np.float32).reshape(len(IDS), -1)
    base, failures = ours("base"), 0

    def check(what, name, got, got_base, limit, delta_limit):
        nonlocal failures
        expected = ours(name)
        error = np.abs(got - expected).max() / np.abs(expected).max()
        change = expected - base
        delta = np.abs(got - got_base - change).max() / np.abs(change).max() if change.any() else 0.0
        is_good = error < limit and delta < delta_limit
        failures += not is_good
        print(f"{what:<46} {error:.1e} (< {limit:.0e}), of delta {delta:.1e} (< {delta_limit:.0e})"
              f"{'' if is_good else '  FAILED'}", flush=True)

    theirs = dict(peft_logits(gguf, folder))
    check("transformers, base", "base", theirs["base"], theirs["base"], 1e-3, 1e-3)
    check("PEFT loads our adapter", "ours", theirs["ours"], theirs["base"], 1e-3, 1e-3)
    check("we load PEFT's adapter", "theirs", theirs["theirs"], theirs["base"], 1e-3, 1e-3)
    check("mlx-lm loads our adapter", "ours", mlx_logits(folder), theirs["base"], 1e-3, 1e-3)
    llama = llama_logits(folder / "base.gguf")
    check("llama.cpp, base", "base", llama, llama, 1e-3, 1e-3)
    for name in ["ours", "theirs"]:
        got = llama_logits(folder / "base.gguf", folder / f"{name}.gguf")
        whose = "our" if name == "ours" else "PEFT's"
        check(f"llama.cpp loads {whose} adapter, converted by us", name, got, llama, 1e-3, 1e-2)
    got = llama_logits(folder / "fused.gguf")
    check("llama.cpp loads what we fused", "ours", got, llama, 1e-3, 1e-2)
    got = llama_logits(gguf, folder / "ours.gguf")
    check("llama.cpp, our adapter, Q4_1 base", "ours", got, llama_logits(gguf), 1e-1, 1.0)
    sys.exit(failures > 0)


if __name__ == "__main__":
    command, gguf, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    {"make": make, "compare": compare}[command](gguf, folder)

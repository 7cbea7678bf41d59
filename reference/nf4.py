"""Makes the vectors of crates/metal-candle/tests/data/nf4 by the real bitsandbytes and transformers, on the CPU.

    pip install -r reference/peers.lock -r reference/nf4.lock && python reference/nf4.py

`numbers.safetensors` has floats and the codes and magnitudes that bitsandbytes makes of them. `plain` and `double` are one
random model of the Llama family as `save_pretrained` leaves it after `load_in_4bit`, without and with double quantisation;
beside them, one weight as bitsandbytes dequantises it, and the logits of the f32 model that has all of them.
"""

from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parent.parent / "crates/metal-candle/tests/data/nf4"
TOKENS = [3, 41, 59, 26]


def numbers() -> None:
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    # A block of zeros, one of tiny numbers, ties and the ends.
    x[0, :64] = 0.0
    x[1, :64] *= 1e-30
    x[2, :64] = torch.linspace(-1.0, 1.0, 64)
    codes, state = quantize_4bit(x, blocksize=64, quant_type="nf4")
    tensors = {"x": x, "codes": codes, "absmax": state.absmax, "values": dequantize_4bit(codes, state)}
    save_file(tensors, FOLDER / "numbers.safetensors")


def models() -> None:
    torch.manual_seed(1)
    # 320 blocks of a weight, so that more than 256 of them share a scale of the second quantisation.
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=320, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )
    base = LlamaForCausalLM(config)
    for parameter in base.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    base.save_pretrained(FOLDER / "base")
    vectors = {}
    for name in ["plain", "double"]:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_use_double_quant=name == "double",
        )
        model = AutoModelForCausalLM.from_pretrained(
            FOLDER / "base", quantization_config=quantization, dtype=torch.float32, device_map="cpu",
        )
        # Before any product: on the CPU that one packs the weights anew, and rounds the magnitudes.
        model.save_pretrained(FOLDER / name)
        (FOLDER / name / "generation_config.json").unlink(missing_ok=True)
        for module, linear in model.model.layers.named_modules():
            if isinstance(linear, Linear4bit):
                values = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
                base.model.layers.get_submodule(module).weight.data = values
        vectors[f"{name}.k_proj"] = base.model.layers[0].self_attn.k_proj.weight.data.clone()
        with torch.no_grad():
            vectors[f"{name}.logits"] = base(torch.tensor([TOKENS])).logits[0].contiguous()
    for file in (FOLDER / "base").iterdir():
        file.unlink()
    (FOLDER / "base").rmdir()
    save_file(vectors, FOLDER / "vectors.safetensors")


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    numbers()
    models()

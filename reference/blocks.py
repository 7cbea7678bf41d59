"""Weights in blocks, as gguf-py (of peers.lock, llama.cpp's own package) reads them, and NF4's as bitsandbytes (of
nf4.lock) does: `blocks.py OUT.bin`.

Writes, for the crate metal-candle-compiler's tests/dialects, of every format in the order of `BlockFormat::ALL`: the
bytes of 512 random weights, then the weights as little-endian f32. Q8_1 and Q8_K, which gguf-py does not read, are a
scale and signed bytes.
"""
import sys

import numpy as np
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type
from gguf import GGMLQuantizationType as Type, quants

# By format: weights and bytes of a block, and where it has scales in f16.
FORMATS = {
    "Q4_0": (32, 18, [0]), "Q4_1": (32, 20, [0, 2]), "Q5_0": (32, 22, [0]), "Q5_1": (32, 24, [0, 2]),
    "Q8_0": (32, 34, [0]), "Q8_1": (32, 36, [0, 2]), "Q2_K": (256, 84, [80, 82]), "Q3_K": (256, 110, [108]),
    "Q4_K": (256, 144, [0, 2]), "Q5_K": (256, 176, [0, 2]), "Q6_K": (256, 210, [208]), "Q8_K": (256, 292, []),
    "NF4": (64, 36, []),
}
WEIGHTS = 512


def weights(name, blocks):
    if name == "Q8_1":
        return blocks[:, :2].copy().view(np.float16).astype(np.float32) * blocks[:, 4:].view(np.int8)
    if name == "Q8_K":
        return blocks[:, :4].copy().view(np.float32) * blocks[:, 4:260].view(np.int8)
    if name == "NF4":
        largest = torch.from_numpy(blocks[:, :4].copy().view(np.float32).reshape(-1))
        state = QuantState(
            largest, shape=(len(blocks), 64), code=get_4bit_type("nf4", "cpu"), blocksize=64, quant_type="nf4",
            dtype=torch.float32,
        )
        return dequantize_4bit(torch.from_numpy(blocks[:, 4:].copy()).reshape(-1, 1), state).numpy()
    return quants.dequantize(blocks, Type[name])


rng = np.random.default_rng(0)
with open(sys.argv[1], "wb") as out:
    for name, (length, size, scales) in FORMATS.items():
        blocks = rng.integers(0, 256, (WEIGHTS // length, size), dtype=np.uint8)
        for at in scales:
            scale = rng.uniform(0.001, 0.02, len(blocks)).astype(np.float16)
            blocks[:, at:at + 2] = scale.view(np.uint8).reshape(-1, 2)
        if name in ("Q8_K", "NF4"):
            blocks[:, :4] = rng.uniform(0.001, 0.02, len(blocks)).astype(np.float32).view(np.uint8).reshape(-1, 4)
        wide = weights(name, blocks).astype("<f4").reshape(-1)
        assert wide.shape == (WEIGHTS,) and np.isfinite(wide).all(), name
        out.write(blocks.tobytes() + wide.tobytes())

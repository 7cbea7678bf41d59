"""Conversions between element types."""

import math

import torch

from .case import NATIVE, Family, Leaf, given, integers, normal

NAMES = {
    "f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16,
    "u8": torch.uint8, "u32": torch.uint32, "i64": torch.int64,
}  # fmt: skip
FLOATS = ["f64", "f32", "bf16", "f16"]
RANGES = {"u8": (0, 2**8 - 1), "u32": (0, 2**32 - 1), "i64": (-(2**63), 2**63 - 1)}

# Halfway cases of f32, bf16 and f16, subnormals of each, overflow of f16, the integers' limits.
FLOAT_VALUES = [
    0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 0.99, -0.99, 2.5, -2.5, 255.5, 256.0,
    300.0, -7.9, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 65504.0, 65519.0,
    65520.0, 2.0**-14, 2.0**-24, 2.0**-25, 3 * 2.0**-25, 2.0**-26, 2.0**-130, 2.0**24 + 2, 2.0**31,
    2.0**32, 2.0**33, 2.0**63, -(2.0**63), 2.0**64, -3e20, 2.0**127, 1 + 2.0**-24, 1 + 3 * 2.0**-24,
]  # fmt: skip
INTEGER_VALUES = {
    "u8": [0, 1, 7, 127, 128, 255],
    "u32": [0, 1, 255, 256, 300, 65519, 65520, 2**24 + 1, 2**31, 2**32 - 1],
    "i64": [0, 1, -1, 255, 256, -7, 2**24 + 1, 2**32 + 5, -(2**33) - 1, 2**53 + 1,
            # Through f64 this one would round twice.
            2**60 + 2**36 + 1, 2**63 - 1, -(2**63)],
}  # fmt: skip


def to_integer(x, to):
    """Truncates towards zero and saturates; NaN gives 0."""
    low, high = RANGES[to]

    def convert(v):
        if math.isnan(v):
            return 0
        return max(low, min(high, int(v))) if math.isfinite(v) else (high if v > 0 else low)

    values = [convert(v) for v in x.double().flatten().tolist()]
    return torch.tensor(values, dtype=torch.int64).to(NAMES[to]).reshape(x.shape)


def cast(to):
    def meaning(x):
        if to in RANGES and x.is_floating_point():
            return to_integer(x, to)
        wide = x if x.is_floating_point() else x.to(torch.int64)
        return wide.to(NAMES[to])

    return meaning


def make() -> Family:
    family = Family("casts")
    for source in NAMES:
        values = FLOAT_VALUES if source in FLOATS else INTEGER_VALUES[source]
        for to in NAMES:
            leaf = given(values, NAMES[source])
            family.case("to_dtype", f"{source}_to_{to}", cast(to), leaf, attrs={"dtype": to},
                        wrt=[], tol=NATIVE)  # fmt: skip
    for source in FLOATS:
        for to in FLOATS:
            # The cotangent arrives in the output's dtype and leaves in the input's.
            draw = normal(3, 7).draw
            leaf = Leaf(lambda g: draw(g).to(NAMES[source]), (("transpose", 0, 1),))
            family.case("to_dtype", f"{source}_to_{to}_gradient", cast(to), leaf,
                        attrs={"dtype": to}, wrt=[0], tol=NATIVE)  # fmt: skip
    for name, shape in [("rank0", []), ("empty", [3, 0])]:
        family.case("to_dtype", name, cast("f32"), integers(0, 9, *shape), attrs={"dtype": "f32"},
                    tol=NATIVE)  # fmt: skip
    return family

"""Matrix products."""

import torch

from .case import SUM, Family, normal

# Hundreds of terms of size 1; bf16 rounds the result, of size 20, once.
LONG = {"f64": [1e-12, 1e-11], "f32": [1e-5, 3e-5], "bf16": [1e-2, 1e-2]}

# (name, shape of a, shape of b)
MATMUL = [
    ("matrix", [2, 3], [3, 4]),
    ("odd", [7, 33], [33, 5]),
    ("long", [3, 300], [300, 5]),
    ("tall", [65, 3], [3, 7]),
    ("wide", [3, 7], [7, 70]),
    ("row", [1, 33], [33, 7]),
    ("column", [33, 7], [7, 1]),
    ("inner", [1, 33], [33, 1]),
    ("outer", [7, 1], [1, 33]),
    ("one", [1, 1], [1, 1]),
    ("batch", [2, 3, 4, 5], [2, 3, 5, 6]),
    ("batch_of_one", [1, 4, 5], [1, 5, 3]),
    ("shared_weight", [2, 3, 4, 5], [5, 6]),
    ("shared_input", [4, 5], [3, 5, 2]),
    ("broadcast_batch", [2, 1, 4, 5], [3, 5, 6]),
    ("rank6", [2, 1, 2, 1, 3, 4], [1, 2, 1, 2, 4, 2]),
    ("no_terms", [3, 0], [0, 4]),
    ("no_rows", [0, 3], [3, 4]),
    ("no_columns", [3, 4], [4, 0]),
    ("no_batch", [0, 2, 3], [0, 3, 2]),
]
TURN = ("transpose", 0, 1)
VIEWS = [
    ("transposed_a", normal(33, 7).view(TURN), normal(33, 5)),
    ("transposed_b", normal(7, 33), normal(5, 33).view(TURN)),
    ("transposed_both", normal(33, 7).view(TURN), normal(5, 33).view(TURN)),
    (
        "heads",
        normal(2, 5, 3, 4).view(("transpose", 1, 2)),
        normal(2, 6, 3, 4).view(("permute", 0, 2, 3, 1)),
    ),
    ("narrowed", normal(5, 9).view(("narrow", 1, 2, 5)), normal(9, 7).view(("narrow", 0, 1, 5))),
    (
        "stepped",
        normal(9, 15).view(("slice", 1, 0, 5, 3)),
        normal(5, 9).view(("slice", 1, 1, 4, 2)),
    ),
    (
        "repeated",
        normal(3, 1).view(("broadcast_as", 3, 7)),
        normal(7, 1).view(("broadcast_as", 7, 5)),
    ),
    ("flipped", normal(3, 7).view(("flip", 1)), normal(7, 5)),
    ("middle_batch", normal(4, 3, 5).view(TURN), normal(5, 3, 2).view(TURN)),
]


def matmul(family):
    for name, a, b in MATMUL:
        family.case("matmul", name, torch.matmul, normal(*a), normal(*b), tol=LONG)
    for name, a, b in VIEWS:
        family.case("matmul", name, torch.matmul, a, b, tol=LONG)
    # More than one tile of every blocking.
    family.case("matmul", "tiles", torch.matmul, normal(70, 65), normal(65, 67), tol=LONG)


def lora(family):
    """base + scale * x A B."""
    for name, base, x, a, b, scale in [
        ("matrix", [7, 6], [7, 5], [5, 2], [2, 6], 2.0),
        ("batch", [2, 3, 6], [2, 3, 33], [33, 4], [4, 6], 0.5),
        ("rank1", [3, 4], [3, 5], [5, 1], [1, 4], 1.0),
        ("wide", [2, 33], [2, 9], [9, 8], [8, 33], 16.0),
        ("nothing", [0, 4], [0, 5], [5, 2], [2, 4], 1.0),
    ]:
        meaning = lambda base, x, a, b: base + scale * (x @ a @ b)
        leaves = [normal(*base), normal(*x), normal(*a, scale=0.3), normal(*b, scale=0.3)]
        # bf16 rounds x A, and on the way back scale · dy Bᵀ, before the next product.
        bf16 = [2e-2, max(5e-2, scale / 128)]
        tol = {"f64": [1e-12, 1e-11], "f32": [1e-5, 3e-5], "bf16": bf16}
        family.case("lora", name, meaning, *leaves, attrs={"scale": scale}, tol=tol)


def make() -> Family:
    family = Family("products")
    matmul(family)
    lora(family)
    return family

"""Sums and extremes over dims, their positions, running sums."""

import math

import torch

from .case import (
    EXACT, MAP, NATIVE, SUM, Family, distinct, given, integers, normal,
)  # fmt: skip

INF, NAN = math.inf, math.nan
# Sums of exact bf16 values, rounded once at the end.
TOTAL = {"f64": [1e-13, 1e-13], "f32": [2e-6, 2e-6], "bf16": [4e-3, 1e-4]}

REDUCE = {
    "sum": (torch.sum, normal, TOTAL),
    "mean": (torch.mean, normal, TOTAL),
    "max": (torch.amax, distinct, EXACT),
    "min": (torch.amin, distinct, EXACT),
}
# (name, shape, dims: all if None, keepdim)
CASES = [
    ("rank0", [], None, False),
    ("rank1", [7], [0], False),
    ("long", [300], [0], True),
    ("rows", [5, 33], [1], False),
    ("rows_kept", [5, 33], [1], True),
    ("columns", [33, 5], [0], False),
    ("columns_kept", [33, 5], [0], True),
    ("middle", [3, 7, 4], [1], False),
    ("outer_two", [3, 7, 4], [0, 1], False),
    ("outer_and_inner", [3, 7, 4], [0, 2], True),
    ("all", [3, 7, 4], None, False),
    ("rank6", [2, 1, 3, 2, 1, 2], [1, 3, 5], False),
    ("rank6_kept", [2, 1, 3, 2, 1, 2], [0, 2, 3], True),
    ("extent1", [4, 1], [1], False),
    ("of_nothing", [0, 3], [1], False),
]


def over(function, dims, keepdim, rank):
    dims = list(range(rank)) if dims is None else dims
    return lambda x: function(x, dims, keepdim) if rank else x + 0


def reduce(family):
    for op, (function, leaf, tol) in REDUCE.items():
        record = lambda name, leaf, dims, keepdim, rank, **how: family.case(
            op, name, over(function, dims, keepdim, rank), leaf,
            attrs={"dims": dims, "keepdim": keepdim}, tol=tol, grad_tol=MAP, **how,
        )  # fmt: skip
        for name, shape, dims, keepdim in CASES:
            record(name, leaf(*shape), dims, keepdim, len(shape))
        record("transposed", leaf(7, 9).view(("transpose", 0, 1)), [1], False, 2)
        record("permuted", leaf(3, 5, 4).view(("permute", 2, 0, 1)), [0, 2], False, 3)
        record("strided", leaf(5, 17).view(("slice", 1, 2, 5, 3)), [1], True, 2)
        record("repeated", normal(3, 1).view(("broadcast_as", 3, 5)), [0], False, 2)
    for op in ["sum", "mean", "max", "min"]:
        function, _, tol = REDUCE[op]
        rows = given([[1.0, NAN, 2.0], [INF, 1.0, -INF], [INF, 1.0, 2.0], [-INF, -INF, -INF]])
        family.case(op, "special", over(function, [1], False, 2), rows, wrt=[], tol=tol,
                    attrs={"dims": [1], "keepdim": False})  # fmt: skip
    family.case("sum", "over_nothing", lambda x: x.sum([1]), normal(3, 0), tol=EXACT,
                attrs={"dims": [1], "keepdim": False})  # fmt: skip
    # 2^24 + 1 does not survive a running f32 sum in order, nor do the small terms a bf16 one.
    family.case("sum", "wide", lambda x: x.sum([1]), given([[4096.0] + [1.0] * 299]), tol=TOTAL,
                attrs={"dims": [1], "keepdim": False})  # fmt: skip
    integer_reduce(family)


def integer_reduce(family):
    for dtype in [torch.int64, torch.uint32, torch.uint8]:
        name = str(dtype).removeprefix("torch.").replace("uint", "u").replace("int", "i")
        low = -100 if dtype == torch.int64 else 0
        leaf = integers(low, 200, 3, 9, dtype=dtype)
        for op in ["sum", "max", "min"]:
            meaning = lambda x: over(REDUCE[op][0], [1], False, 2)(x.to(torch.int64)).to(dtype)
            family.case(op, name, meaning, leaf, attrs={"dims": [1], "keepdim": False}, tol=NATIVE)


def positions(family):
    for op in ["argmax", "argmin"]:
        function = getattr(torch, op)
        for name, leaf, dim, keepdim in [
            ("rank1", distinct(7), 0, False),
            ("long", distinct(300), 0, True),
            ("rows", distinct(5, 33), 1, False),
            ("columns", distinct(33, 5), 0, True),
            ("middle", distinct(3, 7, 4), 1, False),
            ("rank6", distinct(2, 1, 3, 2, 1, 2), 3, True),
            ("extent1", distinct(4, 1), 1, False),
            ("of_nothing", distinct(0, 3), 1, False),
            ("transposed", distinct(7, 9).view(("transpose", 0, 1)), 1, False),
            ("strided", distinct(5, 17).view(("slice", 1, 2, 5, 3)), 1, True),
            ("ties", given([[1.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0]]), 1, False),
            ("special", given([[1.0, NAN, INF, NAN], [-INF, INF, INF, -INF]]), 1, False),
        ]:
            meaning = lambda x: function(x, dim, keepdim).to(torch.uint32)
            family.case(op, name, meaning, leaf, attrs={"dim": dim, "keepdim": keepdim}, wrt=[],
                        tol=EXACT)  # fmt: skip
        meaning = lambda x: function(x, 1, False).to(torch.uint32)
        family.case(op, "i64", meaning, integers(-50, 50, 5, 9), tol=NATIVE,
                    attrs={"dim": 1, "keepdim": False})  # fmt: skip


def running(family):
    for name, leaf, dim in [
        ("rank1", normal(7), 0),
        ("long", normal(300), 0),
        ("rows", normal(3, 33), 1),
        ("columns", normal(33, 3), 0),
        ("middle", normal(2, 5, 3), 1),
        ("rank6", normal(2, 1, 3, 2, 1, 2), 2),
        ("extent1", normal(4, 1), 1),
        ("empty", normal(0, 3), 0),
        ("transposed", normal(7, 5).view(("transpose", 0, 1)), 1),
        ("strided", normal(5, 17).view(("slice", 1, 2, 5, 3)), 1),
    ]:
        family.case("cumsum", name, lambda x: x.cumsum(dim), leaf, attrs={"dim": dim}, tol=SUM)
    family.case("cumsum", "i64", lambda x: x.cumsum(1), integers(-50, 50, 3, 9), attrs={"dim": 1},
                tol=NATIVE)  # fmt: skip

    rows = given([[-INF, -INF, -INF], [-INF, 1.0, 2.0], [INF, 1.0, 2.0], [NAN, 1.0, 2.0]])
    for name, leaf, dim, keepdim in [
        ("rank1", normal(7, scale=2), 0, False),
        ("rows", normal(5, 33, scale=2), 1, True),
        ("long", normal(2, 300, scale=2), 1, False),
        ("columns", normal(33, 3, scale=2), 0, False),
        ("middle", normal(2, 5, 3), 1, False),
        ("rank6", normal(2, 1, 3, 2, 1, 2), 3, True),
        ("extent1", normal(4, 1), 1, False),
        ("large", normal(3, 9, scale=3000), 1, False),
        ("of_nothing", normal(0, 3), 1, False),
        ("transposed", normal(7, 5).view(("transpose", 0, 1)), 1, False),
        ("special", rows, 1, False),
    ]:
        family.case("logsumexp", name, lambda x: x.logsumexp(dim, keepdim), leaf, tol=SUM,
                    wrt=[] if name == "special" else None,
                    attrs={"dim": dim, "keepdim": keepdim})  # fmt: skip


def make() -> Family:
    family = Family("reductions")
    reduce(family)
    positions(family)
    running(family)
    return family

"""Operations that move elements: views, joins, padding."""

import torch
import torch.nn.functional as F

from .case import EXACT, MAP, NATIVE, Family, integers, normal, see

# (op, name, shape, attributes)
ONE = [
    ("reshape", "flatten", [3, 7], {"shape": [21]}),
    ("reshape", "split", [33, 4], {"shape": [3, 11, 2, 2]}),
    ("reshape", "merge_middle", [2, 3, 4, 5], {"shape": [2, 12, 5]}),
    ("reshape", "to_rank0", [1, 1], {"shape": []}),
    ("reshape", "from_rank0", [], {"shape": [1, 1, 1]}),
    ("reshape", "empty", [0, 3], {"shape": [5, 0, 2]}),
    ("reshape", "rank6", [24], {"shape": [2, 1, 3, 1, 2, 2]}),
    ("transpose", "matrix", [3, 7], {"dim0": 0, "dim1": 1}),
    ("transpose", "outer", [3, 7, 2], {"dim0": 0, "dim1": 1}),
    ("transpose", "ends", [3, 7, 2], {"dim0": 2, "dim1": 0}),
    ("transpose", "same", [3, 2], {"dim0": 1, "dim1": 1}),
    ("transpose", "empty", [3, 0], {"dim0": 0, "dim1": 1}),
    ("permute", "rank0", [], {"dims": []}),
    ("permute", "rotate", [2, 3, 5], {"dims": [2, 0, 1]}),
    ("permute", "heads", [2, 5, 3, 4], {"dims": [0, 2, 1, 3]}),
    ("permute", "rank6", [2, 1, 3, 2, 1, 2], {"dims": [5, 3, 1, 0, 2, 4]}),
    ("squeeze", "first", [1, 7], {"dim": 0}),
    ("squeeze", "middle", [3, 1, 7], {"dim": 1}),
    ("squeeze", "last", [7, 1], {"dim": 1}),
    ("unsqueeze", "rank0", [], {"dim": 0}),
    ("unsqueeze", "first", [7], {"dim": 0}),
    ("unsqueeze", "middle", [3, 7], {"dim": 1}),
    ("unsqueeze", "last", [3, 7], {"dim": 2}),
    ("broadcast_as", "rank0", [], {"shape": [3, 2]}),
    ("broadcast_as", "row", [7], {"shape": [3, 7]}),
    ("broadcast_as", "column", [3, 1], {"shape": [3, 33]}),
    ("broadcast_as", "both", [2, 1, 3, 1], {"shape": [5, 2, 4, 3, 2]}),
    ("broadcast_as", "to_empty", [1, 3], {"shape": [0, 3]}),
    ("broadcast_as", "rank6", [1, 2, 1], {"shape": [2, 1, 2, 3, 2, 2]}),
    ("narrow", "first", [7, 3], {"dim": 0, "start": 2, "len": 4}),
    ("narrow", "last", [3, 33], {"dim": 1, "start": 32, "len": 1}),
    ("narrow", "middle", [2, 7, 3], {"dim": 1, "start": 1, "len": 5}),
    ("narrow", "all", [3, 7], {"dim": 1, "start": 0, "len": 7}),
    ("narrow", "nothing", [3, 7], {"dim": 1, "start": 7, "len": 0}),
    ("slice", "first", [9, 3], {"dim": 0, "start": 1, "len": 3, "step": 3}),
    ("slice", "last", [3, 33], {"dim": 1, "start": 0, "len": 17, "step": 2}),
    ("slice", "wide", [2, 300], {"dim": 1, "start": 5, "len": 9, "step": 33}),
    ("slice", "one", [3, 7], {"dim": 1, "start": 4, "len": 1, "step": 100}),
    ("pad", "before", [3, 7], {"dim": 1, "before": 2, "after": 0, "value": 0.0}),
    ("pad", "after", [3, 7], {"dim": 0, "before": 0, "after": 3, "value": 0.0}),
    ("pad", "both", [2, 3, 2], {"dim": 1, "before": 1, "after": 2, "value": -1.5}),
    ("pad", "empty", [3, 0], {"dim": 1, "before": 1, "after": 1, "value": 0.5}),
    ("pad", "nothing", [3, 2], {"dim": 0, "before": 0, "after": 0, "value": 1.0}),
    ("flip", "rank1", [7], {"dim": 0}),
    ("flip", "first", [5, 3], {"dim": 0}),
    ("flip", "last", [3, 33], {"dim": 1}),
    ("flip", "middle", [2, 3, 4], {"dim": 1}),
    ("flip", "empty", [0, 3], {"dim": 0}),
]


def meaning(op, attrs):
    a = attrs
    return {
        "reshape": lambda x: x.reshape(a["shape"]),
        "transpose": lambda x: x.transpose(a["dim0"], a["dim1"]),
        "permute": lambda x: x.permute(a["dims"]),
        "squeeze": lambda x: x.squeeze(a["dim"]),
        "unsqueeze": lambda x: x.unsqueeze(a["dim"]),
        "broadcast_as": lambda x: x.broadcast_to(a["shape"]),
        "narrow": lambda x: x.narrow(a["dim"], a["start"], a["len"]),
        "slice": lambda x: see(x, [("slice", a["dim"], a["start"], a["len"], a["step"])]),
        "flip": lambda x: x.flip([a["dim"]]),
        "pad": lambda x: pad(x, **a),
    }[op]


def pad(x, dim, before, after, value):
    return F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [before, after], value=value)


def one(family):
    for op, name, shape, attrs in ONE:
        record = lambda name, leaf, **how: family.case(
            op, name, meaning(op, attrs), leaf, attrs=attrs, **how
        )
        record(name, normal(*shape), tol=EXACT, grad_tol=MAP)
        if len(shape) > 1:
            turned = normal(*shape[::-1]).view(("permute", *reversed(range(len(shape)))))
            record(f"{name}_of_transposed", turned, tol=EXACT, grad_tol=MAP)
            spread = normal(2 * shape[0], *shape[1:]).view(("slice", 0, 0, shape[0], 2))
            record(f"{name}_of_strided", spread, tol=EXACT, grad_tol=MAP)
    for op, name, shape, attrs in [
        ("flip", "i64", [5, 3], {"dim": 0}),
        ("pad", "i64", [5, 3], {"dim": 1, "before": 1, "after": 2, "value": -4.0}),
        ("permute", "i64", [2, 3, 5], {"dims": [2, 0, 1]}),
    ]:
        leaf = integers(-9, 9, *shape)
        family.case(op, name, meaning(op, attrs), leaf, attrs=attrs, tol=NATIVE)


def several(family):
    for name, dim, *leaves in [
        ("first", 0, normal(2, 3), normal(5, 3)),
        ("last", 1, normal(3, 7), normal(3, 1), normal(3, 33)),
        ("middle", 1, normal(2, 3, 4), normal(2, 2, 4)),
        ("rank1", 0, normal(1), normal(7)),
        ("one", 0, normal(3, 2)),
        ("with_empty", 1, normal(3, 0), normal(3, 2), normal(3, 0)),
        ("empty", 0, normal(0, 2), normal(0, 2)),
        ("transposed", 1, normal(7, 3).view(("transpose", 0, 1)), normal(3, 2)),
        ("rank6", 3, normal(2, 1, 3, 2, 1, 2), normal(2, 1, 3, 1, 1, 2)),
    ]:
        cat = lambda *parts: torch.cat(parts, dim)
        family.case("cat", name, cat, *leaves, attrs={"dim": dim}, tol=EXACT, grad_tol=MAP)
    for name, dim, *leaves in [
        ("rank0", 0, normal(), normal(), normal()),
        ("first", 0, normal(3, 7), normal(3, 7)),
        ("middle", 1, normal(3, 7), normal(3, 7), normal(3, 7)),
        ("last", 2, normal(3, 7), normal(7, 3).view(("transpose", 0, 1))),
        ("one", 1, normal(3, 2)),
        ("rank6", 5, normal(2, 1, 3, 1, 2), normal(2, 1, 3, 1, 2)),
    ]:
        stack = lambda *parts: torch.stack(parts, dim)
        family.case("stack", name, stack, *leaves, attrs={"dim": dim}, tol=EXACT, grad_tol=MAP)
    cat = lambda *parts: torch.cat(parts, 1)
    family.case("cat", "i64", cat, integers(-9, 9, 3, 2), integers(-9, 9, 3, 4), attrs={"dim": 1},
                tol=NATIVE)  # fmt: skip


def make() -> Family:
    family = Family("movement")
    one(family)
    several(family)
    return family

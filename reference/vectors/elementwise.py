"""Scalar functions of one, two and three arguments."""

import math

import torch
import torch.nn.functional as F

from .case import (
    EXACT, MAP, NATIVE, Family, Leaf, distinct, given, integers, normal, uniform,
)  # fmt: skip

INF, NAN = math.inf, math.nan
SPECIAL = [0.0, -0.0, INF, -INF, NAN, 1.0, -1.0, 0.5, 1.5, 2.5, -0.5, -2.5, 2.0**-17, -(2.0**-17),
           80.0, -80.0, 9984.0, -9984.0, 2.0**100, -(2.0**100)]  # fmt: skip
# Without what is a matter of taste: x·0 at -inf, the sine of 2^100.
TAME = [v for v in SPECIAL if abs(v) < 1e5 or v != v]

TIGHT = {"f64": [1e-13, 1e-300], "f32": [2e-6, 1e-30], "bf16": [4e-3, 1e-30]}


def sign(x):
    return torch.where(x.isnan(), x, x.sign())


UNARY = {
    # name: (meaning, domain, special inputs, tolerance)
    "neg": (torch.neg, (-3, 3), SPECIAL, EXACT),
    "abs": (torch.abs, (-3, 3), SPECIAL, EXACT),
    "sign": (sign, (-3, 3), SPECIAL, EXACT),
    "recip": (torch.reciprocal, (0.25, 4), SPECIAL, TIGHT),
    "sqr": (torch.square, (-3, 3), SPECIAL, TIGHT),
    "sqrt": (torch.sqrt, (0.25, 9), SPECIAL, TIGHT),
    "rsqrt": (torch.rsqrt, (0.25, 9), SPECIAL, TIGHT),
    "exp": (torch.exp, (-4, 4), SPECIAL, TIGHT),
    "log": (torch.log, (0.1, 9), SPECIAL, MAP),
    "log1p": (torch.log1p, (-0.8, 5), SPECIAL, TIGHT),
    "expm1": (torch.expm1, (-4, 4), SPECIAL, TIGHT),
    "sin": (torch.sin, (-7, 7), TAME[:2] + TAME[3:], MAP),
    "cos": (torch.cos, (-7, 7), TAME[:2] + TAME[3:], MAP),
    "tanh": (torch.tanh, (-4, 4), SPECIAL, MAP),
    "erf": (torch.erf, (-3, 3), SPECIAL, MAP),
    "sigmoid": (torch.sigmoid, (-6, 6), SPECIAL, MAP),
    "relu": (torch.relu, (-3, 3), SPECIAL, EXACT),
    "silu": (F.silu, (-6, 6), TAME, MAP),
    "gelu": (F.gelu, (-4, 4), TAME, MAP),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), (-4, 4), TAME, MAP),
    "floor": (torch.floor, (-3, 3), SPECIAL, EXACT),
    "ceil": (torch.ceil, (-3, 3), SPECIAL, EXACT),
    "round": (torch.round, (-3, 3), SPECIAL, EXACT),
}


def unary(family):
    for op, (meaning, domain, special, tol) in UNARY.items():
        record = lambda name, *leaves, **how: family.case(
            op, name, meaning, *leaves, tol=tol, grad_tol=MAP, **how
        )
        record("rank0", uniform(*domain))
        record("odd", uniform(*domain, 7))
        record("long", uniform(*domain, 300))
        record("empty", uniform(*domain, 2, 0, 3))
        record("rank6", uniform(*domain, 1, 2, 1, 3, 2, 1))
        record("transposed", uniform(*domain, 3, 7).view(("transpose", 0, 1)))
        strided = uniform(*domain, 5, 9).view(("narrow", 0, 1, 3), ("slice", 1, 1, 3, 3))
        record("strided", strided)
        repeated = uniform(*domain, 3, 1).view(("broadcast_as", 2, 3, 5))
        record("repeated", repeated)
        record("special", given(special), wrt=[])


BINARY = {
    # name: (meaning, leaves of the first and of the second argument, tolerance)
    "add": (torch.add, normal, normal, MAP),
    "sub": (torch.sub, normal, normal, MAP),
    "mul": (torch.mul, normal, normal, MAP),
    "div": (torch.div, normal, lambda *s: uniform(0.5, 3, *s), MAP),
    "pow": (torch.pow, lambda *s: uniform(0.25, 3, *s), lambda *s: uniform(-2, 3, *s), MAP),
    "maximum": (torch.maximum, normal, normal, EXACT),
    "minimum": (torch.minimum, normal, normal, EXACT),
}
COMPARISONS = {
    "eq": torch.eq, "ne": torch.ne, "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge,
}  # fmt: skip

# (name, first shape, second shape), by NumPy's rule of broadcasting.
PAIRS = [
    ("rank0", [], []),
    ("same", [5, 7], [5, 7]),
    ("scalar", [3, 4], []),
    ("scalar_first", [], [3, 4]),
    ("row", [3, 33], [33]),
    ("column", [3, 7], [3, 1]),
    ("mutual", [4, 1, 3], [5, 1]),
    ("rank6", [2, 1, 3, 1, 2, 1], [1, 2, 1, 2, 2, 3]),
    ("empty", [0, 3], [1, 3]),
    ("to_empty", [1, 3], [0, 1]),
]
SPECIAL_PAIRS = [0.0, -0.0, INF, -INF, NAN, 1.0, -1.0, -2.0, 3.0, 0.5]


def binary(family):
    for op, (meaning, first, second, tol) in BINARY.items():
        record = lambda name, *leaves, **how: family.case(
            op, name, meaning, *leaves, tol=tol, grad_tol=MAP, **how
        )
        for name, a, b in PAIRS:
            record(name, first(*a), second(*b))
        record("transposed", first(7, 3).view(("transpose", 0, 1)), second(3, 7))
        stepped = first(6, 4).view(("slice", 0, 1, 3, 2))
        record("strided", stepped, second(3, 9).view(("narrow", 1, 4, 4)))
        column, row = given([[v] for v in SPECIAL_PAIRS]), given(SPECIAL_PAIRS)
        record("special", column, row, wrt=[])
    family.case(
        "pow", "negative_base", torch.pow, uniform(-3, -0.5, 7), given([0.0, 1, 2, 3, -1, -2, 4]),
        wrt=[0], tol=MAP,
    )  # fmt: skip
    family.case("mul", "long", torch.mul, normal(3, 300), normal(300), tol=MAP)
    for op, meaning in COMPARISONS.items():
        record = lambda name, *leaves: family.case(op, name, meaning, *leaves, wrt=[], tol=EXACT)
        for name, a, b in PAIRS:
            record(name, few(*a), few(*b))
        record("transposed", few(7, 3).view(("transpose", 0, 1)), few(3, 7))
        record("special", given([[v] for v in SPECIAL_PAIRS]), given(SPECIAL_PAIRS))


def few(*shape):
    """Floats of few values, so that some are equal."""
    draw = integers(-2, 3, *shape).draw
    return Leaf(lambda g: draw(g).double() / 2)


def wrapped(function, dtype):
    """`function` of Python integers, elementwise and wrapped to `dtype`."""
    bits = torch.iinfo(dtype).bits
    low = -(1 << 63) if dtype == torch.int64 else 0

    def meaning(*inputs):
        lists = [x.to(torch.int64).flatten().tolist() for x in torch.broadcast_tensors(*inputs)]
        values = [(function(*v) - low) % (1 << bits) + low for v in zip(*lists)]
        shape = torch.broadcast_shapes(*(x.shape for x in inputs))
        return torch.tensor(values, dtype=torch.int64).to(dtype).reshape(shape)

    return meaning


def truncated(a, b):
    """Division towards zero; by zero it gives 0."""
    return 0 if b == 0 else (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


def power(a, b):
    """A negative exponent gives 0 unless the base is 1 or -1."""
    if b >= 0:
        return a**b
    return a ** (-b) if a in (1, -1) else 0


INTEGER_UNARY = {
    "neg": lambda a: -a, "abs": abs, "sign": lambda a: (a > 0) - (a < 0), "sqr": lambda a: a * a,
    "relu": lambda a: max(a, 0), "floor": lambda a: a, "ceil": lambda a: a, "round": lambda a: a,
}  # fmt: skip
INTEGER_BINARY = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "div": truncated, "pow": power, "maximum": max, "minimum": min,
}  # fmt: skip
INTEGERS = [
    (torch.int64, [-7, -1, 0, 1, 2, 5, 1 << 40, -(1 << 40)], [-3, -1, 0, 1, 2, 3, 41]),
    (torch.uint32, [0, 1, 2, 77, (1 << 31) + 3, (1 << 32) - 1], [0, 1, 2, 3, 40]),
    (torch.uint8, [0, 1, 2, 7, 200, 255], [0, 1, 2, 3, 9]),
]


def integer(family):
    for dtype, values, others in INTEGERS:
        name = str(dtype).removeprefix("torch.").replace("uint", "u").replace("int", "i")
        column = given([[v] for v in values], dtype)
        row = given(others, dtype)
        for op, function in INTEGER_UNARY.items():
            family.case(op, name, wrapped(function, dtype), given(values, dtype), tol=NATIVE)
        for op, function in INTEGER_BINARY.items():
            family.case(op, name, wrapped(function, dtype), column, row, tol=NATIVE)
        for op, function in COMPARISONS.items():
            compare = lambda a, b: function(a.to(torch.int64), b.to(torch.int64))
            family.case(op, name, compare, column, row, tol=NATIVE)


def ternary(family):
    condition = lambda *s: integers(0, 2, *s, dtype=torch.uint8)
    choose = lambda c, a, b: torch.where(c != 0, a, b)
    record = lambda name, *leaves, **how: family.case(
        "where_cond", name, choose, *leaves, tol=EXACT, grad_tol=MAP, **how
    )
    record("same", condition(5, 7), normal(5, 7), normal(5, 7))
    record("rank0", condition(), normal(), normal())
    record("broadcast", condition(3, 1, 7), normal(2, 1), normal(7))
    record("condition_row", condition(33), normal(3, 33), normal())
    record("empty", condition(0, 3), normal(1, 3), normal(3))
    record("rank6", condition(1, 2, 1, 3, 1, 2), normal(2, 1, 2, 1, 2, 1), normal(2))
    record("transposed", condition(7, 3).view(("transpose", 0, 1)), normal(3, 7), normal(3, 1))
    # The branch not taken must not leak its NaN.
    record("special", given([0, 1, 2, 255], torch.uint8), given([NAN, 1.0, INF, 2.0]),
           given([3.0, NAN, NAN, NAN]))  # fmt: skip
    pair = integers(-9, 9, 9), integers(-9, 9, 9)
    family.case("where_cond", "i64", choose, condition(9), *pair, tol=NATIVE)

    for name, low, high, leaf in [
        ("odd", -0.75, 1.25, distinct(7)),
        ("long", -1.03, 0.51, normal(300)),
        ("rank0", -1.0, 1.0, given(0.5)),
        ("empty", -1.0, 1.0, normal(0, 2)),
        ("transposed", 0.1, 0.9, normal(3, 7).view(("transpose", 0, 1))),
    ]:
        clamp = lambda x: x.clamp(low, high)
        family.case("clamp", name, clamp, leaf, attrs={"min": low, "max": high}, grad_tol=MAP)
    family.case("clamp", "special", lambda x: x.clamp(-2.5, 80.0), given(SPECIAL), wrt=[],
                attrs={"min": -2.5, "max": 80.0}, tol=EXACT)  # fmt: skip


def make() -> Family:
    family = Family("elementwise")
    unary(family)
    binary(family)
    integer(family)
    ternary(family)
    return family

"""Softmax, normalisations and rotary embedding."""

import math

import torch
import torch.nn.functional as F

from .case import MAP, SUM, Family, exact, given, Leaf, normal

INF = math.inf
# Probabilities: as good near 0 as near 1.
ROW = {"f64": [1e-12, 1e-13], "f32": [5e-6, 1e-6], "bf16": [4e-3, 1e-5]}


def softmax(family):
    for op, function in [("softmax", F.softmax), ("log_softmax", F.log_softmax)]:
        for name, leaf, dim in [
            ("rank1", normal(7, scale=2), 0),
            ("rows", normal(5, 33, scale=2), 1),
            ("long", normal(2, 300, scale=2), 1),
            ("columns", normal(33, 3, scale=2), 0),
            ("middle", normal(2, 5, 3), 1),
            ("rank6", normal(2, 1, 3, 2, 1, 2), 3),
            ("extent1", normal(4, 1), 1),
            ("large", normal(3, 9, scale=3000), 1),
            ("of_nothing", normal(0, 3), 1),
            ("over_nothing", normal(3, 0), 1),
            ("transposed", normal(7, 5).view(("transpose", 0, 1)), 1),
            ("strided", normal(5, 17).view(("slice", 1, 2, 5, 3)), 1),
            ("repeated", normal(3, 1).view(("broadcast_as", 3, 5)), 1),
        ]:
            # The gradients of equal elements add up to 0, each rounded before.
            grad_tol = ROW if name != "repeated" else ROW | {"bf16": [4e-3, 1e-2]}
            family.case(op, name, lambda x: function(x, dim), leaf, attrs={"dim": dim}, tol=ROW,
                        grad_tol=grad_tol)  # fmt: skip
        masked = given([[-INF, 1.0, 2.0, -INF], [0.5, -INF, -INF, -INF]])
        family.case(op, "masked", lambda x: function(x, 1), masked, wrt=[], attrs={"dim": 1},
                    tol=ROW)  # fmt: skip


def rms_norm(x, weight, eps):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def norm(family):
    shapes = {
        "rank1": [7], "rows": [5, 33], "long": [2, 300], "batch": [2, 3, 8],
        "rank6": [2, 1, 3, 1, 2, 4], "extent1": [3, 1], "of_nothing": [0, 4],
    }  # fmt: skip
    leaves = {name: normal(*shape, scale=2) for name, shape in shapes.items()}
    leaves["transposed"] = normal(7, 5, scale=2).view(("transpose", 0, 1))
    leaves["strided"] = normal(5, 17, scale=2).view(("slice", 1, 2, 5, 3))
    # eps is most of the root mean square, and next to nothing of it.
    leaves["small"] = normal(3, 9, scale=2.0**-10)
    leaves["offset"] = Leaf(lambda g: exact(16 + torch.randn(3, 9, generator=g).double()))
    widths = {"transposed": 7, "strided": 5, "small": 9, "offset": 9}
    for name, leaf in leaves.items():
        n = widths.get(name) or shapes[name][-1]
        eps = 1e-5 if name != "batch" else 1e-6
        family.case("rms_norm", name, lambda x, w: rms_norm(x, w, eps), leaf, normal(n),
                    attrs={"eps": eps}, tol=SUM)  # fmt: skip
        layer_norm = lambda x, w, b: F.layer_norm(x, [n], w, b, eps)
        # Where all elements are equal, or nearly, the slope is 1 / sqrt(eps).
        tol = SUM if name not in ("extent1", "small", "offset") else SUM | {"f32": [2e-4, 2e-4]}
        family.case("layer_norm", name, layer_norm, leaf, normal(n), normal(n),
                    attrs={"eps": eps}, tol=tol)  # fmt: skip


def rope(x, cos, sin, interleaved):
    """Pairs (x[2i], x[2i+1]) if interleaved, (x[i], x[i + d/2]) if not, turned by an angle each."""
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def angles(function, t, d, start=0):
    """[t, 1, d/2]: cos or sin of position times frequency."""
    frequencies = 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    positions = torch.arange(start, start + t, dtype=torch.float64)
    return Leaf(lambda _: exact(function(torch.outer(positions, frequencies))[:, None, :]))


def rotary(family):
    for interleaved in [False, True]:
        layout = "interleaved" if interleaved else "half"
        for name, leaf, start in [
            ("heads", normal(2, 5, 3, 8), 0),
            ("one_pair", normal(1, 7, 1, 2), 0),
            ("late", normal(1, 3, 2, 6), 100),
            ("one_token", normal(2, 1, 3, 8), 9),
            ("nothing", normal(2, 0, 3, 8), 0),
            ("transposed", normal(2, 3, 5, 8).view(("transpose", 1, 2)), 0),
        ]:
            shape = leaf.draw(torch.Generator()).shape
            t, d = (shape[2] if name == "transposed" else shape[1]), shape[3]
            tables = angles(torch.cos, t, d, start), angles(torch.sin, t, d, start)
            meaning = lambda x, cos, sin: rope(x, cos, sin, interleaved)
            family.case("rope", f"{layout}_{name}", meaning, leaf, *tables, wrt=[0],
                        attrs={"layout": layout}, tol=MAP | {"bf16": [4e-3, 1e-2]})  # fmt: skip


def make() -> Family:
    family = Family("norms")
    softmax(family)
    norm(family)
    rotary(family)
    return family

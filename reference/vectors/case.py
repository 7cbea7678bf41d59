"""One case of a reference vector: inputs, output and input gradients of one operation, in f64."""

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import torch
from safetensors.torch import save_file

# Results with more elements are stored in f32, and `f64` is checked to f32's precision only.
LARGE = 1500
# The cotangent of every output is the beginning of one stored tensor.
COTANGENT_LEN = 8192

EXACT = {"f64": [0.0, 0.0], "f32": [0.0, 0.0], "bf16": [0.0, 0.0]}
# One rounding per element (and, in gradients, a short sum).
MAP = {"f64": [1e-13, 1e-14], "f32": [2e-6, 1e-6], "bf16": [4e-3, 1e-5]}
# Several roundings: sums, products, composites.
SUM = {"f64": [1e-12, 1e-12], "f32": [1e-5, 1e-5], "bf16": [1e-2, 1e-2]}
# Inputs are used in the dtype they are stored in.
NATIVE = {"native": [0.0, 0.0]}


@dataclass(frozen=True)
class Leaf:
    """An input: how to draw it, and the view of it that the operation sees."""

    draw: Callable[[torch.Generator], torch.Tensor]
    steps: tuple = ()

    def view(self, *steps) -> "Leaf":
        """This leaf seen through e.g. ("transpose", 0, 1), ("narrow", dim, start, len)."""
        return Leaf(self.draw, self.steps + steps)


def exact(x: torch.Tensor) -> torch.Tensor:
    """x rounded to bf16, so that every float dtype sees the very same input."""
    return x.to(torch.bfloat16).to(torch.float64)


def normal(*shape, scale=1.0) -> Leaf:
    return Leaf(lambda g: exact(scale * torch.randn(shape, generator=g, dtype=torch.float64)))


def uniform(low, high, *shape) -> Leaf:
    draw = lambda g: torch.rand(shape, generator=g, dtype=torch.float64)
    return Leaf(lambda g: exact(low + (high - low) * draw(g)))


def distinct(*shape) -> Leaf:
    """Up to 512 different values, in random order."""

    def draw(g):
        n = torch.Size(shape).numel()
        return exact((torch.randperm(n, generator=g) - n // 2).double() / 32).reshape(shape)

    return Leaf(draw)


def integers(low, high, *shape, dtype=torch.int64) -> Leaf:
    """Integers in [low, high)."""
    return Leaf(lambda g: torch.randint(low, high, shape, generator=g).to(dtype))


def given(values, dtype=torch.float64) -> Leaf:
    return Leaf(lambda _: torch.tensor(values, dtype=dtype))


def see(x: torch.Tensor, steps) -> torch.Tensor:
    """x through the views of a leaf."""
    for name, *args in steps:
        if name == "slice":
            dim, start, length, step = args
            x = x.index_select(dim, torch.arange(length) * step + start)
        elif name == "flip":
            x = x.flip(args)
        elif name in ("broadcast_as", "permute"):
            x = {"broadcast_as": torch.broadcast_to, "permute": torch.permute}[name](x, args)
        else:
            x = getattr(x, name)(*args)
    return x


@dataclass
class Family:
    """The cases that share one file."""

    name: str
    cases: list = field(default_factory=list)
    tensors: dict = field(default_factory=dict)

    def case(self, op, name, meaning, *leaves, attrs=None, wrt=None, tol=MAP, grad_tol=None):
        """Records `meaning(*inputs)` and its gradients for the inputs `wrt` (every float, if None).

        `meaning` is given f64 inputs, or native ones if `tol` is NATIVE.
        """
        g = torch.Generator().manual_seed(zlib.crc32(f"{op}/{name}".encode()))
        inputs = [leaf.draw(g) for leaf in leaves]
        if wrt is None:
            wrt = [i for i, x in enumerate(inputs) if x.dtype == torch.float64]
        for i in wrt:
            inputs[i].requires_grad_()
        output = meaning(*(see(x, leaf.steps) for x, leaf in zip(inputs, leaves)))
        grads = gradients(output, [inputs[i] for i in wrt])
        key = f"{op}/{name}"
        assert f"{key}/y" not in self.tensors, f"two cases are called {key}"
        large = any(t.numel() > LARGE for t in [output, *grads])
        entry = {
            "op": op,
            "case": name,
            "file": f"{self.name}.safetensors",
            "attrs": attrs or {},
            "inputs": [self.keep(f"{key}/{i}", x, tol) for i, x in enumerate(inputs)],
            "views": {str(i): leaf.steps for i, leaf in enumerate(leaves) if leaf.steps},
            "output": self.keep(f"{key}/y", output, tol, large),
            "grads": {
                str(i): self.keep(f"{key}/d{i}", d, tol, large) for i, d in zip(wrt, grads)
            },
            "tol": widen(tol) if large else tol,
            "grad_tol": widen(grad_tol or tol) if large else (grad_tol or tol),
        }
        self.cases.append(entry)

    def keep(self, name, x, tol, large=False) -> str:
        x = (x.to(torch.uint8) if x.dtype == torch.bool else x).detach().contiguous().clone()
        if x.dtype == torch.float64 and tol is not NATIVE:
            # Inputs are exact in bf16; full f64 only where it is needed.
            short = x.to(torch.bfloat16)
            if torch.equal(short.double().nan_to_num(7), x.nan_to_num(7)):
                x = short
            elif large:
                x = x.float()
        self.tensors[name] = x
        return name

    def write(self, folder: Path):
        path = folder / f"{self.name}.safetensors"
        save_file(self.tensors, path)
        print(f"{path.name}: {len(self.cases)} cases, {path.stat().st_size} bytes")


def gradients(output, wrt):
    """The gradient of sum(output * cotangent); 0 where the output does not depend on an input."""
    if not wrt:
        return []
    if not output.requires_grad:
        return [torch.zeros_like(x) for x in wrt]
    cotangent = COTANGENT[: output.numel()].reshape(output.shape).to(output.dtype)
    return torch.autograd.grad(
        (output * cotangent).sum(), wrt, allow_unused=True, materialize_grads=True
    )


def widen(tol):
    return {**tol, "f64": [max(1e-6, t) for t in tol["f64"]]}


def draw_cotangent():
    g = torch.Generator().manual_seed(2)
    return exact(torch.randn(COTANGENT_LEN, generator=g, dtype=torch.float64))


COTANGENT = draw_cotangent()


def write_all(folder: Path, families):
    """One safetensors file a family, the shared cotangent, and the manifest: a case a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for family in families:
        family.write(folder)
    save_file({"cotangent": COTANGENT.to(torch.bfloat16)}, folder / "cotangent.safetensors")
    cases = [json.dumps(c) for family in families for c in family.cases]
    manifest = folder / "manifest.json"
    manifest.write_text("[\n" + ",\n".join(cases) + "\n]\n")
    total = sum(p.stat().st_size for p in folder.iterdir())
    print(f"{manifest.name}: {len(cases)} cases, {total} bytes in all")

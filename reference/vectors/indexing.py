"""Elements and slices chosen by indices, at trace time or at run time."""

import torch
import torch.nn.functional as F

from .case import EXACT, MAP, NATIVE, SUM, Family, given, integers, normal

U8, U32, I64 = torch.uint8, torch.uint32, torch.int64


def long(index):
    return index.to(torch.int64)


def gather(family):
    for name, dim, x, index in [
        ("rank1", 0, normal(7), integers(0, 7, 5)),
        ("rows", 1, normal(5, 33), integers(0, 33, 5, 3, dtype=U32)),
        ("columns", 0, normal(33, 5), integers(0, 33, 2, 5, dtype=U8)),
        ("label", 1, normal(7, 300), integers(0, 300, 7, 1, dtype=U32)),
        ("smaller", 1, normal(4, 5, 3), integers(0, 5, 2, 9, 2)),
        ("repeated", 0, normal(3, 2), given([[1, 1], [1, 0], [1, 1], [1, 0]], I64)),
        ("nothing", 1, normal(3, 4), integers(0, 4, 3, 0)),
        ("rank6", 3, normal(2, 1, 3, 4, 1, 2), integers(0, 4, 2, 1, 3, 2, 1, 2)),
        ("transposed", 1, normal(7, 3).view(("transpose", 0, 1)),
         integers(0, 7, 4, 3).view(("transpose", 0, 1))),
    ]:  # fmt: skip
        meaning = lambda x, i: x.gather(dim, long(i))
        family.case("gather", name, meaning, x, index, attrs={"dim": dim}, tol=EXACT, grad_tol=MAP)
    meaning = lambda x, i: x.gather(1, i)
    family.case("gather", "i64", meaning, integers(-9, 9, 3, 4), integers(0, 4, 3, 2),
                attrs={"dim": 1}, tol=NATIVE)  # fmt: skip


def select(family):
    for name, dim, x, index in [
        ("rank1", 0, normal(7), integers(0, 7, 5)),
        ("rows", 0, normal(33, 5), integers(0, 33, 7, dtype=U32)),
        ("columns", 1, normal(3, 33), integers(0, 33, 5, dtype=U8)),
        ("middle", 1, normal(2, 5, 3), given([4, 0, 4, 4], U32)),
        ("nothing", 0, normal(3, 2), given([], U32)),
        ("of_empty_rows", 0, normal(3, 0), given([2, 0], U32)),
        ("rank6", 2, normal(2, 1, 3, 2, 1, 2), given([2, 0], U32)),
        ("transposed", 0, normal(3, 7).view(("transpose", 0, 1)), integers(0, 7, 4)),
        ("strided", 1, normal(5, 9).view(("slice", 1, 1, 4, 2)), integers(0, 4, 6)),
    ]:
        meaning = lambda x, i: x.index_select(dim, long(i))
        family.case("index_select", name, meaning, x, index, attrs={"dim": dim}, tol=EXACT,
                    grad_tol=MAP)  # fmt: skip
    for name, ids in [
        ("rank0", given(4, U32)),
        ("tokens", integers(0, 33, 7, dtype=U32)),
        ("batch", integers(0, 33, 2, 5)),
        ("repeated", given([[3, 3, 3], [0, 3, 32]], U32)),
        ("nothing", integers(0, 33, 2, 0, dtype=U32)),
    ]:
        meaning = lambda w, i: F.embedding(long(i), w)
        family.case("embedding", name, meaning, normal(33, 6), ids, tol=EXACT, grad_tol=MAP)


def add(family):
    for name, dim, base, index, src in [
        ("rank1", 0, normal(7), integers(0, 7, 9), normal(9)),
        ("rows", 1, normal(5, 33), integers(0, 33, 5, 40, dtype=U32), normal(5, 40)),
        ("columns", 0, normal(4, 5), integers(0, 4, 7, 5, dtype=U8), normal(7, 5)),
        ("smaller", 1, normal(4, 5, 3), integers(0, 5, 2, 9, 2), normal(2, 9, 2)),
        ("nothing", 1, normal(3, 4), integers(0, 4, 3, 0), normal(3, 0)),
        ("all_to_one", 0, normal(2), given([1] * 300, U32), normal(300)),
        ("transposed", 1, normal(7, 3).view(("transpose", 0, 1)), integers(0, 7, 3, 4),
         normal(4, 3).view(("transpose", 0, 1))),
    ]:  # fmt: skip
        meaning = lambda x, i, s: x.scatter_add(dim, long(i), s)
        family.case("scatter_add", name, meaning, base, index, src, attrs={"dim": dim}, tol=SUM)
    for name, dim, base, index, src in [
        ("rank1", 0, normal(7), integers(0, 7, 9), normal(9)),
        ("rows", 0, normal(5, 33), integers(0, 5, 7, dtype=U32), normal(7, 33)),
        ("columns", 1, normal(3, 4), integers(0, 4, 9, dtype=U8), normal(3, 9)),
        ("middle", 1, normal(2, 3, 4), given([2, 2, 0], U32), normal(2, 3, 4)),
        ("nothing", 0, normal(3, 2), given([], U32), normal(0, 2)),
        ("transposed", 0, normal(7, 3).view(("transpose", 0, 1)), given([0, 2, 0, 1], I64),
         normal(7, 4).view(("transpose", 0, 1))),
    ]:  # fmt: skip
        meaning = lambda x, i, s: x.index_add(dim, long(i), s)
        family.case("index_add", name, meaning, base, index, src, attrs={"dim": dim}, tol=SUM)
    scatter = lambda x, i, s: x.scatter_add(0, i, s)
    family.case("scatter_add", "i64", scatter, integers(-9, 9, 3, 2), integers(0, 3, 5, 2),
                integers(-9, 9, 5, 2), attrs={"dim": 0}, tol=NATIVE)  # fmt: skip


def update(base, values, dim, start):
    return torch.cat(
        [base.narrow(dim, 0, start), values,
         base.narrow(dim, start + values.shape[dim], base.shape[dim] - start - values.shape[dim])],
        dim,
    )  # fmt: skip


def moving(family):
    """The position is an i64 scalar known at run time."""
    for name, dim, start, base, values in [
        ("rank1", 0, 2, normal(7), normal(3)),
        ("cache", 1, 4, normal(2, 9, 3), normal(2, 1, 3)),
        ("end", 1, 31, normal(2, 33), normal(2, 2)),
        ("start", 0, 0, normal(5, 3), normal(2, 3)),
        ("all", 0, 0, normal(5, 3), normal(5, 3)),
        ("nothing", 0, 5, normal(5, 3), normal(0, 3)),
        ("transposed", 0, 3, normal(3, 7).view(("transpose", 0, 1)),
         normal(3, 2).view(("transpose", 0, 1))),
    ]:  # fmt: skip
        meaning = lambda b, v, _: update(b, v, dim, start)
        family.case("slice_update", name, meaning, base, values, given(start, I64),
                    attrs={"dim": dim}, tol=EXACT, grad_tol=MAP)  # fmt: skip
    for name, dim, start, length, x in [
        ("rank1", 0, 2, 3, normal(7)),
        ("positions", 0, 5, 4, normal(9, 6)),
        ("last", 1, 32, 1, normal(3, 33)),
        ("all", 1, 0, 7, normal(3, 7)),
        ("transposed", 0, 3, 2, normal(3, 7).view(("transpose", 0, 1))),
    ]:
        meaning = lambda x, _: x.narrow(dim, start, length)
        family.case("dynamic_slice", name, meaning, x, given(start, I64),
                    attrs={"dim": dim, "len": length}, tol=EXACT, grad_tol=MAP)  # fmt: skip


def make() -> Family:
    family = Family("indexing")
    gather(family)
    select(family)
    add(family)
    moving(family)
    return family

"""Cross-entropy of class labels, of logits and of a linear layer."""

import torch
import torch.nn.functional as F

from .case import SUM, Family, given, integers, normal

U32, I64 = torch.uint32, torch.int64
TOL = {"f64": [1e-12, 1e-12], "f32": [1e-5, 5e-6], "bf16": [1e-2, 1e-2]}


def per_row(logits, labels, ignore_index, label_smoothing):
    # PyTorch's own default of -100 would hide a label of ours.
    return F.cross_entropy(
        logits, labels.to(I64), ignore_index=-(2**40) if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing, reduction="none",
    )  # fmt: skip


# (name, rows, classes, labels, ignore_index, label_smoothing)
CASES = [
    ("rows", 7, 33, integers(0, 33, 7, dtype=U32), None, 0.0),
    ("one", 1, 5, integers(0, 5, 1), None, 0.0),
    ("one_class", 3, 1, given([0, 0, 0], U32), None, 0.0),
    ("long", 3, 300, integers(0, 300, 3, dtype=U32), None, 0.0),
    ("ignored", 6, 9, given([-100, 3, 8, -100, 0, -100], I64), -100, 0.0),
    ("ignored_class", 5, 4, given([0, 1, 2, 0, 3], U32), 0, 0.0),
    ("all_ignored", 3, 9, given([-100, -100, -100], I64), -100, 0.0),
    ("smoothed", 7, 33, integers(0, 33, 7, dtype=U32), None, 0.125),
    ("smoothed_fully", 3, 7, integers(0, 7, 3), None, 1.0),
    ("smoothed_ignored", 5, 9, given([4, -1, 0, 8, -1], I64), -1, 0.25),
    ("nothing", 0, 9, given([], U32), None, 0.0),
]


def make() -> Family:
    family = Family("losses")
    for name, n, classes, labels, ignore_index, smoothing in CASES:
        attrs = {"ignore_index": ignore_index, "label_smoothing": smoothing}
        row = lambda logits, labels: per_row(logits, labels, ignore_index, smoothing)
        family.case("cross_entropy", name, row, normal(n, classes, scale=2), labels, attrs=attrs,
                    tol=TOL)  # fmt: skip
        linear = lambda x, weight, labels: row(x @ weight.T, labels)
        family.case("linear_cross_entropy", name, linear, normal(n, 5), normal(classes, 5), labels,
                    attrs=attrs, tol=TOL)  # fmt: skip
    large = normal(4, 9, scale=1000)
    family.case("cross_entropy", "large", lambda x, i: per_row(x, i, None, 0.0), large,
                integers(0, 9, 4), attrs={"ignore_index": None, "label_smoothing": 0.0}, tol=SUM)
    # More than one chunk of the vocabulary.
    family.case("linear_cross_entropy", "vocabulary", lambda x, w, i: per_row(x @ w.T, i, 7, 0.1),
                normal(5, 3), normal(5000, 3), given([4999, 0, 7, 2500, 4097], U32),
                attrs={"ignore_index": 7, "label_smoothing": 0.1}, tol=TOL)  # fmt: skip
    return family

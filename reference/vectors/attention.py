"""Scaled dot-product attention on [batch, time, heads, head_dim]."""

import math

import torch
import torch.nn.functional as F

from .case import Family, given, integers, normal

TOL = {"f64": [1e-12, 1e-12], "f32": [1e-5, 5e-6], "bf16": [1e-2, 1e-2]}
# The backward pass reads the result as it was rounded, as FlashAttention does.
GRAD_TOL = TOL | {"bf16": [1e-2, 2e-2]}
DEFAULT = {"causal": False, "window": None, "mask": False, "segments": False, "offset": False}


def visible(tq, tk, segments, causal, window, offset):
    """bool[b or 1, 1, tq, tk]: query i stands at position i + offset, key j at position j."""
    query = torch.arange(tq)[:, None] + offset
    key = torch.arange(tk)[None, :]
    seen = torch.ones(tq, tk, dtype=torch.bool)
    if causal:
        seen = seen & (key <= query)
    if window is not None:
        seen = seen & (key > query - window)
    seen = seen[None, None]
    if segments is not None:
        query_segment, key_segment = (s.to(torch.int64) for s in segments)
        seen = seen & (query_segment[:, None, :, None] == key_segment[:, None, None, :])
    return seen


def attend(q, k, v, scale, seen, mask=None):
    """A query that sees no key gives 0."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = scale * q @ k.transpose(-1, -2)
    scores = scores if mask is None else scores + mask
    seen = seen.expand(scores.shape)
    top = scores.detach().masked_fill(~seen, -1e300).amax(-1, keepdim=True)
    weights = torch.where(seen, torch.exp(torch.where(seen, scores - top, 0.0)), 0.0)
    total = weights.sum(-1, keepdim=True)
    y = (weights / torch.where(total == 0, 1.0, total)) @ v
    return y.transpose(1, 2)


# name: ([b, tq, hq, d], [tk, hk, dv], attributes)
CASES = {
    "plain": ([2, 3, 2, 4], [5, 2, 4], {}),
    "one_key": ([1, 3, 1, 4], [1, 1, 4], {}),
    "value_width": ([1, 3, 2, 4], [5, 2, 7], {}),
    "scale": ([1, 3, 2, 4], [3, 2, 4], {"scale": 1.5}),
    "causal": ([2, 7, 2, 4], [7, 2, 4], {"causal": True}),
    "causal_odd": ([1, 33, 1, 5], [33, 1, 5], {"causal": True}),
    "causal_suffix": ([2, 3, 2, 4], [7, 2, 4], {"causal": True}),
    "grouped": ([2, 3, 6, 4], [5, 2, 4], {}),
    "grouped_causal": ([1, 5, 4, 8], [5, 1, 8], {"causal": True}),
    "mask": ([2, 3, 2, 4], [5, 2, 4], {"mask": [2, 2, 3, 5]}),
    "mask_broadcast": ([2, 3, 2, 4], [5, 2, 4], {"mask": [3, 5]}),
    "mask_per_batch": ([2, 3, 4, 4], [5, 2, 4], {"mask": [2, 1, 1, 5], "causal": True}),
    "window": ([1, 9, 2, 4], [9, 2, 4], {"causal": True, "window": 3}),
    "window_one": ([1, 5, 1, 4], [5, 1, 4], {"causal": True, "window": 1}),
    "window_suffix": ([1, 3, 2, 4], [9, 2, 4], {"causal": True, "window": 4}),
    "segments": ([2, 6, 2, 4], [6, 2, 4], {"segments": True}),
    "segments_causal": ([2, 6, 4, 4], [6, 2, 4], {"segments": True, "causal": True}),
    "segments_window": ([2, 6, 2, 4], [6, 2, 4], {"segments": True, "causal": True, "window": 2}),
    "offset": ([2, 1, 4, 4], [9, 2, 4], {"causal": True, "offset": 5}),
    "offset_prompt": ([1, 4, 2, 4], [9, 2, 4], {"causal": True, "offset": 0}),
    "offset_window": ([1, 3, 2, 4], [9, 2, 4], {"causal": True, "offset": 4, "window": 3}),
    "offset_mask": ([1, 2, 2, 4], [7, 1, 4], {"causal": True, "offset": 3, "mask": [2, 7]}),
    "everything": (
        [2, 4, 4, 6], [6, 2, 3],
        {"causal": True, "window": 3, "segments": True, "mask": [1, 4, 4, 6], "offset": 2,
         "scale": 0.7},
    ),
    "long": ([1, 40, 2, 8], [40, 1, 8], {"causal": True}),
    "no_queries": ([1, 0, 2, 4], [5, 2, 4], {}),
    "no_batch": ([0, 3, 2, 4], [5, 2, 4], {"causal": True}),
    # The first queries stand before the first key, or in no key's segment.
    "blind_queries": ([1, 5, 2, 4], [3, 2, 4], {"causal": True}),
    "blind_segment": ([1, 3, 2, 4], [3, 2, 4], {"segments": [[[7, 0, 1]], [[0, 0, 1]]]}),
}  # fmt: skip


def segment_leaves(given_ids, b, tq, tk):
    if given_ids is True:
        return [integers(0, 2, b, t, dtype=torch.uint32) for t in (tq, tk)]
    return [given(ids, torch.uint32) for ids in given_ids]


def record(family, name, query, key, how):
    b, tq, hq, d = query
    tk, hk, dv = key
    how = DEFAULT | how
    scale = how.get("scale") or 1 / math.sqrt(d)
    leaves = [normal(*query), normal(b, tk, hk, d), normal(b, tk, hk, dv)]
    if how["mask"]:
        leaves.append(normal(*how["mask"]))
    if how["segments"]:
        leaves += segment_leaves(how["segments"], b, tq, tk)
    if how["offset"] is not False:
        leaves.append(given(how["offset"], torch.int64))

    def meaning(q, k, v, *rest):
        rest = list(rest)
        mask = rest.pop(0) if how["mask"] else None
        segments = (rest.pop(0), rest.pop(0)) if how["segments"] else None
        offset = int(rest.pop(0)) if how["offset"] is not False else tk - tq
        seen = visible(tq, tk, segments, how["causal"], how["window"], offset)
        y = attend(q, k, v, scale, seen, mask)
        compare_with_torch(y, q, k, v, scale, seen, mask)
        return y

    attrs = {
        "scale": scale, "causal": how["causal"], "window": how["window"], "mask": bool(how["mask"]),
        "segments": bool(how["segments"]), "offset": how["offset"] is not False,
    }  # fmt: skip
    family.case("attention", name, meaning, *leaves, attrs=attrs, tol=TOL, grad_tol=GRAD_TOL)


def compare_with_torch(y, q, k, v, scale, seen, mask):
    """`attend` is PyTorch's own attention wherever that one has a value."""
    if y.numel() == 0 or not seen.any(-1).all():
        return
    bias = torch.where(seen, 0.0 if mask is None else mask.detach(), -math.inf)
    q, k, v = (x.detach().transpose(1, 2) for x in (q, k, v))
    bias = bias.expand(q.shape[0], q.shape[1], -1, -1).to(q.dtype)
    theirs = F.scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=True)
    torch.testing.assert_close(y.detach(), theirs.transpose(1, 2), rtol=1e-12, atol=1e-12)


def make() -> Family:
    family = Family("attention")
    for name, (query, key, how) in CASES.items():
        record(family, name, query, key, how)
    return family

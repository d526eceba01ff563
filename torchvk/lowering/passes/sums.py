"""Sums: constants that are added one after the other; sums of products, which are matrix products; sums of squares that
the summands are divided by."""

from __future__ import annotations

import numpy as np

from torchvk.lowering.draft import Call, Draft, Value, constant
from torchvk.lowering.passes.fold import MAX_BYTES
from torchvk.lowering.passes.rewrite import Rewriter, rewrite


def fuse_sums(draft: Draft) -> Draft:
    return rewrite(draft, {"add": _constants, "sum": _weighted, "div": _normalize})


def _constants(rewriter: Rewriter, call: Call) -> Value | None:
    """(x + a) + b with constants a and b: x + (a + b), as the position and type embeddings of a transformer are.
    float only: differs by rounding."""
    for inner, b in (call.inputs, call.inputs[::-1]):
        first = rewriter.producer(inner, "add")
        if first is None or inner is None or b is None or b.array is None or rewriter.uses.get(inner, 0) != 1:
            continue
        for x, a in (first.inputs, first.inputs[::-1]):
            if x is None or a is None or a.array is None or x.array is not None or not x.dtype.is_float:
                continue
            shape = np.broadcast_shapes(a.shape, b.shape)
            if inner.type != call.outputs[0].type or x.type.nbytes > max(MAX_BYTES, a.type.nbytes + b.type.nbytes):
                continue
            joined = np.asarray(a.array + b.array, dtype=x.dtype.numpy).reshape(shape)
            return rewriter.op("add", x, constant(joined, a.name), like=call)
    return None


def _weighted(rewriter: Rewriter, call: Call) -> Value | None:
    """Σ_s x[b, s, c] · w[b, s, 1]: the product of w as rows [b, 1, s] with x, which writes no products to memory."""
    product = rewriter.producer(call.inputs[0], "mul")
    if product is None or rewriter.uses.get(product.outputs[0], 0) != 1 or tuple(call.attributes.dims) != (1,):
        return None
    for x, w in (product.inputs, product.inputs[::-1]):
        if x is None or w is None or len(x.shape) != 3 or x.type != product.outputs[0].type or not x.dtype.is_float:
            continue
        batch, tokens, columns = x.shape
        if columns < 2 or w.dtype is not x.dtype or w.shape not in ((batch, tokens, 1), (1, tokens, 1)):
            continue
        rows = rewriter.reshape(w, (w.shape[0], 1, tokens), call)
        return rewriter.reshape(rewriter.op("matmul", rows, x, like=call), call.outputs[0].shape, call)
    return None


def _normalize(rewriter: Rewriter, call: Call) -> Value | None:
    """x / max(√Σ x², eps), as torch.nn.functional.normalize is exported."""
    x, divisor = call.inputs
    while (view := rewriter.producer(divisor, "expand")) is not None:
        divisor = view.inputs[0]
    clamp = rewriter.producer(divisor, "clamp")
    if x is None or clamp is None or clamp.attributes.min is None or clamp.attributes.max is not None:
        return None
    root = rewriter.producer(clamp.inputs[0], "sqrt")
    total = rewriter.producer(root.inputs[0], "sum") if root else None
    square = rewriter.producer(total.inputs[0], "mul") if total else None
    if total is None or square is None or square.inputs != (x, x) or not total.attributes.keepdim:
        return None
    if len(total.attributes.dims) != 1 or clamp.attributes.min < 0:
        return None
    attributes = {"dim": total.attributes.dims[0], "eps": clamp.attributes.min}
    return rewriter.op("l2_normalize", x, like=call, attributes=attributes)

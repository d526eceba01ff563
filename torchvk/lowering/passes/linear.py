"""Matrix products: read transposed operands where they lie, and put weight and bias together to a ``linear``."""

from __future__ import annotations

import numpy as np

from torchvk.lowering.draft import Call, Draft, Value, constant
from torchvk.lowering.passes.rewrite import Rewriter, Rule, rewrite
from torchvk.lowering.passes.views import is_dense, strided

# operator → the slot of its bias; that of the residual follows
BIAS = {"linear": 2, "quantized_linear": 3, "conv": 2}


def fuse_linear(draft: Draft) -> Draft:
    return rewrite(rewrite(draft, {"matmul": _matmul}), RULES)


def _matmul(rewriter: Rewriter, call: Call) -> Value | None:
    a, b = call.inputs
    assert a is not None
    assert b is not None
    flags = (bool(call.attributes.transpose_a), bool(call.attributes.transpose_b))
    new_a, transpose_a = _operand(rewriter, a, flags[0], call)
    new_b, transpose_b = _operand(rewriter, b, flags[1], call)
    if not transpose_a and len(new_b.shape) == 2 and new_b.constant and new_a.shape[:-1] == call.outputs[0].shape[:-1]:
        weight = new_b if transpose_b else _transposed(rewriter, new_b)
        if weight is not None:
            return rewriter.op("linear", new_a, weight, None, like=call)
    if (new_a, new_b) == (a, b):
        return None
    rank = len(call.outputs[0].shape)
    # Two matrices give a matrix: keep the rank of the result.
    if len(new_a.shape) < rank and len(new_b.shape) < rank:
        new_a = rewriter.reshape(new_a, (1,) * (rank - len(new_a.shape)) + new_a.shape, call)
    attributes = {"transpose_a": transpose_a, "transpose_b": transpose_b}
    result = rewriter.op("matmul", new_a, new_b, like=call, attributes=attributes)
    return result if result.shape == call.outputs[0].shape else None


def _operand(rewriter: Rewriter, value: Value, flag: bool, call: Call) -> tuple[Value, bool]:
    """The same matrices without the permutes and expands before them, and whether they are to be transposed."""
    base, shape, strides = strided(rewriter, value)
    if base is value:
        return _unswapped(rewriter, value, flag, call)
    if all(size == 1 or stride == 0 for size, stride in zip(shape[:-2], strides[:-2], strict=True)):
        shape, strides = shape[-2:], strides[-2:]
    swapped = (*shape[:-2], shape[-1], shape[-2])
    swapped_strides = (*strides[:-2], strides[-1], strides[-2])
    if base.type.numel != int(np.prod(shape)):
        return value, flag
    if is_dense(shape, strides):
        return rewriter.reshape(base, shape, call), flag
    if is_dense(swapped, swapped_strides):
        return rewriter.reshape(base, swapped, call), not flag
    return value, flag


def _unswapped(rewriter: Rewriter, value: Value, flag: bool, call: Call) -> tuple[Value, bool]:
    """Matrices whose rows come from another place, and transposed on top (the keys of attention): move whole rows,
    and leave the transposition to the product."""
    view = rewriter.producer(value, "reshape")
    moved = view.inputs[0] if view else value
    permute = rewriter.producer(moved, "permute")
    if moved is None or permute is None or permute.inputs[0] is None or moved.shape[-2:] != value.shape[-2:]:
        return value, flag
    *first, row, column = permute.attributes.dims
    if row != len(moved.shape) - 1:
        return value, flag
    rows = rewriter.op("permute", *permute.inputs, like=permute, attributes={"dims": [*first, column, row]})
    return rewriter.reshape(rows, (*value.shape[:-2], value.shape[-1], value.shape[-2]), call), not flag


def _transposed(rewriter: Rewriter, weight: Value) -> Value | None:
    """A constant [K, N] as [N, K], made once however often it is used."""
    if weight.array is None:
        return None
    known: dict[Value, Value] = rewriter.__dict__.setdefault("transposed", {})
    if weight not in known:
        known[weight] = constant(np.ascontiguousarray(weight.array.T), weight.name)
    return known[weight]


def _add(rewriter: Rewriter, call: Call) -> Value | None:
    """``linear(x, w) + b`` with a constant [N], perhaps with a view between them."""
    for product, bias in (call.inputs, call.inputs[::-1]):
        assert product is not None
        assert bias is not None
        view = rewriter.producer(product, "reshape")
        inner = view.inputs[0] if view else product
        made = rewriter.made.get(inner) if inner is not None else None
        if inner is None or made is None or made.op not in BIAS or product.type != call.outputs[0].type:
            continue
        slot, n = BIAS[made.op], inner.shape[-1]
        single = rewriter.uses.get(inner, 0) == 1 and rewriter.uses.get(product, 0) == 1
        fits = bias.array is not None and bias.shape[-1:] == (n,) and bias.type.numel == n and product.shape[-1] == n
        # With an epilogue the addend comes after it: that is no bias.
        plain = made.attributes.epilogue == "none" and all(value is None for value in made.inputs[slot : slot + 2])
        if not single or not fits or not plain:
            continue
        assert bias.array is not None
        flat = constant(bias.array.reshape(n), bias.name)
        operands = (*made.inputs[:slot], flat, *made.inputs[slot + 1 :])
        fused = rewriter.op(made.op, *operands, like=made, attributes=made.attributes)
        return rewriter.reshape(fused, product.shape, call)
    return None


RULES: dict[str, Rule] = {"add": _add}

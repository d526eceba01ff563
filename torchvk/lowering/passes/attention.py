"""``softmax(q kᵀ · scale + mask) v``, as models spell it, becomes one ``attention``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from torchvk.lowering.draft import Call, Draft, Value
from torchvk.lowering.passes.rewrite import Rewriter, rewrite

VIEWS = ("reshape", "permute", "expand")


def fuse_attention(draft: Draft) -> Draft:
    return rewrite(draft, {"matmul": _attention})


@dataclass(frozen=True)
class Scores:
    """``product · factor + mask``, [batch, heads, queries, keys] or, of one head each, [batch, queries, keys]."""

    product: Call
    factor: float
    mask: Value | None
    shape: tuple[int, ...]


def _attention(rewriter: Rewriter, call: Call) -> Value | None:
    """The second product of an attention."""
    weights, values = call.inputs
    if weights is None or values is None or call.attributes.transpose_a or rewriter.uses.get(weights, 0) > 1:
        return None
    softmax, masked_rows = _softmax(rewriter, weights)
    if softmax is None or softmax.inputs[0] is None:
        return None
    scores = _scores(rewriter, softmax.inputs[0])
    if scores is None or scores.product.inputs[0] is None or scores.product.inputs[1] is None:
        return None
    *leading, queries, keys = scores.shape
    batch, heads = leading if len(leading) == 2 else (leading[0], 1)
    flags = scores.product.attributes
    q, q_factor = _operand(rewriter, scores.product.inputs[0], flags.transpose_a, (batch, heads, queries, -1), call)
    k, k_factor = _operand(rewriter, scores.product.inputs[1], not flags.transpose_b, (batch, heads, keys, -1), call)
    v, v_factor = _operand(rewriter, values, call.attributes.transpose_b, (batch, heads, keys, -1), call)
    if q is None or k is None or v is None or v_factor != 1 or k.shape != v.shape:
        return None
    mask = scores.mask
    if mask is not None:
        mask = _mask(rewriter, mask, scores.shape, call)
    attributes = {"scale": scores.factor * q_factor * k_factor, "masked_rows": masked_rows}
    result = rewriter.op("attention", q, k, v, mask, like=call, attributes=attributes)
    moved = rewriter.op("permute", result, like=call, attributes={"dims": [0, 2, 1, 3]})
    return rewriter.reshape(moved, call.outputs[0].shape, call)


def _through_reshapes(rewriter: Rewriter, value: Value | None) -> Value | None:
    while (view := rewriter.producer(value, "reshape")) is not None:
        value = view.inputs[0]
    return value


def _softmax(rewriter: Rewriter, weights: Value) -> tuple[Call | None, Literal["nan", "zero"]]:
    """The softmax over the last dimension behind ``weights``, and what it makes of rows that are all -∞."""
    value = _through_reshapes(rewriter, weights)
    rows: Literal["nan", "zero"] = "nan"
    where = rewriter.producer(value, "where")
    if where is not None:
        # torch's _safe_softmax: where(all(scores == -inf), 0, softmax(scores))
        condition, zero, value = where.inputs
        softmax = rewriter.producer(value, "softmax")
        if softmax is None or _number(zero) != 0 or _fully_masked(rewriter, condition) is not softmax.inputs[0]:
            return None, rows
        rows = "zero"
    softmax = rewriter.producer(value, "softmax")
    if softmax is None or softmax.attributes.dim not in (-1, len(softmax.outputs[0].shape) - 1):
        return None, rows
    if len(softmax.outputs[0].shape) not in (3, 4):
        return None, rows
    # The product's operand: the softmax's result with its leading dimensions flattened, or as it is.
    shape = softmax.outputs[0].shape
    return (softmax if weights.shape[-2:] == shape[-2:] else None), rows


def _fully_masked(rewriter: Rewriter, condition: Value | None) -> Value | None:
    """s, if ``condition`` says of each row whether all of s is -∞: not(any(not(s == -∞)))."""
    outer = rewriter.producer(condition, "logical_not")
    any_ = rewriter.producer(outer.inputs[0], "any") if outer else None
    inner = rewriter.producer(any_.inputs[0], "logical_not") if any_ else None
    equal = rewriter.producer(inner.inputs[0], "eq") if inner else None
    if any_ is None or equal is None or equal.inputs[0] is None or not any_.attributes.keepdim:
        return None
    if tuple(any_.attributes.dims) != (len(equal.inputs[0].shape) - 1,):
        return None
    return equal.inputs[0] if _number(equal.inputs[1]) == -np.inf else None


def _scores(rewriter: Rewriter, value: Value) -> Scores | None:
    """What a softmax is taken of, as a product, a factor and a mask."""
    shape = value.shape
    mask: Value | None = None
    add = rewriter.producer(value, "add")
    if add is not None:
        for first, second in (add.inputs, add.inputs[::-1]):
            if first is not None and first.shape == shape and _product(rewriter, first, shape) is not None:
                value, mask = first, second
                break
        else:
            return None
    found = _product(rewriter, value, shape)
    return None if found is None else Scores(found[0], found[1], mask, shape)


def _product(rewriter: Rewriter, value: Value, shape: tuple[int, ...]) -> tuple[Call, float] | None:
    value, factor = _unscaled(rewriter, value)
    product = rewriter.producer(_through_reshapes(rewriter, value), "matmul")
    if product is None or product.outputs[0].shape[-2:] != shape[-2:]:
        return None
    return product, factor


def _unscaled(rewriter: Rewriter, value: Value) -> tuple[Value, float]:
    """``value`` without multiplications by a number, and their product. Views of what was multiplied are made anew."""
    call = rewriter.made.get(value)
    if call is None:
        return value, 1.0
    if call.op in ("mul", "div"):
        first, second = call.inputs
        for operand, number in ((first, second), (second, first))[: 2 if call.op == "mul" else 1]:
            factor = _number(number)
            if operand is not None and factor is not None and operand.type == value.type:
                inner, more = _unscaled(rewriter, operand)
                return inner, more * factor if call.op == "mul" else more / factor if factor else 0.0
        return value, 1.0
    if call.op in VIEWS and call.inputs[0] is not None:
        inner, factor = _unscaled(rewriter, call.inputs[0])
        if inner is not call.inputs[0]:
            return rewriter.op(call.op, inner, like=call, attributes=call.attributes), factor
    return value, 1.0


def _number(value: Value | None) -> float | None:
    """The one element of a constant."""
    return (
        float(value.array.reshape(()))
        if value is not None and value.array is not None and value.array.size == 1
        else None
    )


def _operand(
    rewriter: Rewriter, value: Value, swapped: bool, shape: tuple[int, int, int, int], call: Call
) -> tuple[Value | None, float]:
    """An operand of a product, [batch, heads, tokens, width] (``swapped``: the last two the other way round), as
    [batch, tokens, heads, width], and the number it was multiplied by. What is permuted to and fro, other passes
    remove."""
    batch, heads, tokens, _ = shape
    value, factor = _unscaled(rewriter, value)
    if value.type.numel % max(batch * heads * tokens, 1) or value.shape[-1 if swapped else -2] != tokens:
        return None, factor
    width = value.shape[-2 if swapped else -1]
    if value.type.numel != batch * heads * tokens * width:
        return None, factor
    last = (width, tokens) if swapped else (tokens, width)
    split = rewriter.reshape(value, (batch, heads, *last), call)
    dims = [0, 3, 1, 2] if swapped else [0, 2, 1, 3]
    return rewriter.op("permute", split, like=call, attributes={"dims": dims}), factor


def _mask(rewriter: Rewriter, mask: Value, shape: tuple[int, ...], call: Call) -> Value:
    """The mask with 4 dimensions, as small as it was before it was broadcast."""
    while (expand := rewriter.producer(mask, "expand")) is not None and expand.inputs[0] is not None:
        mask = expand.inputs[0]
    padded = (1,) * (len(shape) - len(mask.shape)) + mask.shape
    if len(shape) == 3:
        padded = (padded[0], 1, *padded[1:])
    return rewriter.reshape(mask, padded, call)

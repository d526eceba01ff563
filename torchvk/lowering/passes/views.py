"""Views and broadcasts: join them, drop those that change nothing, and let elementwise operators broadcast."""

from __future__ import annotations

import numpy as np
import torch

from torchvk.lowering.draft import Call, Draft, Value, constant
from torchvk.lowering.passes.rewrite import Rewriter, Rule, rewrite

# Operators that broadcast by themselves.
BROADCAST = (
    *("add", "sub", "mul", "div", "floor_divide", "remainder", "fmod", "pow", "minimum", "maximum", "atan2"),
    *("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor"),
    *("bitwise_and", "bitwise_or", "bitwise_xor", "where"),
)


def simplify_views(draft: Draft) -> Draft:
    return rewrite(draft, RULES)


def _reshape(rewriter: Rewriter, call: Call) -> Value | None:
    (x,), shape = _inputs(call), call.outputs[0].shape
    if x.shape == shape:
        return x
    inner = rewriter.producer(x, "reshape")
    return rewriter.reshape(_inputs(inner)[0], shape, call) if inner else None


def _permute(rewriter: Rewriter, call: Call) -> Value | None:
    (x,), dims = _inputs(call), list(call.attributes.dims)
    inner = rewriter.producer(x, "permute")
    if inner:
        dims = [inner.attributes.dims[dim] for dim in dims]
        (x,) = _inputs(inner)
    # Sizes of 1 may go anywhere: nothing moves if the others keep their order.
    moved = [dim for dim in dims if x.shape[dim] != 1]
    if moved == sorted(moved):
        return rewriter.reshape(x, call.outputs[0].shape, call)
    return rewriter.op("permute", x, like=call, attributes={"dims": dims}) if inner else None


def _expand(rewriter: Rewriter, call: Call) -> Value | None:
    (x,), out = _inputs(call), call.outputs[0].type
    if x.type.numel == out.numel:
        return rewriter.reshape(x, out.shape, call)
    inner = rewriter.producer(x, "expand")
    if inner:
        return rewriter.op("expand", *inner.inputs, like=call, attributes={"shape": list(out.shape)})
    return None


def _cast(rewriter: Rewriter, call: Call) -> Value | None:
    (x,) = _inputs(call)
    return x if x.type == call.outputs[0].type else None


def _broadcast(rewriter: Rewriter, call: Call) -> Value | None:
    """Read what an operand is expanded from, as long as the others still give the result its shape."""
    inputs = list(call.inputs)
    changed = False
    for slot, value in enumerate(inputs):
        smaller = _unexpanded(rewriter, value)
        if smaller is None:
            continue
        shapes = [v.shape for i, v in enumerate(inputs) if v is not None and i != slot]
        if np.broadcast_shapes(smaller.shape, *shapes) == call.outputs[0].shape:
            inputs[slot] = smaller
            changed = True
    return rewriter.op(call.op, *inputs, like=call, attributes=call.attributes) if changed else None


def _unexpanded(rewriter: Rewriter, value: Value | None) -> Value | None:
    expand = rewriter.producer(value, "expand")
    if expand:
        return expand.inputs[0]
    full = rewriter.producer(value, "full")
    if full and value is not None and value.shape:
        return constant(np.array(full.attributes.value, value.dtype.numpy), value.name)
    return None


def _inputs(call: Call) -> tuple[Value, ...]:
    return tuple(value for value in call.inputs if value is not None)


RULES: dict[str, Rule] = {
    "reshape": _reshape,
    "permute": _permute,
    "expand": _expand,
    "cast": _cast,
    **dict.fromkeys(BROADCAST, _broadcast),
}


def strided(rewriter: Rewriter, value: Value) -> tuple[Value, tuple[int, ...], tuple[int, ...]]:
    """``value`` as sizes and strides over a value further up, whose elements lie dense and row-major.

    Goes up through reshapes, permutes and expands as far as one strided view can express them.
    """
    chain: list[Call] = []
    base = value
    while (call := rewriter.made.get(base)) is not None and call.op in ("reshape", "permute", "expand"):
        chain.append(call)
        (base,) = _inputs(call)
    x = torch.empty(base.shape, device="meta")
    for call in reversed(chain):
        view = _as_view(x, call)
        if view is None:
            base = call.outputs[0]
            view = torch.empty(base.shape, device="meta")
        x = view
    return base, tuple(x.shape), tuple(x.stride())


def _as_view(x: torch.Tensor, call: Call) -> torch.Tensor | None:
    shape = call.outputs[0].shape
    try:
        if call.op == "permute":
            return x.permute(list(call.attributes.dims))
        return x.expand(shape) if call.op == "expand" else x.view(shape)
    except RuntimeError:
        return None


def is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """True if these strides are row-major without gaps; those of sizes 1 do not matter."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True

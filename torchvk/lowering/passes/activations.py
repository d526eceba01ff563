"""Activation functions that exir takes apart, put together again."""

from __future__ import annotations

from torchvk.lowering.draft import Call, Draft, Value
from torchvk.lowering.passes.rewrite import Rewriter, Rule, rewrite


def fuse_activations(draft: Draft) -> Draft:
    return rewrite(draft, RULES)


def _number(value: Value | None) -> float | None:
    """The number that a constant of one element holds."""
    if value is None or value.array is None or value.array.size != 1:
        return None
    return float(value.array.item())


def _clamp(rewriter: Rewriter, call: Call) -> Value | None:
    """One clamp for two in a row."""
    inner = rewriter.producer(call.inputs[0], "clamp")
    if inner is None:
        return None
    low, high = inner.attributes.min, inner.attributes.max
    if low is not None and high is not None and not low <= high:
        return None
    least, most = call.attributes.min, call.attributes.max
    if least is not None and most is not None and not least <= most:
        return None

    def bounded(bound: float) -> float:
        bound = bound if least is None else max(bound, least)
        return bound if most is None else min(bound, most)

    attributes = {
        "min": least if low is None else bounded(low),
        "max": most if high is None else bounded(high),
    }
    return rewriter.op("clamp", inner.inputs[0], like=call, attributes=attributes)


def _gate(rewriter: Rewriter, value: Value | None) -> Value | None:
    """x of clamp(x + 3, 0, 6)."""
    clamp = rewriter.producer(value, "clamp")
    if clamp is None or (clamp.attributes.min, clamp.attributes.max) != (0, 6):
        return None
    add = rewriter.producer(clamp.inputs[0], "add")
    if add is None:
        return None
    for x, three in (add.inputs, add.inputs[::-1]):
        if x is not None and _number(three) == 3 and x.type == clamp.outputs[0].type and x.dtype.is_float:
            return x
    return None


def _div(rewriter: Rewriter, call: Call) -> Value | None:
    """hardsigmoid, clamp(x + 3, 0, 6) / 6, and hardswish, x times that."""
    numerator, six = call.inputs
    if _number(six) != 6 or numerator is None or numerator.type != call.outputs[0].type:
        return None
    if (x := _gate(rewriter, numerator)) is not None:
        return rewriter.op("hardsigmoid", x, like=call)
    product = rewriter.producer(numerator, "mul")
    if product is not None:
        for x, gate in (product.inputs, product.inputs[::-1]):
            if x is not None and _gate(rewriter, gate) is x:
                return rewriter.op("hardswish", x, like=call)
    return None


def _mul(rewriter: Rewriter, call: Call) -> Value | None:
    """silu, x · sigmoid(x), and hardswish, x · hardsigmoid(x)."""
    for x, gate in (call.inputs, call.inputs[::-1]):
        for op, result in (("sigmoid", "silu"), ("hardsigmoid", "hardswish")):
            made = rewriter.producer(gate, op)
            if made is not None and x is not None and made.inputs[0] is x:
                return rewriter.op(result, x, like=call)
    return None


RULES: dict[str, Rule] = {"clamp": _clamp, "div": _div, "mul": _mul}

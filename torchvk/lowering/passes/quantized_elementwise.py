"""Elementwise functions between dequantize and quantize, with one scale for each tensor: integers in, integers out.

Whatever is computed element by element from one 8-bit tensor alone is a table of its 256 values (``lookup``), made
here by the operators' own references. Sums, differences and products of two 8-bit tensors are
``quantized_arithmetic``.
"""

from __future__ import annotations

import numpy as np

from torchvk import ops
from torchvk.lowering.draft import Array, Call, Draft, Value, constant
from torchvk.lowering.passes.qdq import Static, output_of, static_input, static_output
from torchvk.lowering.passes.rewrite import Rewriter, Rule, rewrite
from torchvk.ops.elementwise import BINARY, UNARY

# What gives each element from those at the same place; "reshape" leaves them in their order.
ELEMENTWISE = {*UNARY, *BINARY, "where", "cast"}
MAX_DEPTH = 24
ARITHMETIC = ("add", "sub", "mul")


def fuse_quantized_elementwise(draft: Draft) -> Draft:
    return rewrite(draft, RULES)


def _quantize(rewriter: Rewriter, call: Call) -> Value | None:
    output = output_of(call)
    if output is None:
        return None
    table = _lookup(rewriter, call)
    return table if table is not None else _arithmetic(rewriter, call)


def _lookup(rewriter: Rewriter, call: Call) -> Value | None:
    source = _source(rewriter, call.inputs[0], 0)
    if source is None:
        return None
    values = {source.quantized: np.arange(256, dtype=np.uint8).view(source.quantized.dtype.numpy)}
    with np.errstate(all="ignore"):
        x = _evaluate(rewriter, call.inputs[0], values)
        (scale, zero) = (_flat(value) for value in (*call.inputs[1:], None)[:2])
        (table,) = ops.get("quantize").reference(call.attributes, [x, scale, zero])
    entries = constant(np.ascontiguousarray(table), call.outputs[0].name)
    result = rewriter.op("lookup", source.quantized, entries, like=call)
    return rewriter.reshape(result, call.outputs[0].shape, call)


def _source(rewriter: Rewriter, value: Value | None, depth: int) -> Static | None:
    """The one 8-bit tensor that ``value`` is computed from element by element, if there is one."""
    static = static_input(rewriter, value)
    call = rewriter.made.get(value) if value is not None else None
    if static is not None or value is None or call is None or depth == MAX_DEPTH:
        return static
    if call.op != "reshape" and call.op not in ELEMENTWISE:
        return None
    found: Static | None = None
    for operand in call.inputs:
        if operand is None or (operand.array is not None and operand.array.size == 1):
            continue
        inner = _source(rewriter, operand, depth + 1)
        # All in one shape but for reshapes of the whole: elements of two operands at one place are from one place.
        if inner is None or (call.op != "reshape" and operand.shape != value.shape):
            return None
        if found is not None and found != inner:
            return None
        found = inner
    return found


def _flat(value: Value | None) -> Array | None:
    """A constant of one element as [1]."""
    return None if value is None or value.array is None else value.array.reshape(1)


def _evaluate(rewriter: Rewriter, value: Value | None, known: dict[Value, Array]) -> Array | None:
    """``value`` for all values of the 8-bit tensor that ``known`` has."""
    if value is None or value in known:
        return None if value is None else known[value]
    if value.array is not None:
        return _flat(value)
    call = rewriter.made[value]
    arrays = [_evaluate(rewriter, operand, known) for operand in call.inputs]
    if call.op == "reshape":
        (result,) = arrays
    else:
        (result,) = ops.get(call.op).reference(call.attributes, arrays)
    assert result is not None
    known[value] = np.asarray(result)
    return known[value]


def _arithmetic(rewriter: Rewriter, call: Call) -> Value | None:
    found = static_output(rewriter, call)
    if found is None or found[0].op not in ARITHMETIC:
        return None
    producer, output = found
    a, b = (static_input(rewriter, value, constants=True) for value in producer.inputs)
    if a is None or b is None:
        return None
    attributes = {"operation": producer.op, **a.attributes("input"), **b.attributes("other"), **output.attributes}
    return rewriter.op("quantized_arithmetic", a.quantized, b.quantized, like=call, attributes=attributes)


RULES: dict[str, Rule] = {"quantize": _quantize}

"""Eight-bit data stays eight-bit where elements only move, or the largest are picked, and where windows are averaged.

dequantize → move becomes move → dequantize: what is dequantized moves down to the quantize that reads it, where the
two cancel (passes/qdq.py), or become a table of 256 entries where their parameters differ. Means between dequantize
and quantize are operators of integers (torchvk.ops.quantized_pooling).
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from torchvk.graph import DType
from torchvk.lowering.draft import Call, Draft, Value, constant
from torchvk.lowering.passes.layout import channels_last
from torchvk.lowering.passes.qdq import Output, Static, output_of, static_input, static_output
from torchvk.lowering.passes.rewrite import Rewriter, rewrite

# Of the first operand (others are indices), and as good on integers. The mapping from integers to numbers is monotone
# (scales are positive), so that the largest ones are the same.
MOVES = ("permute", "expand", "slice", "select", "flip", "repeat", "index", "index_select")
PICKS = ("max_pool", "upsample_nearest", "amax", "amin")
MEANS = ("mean", "avg_pool", "adaptive_avg_pool")


def move_integers(draft: Draft) -> Draft:
    quantized, summed = _quantized(draft)
    return rewrite(draft, lambda rewriter, call: _rule(rewriter, call, quantized, summed))


def _quantized(draft: Draft) -> tuple[dict[Value, Call], set[Value]]:
    """The values that are only read to be quantized, perhaps after they were moved, and how they are; and those that
    are read so, or by arithmetic whose results are."""
    readers: dict[Value, list[Call | None]] = {}
    summed: set[Value] = set()
    for value in draft.outputs:
        readers.setdefault(value, []).append(None)
    found: dict[Value, Call] = {}
    for call in reversed(draft.calls):
        for output in call.outputs:
            ends = [_end(reader, found) for reader in readers.get(output, [])]
            if ends and all(end is not None for end in ends) and ends[0] is not None:
                found[output] = ends[0]
            if all(
                end or _is_summed(reader, summed) for reader, end in zip(readers.get(output, []), ends, strict=True)
            ):
                summed.add(output)
        for operand in call.inputs:
            if operand is not None:
                readers.setdefault(operand, []).append(call)
    return found, summed


def _is_summed(reader: Call | None, summed: set[Value]) -> bool:
    return reader is not None and reader.op in ("add", "sub", "mul", "relu", "clamp") and reader.outputs[0] in summed


def _end(reader: Call | None, found: dict[Value, Call]) -> Call | None:
    """The quantize call that ``reader`` is, or that reads what it moves."""
    if reader is None or (reader.op == "quantize" and output_of(reader) is not None):
        return reader
    return found.get(reader.outputs[0]) if reader.op in (*MOVES, *PICKS, "reshape", "pad", "cat") else None


def _rule(rewriter: Rewriter, call: Call, quantized: dict[Value, Call], summed: set[Value]) -> Value | None:
    end = quantized.get(call.outputs[0]) if call.outputs else None
    if call.op == "permute" and call.outputs[0] in summed and _is_to_channels_last(call):
        return _moved(rewriter, call, call.attributes)
    if call.op in PICKS or call.op == "reshape" or (call.op in MOVES and end is not None) or _returns(rewriter, call):
        return _moved(rewriter, call, call.attributes)
    if call.op == "pad" and call.attributes.value == 0:
        return _padded(rewriter, call)
    if call.op == "cat":
        return _cat(rewriter, call, None if end is None else output_of(end))
    return _mean(rewriter, call) if call.op == "quantize" else None


def _is_to_channels_last(call: Call) -> bool:
    """As passes/layout.py has it where one operand of a sum is an image and the other is not. (In three dimensions it
    is the same as back, which goes the other way.)"""
    dims = tuple(call.attributes.dims)
    return len(dims) > 3 and dims == channels_last(len(dims))


def _returns(rewriter: Rewriter, call: Call) -> bool:
    """Whether a permutation takes back the one of the integers before it."""
    dequantize = rewriter.producer(call.inputs[0], "dequantize") if call.op == "permute" else None
    inner = rewriter.producer(dequantize.inputs[0], "permute") if dequantize else None
    if inner is None:
        return False
    dims = [inner.attributes.dims[dim] for dim in call.attributes.dims]
    return dims == sorted(dims)


def _dequantized(rewriter: Rewriter, q: Value, static: Static, dtype: DType, call: Call) -> Value:
    """Integers as the numbers that they stand for."""
    ones = [1] * len(q.shape)
    scale = constant(np.full(ones, static.scale, np.float32))
    zero = constant(np.full(ones, static.zero_point, np.int32))
    return rewriter.op("dequantize", q, scale, zero, like=call, attributes={"dtype": dtype})


def _moved(rewriter: Rewriter, call: Call, attributes: Any) -> Value | None:
    static = static_input(rewriter, call.inputs[0])
    if static is None or not _every_window_has_elements(call):
        return None
    result = rewriter.op(call.op, static.quantized, *call.inputs[1:], like=call, attributes=attributes)
    return _dequantized(rewriter, result, static, call.outputs[0].dtype, call)


def _every_window_has_elements(call: Call) -> bool:
    """Without any the largest one is minus infinity, which integers have not."""
    if call.op != "max_pool":
        return True
    return not any(call.attributes.padding) or all(step == 1 for step in call.attributes.dilation)


def _padded(rewriter: Rewriter, call: Call) -> Value | None:
    """Zeros are zero points."""
    static = static_input(rewriter, call.inputs[0])
    if static is None:
        return None
    return _moved(rewriter, call, {"padding": call.attributes.padding, "value": static.zero_point})


def _cat(rewriter: Rewriter, call: Call, output: Output | None) -> Value | None:
    """Of integers with one set of parameters: what all have, or what the whole is quantized with. Constants may be
    among them."""
    parts = [static_input(rewriter, value) for value in call.inputs]
    known = [part for part in parts if part is not None]
    constants = [value for value, part in zip(call.inputs, parts, strict=True) if part is None]
    if not known or any(value is None or value.array is None for value in constants):
        return None
    first = known[0]
    same = {(part.scale, part.zero_point, part.quantized.dtype) for part in known}
    if len(same) == 1 and not constants:
        joined = rewriter.op("cat", *(part.quantized for part in known), like=call, attributes=call.attributes)
        return _dequantized(rewriter, joined, first, call.outputs[0].dtype, call)
    if output is None:
        return None
    wanted = Static(first.quantized, output.scale, output.zero_point)
    pieces = [
        part.quantized
        if part is not None
        and (part.scale, part.zero_point, part.quantized.dtype) == (output.scale, output.zero_point, output.dtype)
        else _quantize(rewriter, value, output, call)
        for part, value in zip(parts, call.inputs, strict=True)
    ]
    joined = rewriter.op("cat", *pieces, like=call, attributes=call.attributes)
    return _dequantized(rewriter, joined, wanted, call.outputs[0].dtype, call)


def _quantize(rewriter: Rewriter, value: Value | None, output: Output, call: Call) -> Value:
    assert value is not None
    ones = [1] * len(value.shape)
    attributes = {"dtype": output.dtype, "quant_min": output.low, "quant_max": output.high}
    scale, zero = np.full(ones, output.scale, np.float32), np.full(ones, output.zero_point, np.int32)
    return rewriter.op("quantize", value, constant(scale), constant(zero), like=call, attributes=attributes)


def _mean(rewriter: Rewriter, call: Call) -> Value | None:
    found = static_output(rewriter, call, through=("reshape",))
    if found is None or found[0].op not in MEANS:
        return None
    mean, output = found
    static = static_input(rewriter, mean.inputs[0])
    if static is None or mean.outputs[0].dtype is not DType.FLOAT32:
        return None
    parameters = {**static.attributes("input"), **output.attributes}
    if mean.op != "mean":
        attributes = {**asdict(mean.attributes), **parameters}
        result = rewriter.op(f"quantized_{mean.op}", static.quantized, like=mean, attributes=attributes)
        return rewriter.reshape(result, call.outputs[0].shape, call)
    shape, dims = static.quantized.shape, sorted(mean.attributes.dims)
    if not shape or dims != list(range(dims[0], dims[-1] + 1)) or 0 in shape:
        return None
    # One window over dimensions that are neighbours.
    count = math.prod(shape[dims[0] : dims[-1] + 1])
    flat = (math.prod(shape[: dims[0]]), count, math.prod(shape[dims[-1] + 1 :]))
    window = {"kernel": [count], "stride": [1], "padding": [0], "output": [1]}
    x = rewriter.reshape(static.quantized, flat, mean)
    result = rewriter.op("quantized_avg_pool", x, like=mean, attributes={**window, **parameters})
    return rewriter.reshape(result, call.outputs[0].shape, call)

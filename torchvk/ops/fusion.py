"""Two dispatches that can be one: what the plan asks when one of them only reads what the other writes.

A fused dispatch gives bit for bit what the two give. It saves a barrier (1.7 µs on an H200, before any work) and a pass
over memory. Operators know nothing of it, and neither do files.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from torchvk.ops.operator import Dispatch

ROWS = ("layer_norm_rows_f32", "layer_norm_rows_f16")


@dataclass(frozen=True)
class _Tokens:
    """Quantization of rows [rows, count] to int8 of the same width, with a scale and a zero point a row."""

    rows: int
    count: int
    formula: int
    symmetric: bool
    quant_min: int
    quant_max: int
    smallest_scale: float


def fuse(producer: Dispatch, consumer: Dispatch) -> Dispatch | None:
    """One dispatch in place of both, or None.

    ``producer`` writes one buffer, which is all that ``consumer`` reads. The result has the producer's buffers, and
    after them those that the consumer writes, in order.
    """
    if producer.kernel not in ROWS:
        return None
    tokens = _tokens(consumer)
    if tokens is None or struct.unpack_from("<2I", producer.push) != (tokens.rows, tokens.count):
        return None
    return Dispatch(
        kernel=producer.kernel + "_quantize",
        buffers=(*producer.buffers, *(arg for arg in consumer.buffers if arg.write)),
        groups=producer.groups,
        constants=(*producer.constants, tokens.formula, tokens.symmetric),
        push=producer.push + struct.pack("<2if", tokens.quant_min, tokens.quant_max, tokens.smallest_scale),
        bytes=producer.bytes + tokens.rows * (tokens.count + 8),
        flops=producer.flops + consumer.flops,
    )


def _tokens(dispatch: Dispatch) -> _Tokens | None:
    """What a dispatch of torchvk.ops.quantization does, if it is of that kind."""
    if dispatch.kernel == "quantize_tokens":
        _, _, _, formula, symmetric, floats = dispatch.constants
        rows, count, columns, group, _, low, high, smallest = struct.unpack_from("<5I2if", dispatch.push)
        if floats or group != columns:
            return None
    elif dispatch.kernel == "quantize_rows_tokens":
        _, _, formula, symmetric, _ = dispatch.constants
        rows, count, columns, _, low, high, smallest = struct.unpack_from("<4I2if", dispatch.push)
    else:
        return None
    if count != columns:
        return None
    return _Tokens(rows, count, int(formula), bool(symmetric), low, high, smallest)

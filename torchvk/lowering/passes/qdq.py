"""Dequantize → operator → quantize: what the passes that make integer operators of these have in common.

Such a pass comes before constants are folded. It takes an operator whose operands are dequantized
(:func:`static_input`, :func:`constant_weight`) and puts the integer operator with a float result in its place;
:func:`requantize` then lets an integer operator whose result is quantized at once give integers itself. What no pass
takes stays as it is and is right in floating point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from torchvk.graph import DType
from torchvk.lowering.draft import Array, Call, Draft, Value, constant
from torchvk.lowering.passes.rewrite import Rewriter, Rule, rewrite
from torchvk.ops.quantize import spread

EIGHT_BITS = (DType.INT8, DType.UINT8)

# Operators with the attributes output_dtype, output_scale, output_zero_point, output_min and output_max, whose float
# result is what they quantize where output_dtype is given.
REQUANTIZING: set[str] = set()


@dataclass(frozen=True)
class Static:
    """A value that is (``quantized`` − zero_point) · scale with one scale for all."""

    quantized: Value
    scale: float
    zero_point: int

    def attributes(self, prefix: str) -> dict[str, Any]:
        """As integer operators have them: ``{prefix}_scale`` and ``{prefix}_zero_point``."""
        return {f"{prefix}_scale": self.scale, f"{prefix}_zero_point": self.zero_point}


@dataclass(frozen=True)
class QuantizedConstant:
    """A constant that is (data − zero_point) · scale; a scale for every data.shape / scale.shape elements.

    ``zero_point`` is None where all are 0. ``value`` is the constant with the data.
    """

    value: Value
    data: Array
    scale: Array
    zero_point: Array | None


@dataclass(frozen=True)
class Output:
    """How a float result is quantized: bounds that an activation sets on it are in ``low`` and ``high``."""

    dtype: DType
    scale: float
    zero_point: int
    low: int
    high: int

    @property
    def attributes(self) -> dict[str, Any]:
        return {
            "output_dtype": self.dtype.value,
            "output_scale": self.scale,
            "output_zero_point": self.zero_point,
            "output_min": self.low,
            "output_max": self.high,
        }


def _single(value: Value | None) -> float | int | None:
    """The number in a constant of one element, 0 for none; None if it is no such constant."""
    if value is None:
        return 0
    if value.array is None or value.array.size != 1:
        return None
    return value.array.item()  # type: ignore[no-any-return]


def _parameters(call: Call) -> tuple[float, int] | None:
    """Scale and zero point of a quantize or dequantize call per tensor with constants."""
    scale, zero = _single(call.inputs[1]), _single(call.inputs[2] if len(call.inputs) > 2 else None)
    return None if scale is None or zero is None else (float(scale), int(zero))


def static_input(
    rewriter: Rewriter, value: Value | None, dtypes: tuple[DType, ...] = EIGHT_BITS, constants: bool = False
) -> Static | None:
    """What ``value`` is dequantized from, if that is per tensor and with constant parameters.

    Constants that are dequantized are none, unless ``constants`` asks for them.
    """
    call = rewriter.producer(value, "dequantize")
    if call is None or call.inputs[0] is None:
        return None
    quantized, parameters = call.inputs[0], _parameters(call)
    if parameters is None or quantized.dtype not in dtypes or (quantized.constant and not constants):
        return None
    return Static(quantized, *parameters)


VIEWS = ("reshape", "permute", "expand")


def static_view(rewriter: Rewriter, value: Value | None, dtypes: tuple[DType, ...] = EIGHT_BITS) -> Static | None:
    """As :func:`static_input`, also where views come between: they are emitted again, of the quantized value."""
    views: list[Call] = []
    while (call := rewriter.made.get(value) if value is not None else None) is not None and call.op in VIEWS:
        views.append(call)
        value = call.inputs[0]
    static = static_input(rewriter, value, dtypes)
    if static is None:
        return None
    quantized = static.quantized
    for call in reversed(views):
        quantized = rewriter.op(call.op, quantized, like=call, attributes=call.attributes)
    return replace(static, quantized=quantized)


def constant_weight(rewriter: Rewriter, value: Value | None) -> QuantizedConstant | None:
    """The constants that ``value`` is dequantized from."""
    call = rewriter.producer(value, "dequantize")
    if call is None:
        return None
    data, scale, zero = (*call.inputs, None)[:3]
    if data is None or scale is None or data.array is None or scale.array is None:
        return None
    if zero is not None and zero.array is None:
        return None
    zeros = None if zero is None or not zero.array.any() else zero.array  # type: ignore[union-attr]
    return QuantizedConstant(data, data.array, scale.array, zeros)


def centered(weight: QuantizedConstant) -> QuantizedConstant:
    """Without zero points, and in int8, where the data less those have room in it."""
    zero = 0 if weight.zero_point is None else spread(weight.zero_point.astype(np.int64), weight.data.shape)
    data = weight.data.astype(np.int64) - zero
    if not data.size or data.min() < -128 or data.max() > 127:
        return weight
    return replace(weight, data=data.astype(np.int8), zero_point=None)


def channel_scales(weight: QuantizedConstant, axis: int, channels: int) -> Array | None:
    """float32 [channels], if there are no zero points and no other dimension than ``axis`` has scales of its own."""
    scale = weight.scale
    if weight.zero_point is not None or scale.size not in (1, channels) or scale.shape[axis] != scale.size:
        return None
    return np.ascontiguousarray(np.broadcast_to(scale.reshape(-1).astype(np.float32), (channels,)))


def weight_constant(weight: QuantizedConstant) -> Value:
    """The data, stored in 4 bits where they fit."""
    small = weight.data.dtype == np.int8 and weight.data.size and weight.data.min() >= -8 and weight.data.max() <= 7
    return constant(weight.data, weight.value.name, DType.INT4 if small else None)


def output_of(call: Call) -> Output | None:
    """What a quantize call makes of its input, if that is per tensor, with constants, to 8 bits."""
    parameters = _parameters(call)
    if parameters is None or parameters[0] <= 0 or call.attributes.dtype not in EIGHT_BITS:
        return None
    attributes = call.attributes
    return Output(attributes.dtype, *parameters, attributes.quant_min, attributes.quant_max)


def bounded(output: Output, activation: Call) -> Output | None:
    """``output`` with the bounds of a relu or clamp before it: exact, since rounding is monotone."""
    if activation.op == "relu":
        low, high = 0.0, None
    elif activation.op == "clamp":
        low, high = activation.attributes.min, activation.attributes.max
    else:
        return None
    bottom = output.low if low is None else max(output.low, quantized_number(low, output))
    top = output.high if high is None else min(output.high, quantized_number(high, output))
    # torch's clamp gives ``max`` where the bounds exclude each other.
    return replace(output, low=min(bottom, top), high=top)


def quantized_number(value: float, output: Output) -> int:
    """``value`` as ``output`` quantizes it, in float32."""
    if math.isnan(value):
        return output.low
    with np.errstate(all="ignore"):
        q = np.rint(np.float32(value) * np.float32(1 / output.scale)) + np.float32(output.zero_point)
    return int(np.clip(q, output.low, output.high))


def static_output(rewriter: Rewriter, call: Call, through: tuple[str, ...] = ()) -> tuple[Call, Output] | None:
    """The operator whose result ``call``, a quantize, alone reads, through relu and clamp, and the quantization.

    ``through``: other operators to look through, such as "reshape", which the caller must put back.
    """
    output = output_of(call)
    value = call.inputs[0]
    while output is not None and value is not None and rewriter.uses.get(value, 0) == 1:
        producer = rewriter.made.get(value)
        if producer is None:
            return None
        if producer.op not in ("relu", "clamp", *through):
            return producer, output
        if producer.op not in through:
            output = bounded(output, producer)
        value = producer.inputs[0]
    return None


def requantize(draft: Draft) -> Draft:
    """Integer operators whose float result is quantized at once give integers."""
    return rewrite(draft, REQUANTIZE)


def _requantize(rewriter: Rewriter, call: Call) -> Value | None:
    found = static_output(rewriter, call, through=("reshape",))
    if found is None:
        return None
    producer, output = found
    if producer.op not in REQUANTIZING or producer.attributes.output_dtype is not None or len(producer.outputs) != 1:
        return None
    attributes = replace(producer.attributes, **output.attributes)
    result = rewriter.op(producer.op, *producer.inputs, like=producer, attributes=attributes)
    return rewriter.reshape(result, call.outputs[0].shape, call)


def drop_pairs(draft: Draft) -> Draft:
    """quantize(dequantize(q)) with one set of parameters is q, as far as q is within the range."""
    return rewrite(draft, {"quantize": _drop_pair})


def _drop_pair(rewriter: Rewriter, call: Call) -> Value | None:
    output, static = output_of(call), static_input(rewriter, call.inputs[0])
    if output is None or static is None or static.quantized.type != call.outputs[0].type:
        return None
    if (static.scale, static.zero_point) != (output.scale, output.zero_point):
        return None
    limits = np.iinfo(output.dtype.numpy)
    if (output.low, output.high) == (limits.min, limits.max):
        return static.quantized
    bounds = {"min": output.low, "max": output.high}
    made = rewriter.made.get(static.quantized)
    if made is not None and made.op == "quantize" and _within(made, output):
        return static.quantized
    return rewriter.op("clamp", static.quantized, like=call, attributes=bounds)


def _within(call: Call, output: Output) -> bool:
    return bool(output.low <= call.attributes.quant_min and call.attributes.quant_max <= output.high)


REQUANTIZE: dict[str, Rule] = {"quantize": _requantize}

"""The option ``force_fp16``: float32 becomes float16 inside of a delegate."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from torchvk.graph import DType
from torchvk.lowering.draft import Array, Call, Draft, Value, constant

LARGEST = float(np.finfo(np.float16).max)  # 65504
SMALLEST = float(np.finfo(np.float16).tiny)  # 2^-14
# Inputs that stay as they are: scales (and a quantized weight's bias) may be float32 beside float16 activations.
KEPT_INPUTS = {
    "quantized_linear": {1, 2, 3, 5},
    "quantized_conv": {1, 2, 3},
    "quantize": {1, 2},
    "dequantize": {1, 2},
    "quantized_embedding": {0, 1, 3},
}
# What changes no value: between the interface and integers it moves float32.
MOVES = ("reshape", "permute", "expand", "slice", "select", "flip", "repeat")
# Attributes that are values of the operator's dtype, so that they must be in its range.
VALUES = ("value", "min", "max")


def to_float16(draft: Draft, keep_interface: bool = False) -> Draft:
    """Every float32 value as float16; raises :class:`Refused` if an operator cannot do that.

    ``keep_interface``: inputs and outputs stay float32 and are converted on the way in and out, unless they are
    quantized first or dequantized last, so that integers stay what they are in float32. Finite constants beyond
    float16 (masks of -3.4e38) become ±65504, infinities stay.
    """
    new = Draft()
    renamed: dict[Value, Value] = {}
    exact: dict[Value, Value] = {}  # values that are there in float32, too; what nobody reads of them is removed later

    def now(value: Value) -> Value:
        if value not in renamed:
            renamed[value] = _converted(value)
        return renamed[value]

    for value in draft.inputs:
        if keep_interface:
            new.inputs.append(value)
            if value.dtype is DType.FLOAT32:
                exact[value] = value
                (renamed[value],) = new.emit("cast", [value], {"dtype": DType.FLOAT16}, value.name)
            else:
                renamed[value] = value
        else:
            new.inputs.append(now(value))
    for call in draft.calls:
        kept = KEPT_INPUTS.get(call.op, set())
        inputs = [v if v is None or (slot in kept and v.constant) else now(v) for slot, v in enumerate(call.inputs)]
        first = call.inputs[0] if call.inputs else None
        if call.op == "quantize" and first in exact:
            inputs[0] = exact[first]
        elif call.op in MOVES and first in exact:
            exact[call.outputs[0]] = _as_it_is(new, call, [exact[first], *inputs[1:]])
        elif call.op == "dequantize" and keep_interface and _is_static(call):
            exact[call.outputs[0]] = _as_it_is(new, call, inputs)
        attributes = _attributes(call.op, call.attributes)
        outputs = new.emit(call.op, inputs, attributes, call.outputs[0].name, call.source)
        renamed.update(zip(call.outputs, outputs, strict=True))
    for value in draft.outputs:
        result = exact.get(value) or now(value)
        if keep_interface and result.dtype is not value.dtype:
            (result,) = new.emit("cast", [result], {"dtype": value.dtype}, value.name)
        new.outputs.append(result)
    return new


def _is_static(call: Call) -> bool:
    """Whether a tensor is dequantized by constants."""
    quantized, *parameters = call.inputs
    known = all(value is None or value.constant for value in parameters)
    return known and quantized is not None and not quantized.constant


def _as_it_is(draft: Draft, call: Call, inputs: list[Value | None]) -> Value:
    (result,) = draft.emit(call.op, inputs, call.attributes, call.outputs[0].name, call.source)
    return result


def _converted(value: Value) -> Value:
    if value.dtype is not DType.FLOAT32:
        return value
    if value.array is not None:
        return constant(_clamped(value.array), value.name)
    return Value(type(value.type)(DType.FLOAT16, value.shape), value.name, value.constant)


def _clamped(array: Array) -> Array:
    finite = np.clip(array, -LARGEST, LARGEST)
    result: Array = np.where(np.isinf(array), array, finite).astype(np.float16)
    return result


def _attributes(op: str, attributes: Any) -> Any:
    plain = msgspec.to_builtins(attributes)
    if op in ("quantized_linear", "choose_qparams"):
        # The smallest scale: with one that rounds to 0, rows of zeros would be quantized to 0 / 0.
        plain["eps"] = max(plain["eps"], SMALLEST)
    if plain.get("dtype") == DType.FLOAT32.value:
        plain["dtype"] = DType.FLOAT16.value
    for name in VALUES:
        number = plain.get(name)
        if isinstance(number, float) and LARGEST < abs(number) < float("inf"):
            plain[name] = LARGEST if number > 0 else -LARGEST
    return plain

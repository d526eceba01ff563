"""Convolutions of dequantized weights (and activations) are ``quantized_conv``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from torchvk import ops
from torchvk.lowering.draft import Array, Call, Draft, Value, constant
from torchvk.lowering.passes.qdq import (
    EIGHT_BITS,
    REQUANTIZING,
    centered,
    channel_scales,
    constant_weight,
    static_input,
    weight_constant,
)
from torchvk.lowering.passes.rewrite import Rewriter, Rule, rewrite
from torchvk.ops.quantize import spread

REQUANTIZING.add("quantized_conv")
MOVEMENT = ("permute", "reshape", "flip")


def move_weights(draft: Draft) -> Draft:
    """Weights that are moved after they are dequantized are dequantized where they have arrived."""
    return rewrite(draft, {"conv": _moved})


def quantize_conv(draft: Draft) -> Draft:
    return rewrite(rewrite(draft, {"conv": _conv}), RULES)


def _moved(rewriter: Rewriter, call: Call) -> Value | None:
    x, weight, *rest = call.inputs
    chain: list[Call] = []
    base = weight
    while (made := rewriter.made.get(base) if base is not None else None) is not None and made.op in MOVEMENT:
        chain.append(made)
        base = made.inputs[0]
    found = constant_weight(rewriter, base) if chain else None
    if found is None or weight is None:
        return None
    data, scale = _move(chain, found.data), _reduced(_move(chain, spread(found.scale, found.data.shape)))
    zero = None
    if found.zero_point is not None:
        zero = _reduced(_move(chain, spread(found.zero_point, found.data.shape)), scale.shape)
    name = found.value.name
    given = [constant(data, name, found.value.dtype), constant(scale, name)]
    given += [] if zero is None else [constant(zero, name)]
    w = rewriter.op("dequantize", *given, like=chain[-1], attributes={"dtype": weight.dtype})
    return rewriter.op("conv", x, w, *rest, like=call, attributes=call.attributes)


def _move(chain: list[Call], array: Array) -> Array:
    for call in reversed(chain):
        (array,) = ops.get(call.op).reference(call.attributes, [array])
    return array


def _reduced(array: Array, like: tuple[int, ...] | None = None) -> Array:
    """One element where all along a dimension are equal; or the shape ``like``, if that holds them all."""
    for axis in range(array.ndim):
        one = array.take([0], axis=axis)
        if (array == one).all() if like is None else like[axis] == 1:
            array = one
    return np.ascontiguousarray(array)


def _conv(rewriter: Rewriter, call: Call) -> Value | None:
    x, weight, bias, residual = (*call.inputs, None, None)[:4]
    found = constant_weight(rewriter, weight)
    if found is None or x is None or residual is not None:
        return None
    found = centered(found)
    if found.data.dtype != np.int8:
        return None
    y = call.outputs[0]
    depthwise = len(found.data.shape) < len(x.shape)
    scale = channel_scales(found, -1 if depthwise else 0, y.shape[-1])
    if scale is None or (bias is not None and bias.array is None):
        return None
    b = None if bias is None or bias.array is None else constant(bias.array.astype(np.float32), bias.name)
    operands = [weight_constant(found), constant(scale, found.value.name), b]
    q, more, own = _activation(rewriter, x)
    attributes = {**_attributes(call.attributes), "dtype": y.dtype.value, **own}
    return rewriter.op("quantized_conv", q, *operands, *more, like=call, attributes=attributes)


def _attributes(attributes: Any) -> dict[str, Any]:
    names = ("stride", "padding", "dilation", "input_dilation", "groups", "epilogue")
    return {name: getattr(attributes, name) for name in names}


def _activation(rewriter: Rewriter, x: Value) -> tuple[Value, list[Value | None], dict[str, Any]]:
    """What takes the place of x, operands for its scale and zero point, and attributes."""
    permute = rewriter.producer(x, "permute")
    inner = permute.inputs[0] if permute else x

    def moved(q: Value) -> Value:
        return rewriter.op("permute", q, like=permute, attributes=permute.attributes) if permute else q

    static = static_input(rewriter, inner)
    if static is not None:
        return moved(static.quantized), [], {"activation": "static", **static.attributes("input")}
    call = rewriter.producer(inner, "dequantize")
    if call is not None:
        q, scale, zero = (*call.inputs, None)[:3]
        if q is not None and scale is not None and q.dtype in EIGHT_BITS and scale.type.numel == 1:
            return moved(q), [scale, zero], {"activation": "dynamic"}
    return x, [], {"activation": "none"}


def look_behind_permutes(draft: Draft) -> Draft:
    """The range of a tensor is that of the tensor before it was permuted, so that nobody reads the permuted one but
    who needs it."""
    made: dict[Value, Call] = {}
    new = Draft(list(draft.inputs), [], list(draft.outputs))
    for call in draft.calls:
        permute = made.get(call.inputs[0]) if call.op == "choose_qparams" and call.inputs[0] is not None else None
        if permute is not None and permute.op == "permute" and all(y.type.numel == 1 for y in call.outputs):
            call = replace(call, inputs=(permute.inputs[0], *call.inputs[1:]))
        made.update(dict.fromkeys(call.outputs, call))
        new.calls.append(call)
    return new


def _activated(rewriter: Rewriter, call: Call) -> Value | None:
    """Into a convolution whose result is not quantized (if it is, the bounds do it)."""
    name = call.op
    if name == "clamp":
        if (call.attributes.min, call.attributes.max) != (0, 6):
            return None
        name = "relu6"
    value = call.inputs[0]
    permute = rewriter.producer(value, "permute")
    inner = permute.inputs[0] if permute else value
    layer = rewriter.producer(inner, "quantized_conv")
    if layer is None or value is None or inner is None or layer.attributes.epilogue != "none":
        return None
    if any(each is not None for each in layer.inputs[6:]):
        return None  # a residual, which is added after the activation
    if rewriter.uses.get(value, 0) != 1 or rewriter.uses.get(inner, 0) != 1 or layer.attributes.output_dtype:
        return None
    attributes = replace(layer.attributes, epilogue=name)
    result = rewriter.op(layer.op, *layer.inputs, like=layer, attributes=attributes)
    return rewriter.op("permute", result, like=permute, attributes=permute.attributes) if permute else result


RULES: dict[str, Rule] = dict.fromkeys(("relu", "clamp", "hardswish"), _activated)

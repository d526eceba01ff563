"""Convolutions: constants that multiply and shift channels go into weight and bias (batch normalization, once it is
folded), and those that look at one pixel at a time are linear layers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from torchvk.lowering.draft import Array, Call, Draft, Value, constant
from torchvk.lowering.passes.qdq import centered, channel_scales, constant_weight, static_input, weight_constant
from torchvk.lowering.passes.rewrite import Rewriter, Rule, rewrite


def fuse_conv(draft: Draft) -> Draft:
    return rewrite(rewrite(draft, {"conv": _padded}), RULES)


def _pointwise(rewriter: Rewriter, call: Call) -> Value | None:
    x, weight, *rest = call.inputs
    attributes = call.attributes
    assert x is not None
    assert weight is not None
    plain = attributes.groups == 1 and not any(attributes.padding)
    if not plain or any(step != 1 for step in (*attributes.stride, *attributes.input_dilation, *weight.shape[1:-1])):
        return None
    made = rewriter.producer(weight, "dequantize")
    if made is None:
        matrix = rewriter.reshape(weight, (weight.shape[0], weight.shape[-1]), call)
        return rewriter.op("linear", x, matrix, *rest, like=call, attributes={"epilogue": attributes.epilogue})
    return _quantized(rewriter, call, made)


def _quantized(rewriter: Rewriter, call: Call, made: Call) -> Value | None:
    """A pointwise one of a dequantized weight: as the passes know linear layers, if they take such activations."""
    x, weight, bias, residual = (*call.inputs, None, None)[:4]
    permute = rewriter.producer(x, "permute")
    source = rewriter.producer(permute.inputs[0] if permute else x, "dequantize")
    epilogue = call.attributes.epilogue
    if source is not None:
        if static_input(rewriter, source.outputs[0]) is None:
            return None  # dynamic: a quantized_conv
        parts = [_as_matrix(rewriter, part, call) for part in made.inputs if part is not None]
        matrix = rewriter.op("dequantize", *parts, like=made, attributes=made.attributes)
        return rewriter.op("linear", x, matrix, bias, residual, like=call, attributes={"epilogue": epilogue})
    found = constant_weight(rewriter, weight)
    if found is None:
        return None
    found = centered(found)
    scale = channel_scales(found, 0, call.outputs[0].shape[-1])
    if found.data.dtype != np.int8 or scale is None or x is None or (bias is not None and not bias.constant):
        return None
    data = weight_constant(found)
    matrix = constant(found.data.reshape(found.data.shape[0], -1), data.name, data.dtype)
    attributes = {"group_size": x.shape[-1], "epilogue": epilogue}
    operands = (matrix, constant(scale[:, None], data.name), bias, residual)
    return rewriter.op("quantized_linear", x, *operands, like=call, attributes=attributes)


def _as_matrix(rewriter: Rewriter, value: Value, call: Call) -> Value:
    shape = (value.shape[0], value.shape[-1])
    if value.array is None:
        return rewriter.reshape(value, shape, call)
    return constant(value.array.reshape(shape), value.name, value.dtype)


def _layer(rewriter: Rewriter, call: Call) -> tuple[Call, Call | None, Array] | None:
    """(conv or linear, the permutation to channels first after it, constant [O]) where ``call`` combines the result of
    such a layer with a constant a channel, and nobody else reads what lies between."""
    for product, other in (call.inputs, call.inputs[::-1]):
        if product is None or other is None or other.array is None or product.type != call.outputs[0].type:
            continue
        permute = _channels_first(rewriter, product)
        inner = permute.inputs[0] if permute else product
        layer = rewriter.made.get(inner) if inner is not None else None
        if inner is None or layer is None or layer.op not in ("conv", "linear") or rewriter.uses.get(inner, 0) != 1:
            continue
        rank = len(product.shape)
        axis = (
            rank - 1 if permute is None else 1 if permute.op == "reshape" else permute.attributes.dims.index(rank - 1)
        )
        shape = (1,) * (rank - len(other.shape)) + other.shape
        single = rewriter.uses.get(product, 0) == 1 and other.dtype is product.dtype
        if not single or other.type.numel not in (1, shape[axis]):
            continue
        if layer.attributes.epilogue == "none" and all(value is None for value in layer.inputs[3:]):
            channels = np.broadcast_to(other.array.reshape(-1), (inner.shape[-1],))
            return layer, permute, channels.astype(np.float32)
    return None


def _channels_first(rewriter: Rewriter, value: Value) -> Call | None:
    """The permutation of channels that gives ``value``; a reshape, where there is one pixel."""
    permute = rewriter.producer(value, "permute")
    if permute:
        return permute
    reshape = rewriter.producer(value, "reshape")
    inner = reshape.inputs[0] if reshape else None
    if inner is None or len(inner.shape) < 3 or any(size != 1 for size in inner.shape[1:-1]):
        return None
    moved = (inner.shape[0], inner.shape[-1], *inner.shape[1:-1])
    return reshape if moved == value.shape else None


def _again(rewriter: Rewriter, layer: Call, permute: Call | None, weight: Value, bias: Array, call: Call) -> Value:
    x = layer.inputs[0]
    assert x is not None
    b = constant(bias.astype(x.dtype.numpy), call.outputs[0].name)
    result = rewriter.op(layer.op, x, weight, b, like=layer, attributes=layer.attributes)
    return rewriter.op(permute.op, result, like=permute, attributes=permute.attributes) if permute else result


def _bias(layer: Call) -> Array | None:
    """float32 [O], or None if it is not known."""
    value = (*layer.inputs, None)[2]
    if value is None:
        return np.zeros(layer.outputs[0].shape[-1], np.float32)
    return None if value.array is None else value.array.astype(np.float32)


def _shift(rewriter: Rewriter, call: Call) -> Value | None:
    found = _layer(rewriter, call)
    if found is None:
        return None
    layer, permute, channels = found
    bias, weight = _bias(layer), layer.inputs[1]
    if bias is None or weight is None:
        return None
    return _again(rewriter, layer, permute, weight, bias + channels, call)


def _scale(rewriter: Rewriter, call: Call) -> Value | None:
    found = _layer(rewriter, call)
    if found is None:
        return None
    layer, permute, channels = found
    bias, weight = _bias(layer), layer.inputs[1]
    if bias is None or weight is None or weight.array is None:
        return None
    depthwise = layer.op == "conv" and len(weight.shape) < len(layer.outputs[0].shape)
    factors = channels if depthwise else channels.reshape(-1, *(1,) * (len(weight.shape) - 1))
    scaled = (weight.array.astype(np.float32) * factors).astype(weight.dtype.numpy)
    if not np.isfinite(scaled).all():
        return None
    return _again(rewriter, layer, permute, constant(scaled, weight.name), bias * channels, call)


def _padded(rewriter: Rewriter, call: Call) -> Value | None:
    """Zeros around x, as torch puts them there where "same" padding is not symmetric, are padding."""
    x, *rest = call.inputs
    permute = rewriter.producer(x, "permute")
    pad = rewriter.producer(permute.inputs[0] if permute else x, "pad")
    if pad is None or x is None or pad.inputs[0] is None or pad.attributes.value != 0:
        return None
    rank = len(x.shape)
    dims = permute.attributes.dims if permute else range(rank)
    pairs = [pad.attributes.padding[2 * dim : 2 * dim + 2] for dim in dims]
    if any(pairs[0]) or any(pairs[-1]) or any(step != 1 for step in call.attributes.input_dilation):
        return None
    inner = pad.inputs[0]
    if permute:
        inner = rewriter.op("permute", inner, like=permute, attributes=permute.attributes)
    sizes = [size for pair in pairs[1:-1] for size in pair]
    padding = [own + more for own, more in zip(call.attributes.padding, sizes, strict=True)]
    return rewriter.op("conv", inner, *rest, like=call, attributes=replace(call.attributes, padding=padding))


RULES: dict[str, Rule] = {"conv": _pointwise, "mul": _scale, "add": _shift}

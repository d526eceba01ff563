"""Activations, residual additions and a relu behind those go into the layer before them (torchvk.ops.epilogue)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torchvk.lowering.draft import Call, Draft, Value
from torchvk.lowering.passes.rewrite import Rewriter, Rule, rewrite

# operator → the slot of its residual
RESIDUAL = {"linear": 3, "quantized_linear": 4, "conv": 3, "quantized_conv": 6}


def fuse_epilogue(draft: Draft) -> Draft:
    return rewrite(rewrite(rewrite(draft, ACTIVATIONS), {"add": _residual}), {"relu": _end})


def _layer(rewriter: Rewriter, value: Value | None, readers: int = 1) -> Call | None:
    """The linear layer that gives ``value``, perhaps through a view, if nobody but these readers reads either."""
    if value is None or rewriter.uses.get(value, 0) != readers:
        return None
    view = rewriter.producer(value, "reshape")
    inner = view.inputs[0] if view else value
    layer = rewriter.made.get(inner) if inner is not None else None
    if inner is None or layer is None or layer.op not in RESIDUAL or not inner.dtype.is_float:
        return None
    return layer if inner is value or rewriter.uses.get(inner, 0) == 1 else None


def _again(rewriter: Rewriter, layer: Call, attributes: Any, residual: Value | None, call: Call) -> Value:
    """The layer with another epilogue and residual, in the shape that ``call`` gives."""
    slot = RESIDUAL[layer.op]
    operands = (*layer.inputs, *(None,) * slot)[:slot]
    more = layer.inputs[slot + 1 :]
    result = rewriter.op(layer.op, *operands, residual, *more, like=layer, attributes=attributes)
    return rewriter.reshape(result, call.outputs[0].shape, call)


def _has_residual(layer: Call) -> bool:
    slot = RESIDUAL[layer.op]
    return any(value is not None for value in layer.inputs[slot : slot + 1])


def _end(rewriter: Rewriter, call: Call) -> Value | None:
    layer = _layer(rewriter, call.inputs[0])
    if layer is None or layer.attributes.epilogue != "none" or not _has_residual(layer):
        return None
    residual = layer.inputs[RESIDUAL[layer.op]]
    return _again(rewriter, layer, replace(layer.attributes, epilogue="sum_relu"), residual, call)


def _activation(rewriter: Rewriter, call: Call, readers: int = 1, name: str | None = None) -> Value | None:
    layer = _layer(rewriter, call.inputs[0], readers)
    if layer is None or layer.attributes.epilogue != "none" or _has_residual(layer):
        return None
    if name is None:
        name = "gelu_tanh" if call.op == "gelu" and call.attributes.approximate == "tanh" else call.op
    return _again(rewriter, layer, replace(layer.attributes, epilogue=name), None, call)


def _clamp(rewriter: Rewriter, call: Call) -> Value | None:
    if (call.attributes.min, call.attributes.max) != (0, 6) or not call.outputs[0].dtype.is_float:
        return None
    return _activation(rewriter, call, name="relu6")


def _silu(rewriter: Rewriter, call: Call) -> Value | None:
    """x · sigmoid(x), as exported programs have it."""
    for x, gate in (call.inputs, call.inputs[::-1]):
        sigmoid = rewriter.producer(gate, "sigmoid")
        if sigmoid is not None and gate is not None and sigmoid.inputs[0] is x and rewriter.uses.get(gate, 0) == 1:
            return _activation(rewriter, replace(call, inputs=(x,)), readers=2, name="silu")
    return None


def _residual(rewriter: Rewriter, call: Call) -> Value | None:
    for product, other in (call.inputs, call.inputs[::-1]):
        layer = _layer(rewriter, product)
        if layer is None or other is None or product is other or _has_residual(layer):
            continue
        if product is None or product.type != call.outputs[0].type or other.type != product.type:
            continue
        residual = rewriter.reshape(other, layer.outputs[0].shape, call)
        return _again(rewriter, layer, layer.attributes, residual, call)
    return None


ACTIVATIONS: dict[str, Rule] = {
    **dict.fromkeys(("relu", "gelu", "silu", "hardswish"), _activation),
    "clamp": _clamp,
    "mul": _silu,
}

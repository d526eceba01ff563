"""Sums of an 8-bit residual and a layer's 8-bit result belong to the layer (torchvk.ops.quantized_sum)."""

from __future__ import annotations

from dataclasses import replace

from torchvk.lowering.draft import Call, Draft, Value
from torchvk.lowering.passes.epilogue import RESIDUAL
from torchvk.lowering.passes.rewrite import Rewriter, rewrite

LAYERS = ("quantized_linear", "quantized_conv")


def fuse_quantized_sums(draft: Draft) -> Draft:
    return rewrite(draft, {"quantized_arithmetic": _sum})


def _sum(rewriter: Rewriter, call: Call) -> Value | None:
    a = call.attributes
    if a.operation != "add":
        return None
    first, second = call.inputs
    own, other = (a.input_scale, a.input_zero_point), (a.other_scale, a.other_zero_point)
    for product, residual, of_product, of_residual in ((first, second, own, other), (second, first, other, own)):
        layer = _layer(rewriter, product)
        if layer is None or product is None or residual is None or product is residual:
            continue
        if not product.shape == residual.shape == call.outputs[0].shape:
            continue
        if (layer.attributes.output_scale, layer.attributes.output_zero_point) != of_product:
            continue
        attributes = replace(
            layer.attributes,
            residual_scale=of_residual[0],
            residual_zero_point=of_residual[1],
            **{f"sum_{name}": getattr(a, f"output_{name}") for name in ("dtype", "scale", "zero_point", "min", "max")},
        )
        slot = RESIDUAL[layer.op]
        inputs = [*layer.inputs, *[None] * slot][: max(slot + 1, len(layer.inputs))]
        inputs[slot] = rewriter.reshape(residual, layer.outputs[0].shape, call)
        result = rewriter.op(layer.op, *inputs, like=layer, attributes=attributes)
        return rewriter.reshape(result, call.outputs[0].shape, call)
    return None


def _layer(rewriter: Rewriter, value: Value | None) -> Call | None:
    """The layer without a residual that gives ``value`` in 8 bits, perhaps through a view, to one reader alone."""
    if value is None or rewriter.uses.get(value, 0) != 1:
        return None
    view = rewriter.producer(value, "reshape")
    inner = view.inputs[0] if view else value
    layer = rewriter.made.get(inner) if inner is not None else None
    if inner is None or layer is None or layer.op not in LAYERS or layer.attributes.output_dtype is None:
        return None
    slot = RESIDUAL[layer.op]
    single = inner is value or rewriter.uses.get(inner, 0) == 1
    return layer if single and all(each is None for each in layer.inputs[slot : slot + 1]) else None

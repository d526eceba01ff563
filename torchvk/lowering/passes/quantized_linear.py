"""Products of dequantized activations and dequantized constant matrices become ``quantized_linear``.

Bias, activation and the quantization of the result join later: ``passes.linear``, ``passes.epilogue``, ``passes.qdq``.
"""

from __future__ import annotations

import numpy as np

from torchvk.graph import DType
from torchvk.lowering.draft import Array, Call, Draft, Value, constant
from torchvk.lowering.passes.qdq import REQUANTIZING, QuantizedConstant, constant_weight, static_view
from torchvk.lowering.passes.rewrite import Rewriter, Rule, rewrite
from torchvk.lowering.passes.views import is_dense, strided

REQUANTIZING.add("quantized_linear")


def fuse_quantized_linear(draft: Draft) -> Draft:
    return rewrite(draft, RULES)


def _matmul(rewriter: Rewriter, call: Call) -> Value | None:
    x, weight = call.inputs
    attributes = call.attributes
    if x is None or weight is None or attributes.transpose_a or x.shape[:-1] != call.outputs[0].shape[:-1]:
        return None
    base, shape, strides = strided(rewriter, weight)
    if any(size != 1 and stride for size, stride in zip(shape[:-2], strides[:-2], strict=True)):
        return None
    sizes, steps = shape[-2:], strides[-2:]
    if not attributes.transpose_b:
        sizes, steps = sizes[::-1], steps[::-1]
    # As [N, K] now; what lies in memory is that or its transpose.
    if base.shape == sizes and is_dense(sizes, steps):
        return _linear(rewriter, call, x, base, None, False)
    if base.shape == sizes[::-1] and is_dense(sizes[::-1], steps[::-1]):
        return _linear(rewriter, call, x, base, None, True)
    return None


def _linear_call(rewriter: Rewriter, call: Call) -> Value | None:
    x, weight, bias = (*call.inputs, None)[:3]
    if x is None or weight is None or call.attributes.epilogue != "none" or any(call.inputs[3:]):
        return None
    return _linear(rewriter, call, x, weight, bias, False)


def _linear(
    rewriter: Rewriter, call: Call, x: Value, weight: Value, bias: Value | None, transposed: bool
) -> Value | None:
    known = constant_weight(rewriter, weight)
    if known is None or (bias is not None and bias.array is None):
        return None
    operands = weight_operands(known, transposed)
    static = None if operands is None else static_view(rewriter, x)
    if operands is None or static is None:
        return None
    data, scale = operands
    attributes = {
        "group_size": data.shape[1] // scale.shape[1],
        "activation": "static",
        "dtype": call.outputs[0].dtype,
        **static.attributes("input"),
    }
    return rewriter.op("quantized_linear", static.quantized, data, scale, bias, like=call, attributes=attributes)


def weight_operands(weight: QuantizedConstant, transposed: bool) -> tuple[Value, Value] | None:
    """Weight [N, K] (int4 if it fits) and scale [N, groups] of a matrix that may be stored as [K, N]."""
    if len(weight.data.shape) != 2 or weight.data.dtype != np.int8 or weight.zero_point is not None:
        return None
    data, scale = (_turned(each, transposed) for each in (weight.data, weight.scale))
    if scale.shape[0] not in (1, data.shape[0]) or 0 in data.shape:
        return None
    scale = np.ascontiguousarray(np.broadcast_to(scale, (data.shape[0], scale.shape[1])))
    small = data.min() >= -8 and data.max() <= 7
    name = weight.value.name
    return constant(data, name, DType.INT4 if small else DType.INT8), constant(scale, f"{name}_scale")


def _turned(array: Array, transposed: bool) -> Array:
    return np.ascontiguousarray(array.T) if transposed else array


RULES: dict[str, Rule] = {"matmul": _matmul, "linear": _linear_call}

"""Products with dequantized constant matrices become ``quantized_linear``: of integers where the activations are
dequantized, too, else of floats (activations quantized at run time in ways that no integer product has).

Bias, activation and the quantization of the result join later: ``passes.linear``, ``passes.epilogue``, ``passes.qdq``.
"""

from __future__ import annotations

from typing import Any

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
    if operands is None:
        return None
    data, scale, zero_point = operands
    attributes: dict[str, Any] = {"group_size": data.shape[1] // scale.shape[1]}
    static = static_view(rewriter, x)
    if static is not None:
        x = static.quantized
        attributes |= {"activation": "static", "dtype": call.outputs[0].dtype, **static.attributes("input")}
    inputs = (x, data, scale, bias, None, zero_point)
    return rewriter.op("quantized_linear", *inputs, like=call, attributes=attributes)


def weight_operands(weight: QuantizedConstant, transposed: bool) -> tuple[Value, Value, Value | None] | None:
    """Weight [N, K] (int4 if it fits), scale and perhaps zero point [N, groups] of a matrix that may lie as [K, N].

    None for what ``quantized_linear`` does not take. Zero points go into the integers where these have room.
    """
    if len(weight.data.shape) != 2 or weight.data.dtype not in (np.int8, np.uint8) or not weight.data.size:
        return None
    middle = 128 if weight.data.dtype == np.uint8 else 0
    data, scale = (
        _turned(weight.data, transposed).astype(np.int16) - np.int16(middle),
        _turned(weight.scale, transposed),
    )
    zeros = np.zeros(scale.shape, np.int64) if weight.zero_point is None else _turned(weight.zero_point, transposed)
    zeros = zeros.astype(np.int64) - middle
    (n, k), (rows, groups) = data.shape, scale.shape
    if rows not in (1, n) or zeros.min() < -128 or zeros.max() > 127:
        return None
    scale, zeros = (np.ascontiguousarray(np.broadcast_to(each, (n, groups))) for each in (scale, zeros))
    folded = data - np.repeat(zeros, k // groups, axis=1)
    plain = folded.min() >= -128 and folded.max() <= 127
    data = folded if plain else data
    small = data.min() >= -8 and data.max() <= 7
    name = weight.value.name
    return (
        constant(np.ascontiguousarray(data.astype(np.int8)), name, DType.INT4 if small else DType.INT8),
        constant(scale, f"{name}_scale"),
        None if plain else constant(zeros.astype(np.int8), f"{name}_zero_point"),
    )


def _turned(array: Array, transposed: bool) -> Array:
    return np.ascontiguousarray(array.T) if transposed else array


RULES: dict[str, Rule] = {"matmul": _matmul, "linear": _linear_call}

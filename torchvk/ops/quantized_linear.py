"""Linear layers with integer weights: ``quantized_linear``.

    y[m, n] = f(sx[m] · Σ_g sw[n, g] · Σ_{k in g} (qx[m, k] − zx[m]) · (qw[n, k] − zw[n, g]) + b[n]) + residual[m, n]

with quantized activations: the inner sums are integers and exact, the sum over groups is in float32. Without (weight
only) the product is Σ_k x[m, k] · (sw[n, g] · (qw[n, k] − zw[n, g])) in float32. Symmetric weights have no zero
points zw. f and the residual: see torchvk.ops.epilogue. float16 results are rounded once, at the end.

Against eager mode, which dequantizes and multiplies matrices: float32 models differ by the order of float32 additions
alone. float16 models there round every dequantized weight and activation to float16. Matrix units take weights rounded
like that; other kernels do not round them: each product may differ from eager's by 2^-10 of itself (twice half a unit
of 11 bits), so y by 2^-10 · Σ |x · w| and its own rounding.

Static activations are 8-bit integers already, with one scale and zero point for all. Results may leave as 8-bit
integers, too (torchvk.ops.requantization).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from torchvk.graph import DType, TensorType
from torchvk.ops.epilogue import Epilogue, apply_epilogue
from torchvk.ops.operator import NOTHING, Array, Capabilities, Operator, OperatorError, Types, Variants, register
from torchvk.ops.quantization import Activation, Formulas, Scheme, Static, quantize
from torchvk.ops.quantized_linear_case import BIAS, RESIDUAL, SCALE, WEIGHT, ZERO_POINT, Case
from torchvk.ops.quantized_linear_kernels import variants
from torchvk.ops.quantized_packing import UNIT, Packing, pitch_of
from torchvk.ops.quantized_sum import QuantizedSum, apply_sum, infer_sum
from torchvk.ops.requantization import Requantization, ResultAttributes, check_parameters

# A group's integer sum stays below 2^31: |q − zero point| ≤ 255, |w| ≤ 128, or 255 with zero points.
MAX_GROUP = 1 << 16
MAX_GROUP_ZEROS = 1 << 15
MAX_ELEMENTS = 1 << 31  # kernels count elements in 32 bits


@dataclass(frozen=True)
class QuantizedLinearAttributes(ResultAttributes):
    """group_size: input channels that share a scale; it divides K, and is K for one scale an output channel.

    activation: "none" leaves x as it is (weight only); "dynamic_per_token" and "dynamic_per_tensor" quantize it to
    int8 at run time with the formulas of torchvk.ops.quantization, which say what the other attributes mean. "static":
    x is int8 or uint8 and stands for (x − input_zero_point) · input_scale.
    epilogue: the function that follows the product and the bias; a residual, if there is one, is added to that.
    """

    group_size: int
    activation: Activation = "none"
    symmetric: bool = False
    quant_min: int = -128
    quant_max: int = 127
    eps: float = float(np.finfo(np.float32).tiny)
    qparams: Formulas = "torchao"
    epilogue: Epilogue = "none"
    input_scale: float = 1.0
    input_zero_point: int = 0

    @property
    def scheme(self) -> Scheme | None:
        """How activations are quantized at run time, if they are."""
        if self.activation == "none" or self.activation == "static":
            return None
        return Scheme(self.activation, self.symmetric, self.quant_min, self.quant_max, self.eps, self.qparams)

    def integers(self, x: TensorType) -> Scheme | Static | None:
        """How activations are, or become, integers; None if they stay floats."""
        if self.activation == "static":
            return Static.of(self.input_scale, self.input_zero_point, x.dtype)
        return self.scheme

    def floats(self, x: TensorType) -> DType:
        """The dtype of float results, of the bias and the residual."""
        return self.dtype if self.activation == "static" else x.dtype


def _fail(message: str) -> NoReturn:
    raise OperatorError(f"quantized_linear: {message}")


def _operands(inputs: Types) -> tuple[TensorType, TensorType, TensorType, TensorType | None, TensorType | None]:
    if not 3 <= len(inputs) <= 6:
        _fail(f"takes x, weight, scale and perhaps bias, residual and zero point, {len(inputs)} operands were given")
    x, weight, scale, bias, residual = (*inputs, None, None)[:5]
    if x is None or weight is None or scale is None:
        _fail("x, weight and scale must be there")
    return x, weight, scale, bias, residual


def _zero_point(inputs: Types) -> TensorType | None:
    return inputs[ZERO_POINT] if len(inputs) > ZERO_POINT else None


def _infer(attributes: QuantizedLinearAttributes, inputs: Types) -> tuple[TensorType, ...]:
    x, weight, scale, bias, residual = _operands(inputs)
    zero_point = _zero_point(inputs)
    floats = (DType.FLOAT32, DType.FLOAT16)
    static = attributes.activation == "static"
    if x.dtype not in ((DType.INT8, DType.UINT8) if static else floats) or not x.shape:
        _fail(f"x must be {'int8 or uint8' if static else 'float32 or float16'} of rank 1 or more, got {x}")
    result = attributes.floats(x)
    if result not in floats:
        _fail(f"results must be float32 or float16, not {result.value}")
    if weight.dtype not in (DType.INT2, DType.INT4, DType.INT8) or len(weight.shape) != 2:
        _fail(f"the weight must be int2, int4 or int8 of rank 2, got {weight}")
    n, k = weight.shape
    if x.shape[-1] != k:
        _fail(f"x has {x.shape[-1]} columns, the weight {weight} has {k}")
    if k == 0:
        _fail("there must be at least one input channel")
    if attributes.group_size < 1 or k % attributes.group_size:
        _fail(f"group_size {attributes.group_size} does not divide the {k} input channels")
    if scale.dtype not in floats or scale.shape != (n, k // attributes.group_size):
        _fail(f"the scale must be float32 or float16 {[n, k // attributes.group_size]}, got {scale}")
    if zero_point is not None and (zero_point.dtype is not DType.INT8 or zero_point.shape != scale.shape):
        _fail(f"the zero point of the weight must be int8 {[*scale.shape]}, got {zero_point}")
    if bias is not None and (bias.dtype not in (DType.FLOAT32, result) or bias.shape != (n,)):
        _fail(f"the bias must be float32 or {result.value} {[n]}, got {bias}")
    if static:
        check_parameters("input", attributes.input_scale, attributes.input_zero_point, x.dtype)
    elif attributes.activation != "none":
        if not -128 <= attributes.quant_min < attributes.quant_max <= 127:
            _fail(f"activations of [{attributes.quant_min}, {attributes.quant_max}] are not int8")
        if not (math.isfinite(attributes.eps) and attributes.eps >= 0):
            _fail(f"eps must be a number of 0 or more, got {attributes.eps}")
    output = TensorType(result, (*x.shape[:-1], n))
    if attributes.sum_dtype is None and residual is not None and residual != output:
        _fail(f"the residual must be of the result's type {output}, got {residual}")
    requantization = Requantization.of(attributes)
    if requantization is not None:
        requantization.check()
        output = TensorType(requantization.dtype, output.shape)
    return (infer_sum("quantized_linear", attributes, output, residual),)


def _support(attributes: QuantizedLinearAttributes, inputs: Types) -> str | None:
    x, weight, *_ = _operands(inputs)
    most = MAX_GROUP if _zero_point(inputs) is None else MAX_GROUP_ZEROS
    if attributes.activation != "none" and attributes.group_size > most:
        return f"groups of {attributes.group_size} columns may overflow int32; {most} are supported"
    padded = -(-weight.shape[1] // UNIT) * UNIT
    rows = max(math.prod(x.shape[:-1]), weight.shape[0])
    # Spreading odd groups to whole units can take 32 times the columns, at group size 1.
    width = (
        padded
        if attributes.group_size in (16, weight.shape[1])
        else pitch_of(attributes.group_size) * (weight.shape[1] // attributes.group_size)
    )
    if rows * max(padded, width) > MAX_ELEMENTS or math.prod(x.shape[:-1]) * weight.shape[0] > MAX_ELEMENTS:
        return f"{x} times {weight} has more than {MAX_ELEMENTS} elements"
    return None


def _reference(attributes: QuantizedLinearAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    """As eager mode: dequantize both to x's dtype, multiply matrices in float32, round. Integers exactly."""
    x, weight, scale, bias, residual, zero_point = (*inputs, None, None, None)[:6]
    assert x is not None
    assert weight is not None
    assert scale is not None
    n, k = weight.shape

    def ended(y: Array, dtype: DType) -> tuple[Array, ...]:
        if bias is not None:
            y = y + bias.astype(np.float32)
        added = residual if attributes.sum_dtype is None else None
        y = apply_epilogue(attributes.epilogue, y.reshape(*x.shape[:-1], n), added)
        output = Requantization.of(attributes)
        return (y.astype(dtype.numpy) if output is None else apply_sum(attributes, output.apply(y), residual),)

    if attributes.activation == "static":
        return ended(_static_product(attributes, x, weight, scale, zero_point), attributes.dtype)
    with np.errstate(all="ignore"):
        grouped = weight.reshape(n, -1, attributes.group_size).astype(np.float32)
        if zero_point is not None:
            grouped -= zero_point[..., None].astype(np.float32)
        grouped *= scale[..., None].astype(np.float32)
        w = grouped.reshape(n, k).astype(x.dtype).astype(np.float32)
        rows = x.reshape(-1, k)
        scheme = attributes.scheme
        if scheme is not None:
            q, row_scale, zero_point = quantize(rows, scheme)
            rows = ((q - zero_point).astype(np.float32) * row_scale).astype(x.dtype)
        return ended(rows.astype(np.float32) @ w.T, DType.of(x.dtype))


def _static_product(
    attributes: QuantizedLinearAttributes, x: Array, weight: Array, scale: Array, zero_point: Array | None
) -> Array:
    """Float32 [m, n] of exact sums a group."""
    n, k = weight.shape
    static = Static.of(attributes.input_scale, attributes.input_zero_point, DType.of(x.dtype))
    size = attributes.group_size
    rows = static.integers(x.reshape(-1, k)).reshape(-1, k // size, size)
    groups = weight.reshape(n, -1, size).astype(np.float64)
    if zero_point is not None:
        groups -= zero_point[..., None]
    sums = np.einsum("mgk,ngk->mng", rows, groups, optimize=True)
    y: Array = (sums.astype(np.float32) * scale.astype(np.float32)).sum(axis=-1, dtype=np.float32)
    return y * np.float32(attributes.input_scale)


def _variants(
    attributes: QuantizedLinearAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Variants:
    x, weight, scale, bias, residual = _operands(inputs)
    if outputs[0].numel == 0:
        return NOTHING
    case = Case(
        packing=Packing.of(weight, attributes.group_size),
        m=math.prod(x.shape[:-1]),
        x=x,
        scale=scale,
        bias=bias,
        residual=residual,
        zeros=_zero_point(inputs) is not None,
        epilogue=attributes.epilogue,
        scheme=attributes.integers(x),
        result=attributes.floats(x),
        output=Requantization.of(attributes),
        sum=QuantizedSum.of(attributes, residual, RESIDUAL),
        capabilities=capabilities,
    )
    return variants(case)


register(
    Operator(
        name="quantized_linear",
        summary="linear with int2, int4 or int8 weights, per group or channel, perhaps 8-bit activations (dynamic or "
        "static) and results",
        infer=_infer,
        reference=_reference,
        variants=_variants,
        attributes=QuantizedLinearAttributes,
        support=_support,
        constant_inputs=frozenset({WEIGHT, SCALE, BIAS, ZERO_POINT}),
        dtypes=(DType.FLOAT32, DType.FLOAT16, DType.INT8, DType.UINT8),
    )
)

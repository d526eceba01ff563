"""Convolutions in floating point: ``conv``. float32 accumulation always."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from torchvk.graph import DType, TensorType
from torchvk.ops.conv_kernels import Case, float_kernels
from torchvk.ops.convolution import Geometry, convolve, output_shape, reason_against
from torchvk.ops.epilogue import Epilogue, apply_epilogue, epilogue_constants
from torchvk.ops.operator import (
    NOTHING,
    Array,
    Capabilities,
    Operator,
    Types,
    Variants,
    expect,
    read,
    register,
)

X, WEIGHT, BIAS, RESIDUAL = range(4)
FLOATS = (DType.FLOAT32, DType.FLOAT16)


@dataclass(frozen=True)
class ConvAttributes:
    """A number a spatial dimension; padding: before and after the first, before and after the second, …, negative ones
    cut off. input_dilation: x is spread so far apart, with zeros between (a transposed convolution's stride).
    epilogue: the function that follows product and bias; a residual is added to that (torchvk.ops.epilogue)."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    input_dilation: list[int]
    groups: int = 1
    epilogue: Epilogue = "none"


def _infer(attributes: ConvAttributes, inputs: Types) -> tuple[TensorType, ...]:
    expect(2 <= len(inputs) <= 4, f"conv takes x, weight and perhaps bias and residual, {len(inputs)} were given")
    x, weight, bias, residual = (*inputs, None, None)[:4]
    if x is None or weight is None:
        expect(False, "conv needs x and a weight")
        raise AssertionError
    expect(
        x.dtype in FLOATS and weight.dtype is x.dtype,
        f"conv takes float32 or float16, x and weight of one dtype, got {x} and {weight}",
    )
    y = TensorType(x.dtype, output_shape("conv", attributes, x, weight))
    n = y.shape[-1]
    expect(bias is None or bias == TensorType(x.dtype, (n,)), f"conv takes a bias {x.dtype.value}[{n}], got {bias}")
    expect(residual is None or residual == y, f"conv takes a residual like its result {y}, got {residual}")
    return (y,)


def _support(attributes: ConvAttributes, inputs: Types) -> str | None:
    x, weight = inputs[:2]
    assert x is not None
    assert weight is not None
    return reason_against("conv", attributes, x, weight)


def _reference(attributes: ConvAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    x, weight, bias, residual = (*inputs, None, None)[:4]
    assert x is not None
    assert weight is not None
    with np.errstate(all="ignore"):
        y = convolve(x.astype(np.float32), weight.astype(np.float32), attributes)
        if bias is not None:
            y = y + bias.astype(np.float32)
        return (apply_epilogue(attributes.epilogue, y, residual).astype(x.dtype),)


def _case(attributes: ConvAttributes, inputs: Types, outputs: Sequence[TensorType]) -> Case:
    x, weight, bias, residual = (*inputs, None, None)[:4]
    assert x is not None
    assert weight is not None
    return Case(
        Geometry.of(attributes, x, weight, outputs[0]),
        x.dtype,
        lambda texels: read(WEIGHT, texels=texels),
        None if bias is None else BIAS,
        x.dtype,
        None if residual is None else RESIDUAL,
        epilogue_constants(attributes.epilogue, residual),
    )


def _variants(
    attributes: ConvAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Variants:
    if outputs[0].numel == 0:
        return NOTHING
    return tuple(float_kernels(_case(attributes, inputs, outputs), capabilities))


register(
    Operator(
        name="conv",
        summary="convolution of 1 to 3 dimensions, channels last: stride, padding, dilation, groups, transposed",
        attributes=ConvAttributes,
        infer=_infer,
        reference=_reference,
        variants=_variants,
        support=_support,
        dtypes=FLOATS,
    )
)

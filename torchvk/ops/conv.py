"""Convolutions in floating point: ``conv``. float32 accumulation always."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from torchvk.graph import DType, TensorType
from torchvk.ops.convolution import Geometry, convolve, output_shape, reason_against
from torchvk.ops.epilogue import Epilogue, apply_epilogue, epilogue_constants
from torchvk.ops.operator import (
    Array,
    Capabilities,
    Dispatch,
    Kernels,
    Operator,
    Types,
    Variants,
    expect,
    grid,
    read,
    register,
    write,
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


@dataclass(frozen=True)
class Case:
    """All that the choice of kernels asks."""

    geometry: Geometry
    dtype: DType
    bias: bool
    ending: tuple[int, int]

    @staticmethod
    def of(attributes: ConvAttributes, inputs: Types, outputs: Sequence[TensorType]) -> Case:
        x, weight, bias, residual = (*inputs, None, None)[:4]
        assert x is not None
        assert weight is not None
        geometry = Geometry.of(attributes, x, weight, outputs[0])
        return Case(geometry, x.dtype, bias is not None, epilogue_constants(attributes.epilogue, residual))

    @property
    def half(self) -> bool:
        return self.dtype is DType.FLOAT16

    @property
    def nbytes(self) -> int:
        g = self.geometry
        return (g.x_elements + g.y_elements + g.outputs * g.k) * self.dtype.bits // 8


def _direct(case: Case, capabilities: Capabilities) -> Kernels:
    """A thread a word of the result: right for everything."""
    units = -(-case.geometry.y_elements // (2 if case.half else 1))
    stand_in = read(WEIGHT)
    dispatch = Dispatch(
        "conv_direct_f16" if case.half else "conv_direct_f32",
        (
            read(X),
            read(WEIGHT),
            read(BIAS) if case.bias else stand_in,
            write(),
            read(RESIDUAL) if case.ending[1] else stand_in,
        ),
        grid(units, capabilities),
        (capabilities.local_size, case.bias, *case.ending, case.geometry.depthwise),
        case.geometry.push() + bytes(16),
        bytes=case.nbytes,
        flops=case.geometry.flops,
    )
    return Kernels((dispatch,))


def _variants(
    attributes: ConvAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Variants:
    if outputs[0].numel == 0:
        return (("nothing", Kernels(())),)
    case = Case.of(attributes, inputs, outputs)
    return (("direct", _direct(case, capabilities)),)


def _kernels(
    attributes: ConvAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    return _variants(attributes, inputs, outputs, capabilities)[0][1]


register(
    Operator(
        name="conv",
        summary="convolution of 1 to 3 dimensions, channels last: stride, padding, dilation, groups, transposed",
        attributes=ConvAttributes,
        infer=_infer,
        reference=_reference,
        kernels=_kernels,
        variants=_variants,
        support=_support,
        dtypes=FLOATS,
    )
)

"""Tensors made from nothing: ``full`` and ``arange``."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from torchvk.graph import DType, TensorType
from torchvk.ops.codes import DTYPE, units
from torchvk.ops.operator import (
    Array,
    Capabilities,
    Dispatch,
    Kernels,
    Operator,
    OperatorError,
    Types,
    expect,
    grid,
    register,
    write,
)
from torchvk.ops.shapes import expect_rank, operands, words

ALL = tuple(DTYPE)


@dataclass(frozen=True)
class FullAttributes:
    """A number for a float tensor (rounded to its dtype); a whole one within range for an integer tensor; for a
    bool tensor anything but 0 is true."""

    shape: list[int]
    value: bool | int | float
    dtype: DType


@dataclass(frozen=True)
class ArangeAttributes:
    """start + i step for i in 0 … size - 1. Integer tensors need integers, and wrap."""

    start: int | float
    step: int | float
    size: int
    dtype: DType


def scalar(value: bool | int | float, dtype: DType) -> Array:
    """``value`` as a 0-D array of ``dtype``; raises OperatorError where it does not fit."""
    if dtype.is_float or dtype is DType.BOOL:
        with np.errstate(all="ignore"):
            return np.array(float(value) if dtype.is_float else value != 0).astype(dtype.numpy)
    limits = np.iinfo(dtype.numpy)
    if value != value or int(min(max(value, -(2.0**70)), 2.0**70)) != value or not limits.min <= value <= limits.max:
        raise OperatorError(f"value {value} is not a number of dtype {dtype.value}")
    return np.array(int(value), dtype.numpy)


def pattern(value: Array) -> tuple[int, int]:
    """A 0-D value as an even and an odd word of a tensor that is filled with it."""
    low, high = np.full(8 // value.dtype.itemsize, value).view(np.uint32)
    return int(low), int(high)


def _full_infer(attributes: FullAttributes, inputs: Types) -> tuple[TensorType, ...]:
    operands(inputs, 0)
    expect_rank(attributes.shape)
    expect(not attributes.dtype.packed, f"dtype {attributes.dtype.value} is for weights only")
    scalar(attributes.value, attributes.dtype)
    return (TensorType(attributes.dtype, tuple(attributes.shape)),)


def _full_reference(attributes: FullAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    return (np.full(attributes.shape, scalar(attributes.value, attributes.dtype)),)


def fill_kernels(value: Array, result: TensorType, capabilities: Capabilities) -> Kernels:
    """The first output, filled with a 0-D value of its dtype."""
    count = -(-result.nbytes // 4)
    dispatch = Dispatch(
        "fill",
        (write(),),
        grid(count, capabilities),
        (capabilities.local_size,),
        words(count, *pattern(value), 0, 0),
        bytes=result.nbytes,
    )
    return Kernels((dispatch,))


def _full_kernels(
    attributes: FullAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    return fill_kernels(scalar(attributes.value, attributes.dtype), outputs[0], capabilities)


register(
    Operator("full", "filled with one value", _full_infer, _full_reference, _full_kernels, FullAttributes, dtypes=ALL)
)


def _arange_infer(attributes: ArangeAttributes, inputs: Types) -> tuple[TensorType, ...]:
    operands(inputs, 0)
    expect_rank((attributes.size,))
    dtype = attributes.dtype
    expect(not dtype.packed and dtype is not DType.BOOL, f"dtype {dtype.value} is not supported")
    for number in (attributes.start, attributes.step):
        expect(dtype.is_float or isinstance(number, int), f"{number} is not an integer, as dtype {dtype.value} needs")
        expect(-(2.0**63) <= number < 2.0**63, f"{number} is out of range")
    return (TensorType(dtype, (attributes.size,)),)


def _arange_reference(attributes: ArangeAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    dtype = attributes.dtype
    with np.errstate(all="ignore"):
        if dtype.is_float:
            steps = np.arange(attributes.size, dtype=np.float64)
            return ((attributes.start + steps * attributes.step).astype(np.float32).astype(dtype.numpy),)
        whole = np.arange(attributes.size, dtype=np.int64)
        return ((np.int64(attributes.start) + whole * np.int64(attributes.step)).astype(dtype.numpy),)


def _split(number: float) -> bytes:
    """A number as the sum of two float32."""
    high = np.float32(number)
    return struct.pack("<ff", high, number - float(high))


def _arange_kernels(
    attributes: ArangeAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    (result,) = outputs
    if result.dtype.is_float:
        parameters = _split(float(attributes.start)) + _split(float(attributes.step))
    else:
        parameters = struct.pack("<qq", int(attributes.start), int(attributes.step))
    dispatch = Dispatch(
        "arange_float" if result.dtype.is_float else "arange_int",
        (write(),),
        grid(units(result.numel, result.dtype), capabilities),
        (capabilities.local_size, DTYPE[result.dtype]),
        words(result.numel) + parameters,
        bytes=result.nbytes,
        flops=2 * result.numel,
    )
    return Kernels((dispatch,))


register(
    Operator(
        "arange",
        "evenly spaced numbers",
        _arange_infer,
        _arange_reference,
        _arange_kernels,
        ArangeAttributes,
        dtypes=tuple(dtype for dtype in ALL if dtype is not DType.BOOL),
    )
)

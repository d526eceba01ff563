"""Upsampling of channels-last images: x [N, *spatial, C] gives [N, *size, C].

Which elements a result is made of is torch's rule (aten/src/ATen/native/UpSample.h), in float32 as on a CPU:
nearest takes element ⌊i · scale⌋ of each dimension; bilinear weighs the two elements around i · scale
(``align_corners``), or around max((i + ½) · scale − ½, 0).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from torchvk.graph import DType, TensorType
from torchvk.ops.codes import DTYPE, per_unit, units
from torchvk.ops.operator import (
    Array,
    Capabilities,
    Dispatch,
    Kernels,
    Operator,
    Types,
    expect,
    grid,
    read,
    register,
    write,
)
from torchvk.ops.shapes import expect_dtype, expect_rank, operands

FLOATS = (DType.FLOAT32, DType.FLOAT16)
ANY = tuple(DTYPE)


@dataclass(frozen=True)
class UpsampleNearestAttributes:
    """size: of each spatial dimension of the result; scale: the step in the input for one in the result."""

    size: list[int]
    scale: list[float]


@dataclass(frozen=True)
class UpsampleBilinearAttributes:
    """As for ``upsample_nearest``, with two spatial dimensions."""

    size: list[int]
    scale: list[float]
    align_corners: bool = False


Attributes = UpsampleNearestAttributes | UpsampleBilinearAttributes


def _shape(attributes: Attributes, x: TensorType, ranks: Sequence[int]) -> TensorType:
    rank = len(x.shape) - 2
    expect(rank in ranks, f"takes [N, *spatial, C] with {' or '.join(map(str, ranks))} spatial dimensions, got {x}")
    for values in (attributes.size, attributes.scale):
        expect(len(values) == rank, f"{list(values)} must have a number for each of {rank} spatial dimensions")
    expect(
        all(0 < size < 2**24 for size in (*attributes.size, *x.shape[1:-1])), f"cannot make {attributes.size} of {x}"
    )
    expect(all(0 <= scale < 2**24 for scale in attributes.scale), f"scales of {attributes.scale}")
    shape = (x.shape[0], *attributes.size, x.shape[-1])
    expect_rank(shape)
    return TensorType(x.dtype, shape)


def _infer_nearest(attributes: UpsampleNearestAttributes, inputs: Types) -> tuple[TensorType, ...]:
    (x,) = operands(inputs, 1)
    return (_shape(attributes, x, (1, 2, 3)),)


def _infer_bilinear(attributes: UpsampleBilinearAttributes, inputs: Types) -> tuple[TensorType, ...]:
    (x,) = operands(inputs, 1)
    expect_dtype(x, FLOATS)
    return (_shape(attributes, x, (2,)),)


def nearest(size: int, scale: float, limit: int) -> Array:
    """The elements, of ``limit``, that each of ``size`` results takes."""
    places = np.floor(np.arange(size).astype(np.float32) * np.float32(scale))
    result: Array = np.minimum(places, limit - 1).astype(np.int64)
    return result


def _nearest_reference(attributes: UpsampleNearestAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    (x,) = inputs
    assert x is not None
    for dim, (size, scale) in enumerate(zip(attributes.size, attributes.scale, strict=True)):
        x = x.take(nearest(size, scale, x.shape[dim + 1]), dim + 1)
    return (np.ascontiguousarray(x),)


def _bilinear_reference(attributes: UpsampleBilinearAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    (x,) = inputs
    assert x is not None
    result = x.astype(np.float32)
    half = np.float32(0.5)
    for dim, (size, scale) in enumerate(zip(attributes.size, attributes.scale, strict=True)):
        steps, by, limit = np.arange(size).astype(np.float32), np.float32(scale), x.shape[dim + 1]
        at = steps * by if attributes.align_corners else np.maximum((steps + half) * by - half, np.float32(0))
        low = np.minimum(at.astype(np.int64), limit - 1)
        high = np.minimum(low + 1, limit - 1)
        weight = (at - low.astype(np.float32)).clip(0, 1).reshape(-1, *[1] * (x.ndim - dim - 2))
        result = result.take(low, dim + 1) * (1 - weight) + result.take(high, dim + 1) * weight
    return (result.astype(x.dtype),)


def _kernels(kernel: str, mode: int, attributes: Attributes, x: TensorType, y: TensorType, c: Capabilities) -> Kernels:
    if y.numel == 0:
        return Kernels(())
    rank, channels, dtype = len(x.shape) - 2, x.shape[-1], x.dtype
    whole = channels % per_unit(dtype) == 0
    numel = y.numel
    if whole and kernel == "upsample_nearest" and dtype.bits < 32:
        # Whole words move.
        channels, numel, dtype = channels // per_unit(dtype), numel // per_unit(dtype), DType.INT32
    ones = [1] * (3 - rank)
    push = struct.pack(
        "<8I3f",
        *(numel, channels, *ones, *x.shape[1:-1], *ones, *attributes.size),
        *(*[0.0] * (3 - rank), *attributes.scale),
    )
    dispatch = Dispatch(
        kernel,
        (write(), read(0)),
        grid(units(numel, dtype), c),
        (c.local_size, DTYPE[dtype], whole, mode),
        push,
        bytes=x.nbytes + y.nbytes,
        flops=0 if kernel == "upsample_nearest" else 7 * y.numel,
    )
    return Kernels((dispatch,))


def _nearest_kernels(
    attributes: UpsampleNearestAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    (x,) = operands(inputs, 1)
    return _kernels("upsample_nearest", 0, attributes, x, outputs[0], capabilities)


def _bilinear_kernels(
    attributes: UpsampleBilinearAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    (x,) = operands(inputs, 1)
    return _kernels("upsample_bilinear", attributes.align_corners, attributes, x, outputs[0], capabilities)


register(
    Operator(
        "upsample_nearest",
        "elements repeated to another size, channels last",
        _infer_nearest,
        _nearest_reference,
        _nearest_kernels,
        UpsampleNearestAttributes,
        dtypes=ANY,
    )
)
register(
    Operator(
        "upsample_bilinear",
        "images interpolated to another size, channels last",
        _infer_bilinear,
        _bilinear_reference,
        _bilinear_kernels,
        UpsampleBilinearAttributes,
        dtypes=FLOATS,
    )
)

"""Quantized weights: what the dequantize operators of torchao and PT2E say, as one description."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from torchvk.errors import ArgumentError
from torchvk.graph import DType, TensorType
from torchvk.lowering.draft import Array, Value, constant
from torchvk.lowering.refusal import Refused
from torchvk.lowering.source import Source, module_for, operator_name
from torchvk.lowering.translate.registry import arguments
from torchvk.lowering.types import to_numpy

TORCHAO = "torchao.dequantize_affine.default"
PER_CHANNEL = "quantized_decomposed.dequantize_per_channel.default"
PER_CHANNEL_GROUP = "quantized_decomposed.dequantize_per_channel_group.default"
PER_TENSOR = (
    "quantized_decomposed.dequantize_per_tensor.default",
    "quantized_decomposed.dequantize_per_tensor.tensor",
)
DEQUANTIZE = (TORCHAO, PER_CHANNEL, PER_CHANNEL_GROUP, *PER_TENSOR)


@dataclass(frozen=True)
class QuantizedWeight:
    """``w = (data - zero_point) * scale``; one scale for every ``block`` of elements, in row-major order of blocks.

    packed: 8, or the bits of an integer where ExecuTorch's embeddings have several in a byte, as unsigned numbers.
    """

    data: Node
    scale: Node | float
    zero_point: Node | int | None
    block: tuple[int, int]
    quant_min: int
    quant_max: int
    where: str
    packed: int = 8

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.data.meta["val"].shape
        return rows, columns * (8 // self.packed)

    @property
    def blocks(self) -> tuple[int, int]:
        """How many there are in both directions."""
        return self.shape[0] // self.block[0], self.shape[1] // self.block[1]

    @property
    def middle(self) -> int:
        """What is subtracted from unsigned integers and their zero points, so that they are signed."""
        signed = self.data.meta["val"].dtype == torch.int8 or self.packed < 8
        return 0 if signed else 1 << max(self.quant_max.bit_length() - 1, 0)

    @property
    def limits(self) -> tuple[int, int]:
        """Least and greatest signed integer."""
        return self.quant_min - self.middle, self.quant_max - self.middle


def wrong(where: str, problem: str) -> ArgumentError:
    return ArgumentError(f"the quantized weight of {where} is damaged: {problem}")


def read_weight(node: Node, source: Source) -> QuantizedWeight:
    """The weight that a dequantize node gives; raises :class:`Refused` unless it is a constant matrix.

    Raises:
        ArgumentError: scales or zero points are not as many as there are blocks, or blocks do not divide the matrix.
    """
    given = arguments(node, lambda operand: operand)
    data = given["input"]
    name = operator_name(node)
    scale, zero_point = given.get("scale", given.get("scales")), given.get("zero_point", given.get("zero_points"))
    rows, columns = shape if len(shape := tuple(data.meta["val"].shape)) == 2 else (1, 1)
    if name == TORCHAO:
        block = tuple(given["block_size"])
    elif name == PER_CHANNEL:
        block = (1, columns) if given["axis"] % 2 == 0 else (rows, 1)
    elif name == PER_CHANNEL_GROUP:
        block = (1, given["group_size"])
    else:
        block = (rows, columns)
    low, high = given["quant_min"], given["quant_max"]
    if low is None or high is None:
        low, high = (-128, 127) if data.meta["val"].dtype == torch.int8 else (0, 255)
    return described(node, data, scale, zero_point, block, (low, high), source)


def described(
    node: Node,
    data: Node,
    scale: Node | float,
    zero_point: Node | int | None,
    block: tuple[int, ...],
    limits: tuple[int, int],
    source: Source,
    packed: int = 8,
) -> QuantizedWeight:
    """The weight that ``node`` dequantizes, if it is a constant matrix; raises as :func:`read_weight`."""
    if not source.is_constant(data):
        raise Refused(f"its quantized weight {data.name} is not a constant")
    if data.meta["val"].dim() != 2:
        raise Refused(f"its quantized weight has {data.meta['val'].dim()} dimensions: only matrices are supported")
    stored = data.meta["val"].dtype
    if stored not in (torch.int8, torch.uint8):
        raise Refused(f"its weight is stored as {stored}: torch.int8 and torch.uint8 are supported")
    for operand in (scale, zero_point):
        if isinstance(operand, Node) and not source.is_constant(operand):
            raise Refused(f"{operand.name}, which quantizes its weight, is not a constant")
    where, size = module_for(node) or data.name, (int(block[0]), int(block[1]))
    weight = QuantizedWeight(data, scale, zero_point, size, int(limits[0]), int(limits[1]), where, packed)
    _check_blocks(weight)
    return weight


def _check_blocks(weight: QuantizedWeight) -> None:
    for size, block in zip(weight.shape, weight.block, strict=True):
        if block < 1 or size % block:
            raise wrong(
                weight.where,
                f"blocks of {list(weight.block)} do not divide its shape {list(weight.shape)}; choose a group size "
                "that divides the input channels",
            )
    count = weight.blocks[0] * weight.blocks[1]
    for name, operand in (("scale", weight.scale), ("zero point", weight.zero_point)):
        if isinstance(operand, Node) and operand.meta["val"].numel() != count:
            raise wrong(
                weight.where,
                f"its {name} has {operand.meta['val'].numel()} values, but its shape {list(weight.shape)} in blocks of "
                f"{list(weight.block)} needs {count}",
            )


def check_weight(weight: QuantizedWeight, source: Source) -> DType:
    """INT2, INT4 or INT8, as the weight will be stored; raises :class:`Refused` for what torchvk does not run."""
    low, high = weight.limits
    if not -128 <= low <= high <= 127:
        raise Refused(f"weights quantized to {weight.quant_min}…{weight.quant_max} are not supported: 8 bits are")
    for value in source.candidates(weight.zero_point) if isinstance(weight.zero_point, Node) else []:
        if value.is_floating_point() and not bool((value == value.round()).all()):
            raise Refused("the zero points of its weight are not integers")
    return next(dtype for dtype in (DType.INT2, DType.INT4, DType.INT8) if max(-low - 1, high) < 1 << (dtype.bits - 1))


def weight_values(
    weight: QuantizedWeight, transposed: bool, dtype: DType, source: Source
) -> tuple[Value, Value, Value | None]:
    """Weight [N, K], scale and perhaps zero point [N, K / group size] as constants; without arrays where the program
    holds no data.

    ``transposed``: the data is [K, N]. Scales are float16 where they are stored so, else float32. Zero points go into
    the integers where ``dtype`` has room for the differences.

    Raises:
        ArgumentError: integers or zero points outside of the declared range, scales that are zero or not finite.
    """
    block = weight.block[::-1] if transposed else weight.block
    n, k = weight.shape[::-1] if transposed else weight.shape
    per_rows, group = block
    if per_rows not in (1, n):
        raise Refused(
            f"one scale for {per_rows} output channels and {group} of {k} input channels is not supported: "
            "scales per tensor, per output channel and per group of input channels are"
        )

    def placed(array: Array | None) -> Array | None:
        """Scales or zero points as [N, K / group size]."""
        if array is None:
            return None
        array = _oriented(array.reshape(weight.blocks), transposed)
        return np.ascontiguousarray(np.repeat(array, per_rows, axis=0)) if per_rows != 1 else array

    data = source.data(weight.data)
    packed = None if data is None else _oriented(_integers(weight, to_numpy(data)), transposed)
    scale, scale_dtype = _scale(weight, source)
    zero_point = _zero_points(weight, source)
    if zero_point is not None and not zero_point.any():
        zero_point = None
    zero_point = placed(zero_point)
    if zero_point is not None and packed is not None:
        folded = packed - np.repeat(zero_point, group, axis=1)
        top = 1 << (dtype.bits - 1)
        if -top <= folded.min(initial=0) and folded.max(initial=0) < top:
            packed, zero_point = folded, None
    name, blocks = weight.data.name, (n, k // group)
    absent = zero_point is None and _known(weight, source)
    return (
        _constant(_int8(packed), dtype, (n, k), name),
        _constant(placed(scale), scale_dtype, blocks, f"{name}_scale"),
        None if absent else _constant(_int8(zero_point), DType.INT8, blocks, f"{name}_zero_point"),
    )


def _integers(weight: QuantizedWeight, data: Array) -> Array:
    """Signed, in int16."""
    if weight.packed == 4:
        data = np.stack([data >> 4, data & 15], -1).reshape(weight.shape).astype(np.int16) - 8
    elif weight.packed == 2:
        data = np.stack([data >> shift & 3 for shift in (0, 2, 4, 6)], -1).reshape(weight.shape).astype(np.int16) - 2
    if data.size and not (weight.quant_min <= data.min() and data.max() <= weight.quant_max):
        raise wrong(
            weight.where,
            f"it holds integers from {data.min()} to {data.max()}, but is declared to be quantized to "
            f"{weight.quant_min}…{weight.quant_max}; quantize it again, or declare more bits",
        )
    integers: Array = data.astype(np.int16) - np.int16(weight.middle)
    return integers


def _known(weight: QuantizedWeight, source: Source) -> bool:
    """Whether the program holds the zero points, or all that they may be are zeros."""
    operand = weight.zero_point
    if not isinstance(operand, Node) or source.data(operand) is not None:
        return True
    values = source.candidates(operand)
    return bool(values) and weight.middle == 0 and not any(bool(value.any()) for value in values)


def _zero_points(weight: QuantizedWeight, source: Source) -> Array | None:
    """In int16, of the signed integers; None without data."""
    operand = weight.zero_point
    data = source.data(operand) if isinstance(operand, Node) else torch.full(weight.blocks, operand or 0)
    if data is None:
        return None
    values = to_numpy(data)
    if not np.array_equal(values, np.rint(values)):
        raise Refused("the zero points of a weight are not integers")
    low, high = weight.quant_min, weight.quant_max
    if weight.zero_point is not None and values.size and not (low <= values.min() and values.max() <= high):
        raise wrong(
            weight.where,
            f"its zero points reach from {values.min()} to {values.max()}, outside of the declared {low}…{high}; "
            "quantize it again",
        )
    zero_points: Array = values.astype(np.int16) - np.int16(weight.middle)
    return zero_points


def _int8(array: Array | None) -> Array | None:
    return None if array is None else array.astype(np.int8)


def _scale(weight: QuantizedWeight, source: Source) -> tuple[Array | None, DType]:
    if isinstance(weight.scale, Node):
        half = weight.scale.meta["val"].dtype == torch.float16
        data = source.data(weight.scale)
        scale = None if data is None else to_numpy(data)
    else:
        half, scale = False, np.full(weight.blocks, weight.scale, np.float32)
    bad = scale[~np.isfinite(scale) | (scale == 0)] if scale is not None else []
    if len(bad):
        count = weight.blocks[0] * weight.blocks[1]
        raise wrong(
            weight.where,
            f"{len(bad)} of its {count} scales are zero or not finite ({bad[0]}); quantize finite weights, with "
            "observers that have seen them, and another mapping or more bits if that is not it",
        )
    return scale, DType.FLOAT16 if half else DType.FLOAT32


def _oriented(array: Array, transposed: bool) -> Array:
    return np.ascontiguousarray(array.T) if transposed else array


def _constant(array: Array | None, dtype: DType, shape: tuple[int, ...], name: str) -> Value:
    if array is None:
        return Value(TensorType(dtype, shape), name, constant=True)
    checked: Any = array.reshape(shape)
    return constant(checked, name, dtype)

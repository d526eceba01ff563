"""Quantized weights: what the dequantize operators of torchao and PT2E say, as one description."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from torchvk.graph import DType, TensorType
from torchvk.lowering.draft import Array, Value, constant
from torchvk.lowering.refusal import Refused
from torchvk.lowering.source import Source, operator_name
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
    """``w = (data - zero_point) * scale``; one scale for every ``block`` of elements, in row-major order of blocks."""

    data: Node
    scale: Node | float
    zero_point: Node | int | None
    block: tuple[int, int]
    quant_min: int
    quant_max: int

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.data.meta["val"].shape
        return rows, columns


def read_weight(node: Node, source: Source) -> QuantizedWeight:
    """The weight that a dequantize node gives; raises :class:`Refused` unless it is a constant matrix."""
    given = arguments(node, lambda operand: operand)
    data = given["input"]
    if not source.is_constant(data):
        raise Refused(f"its quantized weight {data.name} is not a constant")
    if data.meta["val"].dim() != 2:
        raise Refused(f"its quantized weight has {data.meta['val'].dim()} dimensions: only matrices are supported")
    if data.meta["val"].dtype != torch.int8:
        raise Refused(f"its weight is stored as {data.meta['val'].dtype}: only torch.int8 is supported")
    rows, columns = data.meta["val"].shape
    name = operator_name(node)
    scale, zero_point = given.get("scale", given.get("scales")), given.get("zero_point", given.get("zero_points"))
    if name == TORCHAO:
        block = tuple(given["block_size"])
    elif name == PER_CHANNEL:
        block = (1, columns) if given["axis"] % 2 == 0 else (rows, 1)
    elif name == PER_CHANNEL_GROUP:
        block = (1, given["group_size"])
    else:
        block = (rows, columns)
    for operand in (scale, zero_point):
        if isinstance(operand, Node) and not source.is_constant(operand):
            raise Refused(f"{operand.name}, which quantizes its weight, is not a constant")
    low, high = given["quant_min"], given["quant_max"]
    if low is None or high is None:
        low, high = -128, 127
    return QuantizedWeight(data, scale, zero_point, (int(block[0]), int(block[1])), int(low), int(high))


def check_weight(weight: QuantizedWeight, source: Source) -> DType:
    """INT4 or INT8, as the weight will be stored; raises :class:`Refused` for a scheme that torchvk does not run.

    Zero points whose values the program does not hold are taken for zeros here: ``lower`` sees them and says no.
    """
    for bits in (1, 2, 3, 5, 6, 7):
        half = 1 << (bits - 1)
        if weight.quant_max == half - 1 and weight.quant_min in (-half, 1 - half):
            raise Refused(f"{bits}-bit weights are not supported: 4- and 8-bit ones are")
    if not -128 <= weight.quant_min < 0 < weight.quant_max <= 127:
        raise Refused(f"weights quantized to {weight.quant_min}…{weight.quant_max} are not supported")
    zero = weight.zero_point
    values = source.candidates(zero) if isinstance(zero, Node) else [torch.tensor(zero or 0)]
    if any(bool(value.any()) for value in values):
        raise Refused("its weight is quantized asymmetrically (with zero points): only symmetric weights are supported")
    return DType.INT4 if weight.quant_min >= -8 and weight.quant_max <= 7 else DType.INT8


def weight_values(weight: QuantizedWeight, transposed: bool, dtype: DType, source: Source) -> tuple[Value, Value]:
    """Weight [N, K] and scale [N, K / group size] as constants; without arrays where the program holds no data.

    ``transposed``: the data is [K, N]. Scales are float16 where they are stored so, else float32.
    """
    block = weight.block[::-1] if transposed else weight.block
    n, k = weight.shape[::-1] if transposed else weight.shape
    per_rows, group = block
    if per_rows not in (1, n) or group < 1 or k % group:
        raise Refused(
            f"one scale for {per_rows} output channels and {group} of {k} input channels is not supported: "
            "scales per tensor, per output channel and per group of input channels are"
        )
    data = source.data(weight.data)
    packed = None if data is None else _oriented(to_numpy(data), transposed)
    scale, scale_dtype = _scale(weight, source)
    if scale is not None:
        scale = _oriented(scale.reshape([s // b for s, b in zip(weight.shape, weight.block, strict=True)]), transposed)
        scale = np.ascontiguousarray(np.repeat(scale, per_rows, axis=0)) if per_rows != 1 else scale
    return (
        _constant(packed, dtype, (n, k), weight.data.name),
        _constant(scale, scale_dtype, (n, k // group), f"{weight.data.name}_scale"),
    )


def _scale(weight: QuantizedWeight, source: Source) -> tuple[Array | None, DType]:
    if not isinstance(weight.scale, Node):
        return np.array(weight.scale, np.float32), DType.FLOAT32
    data = source.data(weight.scale)
    half = weight.scale.meta["val"].dtype == torch.float16
    return None if data is None else to_numpy(data), DType.FLOAT16 if half else DType.FLOAT32


def _oriented(array: Array, transposed: bool) -> Array:
    return np.ascontiguousarray(array.T) if transposed else array


def _constant(array: Array | None, dtype: DType, shape: tuple[int, ...], name: str) -> Value:
    if array is None:
        return Value(TensorType(dtype, shape), name, constant=True)
    checked: Any = array.reshape(shape)
    return constant(checked, name, dtype)

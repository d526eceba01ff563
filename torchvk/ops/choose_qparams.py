"""``choose_qparams``: scales and zero points that quantize a tensor, chosen from the ranges of its blocks.

The formulas are those of torchvk.ops.quantization. Blocks are those of torchvk.ops.quantize: scale and zero point have
the rank of x, and one of them serves x.shape / scale.shape elements.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from torchvk.graph import DType, TensorType
from torchvk.ops.codes import DTYPE, units
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
    scratch_read,
    scratch_write,
    write,
)
from torchvk.ops.quantization import Scheme, choose
from torchvk.ops.shapes import Shape, collapse, dense_strides, expect_dtype, operands, padded, words

FLOATS = (DType.FLOAT32, DType.FLOAT16)
MAX_DIMENSIONS = 4
MAX_SPLITS = 128
MAX_LOCAL_SIZE = 256


@dataclass(frozen=True)
class ChooseQparamsAttributes:
    """blocks: the shape of the scales. formula: "torchao" in x's precision, which scales have, too; "pt2e" as
    quantized_decomposed chooses per tensor, "pt2e_token" as it does per token, with scales in float32."""

    blocks: list[int]
    symmetric: bool
    quant_min: int
    quant_max: int
    eps: float
    formula: Literal["torchao", "pt2e", "pt2e_token"]

    @property
    def scheme(self) -> Scheme:
        activation: Literal["dynamic_per_token", "dynamic_per_tensor"]
        activation = "dynamic_per_token" if self.formula == "pt2e_token" else "dynamic_per_tensor"
        library: Literal["torchao", "pt2e"] = "torchao" if self.formula == "torchao" else "pt2e"
        return Scheme(activation, self.symmetric, self.quant_min, self.quant_max, self.eps, library)


def _infer(attributes: ChooseQparamsAttributes, inputs: Types) -> tuple[TensorType, ...]:
    (x,) = operands(inputs, 1)
    expect_dtype(x, FLOATS)
    blocks = tuple(attributes.blocks)
    expect(
        len(blocks) == len(x.shape) and all(b > 0 and s % b == 0 for s, b in zip(x.shape, blocks, strict=True)),
        f"{list(blocks)} are no blocks of {list(x.shape)}",
    )
    expect(x.numel > 0, "there is no range of nothing")
    limits = -(1 << 15), (1 << 15) - 1
    expect(
        limits[0] <= attributes.quant_min < attributes.quant_max <= limits[1],
        f"quant_min {attributes.quant_min} and quant_max {attributes.quant_max} are no range",
    )
    expect(math.isfinite(attributes.eps) and attributes.eps >= 0, f"eps must be 0 or more, got {attributes.eps}")
    scale = x.dtype if attributes.formula == "torchao" else DType.FLOAT32
    return TensorType(scale, blocks), TensorType(DType.INT32, blocks)


def _walks(x: TensorType, blocks: Shape) -> tuple[tuple[Shape, Shape], tuple[Shape, Shape]]:
    """Sizes and strides of the walk from block to block, and of that within a block."""
    strides = dense_strides(x.shape)
    within = tuple(size // count for size, count in zip(x.shape, blocks, strict=True))
    steps = tuple(stride * size for stride, size in zip(strides, within, strict=True))
    outer, inner = collapse(blocks, steps), collapse(within, strides)
    return (outer[0], outer[1][0]), (inner[0], inner[1][0])


def _support(attributes: ChooseQparamsAttributes, inputs: Types) -> str | None:
    (x,) = operands(inputs, 1)
    if any(len(sizes) > MAX_DIMENSIONS for sizes, _ in _walks(x, tuple(attributes.blocks))):
        return f"blocks along more than {MAX_DIMENSIONS} dimensions are not supported"
    return None


def _reference(attributes: ChooseQparamsAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    (x,) = inputs
    assert x is not None
    shape = [n for size, count in zip(x.shape, attributes.blocks, strict=True) for n in (count, size // count)]
    split = x.reshape(shape)
    axes = tuple(range(1, len(shape), 2))
    with np.errstate(all="ignore"):
        low = np.minimum(split.min(axis=axes), x.dtype.type(0))
        high = np.maximum(split.max(axis=axes), x.dtype.type(0))
        scale, zero_point = choose(low, high, attributes.scheme)
        bad = ~np.isfinite(scale) | np.isnan(low) | np.isnan(high)
        scale = np.where(bad, np.nan, scale).astype(x.dtype if attributes.formula == "torchao" else np.float32)
    return scale, np.where(bad, 0, zero_point).astype(np.int32)


def _kernels(
    attributes: ChooseQparamsAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    (x,) = operands(inputs, 1)
    blocks = outputs[0].numel
    outer, inner = _walks(x, outputs[0].shape)
    size = x.numel // blocks
    # A power of two, for the tree of the reduction.
    wanted = 1 << max(3, min(-(-size // 4), MAX_LOCAL_SIZE).bit_length() - 1)
    local_size = min(wanted, 1 << (capabilities.max_workgroup_invocations.bit_length() - 1), MAX_LOCAL_SIZE)
    splits = max(1, min(MAX_SPLITS, size // (16 * local_size), 1024 // blocks))
    scheme = attributes.scheme
    walk = [n for sizes, strides in (outer, inner) for n in (*padded(sizes, 4, 1), *padded(strides, 4))]
    push = words(blocks, size, splits, *walk)
    ranges = Dispatch(
        "block_ranges",
        (read(0), scratch_write(0)),
        grid(blocks * splits, capabilities, 1),
        (local_size, DTYPE[x.dtype]),
        push,
        bytes=x.nbytes,
    )
    choosing = Dispatch(
        "choose_qparams",
        (scratch_read(0), write(0), write(1)),
        grid(units(blocks, outputs[0].dtype), capabilities),
        (capabilities.local_size, DTYPE[x.dtype], DTYPE[outputs[0].dtype], scheme.formula, scheme.symmetric),
        words(blocks, splits) + struct.pack("<2if", scheme.quant_min, scheme.quant_max, scheme.smallest(x.dtype)),
        bytes=8 * blocks * splits + outputs[0].nbytes + outputs[1].nbytes,
    )
    return Kernels((ranges, choosing), (8 * blocks * splits,))


register(
    Operator(
        "choose_qparams",
        "scales and zero points from the ranges of blocks, by the formulas of torchao and PT2E",
        _infer,
        _reference,
        _kernels,
        ChooseQparamsAttributes,
        _support,
        dtypes=FLOATS,
    )
)

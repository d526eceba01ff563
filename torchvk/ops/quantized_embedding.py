"""Rows of a table of integers: ``quantized_embedding``.

    y[…, d] = (table[id[…], d] − zero point[id[…], g]) · scale[id[…], g]

in float32, rounded once to the result's dtype; g is the group of columns that d is in. Ids are brought into range as by
``embedding``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from torchvk.graph import DType, TensorType
from torchvk.ops.codes import DTYPE, units
from torchvk.ops.indexing import INDICES, clamped
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
from torchvk.ops.shapes import expect_dtype, expect_rank, words

TABLE, SCALE, IDS, ZERO_POINT = range(4)
MAX_BYTES = 1 << 31  # kernels count bytes and elements in 32 bits


@dataclass(frozen=True)
class QuantizedEmbeddingAttributes:
    """group_size: columns that share a scale; it divides the columns, and is all of them for a scale a row.

    dtype: float32 or float16, of the result.
    """

    group_size: int
    dtype: DType = DType.FLOAT32


def _operands(inputs: Types) -> tuple[TensorType, TensorType, TensorType, TensorType | None]:
    expect(3 <= len(inputs) <= 4, f"takes table, scale, ids and perhaps zero point, {len(inputs)} operands were given")
    table, scale, ids, zero_point = (*inputs, None)[:4]
    if table is None or scale is None or ids is None:
        expect(False, "table, scale and ids must be there")
    assert table is not None and scale is not None and ids is not None  # noqa: PT018
    return table, scale, ids, zero_point


def _infer(attributes: QuantizedEmbeddingAttributes, inputs: Types) -> tuple[TensorType, ...]:
    table, scale, ids, zero_point = _operands(inputs)
    expect(
        table.dtype in (DType.INT2, DType.INT4, DType.INT8) and len(table.shape) == 2,
        f"the table must be int2, int4 or int8 of rank 2, got {table}",
    )
    rows, columns = table.shape
    group = attributes.group_size
    expect(group >= 1 and columns % group == 0, f"group_size {group} does not divide the {columns} columns")
    blocks = (rows, columns // group)
    expect(scale.dtype.is_float and scale.shape == blocks, f"the scale must be floating {[*blocks]}, got {scale}")
    if zero_point is not None:
        expect(
            zero_point.dtype is DType.INT8 and zero_point.shape == blocks,
            f"the zero point must be int8 {[*blocks]}, got {zero_point}",
        )
    expect_dtype(ids, INDICES, "the ids")
    expect(rows > 0 or ids.numel == 0, "cannot look up ids in a table without rows")
    expect(attributes.dtype.is_float, f"the result must be float32 or float16, not {attributes.dtype.value}")
    shape = (*ids.shape, columns)
    expect_rank(shape)
    return (TensorType(attributes.dtype, shape),)


def _support(attributes: QuantizedEmbeddingAttributes, inputs: Types) -> str | None:
    table, _, ids, _ = _operands(inputs)
    if max(table.nbytes, ids.numel * table.shape[1]) >= MAX_BYTES:
        return f"{ids} of {table} has {MAX_BYTES} bytes or elements or more"
    return None


def _reference(attributes: QuantizedEmbeddingAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    table, scale, ids, zero_point = (*inputs, None)[:4]
    assert table is not None
    assert scale is not None
    assert ids is not None
    rows = clamped(ids, len(table))
    values = table[rows].astype(np.float32).reshape(*ids.shape, scale.shape[1], attributes.group_size)
    if zero_point is not None:
        values -= zero_point[rows][..., None].astype(np.float32)
    with np.errstate(all="ignore"):
        values = values * scale[rows][..., None].astype(np.float32)
        return (values.reshape(*ids.shape, table.shape[1]).astype(attributes.dtype.numpy),)


def _kernels(
    attributes: QuantizedEmbeddingAttributes,
    inputs: Types,
    outputs: Sequence[TensorType],
    capabilities: Capabilities,
) -> Kernels:
    table, scale, ids, zero_point = _operands(inputs)
    (output,) = outputs
    if output.numel == 0:
        return Kernels(())
    rows, columns = table.shape
    dispatch = Dispatch(
        "quantized_embedding",
        (write(), read(TABLE), read(SCALE), read(IDS), read(SCALE if zero_point is None else ZERO_POINT)),
        grid(units(output.numel, output.dtype), capabilities),
        (
            capabilities.local_size,
            DTYPE[output.dtype],
            DTYPE[ids.dtype],
            DTYPE[scale.dtype],
            table.dtype.bits,
            zero_point is not None,
        ),
        words(output.numel, rows, columns, table.nbytes // rows, attributes.group_size),
        bytes=output.numel * table.dtype.bits // 8 + output.nbytes,
        flops=output.numel,
    )
    return Kernels((dispatch,))


register(
    Operator(
        "quantized_embedding",
        "rows of a table of int2, int4 or int8, with scales per row or group; ids are brought into range",
        _infer,
        _reference,
        _kernels,
        QuantizedEmbeddingAttributes,
        _support,
        frozenset({TABLE, SCALE, ZERO_POINT}),
        dtypes=(DType.INT2, DType.INT4, DType.INT8),
    )
)

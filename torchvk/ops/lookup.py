"""``lookup``: every 8-bit element replaced by the entry of a table of 256, which is any function of it, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torchvk.graph import DType, TensorType
from torchvk.ops.operator import (
    Array,
    Capabilities,
    Dispatch,
    Kernels,
    NoAttributes,
    Operator,
    Types,
    expect,
    grid,
    read,
    register,
    write,
)
from torchvk.ops.quantization import LANES, reads_texels
from torchvk.ops.shapes import expect_dtype, operands, words

EIGHT_BITS = (DType.INT8, DType.UINT8)
SIZE = 256
TABLE = 1


def _infer(attributes: NoAttributes, inputs: Types) -> tuple[TensorType, ...]:
    x, table = operands(inputs, 2)
    expect_dtype(x, EIGHT_BITS)
    expect_dtype(table, EIGHT_BITS, "the table")
    expect(table.shape == (SIZE,), f"the table must have {SIZE} entries, got {list(table.shape)}")
    return (TensorType(table.dtype, x.shape),)


def _reference(attributes: NoAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    """The entry of a negative x is that of x + 256."""
    x, table = inputs
    assert x is not None
    assert table is not None
    return (table[x.view(np.uint8)],)


def _kernels(
    attributes: NoAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    x, _ = operands(inputs, 2)
    if x.numel == 0:
        return Kernels(())
    count = -(-x.numel // 4)
    texels = reads_texels(capabilities, x.nbytes, SIZE)
    threads, local_size = (-(-count // 4), LANES) if texels else (count, capabilities.local_size)
    dispatch = Dispatch(
        "lookup_lanes" if texels else "lookup",
        (read(0, texels=texels), read(TABLE, texels=texels), write()),
        grid(threads, capabilities, local_size),
        (local_size,),
        words(count),
        bytes=2 * x.nbytes + SIZE,
    )
    return Kernels((dispatch,))


register(
    Operator(
        "lookup",
        "entry x of a table of 256 8-bit integers: any function of 8-bit integers",
        _infer,
        _reference,
        _kernels,
        constant_inputs=frozenset({TABLE}),
        dtypes=EIGHT_BITS,
    )
)

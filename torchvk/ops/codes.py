"""Numbers that Python and the shaders share (``shaders/common.slang``)."""

from __future__ import annotations

from torchvk.graph import DType

DTYPE = {
    DType.FLOAT32: 0,
    DType.FLOAT16: 1,
    DType.INT64: 2,
    DType.INT32: 3,
    DType.INT16: 4,
    DType.INT8: 5,
    DType.UINT8: 6,
    DType.BOOL: 7,
}
INT4 = 8  # of a constant, for the few kernels that read one as it is in the file (shaders/nibbles.slang)


def per_unit(dtype: DType) -> int:
    """Elements that one thread of an elementwise kernel owns: those that share a 32-bit word."""
    return max(1, 32 // dtype.bits)


def units(numel: int, dtype: DType) -> int:
    """Threads that cover ``numel`` elements."""
    return -(-numel // per_unit(dtype))

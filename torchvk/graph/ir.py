"""The IR: what a delegate computes, with no word about how.

A :class:`Graph` is a list of tensors and a topologically ordered list of nodes. Tensors are known by their
position in ``Graph.tensors``. Values are immutable (single assignment) and always dense and row-major.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


class DType(str, enum.Enum):
    """Element types. ``int4`` exists for constants only: two's complement, two a byte, the even column in the
    low nibble, every row (last dimension) padded to whole bytes."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT64 = "int64"
    INT32 = "int32"
    INT16 = "int16"
    INT8 = "int8"
    INT4 = "int4"
    UINT8 = "uint8"
    BOOL = "bool"

    @property
    def bits(self) -> int:
        return _BITS[self]

    @property
    def is_float(self) -> bool:
        return self in (DType.FLOAT32, DType.FLOAT16)

    @property
    def numpy(self) -> np.dtype[Any]:
        """The NumPy dtype of one element; ``int4`` has none and unpacks to int8."""
        return np.dtype("int8" if self is DType.INT4 else self.value)

    @classmethod
    def of(cls, dtype: np.dtype[Any]) -> DType:
        """The DType of a NumPy dtype; raises ``ValueError`` for one that the IR does not have."""
        return cls(dtype.name)


_BITS = {
    DType.FLOAT32: 32,
    DType.FLOAT16: 16,
    DType.INT64: 64,
    DType.INT32: 32,
    DType.INT16: 16,
    DType.INT8: 8,
    DType.INT4: 4,
    DType.UINT8: 8,
    DType.BOOL: 8,
}


class Role(str, enum.Enum):
    INPUT = "input"
    OUTPUT = "output"
    CONSTANT = "constant"
    TEMPORARY = "temporary"


@dataclass(frozen=True, slots=True)
class TensorType:
    """dtype and shape of a value."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the dense row-major data (for ``int4``: rows padded to whole bytes)."""
        if self.dtype is DType.INT4:
            last = self.shape[-1] if self.shape else 1
            return math.prod(self.shape[:-1]) * ((last + 1) // 2)
        return self.numel * self.dtype.bits // 8

    def __str__(self) -> str:
        return f"{self.dtype.value}{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class ByteRange:
    """``size`` bytes at ``offset`` of the constants' blob."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """One value of the graph. ``data`` is set for constants and for nothing else."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    role: Role
    data: ByteRange | None = None

    @property
    def type(self) -> TensorType:
        return TensorType(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Node:
    """One application of an operator of ``torchvk.ops``.

    ``inputs`` and ``outputs`` are positions in ``Graph.tensors``; an optional input that is absent is None.
    ``attributes`` are plain data (numbers, strings, booleans, None, lists of them); the operator's own
    attribute dataclass gives them types. ``source`` is the path of the ``nn.Module`` it came from.
    """

    op: str
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True, slots=True)
class Graph:
    """A whole delegate. ``constants`` holds the bytes that the tensors' ``data`` ranges point into.

    ``inputs`` and ``outputs`` give the calling convention: positions in ``tensors``, in the order of the
    arguments and results. The same tensor may be returned twice.
    """

    tensors: tuple[Tensor, ...]
    nodes: tuple[Node, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    constants: memoryview = field(default=memoryview(b""), repr=False)

    def constant_bytes(self, index: int) -> memoryview:
        """The raw bytes of constant ``index``, a view into ``constants``."""
        data = self.tensors[index].data
        if data is None:
            raise ValueError(f"tensor {index} is not a constant")
        return self.constants[data.offset : data.offset + data.size]

    def constant_array(self, index: int) -> np.ndarray[Any, Any]:
        """Constant ``index`` as a read-only array of its shape; ``int4`` is unpacked to int8."""
        tensor = self.tensors[index]
        raw = np.frombuffer(self.constant_bytes(index), dtype=np.uint8)
        if tensor.dtype is DType.INT4:
            return unpack_int4(raw, tensor.shape)
        return raw.view(tensor.dtype.numpy).reshape(tensor.shape)

    def validate(self) -> None:
        """Check the structure; see :func:`torchvk.graph.validate.validate`."""
        from torchvk.graph.validate import validate

        validate(self)


def pack_int4(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Pack integers in [-8, 7], any shape [..., K], into uint8 [..., ceil(K/2)]: even column in the low nibble."""
    if values.size and (values.min() < -8 or values.max() > 7):
        raise ValueError(f"4-bit values must lie in [-8, 7], got [{values.min()}, {values.max()}]")
    nibbles = values.astype(np.int8).view(np.uint8) & 0xF
    if nibbles.shape[-1] % 2:
        nibbles = np.concatenate([nibbles, np.zeros_like(nibbles[..., :1])], axis=-1)
    packed: np.ndarray[Any, Any] = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    return packed


def unpack_int4(packed: np.ndarray[Any, Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The inverse of :func:`pack_int4`: uint8 bytes to int8 values of ``shape`` [..., K]."""
    columns = shape[-1]
    rows = packed.reshape((*shape[:-1], (columns + 1) // 2))
    both = np.empty((*shape[:-1], rows.shape[-1] * 2), np.int8)
    both[..., 0::2] = (rows << 4).view(np.int8) >> 4
    both[..., 1::2] = rows.view(np.int8) >> 4
    return both[..., :columns]

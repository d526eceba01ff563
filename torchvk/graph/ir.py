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
    """Element types. ``int4`` and ``int2`` exist for constants only: two's complement, two or four a byte, the first
    column in the lowest bits, every row (last dimension) padded to whole bytes."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT64 = "int64"
    INT32 = "int32"
    INT16 = "int16"
    INT8 = "int8"
    INT4 = "int4"
    INT2 = "int2"
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
        """The NumPy dtype of one element; ``int4`` and ``int2`` have none and unpack to int8."""
        return np.dtype("int8" if self.packed else self.value)

    @property
    def packed(self) -> bool:
        """Whether several elements share a byte."""
        return self.bits < 8

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
    DType.INT2: 2,
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
    """dtype and shape of a value. ``constant``: its data are in the graph; kernels may have them rearranged."""

    dtype: DType
    shape: tuple[int, ...]
    constant: bool = field(default=False, compare=False, repr=False)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the dense row-major data (of packed dtypes: rows padded to whole bytes)."""
        if self.dtype.packed:
            last = self.shape[-1] if self.shape else 1
            return math.prod(self.shape[:-1]) * -(-last * self.dtype.bits // 8)
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
        return TensorType(self.dtype, self.shape, self.data is not None)


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
        """Constant ``index`` as a read-only array of its shape; ``int4`` and ``int2`` are unpacked to int8."""
        tensor = self.tensors[index]
        raw = np.frombuffer(self.constant_bytes(index), dtype=np.uint8)
        if tensor.dtype.packed:
            return unpack_bits(raw, tensor.dtype.bits, tensor.shape)
        return raw.view(tensor.dtype.numpy).reshape(tensor.shape)

    def validate(self) -> None:
        """Check the structure; see :func:`torchvk.graph.validate.validate`."""
        from torchvk.graph.validate import validate

        validate(self)


def pack_bits(values: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """Pack integers of 2 or 4 bits, any shape [..., K], into uint8 [..., ceil(K bits / 8)], first column lowest."""
    top = 1 << (bits - 1)
    if values.size and (values.min() < -top or values.max() >= top):
        raise ValueError(f"{bits}-bit values must lie in [{-top}, {top - 1}], got [{values.min()}, {values.max()}]")
    count = 8 // bits
    fields = values.astype(np.int8).view(np.uint8) & np.uint8((1 << bits) - 1)
    if padding := -fields.shape[-1] % count:
        fields = np.concatenate([fields, np.zeros((*fields.shape[:-1], padding), np.uint8)], axis=-1)
    packed: np.ndarray[Any, Any] = fields[..., 0::count].copy()
    for place in range(1, count):
        packed |= fields[..., place::count] << np.uint8(bits * place)
    return packed


def unpack_bits(packed: np.ndarray[Any, Any], bits: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The inverse of :func:`pack_bits`: uint8 bytes to int8 values of ``shape`` [..., K]."""
    columns, count = shape[-1], 8 // bits
    rows = packed.reshape((*shape[:-1], -(-columns // count)))
    values = np.empty((*shape[:-1], rows.shape[-1] * count), np.int8)
    for place in range(count):
        values[..., place::count] = (rows << np.uint8(8 - bits * (place + 1))).view(np.int8) >> np.int8(8 - bits)
    return values[..., :columns]

"""Shapes and strides: what the operator families share. Strides count elements."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from torchvk.graph import DType, TensorType
from torchvk.graph.validate import MAX_RANK
from torchvk.ops.operator import Types, expect

Shape = tuple[int, ...]


def operands(inputs: Types, count: int) -> tuple[TensorType, ...]:
    """Exactly ``count`` inputs, all present and none int4; raises OperatorError."""
    expect(len(inputs) == count, f"takes {count} input{'s' if count != 1 else ''}, got {len(inputs)}")
    return present(inputs)


def present(inputs: Types) -> tuple[TensorType, ...]:
    """The inputs, none absent and none int4; raises OperatorError."""
    result = []
    for slot, type in enumerate(inputs):
        expect(type is not None, f"input {slot} is missing")
        assert type is not None
        expect(not type.dtype.packed, f"input {slot} is {type.dtype.value}, which only weights can be")
        result.append(type)
    return tuple(result)


def expect_dtype(type: TensorType, allowed: Sequence[DType], what: str = "input") -> None:
    """Raise OperatorError unless the dtype is one of ``allowed``."""
    names = ", ".join(dtype.value for dtype in allowed)
    expect(type.dtype in allowed, f"{what} is {type.dtype.value}, supported are {names}")


def expect_same_dtype(types: Sequence[TensorType]) -> None:
    names = ", ".join(type.dtype.value for type in types)
    expect(len({type.dtype for type in types}) <= 1, f"inputs must have one dtype, got {names}")


def expect_rank(shape: Sequence[int]) -> None:
    """Raise OperatorError for a shape that a graph cannot hold."""
    expect(len(shape) <= MAX_RANK, f"shape {list(shape)} has rank {len(shape)}, the limit is {MAX_RANK}")
    expect(all(size >= 0 for size in shape), f"shape {list(shape)} has a negative size")


def expect_dim(dim: int, rank: int) -> None:
    """Raise OperatorError unless ``dim`` is normalized: 0 <= dim < rank."""
    expect(0 <= dim < rank, f"dim {dim} is not a dimension of a tensor of rank {rank}")


def broadcast(shapes: Sequence[Shape]) -> Shape:
    """The shape that all of them broadcast to; raises OperatorError."""
    rank = max(len(shape) for shape in shapes)
    result = []
    for d in range(-rank, 0):
        sizes = {shape[d] for shape in shapes if len(shape) >= -d} - {1}
        names = " and ".join(str(list(shape)) for shape in shapes)
        expect(len(sizes) <= 1, f"shapes {names} do not broadcast together")
        result.append(sizes.pop() if sizes else 1)
    return tuple(result)


def dense_strides(shape: Sequence[int]) -> Shape:
    """Strides of a row-major tensor."""
    strides = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        strides[d] = strides[d + 1] * shape[d + 1]
    return tuple(strides)


def broadcast_strides(shape: Shape, target: Shape) -> Shape:
    """Strides that walk a dense tensor of ``shape`` as if it had the broadcast shape ``target``."""
    lead = len(target) - len(shape)
    return (0,) * lead + tuple(
        0 if size == 1 else stride for size, stride in zip(shape, dense_strides(shape), strict=True)
    )


def collapse(shape: Shape, *operands: Shape) -> tuple[Shape, tuple[Shape, ...]]:
    """Fewest dimensions that walk the same elements in the same order: dimensions of size 1 go, neighbours that
    every operand steps through evenly become one. At least one dimension remains."""
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in operands]
    for d in range(len(shape)):
        if shape[d] == 1:
            continue
        if sizes and all(kept[-1] == own[d] * shape[d] for kept, own in zip(strides, operands, strict=True)):
            sizes[-1] *= shape[d]
            for kept, own in zip(strides, operands, strict=True):
                kept[-1] = own[d]
            continue
        sizes.append(shape[d])
        for kept, own in zip(strides, operands, strict=True):
            kept.append(own[d])
    if not sizes:
        return (1,), tuple((0,) for _ in operands)
    return tuple(sizes), tuple(tuple(kept) for kept in strides)


@dataclass(frozen=True)
class Walk:
    """A collapsed walk over a dense output and its operands, as kernels take it."""

    numel: int
    sizes: Shape
    strides: tuple[Shape, ...]

    @classmethod
    def over(cls, shape: Shape, *operands: Shape) -> Walk:
        sizes, strides = collapse(shape, *operands)
        return cls(math.prod(shape), sizes, strides)

    @property
    def rank(self) -> int:
        return len(self.sizes)

    def push(self, operands: int | None = None) -> bytes:
        """numel, the 7 inner sizes, 8 strides an operand: words. The outermost size follows from numel.

        operands: as many as the kernel's block has room for, where those are more.
        """
        missing = (operands or len(self.strides)) - len(self.strides)
        strides = [stride for own in (*self.strides, *[()] * missing) for stride in padded(own, MAX_RANK)]
        return words(self.numel, *padded(self.sizes[1:], MAX_RANK - 1, 1), *strides)


def padded(values: Sequence[int], count: int, filler: int = 0) -> list[int]:
    return [*values, *[filler] * (count - len(values))]


def words(*values: int) -> bytes:
    """32-bit words, two's complement; larger numbers keep their low word (kernels' indices wrap alike)."""
    return struct.pack(f"<{len(values)}I", *(value & 0xFFFFFFFF for value in values))


def nbytes(types: Types) -> int:
    """Bytes of all present types together."""
    return sum(type.nbytes for type in types if type is not None)

"""Operators that read where integer tensors say: embedding, gather, index_select, index.

What indices hold is known only when they are read, so every kernel brings each into range first: one below the range
reads the first, one above it the last element of its dimension. (torch raises an error instead.) ``index`` counts
negative indices from the end before that, as torch does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from torchvk.graph import DType, TensorType
from torchvk.ops.codes import DTYPE, per_unit, units
from torchvk.ops.operator import (
    Arg,
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
    scratch_read,
    scratch_write,
    write,
)
from torchvk.ops.shapes import (
    Shape,
    Walk,
    broadcast,
    broadcast_strides,
    dense_strides,
    expect_dim,
    expect_dtype,
    expect_rank,
    expect_same_dtype,
    operands,
    present,
    words,
)

ALL = tuple(DTYPE)
INDICES = (DType.INT64, DType.INT32)
OFFSETS = 8  # in place of an index dtype: offsets from the kernel index_offsets


@dataclass(frozen=True)
class GatherAttributes:
    dim: int


@dataclass(frozen=True)
class IndexSelectAttributes:
    dim: int


@dataclass(frozen=True)
class Take:
    """Element c of the output (of ``shape``) is element Σ c source_strides + index · stride of the source, with the
    index that stands at Σ c index_strides, brought into [0, size - 1]. index_dtype: a code, or OFFSETS."""

    shape: Shape
    source_strides: Shape
    index_strides: Shape
    size: int
    stride: int
    index_dtype: int
    wrap: bool = False


def take_dispatch(take: Take, dtype: DType, indices: Arg, capabilities: Capabilities) -> Dispatch:
    """From the first input. The output must not be empty."""
    walk, stride = Walk.over(take.shape, take.source_strides, take.index_strides), take.stride
    source_strides, index_strides = walk.strides
    nbytes = walk.numel * dtype.bits // 8
    count = per_unit(dtype)
    # Where whole words move, they are the elements.
    if (
        dtype.bits < 32
        and source_strides[-1] == 1
        and index_strides[-1] == 0
        and take.index_dtype != OFFSETS
        and all(number % count == 0 for number in (walk.sizes[-1], stride, *source_strides[:-1]))
    ):
        sizes = (*walk.sizes[:-1], walk.sizes[-1] // count)
        source_strides = (*(number // count for number in source_strides[:-1]), 1)
        walk = Walk(math.prod(sizes), sizes, (source_strides, index_strides))
        stride, dtype = stride // count, DType.INT32
    return Dispatch(
        "take",
        (write(), read(0), indices),
        grid(units(walk.numel, dtype), capabilities),
        (capabilities.local_size, DTYPE[dtype], take.index_dtype, walk.rank, take.wrap),
        walk.push() + words(take.size, stride),
        bytes=2 * nbytes,
    )


def _expect_indices(index: TensorType, size: int) -> None:
    expect_dtype(index, INDICES, "the index")
    expect(size > 0 or index.numel == 0, "cannot index a dimension of size 0")


def clamped(index: Array, size: int) -> Array:
    """As the kernels do it, for 0 < size or an empty ``index``."""
    return np.clip(index, 0, max(size - 1, 0))


# --- embedding


def _embedding_infer(attributes: NoAttributes, inputs: Types) -> tuple[TensorType, ...]:
    weight, indices = operands(inputs, 2)
    expect(len(weight.shape) >= 1, "the weight must have at least 1 dimension")
    _expect_indices(indices, weight.shape[0])
    shape = indices.shape + weight.shape[1:]
    expect_rank(shape)
    return (TensorType(weight.dtype, shape),)


def _embedding_reference(attributes: NoAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    weight, indices = inputs
    assert weight is not None
    assert indices is not None
    return (np.asarray(weight[clamped(indices, weight.shape[0])]),)


def _embedding_kernels(
    attributes: NoAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    weight, indices = operands(inputs, 2)
    if outputs[0].numel == 0:
        return Kernels(())
    row = math.prod(weight.shape[1:])
    take = Take((indices.numel, row), (0, 1), (1, 0), weight.shape[0], row, DTYPE[indices.dtype])
    return Kernels((take_dispatch(take, weight.dtype, read(1), capabilities),))


register(
    Operator(
        "embedding",
        "rows of a table; ids out of range read the first or last row",
        _embedding_infer,
        _embedding_reference,
        _embedding_kernels,
        dtypes=ALL,
    )
)


# --- gather


def _gather_infer(attributes: GatherAttributes, inputs: Types) -> tuple[TensorType, ...]:
    x, index = operands(inputs, 2)
    expect(len(x.shape) == len(index.shape), f"shapes {list(x.shape)} and {list(index.shape)} must have one rank")
    expect_dim(attributes.dim, max(len(x.shape), 1))
    for d, (size, own) in enumerate(zip(x.shape, index.shape, strict=True)):
        expect(
            d == attributes.dim or own <= size, f"index shape {list(index.shape)} exceeds {list(x.shape)} in dim {d}"
        )
    _expect_indices(index, x.shape[attributes.dim] if x.shape else 1)
    return (TensorType(x.dtype, index.shape),)


def _gather_reference(attributes: GatherAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    x, index = inputs
    assert x is not None
    assert index is not None
    if not x.shape:
        return (x,)
    dim = attributes.dim
    within = x[tuple(slice(None) if d == dim else slice(size) for d, size in enumerate(index.shape))]
    return (np.take_along_axis(within, clamped(index, x.shape[dim]), axis=dim),)


def _gather_kernels(
    attributes: GatherAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    x, index = operands(inputs, 2)
    if index.numel == 0:
        return Kernels(())
    dim, strides = attributes.dim, dense_strides(x.shape)
    take = Take(
        index.shape,
        tuple(0 if d == dim else stride for d, stride in enumerate(strides)),
        dense_strides(index.shape),
        x.shape[dim] if x.shape else 1,
        strides[dim] if x.shape else 1,
        DTYPE[index.dtype],
    )
    return Kernels((take_dispatch(take, x.dtype, read(1), capabilities),))


register(
    Operator(
        "gather",
        "x[…, index[…, i, …], …] along one dimension; indices are clamped",
        _gather_infer,
        _gather_reference,
        _gather_kernels,
        GatherAttributes,
        dtypes=ALL,
    )
)


# --- index_select


def _index_select_infer(attributes: IndexSelectAttributes, inputs: Types) -> tuple[TensorType, ...]:
    x, index = operands(inputs, 2)
    dim = attributes.dim
    expect_dim(dim, len(x.shape))
    expect(len(index.shape) <= 1, f"the index must have at most 1 dimension, its shape is {list(index.shape)}")
    _expect_indices(index, x.shape[dim])
    return (TensorType(x.dtype, (*x.shape[:dim], index.numel, *x.shape[dim + 1 :])),)


def _index_select_reference(attributes: IndexSelectAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    x, index = inputs
    assert x is not None
    assert index is not None
    return (np.take(x, clamped(index.reshape(-1), x.shape[attributes.dim]), axis=attributes.dim),)


def _index_select_kernels(
    attributes: IndexSelectAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    x, index = operands(inputs, 2)
    if outputs[0].numel == 0:
        return Kernels(())
    outer, size = math.prod(x.shape[: attributes.dim]), x.shape[attributes.dim]
    inner = math.prod(x.shape[attributes.dim + 1 :])
    take = Take((outer, index.numel, inner), (size * inner, 0, 1), (0, 1, 0), size, inner, DTYPE[index.dtype])
    return Kernels((take_dispatch(take, x.dtype, read(1), capabilities),))


register(
    Operator(
        "index_select",
        "positions of one dimension; indices are clamped",
        _index_select_infer,
        _index_select_reference,
        _index_select_kernels,
        IndexSelectAttributes,
        dtypes=ALL,
    )
)


# --- index


@dataclass(frozen=True)
class Indexed:
    """x[i0, i1, …]: the dims of x that have an index tensor, the tensors' broadcast shape, and for each dimension
    of the output the dimension of x that it walks, or None for those of the index tensors."""

    dims: tuple[int, ...]
    index_shape: Shape
    walked: tuple[int | None, ...]

    @classmethod
    def of(cls, inputs: Types) -> Indexed:
        """Raises OperatorError. ``inputs``: x, then an index or None per leading dimension of x."""
        expect(len(inputs) >= 1 and inputs[0] is not None, "input 0 is missing")
        x = inputs[0]
        assert x is not None
        expect(len(inputs) - 1 <= len(x.shape), f"{len(inputs) - 1} indices for a tensor of rank {len(x.shape)}")
        dims = tuple(d for d, index in enumerate(inputs[1:]) if index is not None)
        expect(len(dims) >= 1, "takes at least one index")
        types = present([inputs[d + 1] for d in dims])
        for d, type in zip(dims, types, strict=True):
            expect(
                type.dtype not in (DType.BOOL, DType.UINT8),
                "a bool mask as index gives a shape that depends on the data, which is not supported",
            )
            _expect_indices(type, x.shape[d])
        expect_same_dtype(types)
        shape = broadcast([type.shape for type in types])
        rest: list[int | None] = [d for d in range(len(x.shape)) if d not in dims]
        # The new dimensions stand where the indexed ones stood if those are neighbours, else first
        # (NumPy, "Combining advanced and basic indexing").
        adjacent = dims[-1] - dims[0] + 1 == len(dims)
        at = dims[0] if adjacent else 0
        return cls(dims, shape, (*rest[:at], *[None] * len(shape), *rest[at:]))


def _index_infer(attributes: NoAttributes, inputs: Types) -> tuple[TensorType, ...]:
    indexed = Indexed.of(inputs)
    (x,) = present(inputs[:1])
    own = iter(indexed.index_shape)
    shape = tuple(next(own) if d is None else x.shape[d] for d in indexed.walked)
    expect_rank(shape)
    return (TensorType(x.dtype, shape),)


def _index_reference(attributes: NoAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    x = inputs[0]
    assert x is not None

    def wrapped(index: Array, size: int) -> Array:
        return clamped(np.where(index < 0, index + size, index), size)

    key = tuple(
        slice(None) if index is None else wrapped(index, size) for index, size in zip(inputs[1:], x.shape, strict=False)
    )
    return (np.ascontiguousarray(x[key]).reshape(x[key].shape),)


def _index_kernels(
    attributes: NoAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    """One index tensor: read where it is needed. Several: their offsets are added up first."""
    if outputs[0].numel == 0:
        return Kernels(())
    indexed = Indexed.of(inputs)
    (x,) = present(inputs[:1])
    (first, *_) = present([inputs[d + 1] for d in indexed.dims])
    strides = dense_strides(x.shape)
    own = iter(dense_strides(indexed.index_shape))
    single = len(indexed.dims) == 1
    dim = indexed.dims[0]
    take = Take(
        outputs[0].shape,
        tuple(0 if d is None else strides[d] for d in indexed.walked),
        tuple(next(own) if d is None else 0 for d in indexed.walked),
        x.shape[dim] if single else x.numel,
        strides[dim] if single else 1,
        DTYPE[first.dtype] if single else OFFSETS,
        wrap=True,
    )
    if single:
        return Kernels((take_dispatch(take, x.dtype, read(dim + 1), capabilities),))
    return Kernels(
        (
            *_offset_dispatches(indexed, inputs, capabilities),
            take_dispatch(take, x.dtype, scratch_read(0), capabilities),
        ),
        (4 * math.prod(indexed.index_shape),),
    )


def _offset_dispatches(indexed: Indexed, inputs: Types, capabilities: Capabilities) -> list[Dispatch]:
    """Offsets in the source for each element of the broadcast index tensors, into scratch 0; two tensors a dispatch."""
    (x,) = present(inputs[:1])
    strides = dense_strides(x.shape)
    dispatches = []
    for begin in range(0, len(indexed.dims), 2):
        # An odd one out is bound twice and counts once.
        pair = indexed.dims[begin : begin + 2]
        bound = (*pair, *pair)[:2]
        types = present([inputs[d + 1] for d in bound])
        walk = Walk.over(indexed.index_shape, *(broadcast_strides(type.shape, indexed.index_shape) for type in types))
        scales = [strides[d] if position < len(pair) else 0 for position, d in enumerate(bound)]
        dispatches.append(
            Dispatch(
                "index_offsets",
                (
                    Arg("scratch", 0, write=True, read=True) if begin else scratch_write(0),
                    *(read(d + 1) for d in bound),
                ),
                grid(walk.numel, capabilities),
                (capabilities.local_size, 0, DTYPE[types[0].dtype], walk.rank, True, begin > 0),
                walk.push() + words(x.shape[bound[0]], scales[0], x.shape[bound[1]], scales[1]),
                bytes=sum(type.nbytes for type in types) + 4 * walk.numel,
            )
        )
    return dispatches


register(
    Operator(
        "index",
        "x[i0, i1, …] with integer tensors; negative indices count from the end, others are clamped",
        _index_infer,
        _index_reference,
        _index_kernels,
        dtypes=ALL,
    )
)

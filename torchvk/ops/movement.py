"""Operators that move elements and compute nothing. Any dtype, any rank up to 8, empty tensors included."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchvk.graph import DType, TensorType
from torchvk.graph.validate import MAX_RANK
from torchvk.ops.codes import DTYPE, per_unit, units
from torchvk.ops.creation import fill_kernels, pattern, scalar
from torchvk.ops.operator import (
    Arg,
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
from torchvk.ops.shapes import (
    Shape,
    Walk,
    broadcast,
    broadcast_strides,
    dense_strides,
    expect_dim,
    expect_rank,
    expect_same_dtype,
    operands,
    padded,
    present,
    words,
)

ALL = tuple(DTYPE)
CAT_INPUTS = 3  # a dispatch; with the output 4 storage buffers, as many as every device has


@dataclass(frozen=True)
class ReshapeAttributes:
    shape: list[int]


@dataclass(frozen=True)
class PermuteAttributes:
    """Dimension d of the output is dimension dims[d] of the input."""

    dims: list[int]


@dataclass(frozen=True)
class ExpandAttributes:
    """The output's shape: sizes of 1 grow, new dimensions come first."""

    shape: list[int]


@dataclass(frozen=True)
class SliceAttributes:
    """0 <= start <= end <= size, step >= 1."""

    dim: int
    start: int
    end: int
    step: int = 1


@dataclass(frozen=True)
class SelectAttributes:
    dim: int
    index: int


@dataclass(frozen=True)
class FlipAttributes:
    dims: list[int]


@dataclass(frozen=True)
class CatAttributes:
    dim: int


@dataclass(frozen=True)
class RepeatAttributes:
    """How often each dimension of the output repeats the input's; new dimensions come first."""

    repeats: list[int]


@dataclass(frozen=True)
class PadAttributes:
    """padding: before and after the first dimension, before and after the second, and so on; negative ones crop.
    value: as for ``full``."""

    padding: list[int]
    value: bool | int | float = 0


# --- one dense input, walked with strides


@dataclass(frozen=True)
class View:
    """The input seen with other sizes and strides, from an offset on."""

    shape: Shape
    strides: Shape
    offset: int = 0


def copy_kernels(view: View, dtype: DType, capabilities: Capabilities) -> Kernels:
    """A dense copy of a view of the first input."""
    walk = Walk.over(view.shape, view.strides)
    if walk.numel == 0:
        return Kernels(())
    size = walk.numel * dtype.bits // 8
    offset, count = view.offset, per_unit(dtype)
    (strides,) = walk.strides
    # Where whole words move, they are the elements.
    if (
        strides[-1] == 1
        and all(number % count == 0 for number in (walk.sizes[-1], offset, *strides[:-1]))
        and dtype.bits < 32
    ):
        sizes = (*walk.sizes[:-1], walk.sizes[-1] // count)
        strides = (*(stride // count for stride in strides[:-1]), 1)
        walk, offset, dtype = Walk(math.prod(sizes), sizes, (strides,)), offset // count, DType.INT32
    dispatch = Dispatch(
        "strided_copy",
        (write(), read(0)),
        grid(units(walk.numel, dtype), capabilities),
        (capabilities.local_size, DTYPE[dtype], walk.rank),
        walk.push() + words(offset),
        bytes=2 * size,
    )
    return Kernels((dispatch,))


def _register_view(
    name: str,
    summary: str,
    attributes_type: type,
    view: Callable[[Any, Shape], View],
    reference: Callable[[Any, Array], Array],
) -> None:
    """An operator whose output is a view of its input, made dense. ``view`` raises OperatorError."""

    def infer(attributes: Any, inputs: Types) -> tuple[TensorType, ...]:
        (x,) = operands(inputs, 1)
        return (TensorType(x.dtype, view(attributes, x.shape).shape),)

    def dense_reference(attributes: Any, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
        (x,) = inputs
        assert x is not None
        return (np.ascontiguousarray(reference(attributes, x)).reshape(view(attributes, x.shape).shape),)

    def kernels(attributes: Any, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities) -> Kernels:
        (x,) = operands(inputs, 1)
        return copy_kernels(view(attributes, x.shape), x.dtype, capabilities)

    register(Operator(name, summary, infer, dense_reference, kernels, attributes_type, dtypes=ALL))


def _permute_view(attributes: PermuteAttributes, shape: Shape) -> View:
    dims = attributes.dims
    expect(sorted(dims) == list(range(len(shape))), f"dims {dims} are no permutation of {len(shape)} dimensions")
    strides = dense_strides(shape)
    return View(tuple(shape[d] for d in dims), tuple(strides[d] for d in dims))


def _expand_view(attributes: ExpandAttributes, shape: Shape) -> View:
    target = tuple(attributes.shape)
    expect_rank(target)
    expect(
        len(target) >= len(shape) and broadcast((shape, target)) == target,
        f"shape {list(shape)} does not expand to {list(target)}",
    )
    return View(target, broadcast_strides(shape, target))


def _slice_view(attributes: SliceAttributes, shape: Shape) -> View:
    dim, start, end, step = attributes.dim, attributes.start, attributes.end, attributes.step
    expect_dim(dim, len(shape))
    expect(
        0 <= start <= end <= shape[dim] and step >= 1,
        f"slice {start}:{end}:{step} is not normalized for a dimension of size {shape[dim]}",
    )
    strides = dense_strides(shape)
    return View(
        (*shape[:dim], -(-(end - start) // step), *shape[dim + 1 :]),
        (*strides[:dim], strides[dim] * step, *strides[dim + 1 :]),
        start * strides[dim],
    )


def _select_view(attributes: SelectAttributes, shape: Shape) -> View:
    dim, index = attributes.dim, attributes.index
    expect_dim(dim, len(shape))
    expect(0 <= index < shape[dim], f"index {index} is out of range for a dimension of size {shape[dim]}")
    strides = dense_strides(shape)
    return View((*shape[:dim], *shape[dim + 1 :]), (*strides[:dim], *strides[dim + 1 :]), index * strides[dim])


def _flip_view(attributes: FlipAttributes, shape: Shape) -> View:
    dims = set(attributes.dims)
    expect(len(dims) == len(attributes.dims), f"dims {attributes.dims} repeat themselves")
    for dim in dims:
        expect_dim(dim, len(shape))
    strides = dense_strides(shape)
    return View(
        shape,
        tuple(-stride if d in dims else stride for d, stride in enumerate(strides)),
        sum((shape[d] - 1) * strides[d] for d in dims),
    )


_register_view(
    "permute", "dimensions in another order", PermuteAttributes, _permute_view, lambda a, x: x.transpose(a.dims)
)
_register_view(
    "expand", "broadcast to a shape", ExpandAttributes, _expand_view, lambda a, x: np.broadcast_to(x, tuple(a.shape))
)
_register_view(
    "slice",
    "a range of one dimension",
    SliceAttributes,
    _slice_view,
    lambda a, x: x[(slice(None),) * a.dim + (slice(a.start, a.end, a.step),)],
)
_register_view(
    "select", "one position of one dimension", SelectAttributes, _select_view, lambda a, x: np.take(x, a.index, a.dim)
)
_register_view("flip", "dimensions backwards", FlipAttributes, _flip_view, lambda a, x: np.flip(x, tuple(a.dims)))


# --- reshape


def _reshape_infer(attributes: ReshapeAttributes, inputs: Types) -> tuple[TensorType, ...]:
    (x,) = operands(inputs, 1)
    shape = tuple(attributes.shape)
    expect_rank(shape)
    expect(math.prod(shape) == x.numel, f"shape {list(x.shape)} cannot become {list(shape)}")
    return (TensorType(x.dtype, shape),)


def _reshape_reference(attributes: ReshapeAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    (x,) = inputs
    assert x is not None
    return (x.reshape(attributes.shape),)


def _reshape_kernels(
    attributes: ReshapeAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    return Kernels(())


register(
    Operator(
        "reshape",
        "another shape for the same elements; free",
        _reshape_infer,
        _reshape_reference,
        _reshape_kernels,
        ReshapeAttributes,
        alias=True,
        dtypes=ALL,
    )
)


# --- cat


def _cat_infer(attributes: CatAttributes, inputs: Types) -> tuple[TensorType, ...]:
    types = present(inputs)
    expect(len(types) > 0, "takes at least 1 input")
    expect_same_dtype(types)
    first, dim = types[0], attributes.dim
    expect_dim(dim, len(first.shape))
    for type in types:
        expect(
            len(type.shape) == len(first.shape)
            and type.shape[:dim] == first.shape[:dim]
            and type.shape[dim + 1 :] == first.shape[dim + 1 :],
            f"shapes {list(first.shape)} and {list(type.shape)} differ outside of dim {dim}",
        )
    joined = sum(type.shape[dim] for type in types)
    return (TensorType(first.dtype, (*first.shape[:dim], joined, *first.shape[dim + 1 :])),)


def _cat_reference(attributes: CatAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    return (np.concatenate([x for x in inputs if x is not None], axis=attributes.dim),)


def _cat_kernels(
    attributes: CatAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    """Dispatches of up to CAT_INPUTS inputs, in order: each fills its columns of the output's rows."""
    (result,) = outputs
    if result.numel == 0:
        return Kernels(())
    inner = math.prod(result.shape[attributes.dim + 1 :])
    runs = [(slot, type.shape[attributes.dim] * inner) for slot, type in enumerate(present(inputs)) if type.numel]
    dtype, numel, total = result.dtype, result.numel, sum(run for _, run in runs)
    count = per_unit(dtype)
    if count > 1 and all(run % count == 0 for _, run in runs):
        # Whole words move.
        runs = [(slot, run // count) for slot, run in runs]
        dtype, numel, total = DType.INT32, numel // count, total // count
    dispatches = []
    begin = 0
    for first in range(0, len(runs), CAT_INPUTS):
        group = runs[first : first + CAT_INPUTS]
        width = sum(run for _, run in group)
        merge = first > 0 and per_unit(dtype) > 1
        threads = units(numel, dtype) if per_unit(dtype) > 1 else numel // total * width
        slots = padded([slot for slot, _ in group], CAT_INPUTS, group[0][0])
        dispatches.append(
            Dispatch(
                "cat",
                (Arg("output", 0, write=True, read=merge), *(read(slot) for slot in slots)),
                grid(threads, capabilities),
                (capabilities.local_size, DTYPE[dtype], 1, merge),
                words(numel, total, begin, *padded([run for _, run in group], CAT_INPUTS)),
                bytes=2 * (numel // total * width) * dtype.bits // 8,
            )
        )
        begin += width
    return Kernels(tuple(dispatches))


register(
    Operator("cat", "joined along one dimension", _cat_infer, _cat_reference, _cat_kernels, CatAttributes, dtypes=ALL)
)


# --- repeat


def _repeat_shapes(attributes: RepeatAttributes, shape: Shape) -> tuple[Shape, Shape]:
    """The input's shape with new dimensions of size 1, and the output's."""
    repeats = attributes.repeats
    expect_rank(repeats)
    expect(len(repeats) >= len(shape), f"repeats {repeats} are fewer than the {len(shape)} dimensions of the input")
    source = (1,) * (len(repeats) - len(shape)) + shape
    return source, tuple(count * size for count, size in zip(repeats, source, strict=True))


def _repeat_infer(attributes: RepeatAttributes, inputs: Types) -> tuple[TensorType, ...]:
    (x,) = operands(inputs, 1)
    return (TensorType(x.dtype, _repeat_shapes(attributes, x.shape)[1]),)


def _repeat_reference(attributes: RepeatAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    (x,) = inputs
    assert x is not None
    return (np.tile(x, attributes.repeats),)


def _repeat_kernels(
    attributes: RepeatAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    (x,) = operands(inputs, 1)
    source, target = _repeat_shapes(attributes, x.shape)
    if math.prod(target) == 0:
        return Kernels(())
    dtype = x.dtype
    # Dimensions that are not repeated, and repeated ones of size 1, could collapse; one of size 1 is kept for 0-D.
    kept = [d for d in range(len(target)) if target[d] != 1]
    source, target = (tuple(shape[d] for d in kept) or (1,) for shape in (source, target))
    if source[-1] % per_unit(dtype) == 0 and dtype.bits < 32:
        source, target = ((*shape[:-1], shape[-1] // per_unit(dtype)) for shape in (source, target))
        dtype = DType.INT32
    dispatch = Dispatch(
        "repeat",
        (write(), read(0)),
        grid(units(math.prod(target), dtype), capabilities),
        (capabilities.local_size, DTYPE[dtype], len(target)),
        words(math.prod(target), *padded(target[1:], MAX_RANK - 1, 1), *padded(source, MAX_RANK, 1)),
        bytes=x.nbytes + outputs[0].nbytes,
    )
    return Kernels((dispatch,))


register(
    Operator(
        "repeat",
        "repeated along dimensions",
        _repeat_infer,
        _repeat_reference,
        _repeat_kernels,
        RepeatAttributes,
        dtypes=ALL,
    )
)


# --- pad


def _pad_infer(attributes: PadAttributes, inputs: Types) -> tuple[TensorType, ...]:
    (x,) = operands(inputs, 1)
    padding = attributes.padding
    expect(
        len(padding) == 2 * len(x.shape),
        f"padding {padding} must have two numbers for each of {len(x.shape)} dimensions",
    )
    shape = tuple(size + sum(padding[2 * d : 2 * d + 2]) for d, size in enumerate(x.shape))
    expect_rank(shape)
    scalar(attributes.value, x.dtype)
    return (TensorType(x.dtype, shape),)


def _pad_reference(attributes: PadAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    (x,) = inputs
    assert x is not None
    befores, afters = attributes.padding[0::2], attributes.padding[1::2]
    shape = tuple(size + b + a for size, b, a in zip(x.shape, befores, afters, strict=True))
    result = np.full(shape, scalar(attributes.value, DType.of(x.dtype)))
    # Element c of the output is element c - before of the input, where there is one.
    inside = [
        (max(0, before), max(0, before, min(size, old + before)), before)
        for size, old, before in zip(shape, x.shape, befores, strict=True)
    ]
    result[tuple(slice(begin, end) for begin, end, _ in inside)] = x[
        tuple(slice(begin - before, end - before) for begin, end, before in inside)
    ]
    return (result,)


def _pad_kernels(
    attributes: PadAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    (x,) = operands(inputs, 1)
    (result,) = outputs
    value = scalar(attributes.value, x.dtype)
    if x.numel == 0:
        return fill_kernels(value, result, capabilities)
    if not x.shape:
        return copy_kernels(View((), ()), x.dtype, capabilities)
    dispatch = Dispatch(
        "pad",
        (write(), read(0)),
        grid(units(result.numel, x.dtype), capabilities),
        (capabilities.local_size, DTYPE[x.dtype], len(x.shape)),
        words(
            result.numel,
            *padded(result.shape[1:], MAX_RANK - 1, 1),
            *padded(x.shape, MAX_RANK, 1),
            *padded(attributes.padding[0::2], MAX_RANK),
            *pattern(value),
        ),
        bytes=x.nbytes + result.nbytes,
    )
    return Kernels((dispatch,))


register(
    Operator(
        "pad",
        "a frame of one value around it",
        _pad_infer,
        _pad_reference,
        _pad_kernels,
        PadAttributes,
        dtypes=ALL,
    )
)

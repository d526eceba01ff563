"""Pooling over windows, channels last: x [N, *spatial, C] gives [N, *spatial', C], with 1 to 3 spatial dimensions.

The formulas are torch's: https://pytorch.org/docs/stable/generated/torch.nn.AvgPool2d.html and its neighbours. Sums
of floats are float32 additions in a row (in a tree for large windows), rounded once.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchvk.graph import DType, TensorType
from torchvk.ops.codes import DTYPE, per_unit, units
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
from torchvk.ops.quantization import reads_texels
from torchvk.ops.shapes import Shape, expect_dtype, expect_rank, operands

FLOATS = (DType.FLOAT32, DType.FLOAT16)
BYTES = (DType.INT8, DType.UINT8)

# Operation codes of shaders/pooling.slang.
MAX, AVERAGE = 0, 1
# lavapipe ends loops, silently, after 65535 iterations of all loops together; a thread may have four windows.
MAX_TAPS = 12288
# Windows of at least so many elements are shared by a workgroup, on a GPU.
SHARED_TAPS = 32
LIMIT = 2**31


@dataclass(frozen=True)
class MaxPoolAttributes:
    """A number for every spatial dimension; ``output``: the size of the result, which ceil_mode has a say in."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    output: list[int]


@dataclass(frozen=True)
class AvgPoolAttributes:
    """As for ``max_pool``. divisor: instead of the number of elements; 0 where that counts."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    output: list[int]
    count_include_pad: bool = True
    divisor: int = 0


@dataclass(frozen=True)
class AdaptiveAvgPoolAttributes:
    """Window i of n over a dimension of size s are the elements from ⌊i s / n⌋ to ⌈(i + 1) s / n⌉."""

    output: list[int]


@dataclass(frozen=True)
class Windows:
    """The windows of one pooling: what the kernels take. ``divisor`` 0: as many as there are, or with
    ``include_pad`` as many as reach into the padding."""

    output: Shape
    kernel: Shape = (1, 1, 1)
    stride: Shape = (1, 1, 1)
    padding: Shape = (0, 0, 0)
    dilation: Shape = (1, 1, 1)
    adaptive: bool = False
    include_pad: bool = False
    divisor: int = 0

    def spans(self, dim: int, size: int) -> list[tuple[int, int, int, int]]:
        """(first, end, step, counted) of every window of a spatial dimension of that size."""
        if self.adaptive:
            count = self.output[dim]
            cut = [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
            return [(first, end, 1, end - first) for first, end in cut]
        kernel, padding, dilation = self.kernel[dim], self.padding[dim], self.dilation[dim]
        result = []
        for i in range(self.output[dim]):
            start = i * self.stride[dim] - padding
            first = start + max(0, -(start // dilation)) * dilation
            end = min(start + (kernel - 1) * dilation + 1, size)
            counted = min(start + kernel, size + padding) - start if self.include_pad else max(end - first, 0)
            result.append((first, end, dilation, counted))
        return result

    def taps(self, sizes: Shape) -> int:
        """Elements of the largest window."""
        if self.adaptive:
            return math.prod(-(-size // n) + 1 for size, n in zip(sizes, self.output, strict=True) if n)
        return math.prod(min(kernel, size) for kernel, size in zip(self.kernel, sizes, strict=True))


def windows(attributes: Any) -> Windows:
    """What the attributes of a pooling operator say."""
    if isinstance(attributes, AdaptiveAvgPoolAttributes):
        return Windows(tuple(attributes.output), adaptive=True)
    dilation = getattr(attributes, "dilation", [1] * len(attributes.kernel))
    return Windows(
        tuple(attributes.output),
        tuple(attributes.kernel),
        tuple(attributes.stride),
        tuple(attributes.padding),
        tuple(dilation),
        include_pad=getattr(attributes, "count_include_pad", False),
        divisor=getattr(attributes, "divisor", 0),
    )


def pooled_shape(attributes: Any, x: TensorType) -> Shape:
    """The result's shape; raises OperatorError for windows that make no sense."""
    rank = len(x.shape) - 2
    expect(1 <= rank <= 3, f"takes [N, *spatial, C] with 1 to 3 spatial dimensions, got {list(x.shape)}")
    view = windows(attributes)
    lists = (view.output,) if view.adaptive else (view.output, view.kernel, view.stride, view.padding, view.dilation)
    for values in lists:
        expect(len(values) == rank, f"{list(values)} must have a number for each of {rank} spatial dimensions")
        expect(all(0 <= value < LIMIT for value in values), f"{list(values)} has a number out of range")
    shape = (x.shape[0], *view.output, x.shape[-1])
    expect_rank(shape)
    expect(all(view.output), f"output {list(view.output)} has a size of 0")
    for dim, size in enumerate(x.shape[1:-1]):
        expect(size > 0, f"there is nothing to pool in {list(x.shape)}")
        if view.adaptive:
            expect(size * view.output[dim] < LIMIT, f"output {list(view.output)} is too large")
            continue
        kernel, stride, padding, dilation = (v[dim] for v in (view.kernel, view.stride, view.padding, view.dilation))
        reach = (kernel - 1) * dilation
        expect(kernel > 0 and stride > 0 and dilation > 0, "kernel, stride and dilation must be at least 1")
        expect(padding <= (reach + 1) // 2, f"padding {padding} is more than half of a window of {reach + 1}")
        last = (view.output[dim] - 1) * stride - padding
        expect(last < size, f"window {view.output[dim] - 1} lies outside of a dimension of size {size}")
        expect(last + padding + reach + size < LIMIT, "windows reach too far")
    return shape


# --- references


def pool(x: Array, view: Windows, start: Any, merge: np.ufunc) -> Array:
    """``merge`` over each window, element after element from ``start`` on: [N, *output, C] of start's dtype."""
    sizes = x.shape[1:-1]
    spans = [view.spans(dim, size) for dim, size in enumerate(sizes)]
    longest = [max(max(0, -(-(end - first) // step)) for first, end, step, _ in own) for own in spans]
    result = np.full((x.shape[0], *view.output, x.shape[-1]), start)
    for tap in itertools.product(*map(range, longest)):
        picked, inside = x, np.ones((), bool)
        for dim, (own, step) in enumerate(zip(spans, tap, strict=True)):
            places = np.array([first + step * by for first, _, by, _ in own])
            held = places < [end for _, end, _, _ in own]
            picked = picked.take(np.where(held, places, 0), dim + 1)
            inside = inside[..., None] & held
        result = np.where(inside[..., None], merge(result, picked.astype(result.dtype)), result)
    return result


def mean(sums: Array, view: Windows, sizes: Shape) -> Array:
    """Sums over their divisors; adaptive ones one dimension after the other, as torch's kernel has it."""
    counts = []
    for dim, size in enumerate(sizes):
        counts.append(np.array([span[3] for span in view.spans(dim, size)]).reshape(-1, *[1] * (len(sizes) - dim)))
    if not view.adaptive:
        counts = [np.array(view.divisor) if view.divisor else math.prod(counts, start=np.array(1))]
    for count in counts:
        sums = sums / count.astype(sums.dtype)
    return sums


def _max_reference(attributes: MaxPoolAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    (x,) = inputs
    assert x is not None
    lowest = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    return (pool(x, windows(attributes), x.dtype.type(lowest), np.maximum),)


def _average_reference(attributes: Any, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    (x,) = inputs
    assert x is not None
    view, sizes = windows(attributes), x.shape[1:-1]
    # NumPy has no sums in blocks here: large windows are added in double.
    wide = np.float32(0) if view.taps(sizes) < SHARED_TAPS else np.float64(0)
    with np.errstate(all="ignore"):
        return (mean(pool(x, view, wide, np.add), view, sizes).astype(x.dtype),)


# --- kernels


def three(values: Sequence[int], filler: int) -> list[int]:
    """Spatial numbers of 3 dimensions, the missing ones first."""
    return [*[filler] * (3 - len(values)), *values]


def _across(words: int, taps: int, local_size: int) -> int:
    """Words that a workgroup of ``local_size`` threads shares: as many as keep the device busy, and chains of
    additions short: no longer than 2 √taps, as the sums of torchvk.ops.reduction."""
    across = min(32, 1 << (words - 1).bit_length())
    least = 8 if taps < 1024 else 1  # neighbours are read together
    while across > least and words // across < 128:
        across //= 2
    while across > 1 and taps * across > 2 * math.isqrt(taps) * local_size:
        across //= 2
    return across


def middle_sum(shape: Shape, x: TensorType, y: TensorType, divisor: int, capabilities: Capabilities) -> Kernels | None:
    """Sums over the middle of ``shape`` [B, S, A], divided; None where the kernels here are no gain: on CPUs, for few
    elements, for results enough to give each a thread."""
    words = units(y.numel, y.dtype)
    suits = shape[1] >= SHARED_TAPS and 0 < words < 65536 and shape[2] >= 8 and shape[2] % per_unit(x.dtype) == 0
    if capabilities.kind == "cpu" or not suits:
        return None
    view = Windows((1,), kernel=(shape[1],), stride=(1,), padding=(0,), dilation=(1,), divisor=divisor)
    return pool_kernels(view, AVERAGE, TensorType(x.dtype, shape), y, capabilities)


def pool_kernels(
    view: Windows, operation: int, x: TensorType, y: TensorType, capabilities: Capabilities, static: bytes = b""
) -> Kernels:
    """``static``: scales and zero points of a quantized average, as the push constants want them."""
    if y.numel == 0:
        return Kernels(())
    rank, channels, sizes = len(x.shape) - 2, x.shape[-1], x.shape[1:-1]
    # Whole words: the elements of a word belong to one window.
    whole = channels % per_unit(y.dtype) == 0 and per_unit(x.dtype) == per_unit(y.dtype)
    threads = units(y.numel, y.dtype)
    large = view.taps(sizes) >= SHARED_TAPS
    kernel = "pool_float" if x.dtype.is_float or (static and not large) else "pool_int"
    across = 0
    local_size = capabilities.local_size
    if operation == AVERAGE and capabilities.kind != "cpu" and large and whole:
        # Some threads a word, each with every so manieth element of its window.
        kernel += "_shared"
        local_size = min(256, 1 << (capabilities.max_workgroup_invocations.bit_length() - 1))
        across = _across(threads, view.taps(sizes), local_size)
    fillers = ((view.kernel, 1), (view.stride, 1), (view.padding, 0), (view.dilation, 1))
    numbers = [[0] * 3 if view.adaptive else three(values, filler) for values, filler in fillers]
    push = struct.pack(
        "<21I",
        y.numel,
        channels,
        view.divisor,
        *three(sizes, 1),
        *three(view.output, 1),
        *(number for values in numbers for number in values),
    )
    dispatch = Dispatch(
        kernel,
        (write(), read(0)),
        grid(threads, capabilities, across or local_size),
        (
            local_size,
            DTYPE[x.dtype],
            DTYPE[y.dtype],
            operation,
            rank,
            whole,
            view.adaptive,
            view.include_pad,
            bool(static),
            across,
        ),
        push + (static or bytes(24)),
        bytes=x.nbytes + y.nbytes,
        flops=y.numel * view.taps(sizes),
    )
    return Kernels((dispatch,))


def _max_kernels(
    attributes: MaxPoolAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    (x,) = operands(inputs, 1)
    y, view = outputs[0], windows(attributes)
    rank, vectors = len(x.shape) - 2, x.shape[-1] * x.dtype.bits // 128
    if rank > 2 or x.shape[-1] * x.dtype.bits % 128 or y.numel == 0:
        return pool_kernels(view, MAX, x, y, capabilities)
    texels = reads_texels(capabilities, x.nbytes)
    count = y.nbytes // 16
    numbers = (x.shape[1:-1], view.output, view.kernel, view.stride, view.padding, view.dilation)
    pairs = (three(values, 0 if values is view.padding else 1)[:0:-1] for values in numbers)
    dispatch = Dispatch(
        "max_pool_texels" if texels else "max_pool",
        (write(), read(0, texels=texels)),
        grid(count, capabilities),
        (capabilities.local_size, DTYPE[x.dtype]),
        struct.pack("<14I", count, vectors, *(number for pair in pairs for number in pair)),
        bytes=x.nbytes + y.nbytes,
        flops=y.numel * view.taps(x.shape[1:-1]),
    )
    return Kernels((dispatch,))


def _infer(dtypes: Sequence[DType]) -> Callable[[Any, Types], tuple[TensorType, ...]]:
    def infer(attributes: Any, inputs: Types) -> tuple[TensorType, ...]:
        (x,) = operands(inputs, 1)
        expect_dtype(x, dtypes)
        return (TensorType(x.dtype, pooled_shape(attributes, x)),)

    return infer


def _support(attributes: Any, inputs: Types) -> str | None:
    (x,) = operands(inputs, 1)
    taps = windows(attributes).taps(x.shape[1:-1])
    return None if taps <= MAX_TAPS else f"windows of {taps} elements are not supported: at most {MAX_TAPS}"


def _average_kernels(
    attributes: Any, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    (x,) = operands(inputs, 1)
    return pool_kernels(windows(attributes), AVERAGE, x, outputs[0], capabilities)


register(
    Operator(
        "max_pool",
        "largest of each window, channels last",
        _infer((*FLOATS, *BYTES)),
        _max_reference,
        _max_kernels,
        MaxPoolAttributes,
        _support,
        dtypes=(*FLOATS, *BYTES),
    )
)
register(
    Operator(
        "avg_pool",
        "mean of each window, channels last",
        _infer(FLOATS),
        _average_reference,
        _average_kernels,
        AvgPoolAttributes,
        _support,
        dtypes=FLOATS,
    )
)
register(
    Operator(
        "adaptive_avg_pool",
        "means of windows that cut each dimension into so many, channels last",
        _infer(FLOATS),
        _average_reference,
        _average_kernels,
        AdaptiveAvgPoolAttributes,
        _support,
        dtypes=FLOATS,
    )
)

"""Reductions over dimensions, ``argmax`` and ``argmin``, and cumulative sums.

Accuracy of float sums (float32 accumulation, in blocks): relative to Σ|x| the error is at most about
(2 √n + 10) · 2^-24 for n elements, far below a plain chain's n · 2^-24.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from torchvk.graph import DType, TensorType
from torchvk.ops.codes import DTYPE, units
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
    scratch_read,
    scratch_write,
    write,
)
from torchvk.ops.pooling import middle_sum
from torchvk.ops.rounding import round_to_half

ALL = (
    DType.FLOAT32,
    DType.FLOAT16,
    DType.INT64,
    DType.INT32,
    DType.INT16,
    DType.INT8,
    DType.UINT8,
    DType.BOOL,
)
FLOATS = (DType.FLOAT32, DType.FLOAT16)
NUMBERS = ALL[:-1]

Name = Literal["sum", "mean", "prod", "amax", "amin", "any", "all", "argmax", "argmin"]

# Operation codes of shaders/reduction.slang; any and all are the maximum and minimum of 0 and 1.
OPERATION = {"sum": 0, "mean": 1, "prod": 2, "amax": 3, "amin": 4, "any": 3, "all": 4, "argmax": 3, "argmin": 4}
WHOLE, SEGMENTS, STATES = 0, 1, 2

# lavapipe ends loops, silently, after 65535 iterations of all loops of a workgroup together. A thread may have to
# do the 4 results of a word of bytes: none gets more elements than this.
MAX_CHAIN = 12288


@dataclass(frozen=True)
class ReduceAttributes:
    """dims: normalized, distinct, not empty (a scalar may be reduced over dimension 0, as in torch)."""

    dims: tuple[int, ...]
    keepdim: bool = False


@dataclass(frozen=True)
class ArgAttributes:
    dim: int
    keepdim: bool = False


@dataclass(frozen=True)
class ScanAttributes:
    dim: int


# Shapes


def one_input(name: str, inputs: Types) -> TensorType:
    """The only input of an operator that has one."""
    expect(len(inputs) == 1, f"{name} takes 1 input, {len(inputs)} were given")
    x = inputs[0]
    expect(x is not None, f"{name} needs its input")
    assert x is not None
    return x


def check_dims(name: str, dims: Sequence[int], shape: Sequence[int]) -> None:
    """Dims are distinct and inside the shape; a scalar counts as one dimension."""
    rank = max(len(shape), 1)
    expect(
        len(dims) > 0 and len(set(dims)) == len(dims) and all(0 <= dim < rank for dim in dims),
        f"{name} takes distinct dimensions from 0 to {rank - 1} of a shape {list(shape)}, got {list(dims)}",
    )


def reduced_shape(shape: Sequence[int], dims: Sequence[int], keepdim: bool) -> tuple[int, ...]:
    """The shape after a reduction over ``dims``."""
    if keepdim:
        return tuple(1 if dim in dims else size for dim, size in enumerate(shape))
    return tuple(size for dim, size in enumerate(shape) if dim not in dims)


def _count(shape: Sequence[int], dims: Sequence[int]) -> int:
    return math.prod(shape[dim] for dim in dims if dim < len(shape))


def _result_dtype(name: Name, dtype: DType) -> DType:
    if name in ("argmax", "argmin") or (name in ("sum", "prod") and not dtype.is_float):
        return DType.INT64
    if name in ("any", "all"):
        # torch keeps uint8, its old stand-in for bool.
        return dtype if dtype is DType.UINT8 else DType.BOOL
    return dtype


def _infer(name: Name, attributes: ReduceAttributes, inputs: Types) -> tuple[TensorType, ...]:
    x = one_input(name, inputs)
    check_dims(name, attributes.dims, x.shape)
    dtypes = FLOATS if name == "mean" else ALL
    expect(x.dtype in dtypes, f"{name} takes {', '.join(dtype.value for dtype in dtypes)}, got {x}")
    if name in ("amax", "amin"):
        expect(_count(x.shape, attributes.dims) > 0, f"{name} of {x} over no elements has no value")
    return (TensorType(_result_dtype(name, x.dtype), reduced_shape(x.shape, attributes.dims, attributes.keepdim)),)


def _infer_arg(name: Name, attributes: ArgAttributes, inputs: Types) -> tuple[TensorType, ...]:
    x = one_input(name, inputs)
    check_dims(name, (attributes.dim,), x.shape)
    expect(x.dtype in NUMBERS, f"{name} takes {', '.join(dtype.value for dtype in NUMBERS)}, got {x}")
    expect(_count(x.shape, (attributes.dim,)) > 0, f"{name} of {x} over no elements has no value")
    return (TensorType(DType.INT64, reduced_shape(x.shape, (attributes.dim,), attributes.keepdim)),)


def _infer_scan(attributes: ScanAttributes, inputs: Types) -> tuple[TensorType, ...]:
    x = one_input("cumsum", inputs)
    check_dims("cumsum", (attributes.dim,), x.shape)
    expect(x.dtype in ALL, f"cumsum takes {', '.join(dtype.value for dtype in ALL)}, got {x}")
    return (TensorType(x.dtype if x.dtype.is_float else DType.INT64, x.shape),)


# Kernels of reductions


class Axes(NamedTuple):
    """Dimensions of one kind, neighbours merged: sizes and strides in elements, outermost first."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]


def axes(shape: Sequence[int], dims: Sequence[int]) -> tuple[Axes, Axes]:
    """The kept and the reduced dimensions of a dense tensor."""
    found: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
    stride = 1
    previous: bool | None = None
    for dim in reversed(range(len(shape))):
        reduced = dim in dims
        size = shape[dim]
        if size != 1:
            if reduced is previous:
                inner, inner_stride = found[reduced][0]
                found[reduced][0] = (inner * size, inner_stride)
            else:
                found[reduced].insert(0, (size, stride))
            previous = reduced
        stride *= size
    kept, gone = found[False] or [(1, 0)], found[True] or [(1, 0)]
    return Axes(*zip(*kept, strict=True)), Axes(*zip(*gone, strict=True))


class Choice(NamedTuple):
    """Whether a workgroup shares a result (else a thread has it alone), and into how many segments it is cut."""

    group: bool
    segments: int


def choose(results: int, tasks: int, count: int, contiguous: bool, capabilities: Capabilities) -> Choice:
    """How ``results`` reductions of ``count`` elements are spread; ``tasks`` of them can run at once (results that
    share a word cannot). ``contiguous``: the elements of a result are neighbours."""
    if capabilities.kind == "cpu":
        # A subgroup on each of some cores wants work, but no lane less than 64 elements.
        segments = min(-(-128 // tasks), count // 64)
        return Choice(False, max(segments, -(-count // MAX_CHAIN), 1))
    if count <= 64 or (not contiguous and tasks >= 4096):
        return Choice(False, 1)
    # A workgroup a task; where they are few, each of the segments keeps 4096 elements.
    segments = min(-(-512 // tasks), count // 4096)
    return Choice(True, max(segments, 1))


def _domain(name: Name, dtype: DType) -> str:
    value = "float" if dtype.is_float and name not in ("any", "all") else "long"
    return f"index_{value}" if name in ("argmax", "argmin") else value


STATE_WORDS = {"float": 1, "long": 2, "index_float": 2, "index_long": 3}


def _reduce_kernels(
    name: Name, dims: Sequence[int], x: TensorType, y: TensorType, capabilities: Capabilities
) -> Kernels:
    results = y.numel
    if results == 0:
        return Kernels(())
    count = _count(x.shape, dims)
    kept, reduced = axes(x.shape, dims)
    domain = _domain(name, x.dtype)
    if name in ("sum", "mean") and domain == "float" and len(reduced.sizes) == 1 and kept.strides[-1] == 1:
        shape = (results // kept.sizes[-1], count, kept.sizes[-1])
        pooled = middle_sum(shape, x, y, count if name == "mean" else 1, capabilities)
        if pooled is not None and x.numel == math.prod(shape):
            return pooled
    tasks = units(results, y.dtype)
    choice = choose(results, tasks, count, reduced.strides[-1] == 1, capabilities)
    local_size = min(256, capabilities.max_workgroup_invocations) if choice.group else capabilities.local_size
    kernel = f"reduce_{domain}"
    if choice.group:
        subgroups = capabilities.tier >= 1 and name in ("sum", "mean", "prod") and domain == "float"
        kernel += "_subgroup" if subgroups else "_group"
    length = -(-count // choice.segments)

    def dispatch(stage: int, count_here: int) -> Dispatch:
        tasks_here = results * choice.segments if stage == SEGMENTS else tasks
        chain = -(-count_here // (local_size if choice.group else 1))
        values = [*_four(kept.sizes), *_four(kept.strides), *_four(reduced.sizes), *_four(reduced.strides)]
        values += [results, count, choice.segments, length, max(math.isqrt(chain), 8)]
        return Dispatch(
            kernel=kernel,
            buffers=(
                scratch_read(0) if stage == STATES else read(0),
                scratch_write(0) if stage == SEGMENTS else write(0),
            ),
            groups=grid(tasks_here, capabilities, 1 if choice.group else local_size),
            constants=(
                local_size,
                DTYPE[x.dtype],
                DTYPE[y.dtype],
                OPERATION[name],
                len(kept.sizes),
                len(reduced.sizes),
                stage,
                name in ("any", "all"),
            ),
            push=struct.pack("<21I", *values),
            bytes=state_bytes + y.nbytes if stage == STATES else x.nbytes,
            flops=0 if stage == STATES else x.numel,
        )

    state_bytes = results * choice.segments * STATE_WORDS[domain] * 4
    if choice.segments == 1:
        return Kernels((dispatch(WHOLE, count),))
    return Kernels((dispatch(SEGMENTS, length), dispatch(STATES, choice.segments)), (state_bytes,))


def _four(values: Sequence[int]) -> tuple[int, ...]:
    return (*values, *(0,) * (4 - len(values)))


def _kernels(
    name: Name,
    attributes: ReduceAttributes,
    inputs: Types,
    outputs: Sequence[TensorType],
    capabilities: Capabilities,
) -> Kernels:
    return _reduce_kernels(name, attributes.dims, one_input(name, inputs), outputs[0], capabilities)


def _arg_kernels(
    name: Name, attributes: ArgAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    return _reduce_kernels(name, (attributes.dim,), one_input(name, inputs), outputs[0], capabilities)


def _scan_kernels(
    attributes: ScanAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    x = one_input("cumsum", inputs)
    if x.numel == 0:
        return Kernels(())
    count = x.shape[attributes.dim] if x.shape else 1
    inner = math.prod(x.shape[attributes.dim + 1 :])
    lines = x.numel // count
    domain = "float" if x.dtype.is_float else "long"
    half = x.dtype is DType.FLOAT16
    out = scratch_write(0) if half else write(0)
    scratch = (4 * x.numel,) if half else ()

    def dispatch(kernel: str, buffers: tuple[Arg, ...], tasks: int, local_size: int, grouped: bool = False) -> Dispatch:
        return Dispatch(
            kernel=f"cumsum_{domain}{kernel}",
            buffers=buffers,
            groups=grid(tasks, capabilities, 1 if grouped else local_size),
            constants=(local_size, DTYPE[x.dtype]),
            push=struct.pack("<5I", lines, count, inner, segments, length),
            bytes=x.nbytes + (0 if kernel == "_totals" else 4 * x.numel if half else outputs[0].nbytes),
            flops=x.numel,
        )

    segments, length = 1, count
    if capabilities.kind != "cpu" and lines < 4096 and count > 16:
        # A workgroup a line, unless there are lines enough to fill a GPU, or nothing to share.
        local_size = min(256, capabilities.max_workgroup_invocations)
        steps = [dispatch("_group", (read(0), out), lines, local_size, grouped=True)]
    elif count > MAX_CHAIN:
        # A thread adds the totals before its segment: about as many as there are elements in it.
        length = max(math.isqrt(count), 1024)
        segments = -(-count // length)
        tasks = lines * segments
        sums = len(scratch)
        scratch = (*scratch, 8 * tasks)
        steps = [
            dispatch("_totals", (read(0), scratch_write(sums)), tasks, capabilities.local_size),
            dispatch("_segments", (read(0), out, scratch_read(sums)), tasks, capabilities.local_size),
        ]
    else:
        steps = [dispatch("", (read(0), out), lines, capabilities.local_size)]
    if half:
        steps.append(round_to_half(x.numel, 0, capabilities))
    return Kernels(tuple(steps), scratch)


# References


def _rows(x: Array, dims: Sequence[int]) -> Array:
    """[*kept, elements]: the reduced dimensions, in order, as one last dimension."""
    if x.ndim == 0:
        return x.reshape(1)
    kept = [dim for dim in range(x.ndim) if dim not in dims]
    count = _count(x.shape, dims)
    moved = x.transpose([*kept, *sorted(dims)])
    return np.ascontiguousarray(moved).reshape([*(x.shape[dim] for dim in kept), count])


def _sum(rows: Array) -> Array:
    # float16 accumulates in float32; NumPy adds contiguous rows pairwise.
    wide = np.float32 if rows.dtype.kind == "f" else np.int64
    sums: Array = rows.sum(-1, dtype=wide)
    return sums


def _prod(rows: Array) -> Array:
    wide = np.float32 if rows.dtype.kind == "f" else np.int64
    products: Array = rows.prod(-1, dtype=wide)
    return products


def _mean(rows: Array) -> Array:
    return _sum(rows) / np.float32(rows.shape[-1])


_COMPUTE: dict[Name, Callable[[Array], Array]] = {
    "sum": _sum,
    "mean": _mean,
    "prod": _prod,
    "amax": lambda rows: rows.max(-1),
    "amin": lambda rows: rows.min(-1),
    "any": lambda rows: (rows != 0).any(-1),
    "all": lambda rows: (rows != 0).all(-1),
    # The first of equal ones; the first NaN before everything.
    "argmax": lambda rows: rows.argmax(-1),
    "argmin": lambda rows: rows.argmin(-1),
}


def _reduce_reference(name: Name, x: Array | None, dims: Sequence[int], keepdim: bool) -> tuple[Array, ...]:
    assert x is not None
    dtype = _result_dtype(name, DType.of(x.dtype))
    with np.errstate(all="ignore"):
        values = np.asarray(_COMPUTE[name](_rows(x, dims))).astype(dtype.numpy)
    return (values.reshape(reduced_shape(x.shape, dims, keepdim)),)


def _reference(name: Name, attributes: ReduceAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    return _reduce_reference(name, inputs[0], attributes.dims, attributes.keepdim)


def _arg_reference(name: Name, attributes: ArgAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    return _reduce_reference(name, inputs[0], (attributes.dim,), attributes.keepdim)


def _scan_reference(attributes: ScanAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    x = inputs[0]
    assert x is not None
    # torch on the CPU accumulates floats in double.
    wide = np.float64 if x.dtype.kind == "f" else np.int64
    with np.errstate(all="ignore"):
        sums = np.cumsum(np.atleast_1d(x), axis=attributes.dim, dtype=wide).reshape(x.shape)
        return (sums.astype(x.dtype) if x.dtype.kind == "f" else sums,)


# Operators

_SUMMARIES: dict[Name, str] = {
    "sum": "Sum over dimensions; integers and bool give int64",
    "mean": "Mean over dimensions",
    "prod": "Product over dimensions; integers and bool give int64",
    "amax": "Largest element over dimensions; NaN if there is one",
    "amin": "Smallest element over dimensions; NaN if there is one",
    "any": "Whether any element is not zero; bool (uint8 stays uint8)",
    "all": "Whether all elements are not zero; bool (uint8 stays uint8)",
    "argmax": "Index of the largest element along a dimension, the first of equal ones; NaN counts as largest",
    "argmin": "Index of the smallest element along a dimension, the first of equal ones; NaN counts as smallest",
}


def _register(name: Name) -> Operator:
    arg = name in ("argmax", "argmin")
    return register(
        Operator(
            name=name,
            summary=_SUMMARIES[name],
            attributes=ArgAttributes if arg else ReduceAttributes,
            infer=partial(_infer_arg if arg else _infer, name),
            reference=partial(_arg_reference if arg else _reference, name),
            kernels=partial(_arg_kernels if arg else _kernels, name),
            dtypes=FLOATS if name == "mean" else NUMBERS if arg else ALL,
        )
    )


SUM = _register("sum")
MEAN = _register("mean")
PROD = _register("prod")
AMAX = _register("amax")
AMIN = _register("amin")
ANY = _register("any")
ALL_OF = _register("all")
ARGMAX = _register("argmax")
ARGMIN = _register("argmin")

CUMSUM = register(
    Operator(
        name="cumsum",
        summary="Cumulative sum along a dimension; integers and bool give int64",
        attributes=ScanAttributes,
        infer=_infer_scan,
        reference=_scan_reference,
        kernels=_scan_kernels,
        dtypes=ALL,
    )
)

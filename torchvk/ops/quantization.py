"""Quantized activations: the formulas of torchao and PT2E, and the dispatches that carry them out.

x [M, K] becomes integers q with a scale and a zero point a row: x ≈ (q − zero point) · scale. The formulas are those
of ``torchao.quantization.quant_primitives`` (``_choose_qparams_affine``, ``_quantize_affine_no_dtype_cast``) and of
``torch.ao.quantization.fx._decomposed`` (``choose_qparams``, ``choose_qparams_per_token*``, ``quantize_per_tensor``,
``quantize_per_token``) on a CPU. With min ≤ 0 ≤ max the range of x, widened to hold 0:

- asymmetric: scale = max((max − min) / (quant_max − quant_min), eps),
  zero point = clamp(quant_min − round(min / scale));
- symmetric: scale = max(max(−min, max) / ((quant_max − quant_min) / 2), eps), zero point 0;
- q = clamp(round(x · (1 / scale)) + zero point), with round half to even.

They differ in the precision of each step (``Scheme.qparams``): torchao computes all of it in x's dtype, PT2E the
range and the scale in x's dtype and the rest in float32. Per token, PT2E chooses the zero point from whichever end
of the range loses less, and rounds x / scale + zero point in float64.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np

from torchvk.graph import DType
from torchvk.ops.operator import (
    Arg,
    Array,
    Capabilities,
    Dispatch,
    Layout,
    grid,
    read,
    scratch_read,
    scratch_write,
)

Activation = Literal["none", "dynamic_per_token", "dynamic_per_tensor", "static"]
Formulas = Literal["torchao", "pt2e"]


@dataclass(frozen=True)
class Scheme:
    """How activations are quantized.

    activation: "dynamic_per_token" has a scale for every row, "dynamic_per_tensor" one for all.
    eps: the smallest scale; for symmetric PT2E quantization per token, the smallest largest magnitude.
    """

    activation: Activation
    symmetric: bool
    quant_min: int
    quant_max: int
    eps: float
    qparams: Formulas

    @property
    def per_token(self) -> bool:
        return self.activation == "dynamic_per_token"

    @property
    def formula(self) -> int:
        """The code that the shader knows: 0 torchao, 1 PT2E per tensor, 2 PT2E per token."""
        if self.qparams == "torchao":
            return 0
        return 2 if self.per_token else 1

    @property
    def centered(self) -> bool:
        """Whether all zero points are 0."""
        return self.symmetric and (self.formula != 0 or int((self.quant_max + self.quant_min + 1) / 2) == 0)

    def smallest(self, dtype: DType) -> float:
        """eps as the formula meets it: in x's precision where it clamps a tensor of x's dtype."""
        if self.formula == 1 or (self.formula == 2 and self.symmetric):
            return float(np.float32(self.eps))
        return float(dtype.numpy.type(self.eps))


@dataclass(frozen=True)
class Static:
    """Activations that are 8-bit integers: one scale and zero point for all, known when the file is made.

    The zero point is that of signed integers: uint8 is taken for int8 by subtracting 128 from both.
    """

    scale: float
    zero_point: int
    unsigned: bool

    @staticmethod
    def of(scale: float, zero_point: int, dtype: DType) -> Static:
        unsigned = dtype is DType.UINT8
        return Static(scale, zero_point - 128 if unsigned else zero_point, unsigned)

    @property
    def per_token(self) -> bool:
        return False

    @property
    def centered(self) -> bool:
        return self.zero_point == 0

    def integers(self, x: Array) -> Array:
        """x less its zero point, float64."""
        return np.asarray(x.astype(np.float64) - (self.zero_point + (128 if self.unsigned else 0)))


def quantize(x: Array, scheme: Scheme) -> tuple[Array, Array, Array]:
    """Integers int32 [M, K], scales float32 [M, 1] and zero points int32 [M, 1] of x [M, K], float32 or float16.

    A row (per tensor: every row) with a value that is not finite, or a range too wide for x's dtype, gets the scale
    NaN, and so a result of NaN; eager mode gives NaN there too, or, where no other value of the row quantizes to its
    zero point, infinity.
    """
    with np.errstate(all="ignore"):
        return _quantize(x, scheme)


def _quantize(x: Array, scheme: Scheme) -> tuple[Array, Array, Array]:
    if x.shape[0] == 0:
        return np.zeros(x.shape, np.int32), np.zeros((0, 1), np.float32), np.zeros((0, 1), np.int32)
    axis = 1 if scheme.per_token else None
    # NumPy's float16 arithmetic rounds after each operation, as torch's does.
    low = np.minimum(x.min(axis=axis, keepdims=True), x.dtype.type(0))
    high = np.maximum(x.max(axis=axis, keepdims=True), x.dtype.type(0))
    low, high = np.broadcast_to(low, (len(x), 1)), np.broadcast_to(high, (len(x), 1))
    scale, zero_point = choose(low, high, scheme)
    bad = ~np.isfinite(scale) | np.isnan(low) | np.isnan(high)
    scale = np.where(bad, scale.dtype.type(1), scale)
    zero_point = np.where(bad, 0, zero_point)
    clean = np.where(bad, x.dtype.type(0), x)
    if scheme.formula == 0:
        q = np.rint(clean * (x.dtype.type(1) / scale)) + zero_point
    elif scheme.formula == 2 and not scheme.symmetric:
        q = np.rint(clean.astype(np.float64) * (1 / scale.astype(np.float64)) + zero_point)
    else:
        q = np.rint(clean.astype(np.float32) * (np.float32(1) / scale)) + zero_point
    integers = np.clip(q, scheme.quant_min, scheme.quant_max).astype(np.int32)
    return integers, np.where(bad, np.nan, scale).astype(np.float32), zero_point.astype(np.int32)


def choose(low: Array, high: Array, scheme: Scheme) -> tuple[Array, Array]:
    """Scale and zero point for ranges that hold zero."""
    dtype = low.dtype.type
    qmin, qmax = scheme.quant_min, scheme.quant_max
    smallest = scheme.smallest(DType.of(low.dtype))
    if scheme.symmetric:
        largest = np.maximum(-low, high)
        if scheme.formula == 2:
            scale = np.maximum(largest.astype(np.float32), np.float32(smallest)) / np.float32(qmax)
        else:
            scale = _divide(largest, (qmax - qmin) / 2)
            scale = np.maximum(scale.astype(dtype if scheme.formula == 0 else np.float32), dtype(smallest))
        zero = int((qmax + qmin + 1) / 2) if scheme.formula == 0 else 0
        return scale, np.full(scale.shape, zero, np.int32)
    scale = _divide(high - low, qmax - qmin)
    if scheme.formula == 1:
        scale = np.maximum(scale.astype(np.float32), np.float32(smallest))
        zero_point = qmin - np.rint(low.astype(np.float32) / scale)
    elif scheme.formula == 0:
        scale = np.maximum(scale, dtype(smallest))
        zero_point = qmin - np.rint(low / scale)
    else:
        scale = np.maximum(scale, dtype(smallest))
        down, up = low / scale, high / scale
        from_min = (dtype(qmin) + down) + (dtype(qmax) + up) > 0
        zero_point = np.where(from_min, dtype(qmin) - down, dtype(qmax) - up)
    return scale, np.rint(np.clip(np.nan_to_num(zero_point), qmin, qmax)).astype(np.int32)


def _divide(a: Array, b: float) -> Array:
    """a / b in a's dtype; torch divides float16 by a number in float32 and rounds the quotient."""
    quotient: Array = (a.astype(np.float32) / np.float32(b)).astype(a.dtype)
    return quotient


@dataclass(frozen=True)
class Rows:
    """x [m, k] and the columns of its copy: groups of ``group`` columns, spread to ``pitch``, padded to ``columns``."""

    m: int
    k: int
    dtype: DType
    group: int
    pitch: int
    columns: int

    def push(self, scheme: Scheme | None = None) -> bytes:
        low, high, eps = (
            (0, 0, 0.0) if scheme is None else (scheme.quant_min, scheme.quant_max, scheme.smallest(self.dtype))
        )
        return struct.pack("<5I2if", self.m, self.k, self.columns, self.group, self.pitch, low, high, eps)

    def constants(self, local_size: int, scheme: Scheme | None = None, floats: bool = False) -> tuple[int, ...]:
        aligned = self.k % 4 == 0 and self.group % 4 == 0
        formula, symmetric = (0, False) if scheme is None else (scheme.formula, scheme.symmetric)
        return (local_size, self.dtype is DType.FLOAT16, aligned, formula, symmetric, floats)


@dataclass(frozen=True)
class Activations:
    """Quantized rows of x for an integer kernel: the integers, a scale and zero point a row, and what makes them."""

    values: Arg
    qparams: Arg
    dispatches: tuple[Dispatch, ...]
    scratch: tuple[int, ...]


def activations(
    rows: Rows,
    x: int,
    constant: int,
    scheme: Scheme | Static,
    capabilities: Capabilities,
    *,
    floats: bool,
    texels: bool,
    whole: int = 0,
) -> Activations:
    """Input ``x`` as :func:`quantization` gives it. ``constant``: any constant input of the node.

    ``whole``: the kernel takes static x as it is, of this dtype, if its rows are a multiple of so many columns, and has
    weights of 0 beyond. 0: it does not.
    """
    if isinstance(scheme, Scheme):
        dispatches, scratch = quantization(rows, x, scheme, capabilities, floats=floats, texels=texels)
        return Activations(scratch_read(0, texels=texels), scratch_read(1, texels=texels), dispatches, scratch)
    qparams = read(constant, _same_rows(rows.m, scheme), texels=texels)
    as_it_is = whole > 0 and rows.k % whole == 0 and rows.group == rows.columns
    if as_it_is or (not floats and not scheme.unsigned and rows.columns == rows.k):
        return Activations(read(x, texels=texels), qparams, (), ())
    size = rows.m * rows.columns * (4 if floats else 1)
    quads = rows.m * rows.columns // 4
    aligned = rows.k % 4 == 0 and rows.group % 4 == 0
    local_size = LANES if texels else capabilities.local_size
    spreading = Dispatch(
        "spread_bytes_lanes" if texels else "spread_bytes",
        (read(x, texels=texels), scratch_write(0)),
        grid(quads, capabilities, local_size),
        (local_size, scheme.unsigned, floats, aligned),
        struct.pack("<5Ii", quads, rows.k, rows.columns, rows.group, rows.pitch, scheme.zero_point),
        bytes=rows.m * rows.k + size,
    )
    return Activations(scratch_read(0, texels=texels), qparams, (spreading,), (size,))


def _same_rows(m: int, scheme: Static) -> Layout:
    """One scale and zero point for each row, as constants; a whole number of texels."""

    def pack(constant: Array) -> Array:
        result = np.empty((m + m % 2, 2), np.int32)
        result[:, 0] = np.float32(scheme.scale).view(np.int32)
        result[:, 1] = scheme.zero_point
        return result

    return Layout(f"static_rows_{m}_{scheme.scale!r}_{scheme.zero_point}", pack)


def quantization(
    rows: Rows, x: int, scheme: Scheme, capabilities: Capabilities, *, floats: bool, texels: bool
) -> tuple[tuple[Dispatch, ...], tuple[int, ...]]:
    """Dispatches that quantize input ``x`` into scratch, and the sizes of the scratch buffers.

    Scratch 0: the integers, int8 [m, columns], or, with ``floats``, less their zero points as float32. Scratch 1:
    per row its scale (float32) and zero point (int32). The rest is their own. Nothing depends on the weights, so
    layers with one input share it. ``texels``: whether x is read as texels.
    """
    if not floats and not texels and (turns := _in_registers(rows, capabilities)) is not None:
        return _quantization_in_registers(rows, x, scheme, capabilities, *turns)
    suffix, local_size = _variant(rows.columns, texels, capabilities)
    results = (scratch_write(0), scratch_write(1))
    sizes: tuple[int, ...] = (rows.m * rows.columns * (4 if floats else 1), 8 * rows.m)
    x_bytes = rows.m * rows.k * rows.dtype.bits // 8
    source = read(x, texels=texels)

    def over(kernel: str, *buffers: Arg, nbytes: int) -> Dispatch:
        """A workgroup a row."""
        constants = rows.constants(local_size, scheme, floats)
        groups = grid(rows.m, capabilities, 1)
        return Dispatch(f"{kernel}{suffix}", buffers, groups, constants, rows.push(scheme), bytes=nbytes)

    if scheme.per_token:
        return (over("quantize_tokens", source, *results, nbytes=x_bytes + sum(sizes)),), sizes
    dispatches = [over("quantize_range", source, scratch_write(2), nbytes=x_bytes)]
    sizes = (*sizes, 8 * rows.m)
    if rows.m > 1:
        # The range of the rows' ranges.
        width = -(-2 * rows.m // 4) * 4
        lengths = Rows(1, 2 * rows.m, DType.FLOAT32, width, width, width)
        constants = lengths.constants(_variant(width, texels, capabilities)[1], scheme)
        buffers = (scratch_read(2, texels=texels), scratch_write(3))
        push = lengths.push(scheme)
        dispatches.append(Dispatch(f"quantize_range{suffix}", buffers, (1, 1, 1), constants, push, bytes=8 * rows.m))
        sizes = (*sizes, 8)
    ranges = scratch_read(len(sizes) - 1)
    dispatches.append(over("quantize_tensor", source, ranges, *results, nbytes=x_bytes + sizes[0]))
    return tuple(dispatches), sizes


def _in_registers(rows: Rows, capabilities: Capabilities) -> tuple[int, int] | None:
    """Workgroup size and turns of quantize_rows.slang for these rows, or None if they do not suit it."""
    if capabilities.tier < 1 or capabilities.kind == "cpu" or rows.k % 8 or rows.group != rows.columns:
        return None
    eights = rows.columns // 8
    limit = min(1024, 1 << (capabilities.max_workgroup_invocations.bit_length() - 1))
    # Four eights a thread; at least a subgroup.
    local_size = max(capabilities.subgroup_size, 1 << (-(-eights // 4) - 1).bit_length())
    if local_size > limit or local_size > 64 * capabilities.subgroup_size:
        return None
    return local_size, -(-eights // local_size)


def _quantization_in_registers(
    rows: Rows, x: int, scheme: Scheme, capabilities: Capabilities, local_size: int, turns: int
) -> tuple[tuple[Dispatch, ...], tuple[int, ...]]:
    """``quantization`` by quantize_rows.slang."""
    results = (scratch_write(0), scratch_write(1))
    sizes: tuple[int, ...] = (rows.m * rows.columns, 8 * rows.m)
    x_bytes = rows.m * rows.k * rows.dtype.bits // 8
    eights = rows.m * rows.k // 8
    # As many ranges as each row's workgroup looks through in a few steps, and as keep the device busy.
    ranges = max(1, min(256, eights // 1024))
    workgroups = min(rows.m, 1024)
    push = struct.pack(
        "<4I2ifI",
        *(rows.m, rows.k, rows.columns, ranges),
        *(scheme.quant_min, scheme.quant_max, scheme.smallest(rows.dtype), workgroups),
    )

    def constants(size: int, turns: int) -> tuple[int, ...]:
        return (size, rows.dtype is DType.FLOAT16, scheme.formula, scheme.symmetric, turns)

    if scheme.per_token:
        one = Dispatch(
            "quantize_rows_tokens",
            (read(x), *results),
            grid(rows.m, capabilities, 1),
            constants(local_size, turns),
            push,
            bytes=x_bytes + sum(sizes),
        )
        return (one,), sizes
    size = min(256, 1 << (capabilities.max_workgroup_invocations.bit_length() - 1))
    first = Dispatch(
        "quantize_rows_range",
        (read(x), scratch_write(2)),
        grid(ranges, capabilities, 1),
        constants(size, 1),
        push,
        bytes=x_bytes,
    )
    second = Dispatch(
        "quantize_rows_tensor",
        (read(x), scratch_read(2), *results),
        grid(workgroups, capabilities, 1),
        constants(local_size, turns),
        push,
        bytes=x_bytes + sum(sizes),
    )
    return (first, second), (*sizes, 8 * ranges)


def spreading(rows: Rows, x: int, capabilities: Capabilities, *, texels: bool) -> tuple[Dispatch, int]:
    """The dispatch that copies input ``x`` to scratch 0 as float32 [m, columns], and the size of that."""
    suffix, local_size = _variant(rows.columns, texels, capabilities)
    size = 4 * rows.m * rows.columns
    buffers: tuple[Arg, ...] = (read(x, texels=texels), scratch_write(0))
    dispatch = Dispatch(
        f"spread_rows{suffix}",
        buffers,
        grid(rows.m, capabilities, 1),
        rows.constants(local_size),
        rows.push(),
        bytes=rows.m * rows.k * rows.dtype.bits // 8 + size,
    )
    return dispatch, size


def _variant(columns: int, texels: bool, capabilities: Capabilities) -> tuple[str, int]:
    """Kernel suffix and workgroup size for rows of so many columns."""
    if texels:
        return "_lanes", LANES
    # A power of two, for the tree of the reduction; a thread takes four columns at a time.
    wanted = 1 << max(5, (columns // 4 - 1).bit_length())
    return "", min(256, wanted, 1 << (capabilities.max_workgroup_invocations.bit_length() - 1))


# Threads of the kernels for CPUs: one subgroup, and what AVX2 computes at once.
LANES = 8


def reads_texels(capabilities: Capabilities, *nbytes: int) -> bool:
    """Whether the kernels for CPUs can be used: buffers of these sizes as texels, sums across one subgroup."""
    return (
        capabilities.kind == "cpu"
        and capabilities.tier >= 1
        and capabilities.subgroup_size >= LANES
        and all(-(-size // 16) <= capabilities.max_texels for size in nbytes)
    )

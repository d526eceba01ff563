"""Attention: ``softmax(q kᵀ · scale + mask) v`` for each head, in one dispatch.

The operands lie as linear layers give them, [batch, tokens, heads, width], so that nothing is permuted. Scores and
probabilities never reach memory: a kernel goes through the keys in blocks and rescales what it has whenever a block
holds a new largest score (M. Milakov, N. Gimelshein: Online normalizer calculation for softmax, 2018, arXiv:1805.02867;
T. Dao et al.: FlashAttention, 2022, arXiv:2205.14135). Sums are in float32.

Accuracy: as softmax and matmul apart, except that float16 probabilities are not rounded between them, or, on matrix
units, before they are divided by their sum instead of after.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from torchvk.errors import UnsupportedError
from torchvk.graph import DType, TensorType
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

FLOATS = (DType.FLOAT32, DType.FLOAT16)
MAX_WIDTH = 256
MAX_ELEMENTS = 1 << 31  # kernels count elements in 32 bits
# float16 masks have no number so low that a score disappears beside it, as float32's -3.4e38 has: their lowest one
# is taken to be that.
LOWEST_HALF = np.float16(-65504)
# lavapipe ends loops, silently, after 65535 iterations of all loops of a workgroup together.
MAX_CPU_STEPS = 60_000


@dataclass(frozen=True)
class AttentionAttributes:
    """scale: what q kᵀ is multiplied by. masked_rows: what a row gives whose scores are all -∞: NaN, as softmax does,
    or zeros, as torch's scaled_dot_product_attention does."""

    scale: float
    masked_rows: Literal["nan", "zero"] = "nan"


@dataclass(frozen=True)
class Sizes:
    """q [batch, queries, heads, width]; k, v [batch, keys, heads / share, width]."""

    batch: int
    queries: int
    keys: int
    heads: int
    share: int  # heads of q that read one head of k and v
    width: int


def _operands(inputs: Types) -> tuple[TensorType, TensorType, TensorType, TensorType | None]:
    expect(len(inputs) in (3, 4), f"attention takes q, k, v and perhaps a mask, {len(inputs)} operands were given")
    q, k, v, mask = (*inputs, None)[:4]
    if q is None or k is None or v is None:
        expect(False, "attention needs q, k and v")
        raise AssertionError
    return q, k, v, mask


def _sizes(inputs: Types) -> Sizes:
    q, k, _, _ = _operands(inputs)
    batch, queries, heads, width = q.shape
    return Sizes(batch, queries, k.shape[1], heads, heads // max(k.shape[2], 1), width)


def _infer(attributes: AttentionAttributes, inputs: Types) -> tuple[TensorType, ...]:
    q, k, v, mask = _operands(inputs)
    expect(
        q.dtype in FLOATS and k.dtype is q.dtype and v.dtype is q.dtype,
        f"attention takes float32 or float16 operands of one dtype, got {q}, {k} and {v}",
    )
    expect(
        len(q.shape) == 4 and len(k.shape) == 4 and k.shape == v.shape,
        f"attention takes [batch, tokens, heads, width], k and v alike, got {q}, {k} and {v}",
    )
    batch, queries, heads, width = q.shape
    expect(k.shape[0] == batch and k.shape[3] == width, f"attention of {q} and {k}: batch and width must be equal")
    expect(heads % max(k.shape[2], 1) == 0 and min(k.shape) > 0, f"attention of {q} cannot share the heads of {k}")
    if mask is not None:
        full = (batch, heads, queries, k.shape[1])
        expect(
            mask.dtype is q.dtype
            and len(mask.shape) == 4
            and all(size in (1, whole) for size, whole in zip(mask.shape, full, strict=True)),
            f"attention of {q} and {k} takes a mask {TensorType(q.dtype, full)} or 1 in any place, got {mask}",
        )
    expect(math.isfinite(attributes.scale), f"attention takes a finite scale, got {attributes.scale}")
    return (q,)


def _support(attributes: AttentionAttributes, inputs: Types) -> str | None:
    operands = _operands(inputs)
    width = operands[0].shape[3]
    if width > MAX_WIDTH:
        return f"attention heads of more than {MAX_WIDTH} ({width})"
    if operands[0].dtype is DType.FLOAT16 and width % 2:
        return f"float16 attention heads of odd width ({width})"
    if max(operand.numel for operand in operands if operand is not None) >= MAX_ELEMENTS:
        return f"attention operands of {MAX_ELEMENTS} elements and more"
    return None


def _reference(attributes: AttentionAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    q, k, v, mask = (*inputs, None)[:4]
    assert q is not None
    assert k is not None
    assert v is not None
    share = q.shape[2] // k.shape[2]
    # [batch, heads, tokens, width]
    queries, keys, values = (x.astype(np.float32).transpose(0, 2, 1, 3) for x in (q, k, v))
    keys, values = (np.repeat(x, share, axis=1) for x in (keys, values))
    with np.errstate(all="ignore"):
        scores = np.matmul(queries, keys.transpose(0, 1, 3, 2)) * np.float32(attributes.scale)
        if mask is not None:
            added = scores + mask.astype(np.float32)
            swallows = mask == LOWEST_HALF if mask.dtype == np.float16 else np.False_
            scores = np.where(swallows, mask.astype(np.float32), added)
        largest = scores.max(-1, keepdims=True)
        weights = np.exp(scores - largest)
        weights /= weights.sum(-1, keepdims=True)
        if attributes.masked_rows == "zero":
            weights = np.where(largest == -np.inf, np.float32(0), weights)
        y = np.matmul(weights, values)
        return (np.ascontiguousarray(y.transpose(0, 2, 1, 3)).astype(q.dtype),)


# Cooperative matrices, and the lanes of a subgroup, that shaders/attention_matrix.slang has kernels for.
MATRICES = (((16, 16, 16), 32), ((16, 16, 16), 64), ((8, 16, 16), 16), ((8, 8, 8), 8))
# Workgroups that keep a large GPU busy.
BUSY = 128


@dataclass(frozen=True)
class Choice:
    """A kernel: how many queries and columns a workgroup computes, its size, whether operands are texels."""

    kernel: str
    queries: int
    columns: int
    local_size: int
    texels: bool = False


def choose(sizes: Sizes, dtype: DType, mask_elements: int, capabilities: Capabilities) -> Choice:
    """The kernel: pure, by sizes and capabilities."""
    if capabilities.kind == "cpu":
        return _choose_lanes(sizes, dtype, mask_elements, capabilities)
    if dtype is DType.FLOAT16 and (choice := _choose_matrix(sizes, capabilities)) is not None:
        return choice
    width = next(w for w in (32, 64, 128, 256) if sizes.width <= w)
    # 128 threads, which any device has. Fewer queries a workgroup where there would be too few workgroups.
    tiles = sizes.batch * sizes.heads * -(-sizes.queries // 32)
    rows = 2 if tiles < 256 else 4
    return Choice(f"attention_tiled_{width}_{8 * rows}", 8 * rows, width, 128)


def _choose_matrix(sizes: Sizes, capabilities: Capabilities) -> Choice | None:
    if capabilities.tier < 2 or not capabilities.shuffle or sizes.width % 8 or sizes.width > 128:
        return None
    shapes = capabilities.matrix_shapes("float16", "float32")
    width = next(w for w in (32, 64, 128) if sizes.width <= w)
    keys = 32 if width > 64 else 64
    for shape, lanes in MATRICES:
        if shape not in shapes or lanes != capabilities.subgroup_size:
            continue
        # One subgroup a workgroup where four would leave much of the device idle.
        tiles = sizes.batch * sizes.heads * -(-sizes.queries // (4 * shape[0]))
        groups = 1 if tiles < BUSY and (shape, lanes) == MATRICES[0] else 4
        rows = groups * shape[0]
        shared = 16 * (2 * keys * (width // 8 + 1) + rows * (max(width, keys) // 4 + 2)) + 4 * rows
        if shared <= capabilities.shared_memory and groups * lanes <= capabilities.max_workgroup_invocations:
            name = f"attention_matrix_{'x'.join(map(str, (*shape, lanes)))}_{width}_{groups}"
            return Choice(name, rows, width, groups * lanes)
    return None


def _choose_lanes(sizes: Sizes, dtype: DType, mask_elements: int, capabilities: Capabilities) -> Choice:
    lanes = capabilities.subgroup_size
    broadcast = capabilities.shuffle and lanes == 8
    columns = 64 if sizes.width > 32 and broadcast else 32
    if -(-sizes.keys // 8) * (-(-sizes.width // 4) + 2) > MAX_CPU_STEPS:
        raise UnsupportedError(f"attention to {sizes.keys} keys of width {sizes.width} is too long for CPU devices")
    elements = max(
        sizes.batch * sizes.heads * sizes.width * max(sizes.queries, sizes.keys),
        mask_elements,
    )
    # Texels are whole: rows of whole texels, or of whole halves of them, are read by them.
    texels = elements * dtype.bits // 8 <= capabilities.max_texels * 16
    suffix = ("_broadcast" if broadcast else "") + ("_texels" if texels else "")
    return Choice(f"attention_lanes_{columns}{suffix}", 2 * lanes, columns, lanes, texels)


def _kernels(
    attributes: AttentionAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    q, _, _, mask = _operands(inputs)
    if q.numel == 0:
        return Kernels(())
    sizes = _sizes(inputs)
    choice = choose(sizes, q.dtype, 0 if mask is None else mask.numel, capabilities)
    tiles = -(-sizes.queries // choice.queries)
    blocks = -(-sizes.width // choice.columns)
    total = tiles * blocks * sizes.batch * sizes.heads
    strides = (0, 0, 0, 0) if mask is None else _strides(mask.shape)
    push = struct.pack(
        "<12If",
        *(sizes.queries, sizes.keys, sizes.heads, sizes.share, sizes.width),
        *(tiles, blocks, total),
        *strides,
        attributes.scale,
    )
    constants = (
        choice.local_size,
        q.dtype is DType.FLOAT16,
        # Whether four neighbours from a multiple of four on are in one row.
        sizes.width % 4 == 0,
        mask is not None,
        mask is not None and strides[3] == 1 and sizes.keys % 4 == 0,
        attributes.masked_rows == "zero",
    )
    # Every binding needs a buffer: q stands in for a mask that is not there.
    slots = (0, 1, 2, 0 if mask is None else 3)
    element = q.dtype.bits // 8
    moved = sizes.batch * sizes.width * 2 * (sizes.queries * sizes.heads + sizes.keys * sizes.heads // sizes.share)
    main = Dispatch(
        kernel=choice.kernel,
        buffers=(*(read(slot, texels=choice.texels) for slot in slots), write(0)),
        groups=grid(total, capabilities, 1),
        constants=constants,
        push=push,
        bytes=element * (moved + (0 if mask is None else mask.numel)),
        flops=4 * sizes.batch * sizes.heads * sizes.queries * sizes.keys * sizes.width,
    )
    return Kernels((main,))


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major, 0 where an operand is broadcast."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step if size > 1 else 0)
        step *= size
    return tuple(reversed(strides))


ATTENTION = register(
    Operator(
        name="attention",
        summary="softmax(q kᵀ · scale + mask) v of [batch, tokens, heads, width], heads of k and v perhaps shared",
        attributes=AttentionAttributes,
        infer=_infer,
        reference=_reference,
        kernels=_kernels,
        support=_support,
        dtypes=FLOATS,
    )
)

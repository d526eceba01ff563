"""softmax, log_softmax, layer_norm and l2_normalize: float32 arithmetic whatever the dtype.

Accuracy: layer_norm's mean and variance come from blocks of 8 elements, each in two passes, merged by Chan's
formulae, so a large mean does not cancel. softmax rescales its sum only where a block holds a new largest element.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

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
from torchvk.ops.reduction import FLOATS, check_dims, one_input

WHOLE, SEGMENTS, STATES = 0, 1, 2

# Longest line of one thread on a CPU: one is as good as any in parallelism, and lavapipe ends loops after 65535
# iterations in all.
MAX_LINE = 4096
SEGMENT = 1024
MAX_TURNS = 4  # of shaders/normalization_rows.slang


@dataclass(frozen=True)
class SoftmaxAttributes:
    dim: int


@dataclass(frozen=True)
class NormalizeAttributes:
    """eps: what lines are at least divided by."""

    dim: int
    eps: float = 1e-12


@dataclass(frozen=True)
class LayerNormAttributes:
    """dims: how many trailing dimensions are normalized together."""

    dims: int
    eps: float = 1e-5


@dataclass(frozen=True)
class Lines:
    """``lines`` lines of ``count`` elements, ``inner`` apart."""

    lines: int
    count: int
    inner: int


def _line_kernels(
    name: Literal["softmax", "layer_norm", "l2_normalize"],
    x: TensorType,
    shape: Lines,
    operands: tuple[Arg, ...],
    flags: tuple[bool, bool, bool],
    epsilon: float,
    capabilities: Capabilities,
) -> Kernels:
    """``operands``: weight and bias of a layer_norm; ``flags``: logarithm, has weight, has bias."""
    if x.numel == 0:
        return Kernels(())
    lines, count, inner = shape.lines, shape.count, shape.inner
    cpu = capabilities.kind == "cpu"
    # A workgroup has something to share from some tens of elements on; threads on neighbouring lines read neighbours.
    group = not cpu and count > 32 and not (inner >= 32 and lines >= 4096)
    local_size = min(256, capabilities.max_workgroup_invocations) if group else capabilities.local_size
    segments = -(-count // SEGMENT) if cpu and count > MAX_LINE else 1
    length = -(-count // segments)
    words = x.dtype is DType.FLOAT32 or (inner == 1 and count % 2 == 0)
    push = struct.pack("<5If", lines, count, inner, segments, length, epsilon)

    def dispatch(
        kernel: str, buffers: tuple[Arg, ...], tasks: int, stage: int = WHOLE, per: int = 0, moved: int = 0
    ) -> Dispatch:
        size = per or capabilities.local_size
        return Dispatch(
            kernel=f"{name}_{kernel}",
            buffers=buffers,
            groups=grid(tasks, capabilities, 1 if kernel.endswith("group") else size),
            constants=(size, DTYPE[x.dtype], stage, *flags),
            push=push,
            bytes=moved * x.nbytes,
            flops=0 if stage == STATES else 5 * x.numel,
        )

    suffix = "_group" if group else ""
    if segments == 1 and words:
        kernel = "line" + ("_subgroup" if group and capabilities.tier >= 1 else suffix)
        return Kernels((dispatch(kernel, (read(0), *operands, write(0)), lines, per=local_size, moved=2),))
    # Scratch 0: two floats a line; scratch 1: three a segment.
    steps = []
    scratch = [8 * lines]
    if segments == 1:
        steps.append(dispatch(f"statistics{suffix}", (read(0), scratch_write(0)), lines, per=local_size, moved=1))
    else:
        scratch.append(12 * lines * segments)
        steps.append(dispatch("statistics", (read(0), scratch_write(1)), lines * segments, SEGMENTS, moved=1))
        steps.append(dispatch("statistics", (scratch_read(1), scratch_write(0)), lines, STATES))
    buffers = (read(0), scratch_read(0), *operands, write(0))
    steps.append(dispatch("apply", buffers, units(x.numel, x.dtype), moved=2))
    return Kernels(tuple(steps), tuple(scratch))


# softmax


def _infer_softmax(name: str, attributes: SoftmaxAttributes, inputs: Types) -> tuple[TensorType, ...]:
    x = one_input(name, inputs)
    check_dims(name, (attributes.dim,), x.shape)
    expect(x.dtype in FLOATS, f"{name} takes float32 or float16, got {x}")
    return (x,)


def _softmax_kernels(
    name: str, attributes: SoftmaxAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    x = one_input(name, inputs)
    count = x.shape[attributes.dim] if x.shape else 1
    inner = math.prod(x.shape[attributes.dim + 1 :])
    shape = Lines(x.numel // max(count, 1), count, inner)
    return _line_kernels("softmax", x, shape, (), (name == "log_softmax", False, False), 0.0, capabilities)


def _softmax_reference(name: str, attributes: SoftmaxAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    x = inputs[0]
    assert x is not None
    if x.size == 0:
        return (x.copy(),)
    # The dimension goes last and contiguous: NumPy adds such rows pairwise.
    last = np.ascontiguousarray(np.moveaxis(np.atleast_1d(x).astype(np.float32), attributes.dim, -1))
    with np.errstate(all="ignore"):
        shifted = last - last.max(-1, keepdims=True)
        exponentials = np.exp(shifted)
        sums = exponentials.sum(-1, keepdims=True)
        y = shifted - np.log(sums) if name == "log_softmax" else exponentials / sums
        return (np.moveaxis(y, -1, attributes.dim).astype(x.dtype).reshape(x.shape),)


def _register_softmax(name: Literal["softmax", "log_softmax"], summary: str) -> Operator:
    return register(
        Operator(
            name=name,
            summary=summary,
            attributes=SoftmaxAttributes,
            infer=partial(_infer_softmax, name),
            reference=partial(_softmax_reference, name),
            kernels=partial(_softmax_kernels, name),
            dtypes=FLOATS,
        )
    )


SOFTMAX = _register_softmax("softmax", "exp(x - max) / Σ exp(x - max) along a dimension")
LOG_SOFTMAX = _register_softmax("log_softmax", "Logarithm of softmax along a dimension, without loss in the tails")


# l2_normalize


def _infer_normalize(attributes: NormalizeAttributes, inputs: Types) -> tuple[TensorType, ...]:
    x = one_input("l2_normalize", inputs)
    check_dims("l2_normalize", (attributes.dim,), x.shape)
    expect(x.dtype in FLOATS, f"l2_normalize takes float32 or float16, got {x}")
    return (x,)


def _normalize_kernels(
    attributes: NormalizeAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    x = one_input("l2_normalize", inputs)
    count = x.shape[attributes.dim] if x.shape else 1
    inner = math.prod(x.shape[attributes.dim + 1 :])
    shape = Lines(x.numel // max(count, 1), count, inner)
    return _line_kernels("l2_normalize", x, shape, (), (False, False, False), attributes.eps, capabilities)


def _normalize_reference(attributes: NormalizeAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    x = inputs[0]
    assert x is not None
    wide = np.atleast_1d(x).astype(np.float32)
    with np.errstate(all="ignore"):
        length = np.sqrt(np.square(wide).sum(attributes.dim, keepdims=True, dtype=np.float32))
        y = wide / np.maximum(length, np.float32(attributes.eps))
        return (y.astype(x.dtype).reshape(x.shape),)


L2_NORMALIZE = register(
    Operator(
        name="l2_normalize",
        summary="x / max(√Σ x², eps) along a dimension",
        attributes=NormalizeAttributes,
        infer=_infer_normalize,
        reference=_normalize_reference,
        kernels=_normalize_kernels,
        dtypes=FLOATS,
    )
)


# layer_norm


def _infer_layer_norm(attributes: LayerNormAttributes, inputs: Types) -> tuple[TensorType, ...]:
    expect(1 <= len(inputs) <= 3, f"layer_norm takes an input, a weight and a bias, {len(inputs)} were given")
    x = one_input("layer_norm", inputs[:1])
    expect(x.dtype in FLOATS, f"layer_norm takes float32 or float16, got {x}")
    expect(
        1 <= attributes.dims <= len(x.shape),
        f"layer_norm of {x} takes from 1 to {len(x.shape)} trailing dimensions, got {attributes.dims}",
    )
    expected = TensorType(x.dtype, x.shape[len(x.shape) - attributes.dims :])
    for label, operand in zip(("weight", "bias"), inputs[1:], strict=False):
        expect(operand is None or operand == expected, f"layer_norm of {x} takes a {label} {expected}, got {operand}")
    return (x,)


def _layer_norm_kernels(
    attributes: LayerNormAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    x, weight, bias = (*inputs, None, None)[:3]
    assert x is not None
    count = math.prod(x.shape[len(x.shape) - attributes.dims :])
    shape = Lines(x.numel // max(count, 1), count, 1)
    if x.numel and (rows := _row_kernel(attributes, x, shape, weight, bias, capabilities)) is not None:
        return Kernels((rows,))
    # Every binding needs a buffer: x stands in for what is absent and is not read as such.
    operands = (read(0 if weight is None else 1), read(0 if bias is None else 2))
    flags = (False, weight is not None, bias is not None)
    return _line_kernels("layer_norm", x, shape, operands, flags, attributes.eps, capabilities)


def _row_kernel(
    attributes: LayerNormAttributes,
    x: TensorType,
    shape: Lines,
    weight: TensorType | None,
    bias: TensorType | None,
    capabilities: Capabilities,
) -> Dispatch | None:
    """The kernel that keeps a row in the registers of a workgroup, if rows suit it. (torchvk.ops.fusion knows it.)"""
    if capabilities.kind == "cpu" or capabilities.tier < 1 or shape.count % 4 or shape.count <= 32:
        return None
    fours = shape.count // 4
    # Four fours a thread at most; a subgroup at least.
    local_size = max(capabilities.subgroup_size, 1 << (-(-fours // MAX_TURNS) - 1).bit_length())
    if local_size > min(capabilities.max_workgroup_invocations, 64 * capabilities.subgroup_size):
        return None
    return Dispatch(
        kernel=f"layer_norm_rows_{'f16' if x.dtype is DType.FLOAT16 else 'f32'}",
        buffers=(read(0), read(0 if weight is None else 1), read(0 if bias is None else 2), write(0)),
        groups=grid(shape.lines, capabilities, 1),
        constants=(local_size, weight is not None, bias is not None, -(-fours // local_size)),
        push=struct.pack("<2If", shape.lines, shape.count, attributes.eps),
        bytes=2 * x.nbytes,
        flops=5 * x.numel,
    )


def _layer_norm_reference(attributes: LayerNormAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    x, weight, bias = (*inputs, None, None)[:3]
    assert x is not None
    if x.size == 0:
        return (x.copy(),)
    over = tuple(range(x.ndim - attributes.dims, x.ndim))
    wide = x.astype(np.float32)
    with np.errstate(all="ignore"):
        centred = wide - wide.mean(over, keepdims=True, dtype=np.float32)
        variance = np.square(centred).mean(over, keepdims=True, dtype=np.float32)
        y = centred / np.sqrt(variance + np.float32(attributes.eps))
        if weight is not None:
            y = y * weight.astype(np.float32)
        if bias is not None:
            y = y + bias.astype(np.float32)
        return (y.astype(x.dtype),)


LAYER_NORM = register(
    Operator(
        name="layer_norm",
        summary="(x - mean) / √(variance + eps) over trailing dimensions, times weight, plus bias; both optional",
        attributes=LayerNormAttributes,
        infer=_infer_layer_norm,
        reference=_layer_norm_reference,
        kernels=_layer_norm_kernels,
        dtypes=FLOATS,
    )
)

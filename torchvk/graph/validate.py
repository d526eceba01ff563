"""Structural checks of a graph from an untrusted file: everything that the runtime relies on."""

from __future__ import annotations

import math

from torchvk.errors import FormatError
from torchvk.graph.ir import Graph, Role, Tensor

MAX_RANK = 8
MAX_TENSORS = 1 << 20
MAX_TENSOR_BYTES = 1 << 40
CONSTANT_ALIGNMENT = 64


def validate(graph: Graph) -> None:
    """Raise :class:`FormatError` unless ``graph`` is sound.

    Sound means: ids in range; inputs and constants never written, every other tensor written exactly once and
    before it is read; roles agree with the calling convention; rank at most 8, sizes non-negative and far
    from overflow; constants' byte ranges aligned, inside the blob and of the size that shape and dtype give.
    """
    count = len(graph.tensors)
    if count > MAX_TENSORS:
        raise FormatError(f"graph has {count} tensors, the limit is {MAX_TENSORS}")
    for index, tensor in enumerate(graph.tensors):
        _check_tensor(tensor, f"tensor {index} ({tensor.name!r})", len(graph.constants))
    defined = _check_nodes(graph)
    _check_ends(graph, defined)


def _check_tensor(tensor: Tensor, where: str, constant_bytes: int) -> None:
    if len(tensor.shape) > MAX_RANK:
        raise FormatError(f"{where} has rank {len(tensor.shape)}, the limit is {MAX_RANK}")
    if any(size < 0 for size in tensor.shape):
        raise FormatError(f"{where} has a negative size: {list(tensor.shape)}")
    # Zero sizes must not hide an overflow of the others: count each as at least one.
    if math.prod(max(size, 1) for size in tensor.shape) * 8 > MAX_TENSOR_BYTES:
        raise FormatError(f"{where} is too large: {list(tensor.shape)}")
    if (tensor.role is Role.CONSTANT) != (tensor.data is not None):
        raise FormatError(
            f"{where} with role {tensor.role.value} must {'' if tensor.data is None else 'not '}have data"
        )
    if tensor.dtype.packed and tensor.role is not Role.CONSTANT:
        raise FormatError(f"{where} is {tensor.dtype.value}, which only constants can be")
    if tensor.dtype.packed and not tensor.shape:
        raise FormatError(f"{where} is {tensor.dtype.value} and a scalar: it is packed along the last dimension")
    if tensor.data is not None:
        begin, size = tensor.data.offset, tensor.data.size
        if begin < 0 or size < 0 or begin % CONSTANT_ALIGNMENT or begin + size > constant_bytes:
            raise FormatError(
                f"{where}: bytes {begin}..{begin + size} are misaligned or outside the {constant_bytes} bytes of "
                "constants"
            )
        if size != tensor.type.nbytes:
            raise FormatError(f"{where}: {tensor.type} needs {tensor.type.nbytes} bytes, the file gives {size}")


def _check_nodes(graph: Graph) -> list[bool]:
    """Which tensors have a value in the end."""
    count = len(graph.tensors)
    defined = [tensor.role in (Role.INPUT, Role.CONSTANT) for tensor in graph.tensors]
    for position, node in enumerate(graph.nodes):
        where = f"node {position} ({node.op!r})"
        named = [operand for operand in (*node.inputs, *node.outputs) if operand is not None]
        for operand in named:
            if not 0 <= operand < count:
                raise FormatError(f"{where} names tensor {operand} of {count}")
        for read in node.inputs:
            if read is not None and not defined[read]:
                raise FormatError(f"{where} reads tensor {read} before it is written")
        for output in node.outputs:
            if defined[output]:
                raise FormatError(f"{where} writes tensor {output}, which already has a value")
            defined[output] = True
    return defined


def _check_ends(graph: Graph, defined: list[bool]) -> None:
    """Inputs and outputs."""
    count = len(graph.tensors)
    for label, positions in (("input", graph.inputs), ("output", graph.outputs)):
        for position in positions:
            if not 0 <= position < count:
                raise FormatError(f"graph {label} names tensor {position} of {count}")
    if len(set(graph.inputs)) != len(graph.inputs):
        raise FormatError("a tensor is listed twice as graph input")
    if {i for i, t in enumerate(graph.tensors) if t.role is Role.INPUT} != set(graph.inputs):
        raise FormatError("the graph's inputs and the tensors with role input differ")
    returned = set(graph.outputs)
    for index, tensor in enumerate(graph.tensors):
        if tensor.role is Role.OUTPUT and index not in returned:
            raise FormatError(f"tensor {index} ({tensor.name!r}) has role output but is not returned")
        if tensor.role is Role.TEMPORARY and index in returned:
            raise FormatError(f"tensor {index} ({tensor.name!r}) is returned but has role temporary")
        if index in returned and not defined[index]:
            raise FormatError(f"graph output {index} ({tensor.name!r}) is never written")

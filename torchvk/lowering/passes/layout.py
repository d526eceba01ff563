"""Channels stay last between the operators of a convolutional network.

torch keeps channels before the spatial dimensions, operators on images want them last: their translations stand
between two permutations. Those that put channels first sink towards the outputs, through everything that works as well
in another order of dimensions; those that put channels last rise towards the inputs. Where two meet they cancel
(passes/views.py), so that only the edges of a network keep any.

Only permutations of images move: one sinks if it comes, by whatever way, from an operator on images, and rises if it
leads to one. What others do on purpose (the heads of attention) stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from torchvk.lowering.draft import Call, Draft, Value, constant
from torchvk.lowering.passes.rewrite import Rewriter, rewrite
from torchvk.ops.elementwise import BINARY, UNARY

IMAGE = ("conv", "quantized_conv", "max_pool", "avg_pool", "adaptive_avg_pool", "upsample_nearest", "upsample_bilinear")
QUANTIZE = ("quantize", "dequantize")
UNARIES = (*UNARY, "cast")
# Of operands that broadcast.
ELEMENTWISE = (*UNARIES, *BINARY, "where", *QUANTIZE, "quantized_arithmetic")
# Of the first operand; the others are tables and the like.
FIRST_ONLY = ("lookup",)
# Not through quantize: bytes are permuted, not the floats before them.
RISING = (*UNARIES, *BINARY, "dequantize", *FIRST_ONLY)


def move_permutes(draft: Draft) -> Draft:
    down = {**RULES, **dict.fromkeys((*ELEMENTWISE, *FIRST_ONLY), _elementwise)}
    origins = _from_images(draft)
    sunk = rewrite(draft, lambda rewriter, call: _sink(rewriter, call, down, origins))
    targets = _to_images(sunk)
    return rewrite(sunk, lambda rewriter, call: _rise(rewriter, call, targets))


def channels_first(rank: int) -> tuple[int, ...]:
    return (0, rank - 1, *range(1, rank - 1))


def channels_last(rank: int) -> tuple[int, ...]:
    return (0, *range(2, rank), 1)


def inverse(dims: Sequence[int]) -> list[int]:
    return sorted(range(len(dims)), key=dims.__getitem__)


def _from_images(draft: Draft) -> set[Value]:
    """The values that come from an operator on images."""
    found: set[Value] = set()
    for call in draft.calls:
        if call.op in IMAGE or any(value in found for value in call.inputs):
            found.update(call.outputs)
    return found


def _to_images(draft: Draft) -> set[Value]:
    """The values that operators on images read, perhaps through others that keep the dimensions."""
    found: set[Value] = set()
    for call in reversed(draft.calls):
        if call.op in IMAGE or (call.op in (*ELEMENTWISE, *RULES) and call.outputs[0] in found):
            found.update(value for value in call.inputs if value is not None)
    return found


class Moved:
    """What ``value`` is a permutation of, if that is one that sinks."""

    def __init__(self, rewriter: Rewriter, value: Value | None, origins: set[Value]) -> None:
        self.dims: tuple[int, ...] = ()
        self.source: Value | None = None
        call = rewriter.made.get(value) if value in origins else None
        source = call.inputs[0] if call is not None and call.op in ("permute", "reshape") else None
        if call is None or value is None or source is None or len(value.shape) < 3:
            return
        dims = channels_first(len(value.shape))
        if call.op == "permute" and tuple(call.attributes.dims) != dims:
            return
        if call.op == "reshape" and not _is_permutation(source, value, dims):
            return
        self.dims, self.source = dims, source

    def __bool__(self) -> bool:
        return self.source is not None


def _is_permutation(source: Value, value: Value, dims: Sequence[int]) -> bool:
    """Whether a reshape is a permutation of dimensions most of which have one element."""
    return (
        len(source.shape) == len(dims)
        and source.shape != value.shape
        and tuple(source.shape[dim] for dim in dims) == value.shape
        and not _moves(source, dims)
    )


# (rewriter, call, its operands as far as they are moved, the dims of the first that is) → the new result
Sink = Callable[[Rewriter, Call, list[Moved], tuple[int, ...]], Value | None]


def _sink(rewriter: Rewriter, call: Call, rules: dict[str, Sink], origins: set[Value]) -> Value | None:
    rule = rules.get(call.op)
    if rule is None:
        return None
    operands = [Moved(rewriter, value, origins) for value in call.inputs]
    dims = next((operand.dims for operand in operands if operand), None)
    result = None if dims is None else rule(rewriter, call, operands, dims)
    if result is not None:
        origins.add(result)
    return result


def _permuted(rewriter: Rewriter, value: Value, dims: Sequence[int], call: Call) -> Value:
    """``value``, with 1 for the dimensions that it lacks, in the order ``dims``; numbers stay as they are."""
    if value.type.numel == 1 and len(value.shape) < len(dims):
        return value
    shape = (1,) * (len(dims) - len(value.shape)) + value.shape
    if value.array is not None:
        return constant(np.ascontiguousarray(value.array.reshape(shape).transpose(dims)), value.name, value.dtype)
    full = rewriter.reshape(value, shape, call)
    return rewriter.op("permute", full, like=call, attributes={"dims": list(dims)})


def _moves(value: Value, dims: Sequence[int]) -> bool:
    """Whether a permutation of ``value`` is work for the device."""
    shape = (1,) * (len(dims) - len(value.shape)) + value.shape
    order = [dim for dim in dims if shape[dim] != 1]
    return not value.constant and order != sorted(order)


def _operands(
    rewriter: Rewriter, call: Call, operands: list[Moved], dims: tuple[int, ...]
) -> list[Value | None] | None:
    """All operands in the order before the permutation; None if more of them had to be moved than are now."""
    back = inverse(dims)
    others = [v for v, moved in zip(call.inputs, operands, strict=True) if v is not None and moved.dims != dims]
    if sum(_moves(value, back) for value in others) > sum(moved.dims == dims for moved in operands):
        return None
    result: list[Value | None] = []
    for value, moved in zip(call.inputs, operands, strict=True):
        if value is None or moved.dims == dims:
            result.append(moved.source)
        else:
            result.append(_permuted(rewriter, value, back, call))
    return result


def _elementwise(rewriter: Rewriter, call: Call, operands: list[Moved], dims: tuple[int, ...]) -> Value | None:
    if len(dims) != len(call.outputs[0].shape):
        return None
    if call.op == "dequantize" and rewriter.producer(call.inputs[0], "reshape"):
        return None  # passes/quantized_movement.py moves reshapes the other way
    if call.op in FIRST_ONLY:
        if not operands[0]:
            return None
        inputs: list[Value | None] | None = [operands[0].source, *call.inputs[1:]]
    else:
        inputs = _operands(rewriter, call, operands, dims)
    if inputs is None:
        return None
    return _back(rewriter, call, inputs, call.attributes, dims)


def _back(rewriter: Rewriter, call: Call, inputs: list[Value | None], attributes: Any, dims: Sequence[int]) -> Value:
    """The operator, and the permutation behind it; none where that changes nothing."""
    result = rewriter.op(call.op, *inputs, like=call, attributes=attributes)
    if list(dims) == sorted(dims):
        return result
    return rewriter.op("permute", result, like=call, attributes={"dims": list(dims)})


def _cat(rewriter: Rewriter, call: Call, operands: list[Moved], dims: tuple[int, ...]) -> Value | None:
    inputs = _operands(rewriter, call, operands, dims)
    return None if inputs is None else _back(rewriter, call, inputs, {"dim": dims[call.attributes.dim]}, dims)


def _along(rewriter: Rewriter, call: Call, operands: list[Moved], dims: tuple[int, ...]) -> Value | None:
    """Operators with one dimension that matters, and results of the operand's shape."""
    attributes = replace(call.attributes, dim=dims[call.attributes.dim])
    return _back(rewriter, call, [operands[0].source], attributes, dims)


def _kept(dims: tuple[int, ...], gone: Sequence[int]) -> list[int]:
    """The permutation of what remains of ``dims`` without the (permuted) dimensions ``gone``."""
    kept = [source for dim, source in enumerate(dims) if dim not in gone]
    return [sorted(kept).index(source) for source in kept]


def _reduce(rewriter: Rewriter, call: Call, operands: list[Moved], dims: tuple[int, ...]) -> Value | None:
    gone = call.attributes.dims
    attributes = replace(call.attributes, dims=tuple(sorted(dims[dim] for dim in gone)))
    return _back(rewriter, call, [operands[0].source], attributes, dims if attributes.keepdim else _kept(dims, gone))


def _select(rewriter: Rewriter, call: Call, operands: list[Moved], dims: tuple[int, ...]) -> Value | None:
    dim = call.attributes.dim
    attributes = replace(call.attributes, dim=dims[dim])
    keepdim = getattr(attributes, "keepdim", False)
    return _back(rewriter, call, [operands[0].source], attributes, dims if keepdim else _kept(dims, [dim]))


def _flip(rewriter: Rewriter, call: Call, operands: list[Moved], dims: tuple[int, ...]) -> Value | None:
    attributes = {"dims": [dims[dim] for dim in call.attributes.dims]}
    return _back(rewriter, call, [operands[0].source], attributes, dims)


def _pad(rewriter: Rewriter, call: Call, operands: list[Moved], dims: tuple[int, ...]) -> Value | None:
    pairs = [call.attributes.padding[2 * dim : 2 * dim + 2] for dim in inverse(dims)]
    attributes = replace(call.attributes, padding=[size for pair in pairs for size in pair])
    return _back(rewriter, call, [operands[0].source], attributes, dims)


def _sizes(name: str) -> Sink:
    """Operators with a number for each dimension of the result, of which there are as many as of the operand."""

    def sink(rewriter: Rewriter, call: Call, operands: list[Moved], dims: tuple[int, ...]) -> Value | None:
        numbers = getattr(call.attributes, name)
        if len(numbers) != len(dims):
            return None
        attributes = {name: [numbers[dim] for dim in inverse(dims)]}
        return _back(rewriter, call, [operands[0].source], attributes, dims)

    return sink


def _reshape(rewriter: Rewriter, call: Call, operands: list[Moved], dims: tuple[int, ...]) -> Value | None:
    """Dimensions that are joined, or cut, while they are neighbours before the permutation, too."""
    source = operands[0].source
    assert source is not None
    target = call.outputs[0].shape
    if source.type.numel == 0:
        return None
    groups = _groups([source.shape[dim] for dim in dims], target)
    order = [dim for dim in range(len(dims)) if source.shape[dim] != 1]
    first: list[tuple[int, range]] = []
    for joined, cut in groups:
        own = [dims[dim] for dim in joined if source.shape[dims[dim]] != 1]
        if own and own != order[order.index(own[0]) :][: len(own)]:
            return None
        first.append((order.index(own[0]) if own else -1, cut))
    places = [place for _, cut in sorted(first, key=lambda group: group[0]) for place in cut]
    if places == sorted(places):
        return None
    moved = rewriter.reshape(source, tuple(target[place] for place in places), call)
    return rewriter.op("permute", moved, like=call, attributes={"dims": inverse(places)})


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[range, range]]:
    """The smallest groups of neighbouring dimensions that become one another."""
    groups = []
    i = j = 0
    while i < len(old) or j < len(new):
        start, begin = i, j
        a = b = 1
        if i < len(old):
            a, i = old[i], i + 1
        if j < len(new) and a != 1:
            b, j = new[j], j + 1
        elif j < len(new) and new[j] == 1:
            j += 1
        while a != b:
            if (a < b and i < len(old)) or j == len(new):
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        groups.append((range(start, i), range(begin, j)))
    return groups


def _rise(rewriter: Rewriter, call: Call, targets: set[Value]) -> Value | None:
    """A permutation to channels last, before the operator whose result it permutes."""
    value = call.inputs[0] if call.op == "permute" else None
    if value is None or call.outputs[0] not in targets:
        return None
    dims = tuple(call.attributes.dims)
    made = rewriter.made.get(value)
    if dims != channels_last(len(dims)) or made is None or made.op not in RISING or rewriter.uses.get(value, 0) != 1:
        return None
    operands = made.inputs[:1] if made.op in FIRST_ONLY else made.inputs
    if sum(_moves(operand, dims) for operand in operands if operand is not None) > 1:
        return None
    if all(operand is None or len(operand.shape) != len(dims) for operand in operands):
        return None
    moved = [None if operand is None else _permuted(rewriter, operand, dims, call) for operand in operands]
    return rewriter.op(made.op, *moved, *made.inputs[len(moved) :], like=made, attributes=made.attributes)


RULES: dict[str, Sink] = {
    "cat": _cat,
    **dict.fromkeys(("sum", "mean", "prod", "amax", "amin", "any", "all"), _reduce),
    **dict.fromkeys(("argmax", "argmin", "select"), _select),
    **dict.fromkeys(("softmax", "log_softmax", "l2_normalize", "cumsum", "slice"), _along),
    "flip": _flip,
    "pad": _pad,
    "expand": _sizes("shape"),
    "repeat": _sizes("repeats"),
    "reshape": _reshape,
}

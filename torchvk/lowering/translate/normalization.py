"""Softmax and layer normalization."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torchvk.graph import DType
from torchvk.lowering.draft import Value
from torchvk.lowering.refusal import Refused
from torchvk.lowering.translate.registry import Translation, Translator, dim_of, register, translates

SOFTMAX = {"aten._softmax.default": "softmax", "aten._log_softmax.default": "log_softmax"}


def softmax(op: str) -> Translation:
    def translate(t: Translator, self: Value, dim: int, half_to_float: bool = False) -> Value:
        x = t.cast(self, DType.FLOAT32) if half_to_float else self
        if not x.shape:
            return t.reshape(t.op(op, t.reshape(x, (1,)), dim=0), ())
        return t.op(op, x, dim=dim_of(dim, len(x.shape)))

    return translate


for _name, _op in SOFTMAX.items():
    register(softmax(_op), _name)


@translates("aten.native_layer_norm.default")
def native_layer_norm(
    t: Translator, input: Value, normalized_shape: Sequence[int], weight: Value | None, bias: Value | None, eps: float
) -> tuple[Value | None, ...]:
    """torch also gives mean and reciprocal standard deviation, which only training uses."""
    return (layer_norm(t, input, normalized_shape, weight, bias, eps), None, None)


@translates("aten.layer_norm.default")
def layer_norm(
    t: Translator,
    input: Value,
    normalized_shape: Sequence[int],
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
) -> Value:
    return t.op("layer_norm", input, weight, bias, dims=len(normalized_shape), eps=float(eps))


@translates("aten.native_group_norm.default")
def native_group_norm(
    t: Translator,
    input: Value,
    weight: Value | None,
    bias: Value | None,
    N: int,  # torch's names
    C: int,
    group: int,
    eps: float,
) -> tuple[Value | None, ...]:
    """Groups of channels, all pixels of them, are lines of a layer norm."""
    if input.type.numel == 0:
        return (input, None, None)
    lines = t.reshape(input, (N, group, input.type.numel // (N * group)))
    y = t.reshape(t.op("layer_norm", lines, None, None, dims=1, eps=float(eps)), input.shape)
    return (_per_channel(t, y, weight, bias), None, None)


@translates("aten._native_batch_norm_legit.no_stats")
def batch_norm_of_this_batch(
    t: Translator, input: Value, weight: Value | None, bias: Value | None, training: bool, eps: float
) -> tuple[Value | None, ...]:
    """Instance normalization, as exir hands it over, and batch normalization that keeps no statistics."""
    batch, channels, *rest = input.shape
    if not training:
        raise Refused("there are no statistics to normalize by")
    if input.type.numel == 0:
        return (input, None, None)
    swapped = input if batch == 1 else t.op("permute", input, dims=[1, 0, *range(2, len(input.shape))])
    lines = t.reshape(swapped, (channels, batch * math.prod(rest)))
    y = t.reshape(t.op("layer_norm", lines, None, None, dims=1, eps=float(eps)), swapped.shape)
    y = y if batch == 1 else t.op("permute", y, dims=[1, 0, *range(2, len(input.shape))])
    return (_per_channel(t, y, weight, bias), None, None)


def _per_channel(t: Translator, x: Value, weight: Value | None, bias: Value | None) -> Value:
    """x [N, C, …] times weight [C] plus bias [C]."""
    for op, operand in (("mul", weight), ("add", bias)):
        if operand is not None:
            shape = (*operand.shape, *(1,) * (len(x.shape) - 2))
            x = t.op(op, x, t.reshape(t.cast(operand, x.dtype), shape))
    return x

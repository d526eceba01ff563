"""Convolutions, and the normalization by constants that follows them.

torch keeps channels before the spatial dimensions, torchvk behind them: permutations stand around each operator, and
the passes join those between neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

from torchvk.lowering.draft import Value
from torchvk.lowering.translate.registry import Translator, translates


def channels_last(t: Translator, x: Value) -> Value:
    """[N, C, *spatial] as [N, *spatial, C]."""
    return t.op("permute", x, dims=[0, *range(2, len(x.shape)), 1])


def channels_first(t: Translator, x: Value) -> Value:
    rank = len(x.shape)
    return t.op("permute", x, dims=[0, rank - 1, *range(1, rank - 1)])


@translates("aten.convolution.default")
def convolution(
    t: Translator,
    input: Value,
    weight: Value,
    bias: Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Value:
    """torch's weight is [O, C / groups, *kernel], a transposed convolution's [C, O / groups, *kernel]."""
    rank = len(weight.shape) - 2
    batched = len(input.shape) == rank + 2
    x = input if batched else t.reshape(input, (1, *input.shape))
    stride, padding, dilation, output_padding = (
        [*values] * rank if len(values) == 1 else [*values] for values in (stride, padding, dilation, output_padding)
    )
    depthwise = groups > 1 and groups == x.shape[1]
    if transposed:
        sizes = zip(padding, dilation, weight.shape[2:], output_padding, strict=True)
        pairs = [(d * (k - 1) - p, d * (k - 1) - p + extra) for p, d, k, extra in sizes]
        up, stride = stride, [1] * rank
        w = _transposed_weight(t, weight, groups, depthwise)
    else:
        pairs, up = [(p, p) for p in padding], [1] * rank
        if depthwise:
            moved = t.op("permute", weight, dims=[*range(2, rank + 2), 0, 1])
            w = t.reshape(moved, moved.shape[:-1])
        else:
            w = channels_last(t, weight)
    y = t.op(
        "conv",
        channels_last(t, x),
        w,
        bias,
        stride=stride,
        padding=[size for pair in pairs for size in pair],
        dilation=dilation,
        input_dilation=up,
        groups=groups,
    )
    y = channels_first(t, y)
    return y if batched else t.reshape(y, y.shape[1:])


def _transposed_weight(t: Translator, weight: Value, groups: int, depthwise: bool) -> Value:
    """As ``conv`` has it, of a transposed convolution."""
    rank, kernel = len(weight.shape) - 2, weight.shape[2:]
    weight = t.op("flip", weight, dims=list(range(2, rank + 2)))
    if depthwise:
        # [C, multiplier, *kernel]
        moved = t.op("permute", weight, dims=[*range(2, rank + 2), 0, 1])
        return t.reshape(moved, (*kernel, weight.shape[0] * weight.shape[1]))
    if groups == 1:
        return t.op("permute", weight, dims=[1, *range(2, rank + 2), 0])
    inside, outside = weight.shape[0] // groups, weight.shape[1]
    split = t.reshape(weight, (groups, inside, outside, *kernel))
    swapped = t.op("permute", split, dims=[0, 2, *range(3, rank + 3), 1])
    return t.reshape(swapped, (groups * outside, *kernel, inside))


@translates("aten._native_batch_norm_legit_no_training.default")
def batch_norm(
    t: Translator,
    input: Value,
    weight: Value | None,
    bias: Value | None,
    running_mean: Value,
    running_var: Value,
    eps: float,
) -> tuple[Value | None, ...]:
    """A multiplication and an addition a channel, whose constants are computed once; after a convolution the passes
    take them into its weights. (torch also gives what only training uses.)"""
    dtype = running_var.dtype
    scale = t.op("rsqrt", t.op("add", running_var, t.scalar(eps, dtype)))
    if weight is not None:
        scale = t.op("mul", scale, t.cast(weight, dtype))
    shift = t.op("mul", running_mean, scale)
    shift = t.op("sub", t.cast(bias, dtype), shift) if bias is not None else t.op("neg", shift)
    shape = (*scale.shape, *(1,) * (len(input.shape) - 2))
    scale, shift = (t.reshape(t.cast(each, input.dtype), shape) for each in (scale, shift))
    return (t.op("add", t.op("mul", input, scale), shift), None, None)

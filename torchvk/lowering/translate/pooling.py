"""Pooling. torch keeps channels before the spatial dimensions, torchvk behind them: permutations stand around each
operator, and the passes join those between neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torchvk.lowering.draft import Value
from torchvk.lowering.refusal import Refused
from torchvk.lowering.translate.registry import Translator, register, translates


def channels_last(t: Translator, x: Value, spatial: int, operator: Callable[[Value], Value]) -> Value:
    """``operator`` of x [N, C, *spatial] or [C, *spatial], for which it gets [N, *spatial, C] and gives the same."""
    if len(x.shape) not in (spatial + 1, spatial + 2):
        raise Refused(f"an input of shape {list(x.shape)} for {spatial} spatial dimensions")
    batched = len(x.shape) == spatial + 2
    x = x if batched else t.reshape(x, (1, *x.shape))
    y = operator(t.op("permute", x, dims=[0, *range(2, spatial + 2), 1]))
    y = t.op("permute", y, dims=[0, spatial + 1, *range(1, spatial + 1)])
    return y if batched else t.reshape(y, y.shape[1:])


def _numbers(values: Sequence[int], spatial: int, default: Sequence[int] = ()) -> list[int]:
    """One for each spatial dimension: torch lets one stand for all, and none for the default."""
    values = list(values) or list(default)
    return values * spatial if len(values) == 1 else values


def _max_pool(spatial: int) -> Callable[..., tuple[Value | None, None]]:
    def translate(
        t: Translator,
        self: Value,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> tuple[Value | None, None]:
        """Without the places of the largest elements, which torch gives beside them."""
        kernel = _numbers(kernel_size, spatial)
        window = {
            "kernel": kernel,
            "stride": _numbers(stride, spatial, kernel),
            "padding": _numbers(padding, spatial),
            "dilation": _numbers(dilation, spatial),
            "output": list(t.out.shape[-spatial:]),
        }
        return channels_last(t, self, spatial, lambda x: t.op("max_pool", x, **window)), None

    return translate


def _avg_pool(spatial: int) -> Callable[..., Value]:
    def translate(
        t: Translator,
        self: Value,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        count_include_pad: bool,
        divisor_override: int | None,
    ) -> Value:
        if divisor_override is not None and divisor_override < 1:
            raise Refused(f"divisor_override={divisor_override} is not supported")
        kernel = _numbers(kernel_size, spatial)
        window = {
            "kernel": kernel,
            "stride": _numbers(stride, spatial, kernel),
            "padding": _numbers(padding, spatial),
            "output": list(t.out.shape[-spatial:]),
            "count_include_pad": count_include_pad,
            "divisor": divisor_override or 0,
        }
        return channels_last(t, self, spatial, lambda x: t.op("avg_pool", x, **window))

    return translate


def _adaptive_avg_pool(spatial: int) -> Callable[..., Value]:
    def translate(t: Translator, self: Value) -> Value:
        output = list(t.out.shape[-spatial:])
        return channels_last(t, self, spatial, lambda x: t.op("adaptive_avg_pool", x, output=output))

    return translate


for _rank in (2, 3):
    register(_max_pool(_rank), f"aten.max_pool{_rank}d_with_indices.default")
    register(_avg_pool(_rank), f"aten.avg_pool{_rank}d.default")
    register(_adaptive_avg_pool(_rank), f"aten._adaptive_avg_pool{_rank}d.default")


def _scale(given: float | None, size: int, wanted: int) -> float:
    """The step in the input for one in the result (``compute_scales_value`` of aten/src/ATen/native/UpSample.h)."""
    return 1.0 / given if given is not None and given > 0 else size / wanted


@translates("aten.upsample_nearest2d.vec")
def upsample_nearest(t: Translator, input: Value, scale_factors: Sequence[float] | None) -> Value:
    sizes, output = input.shape[-2:], t.out.shape[-2:]
    given = [None, None] if scale_factors is None else scale_factors
    scale = [
        # torch takes these without any arithmetic.
        1.0 if size == wanted else 0.5 if 2 * size == wanted else _scale(own, size, wanted)
        for own, size, wanted in zip(given, sizes, output, strict=True)
    ]
    return channels_last(t, input, 2, lambda x: t.op("upsample_nearest", x, size=list(output), scale=scale))


@translates("aten.upsample_bilinear2d.vec")
def upsample_bilinear(t: Translator, input: Value, align_corners: bool, scale_factors: Sequence[float] | None) -> Value:
    sizes, output = input.shape[-2:], t.out.shape[-2:]
    given = [None, None] if scale_factors is None else scale_factors
    if align_corners:
        scale = [(size - 1) / (wanted - 1) if wanted > 1 else 0.0 for size, wanted in zip(sizes, output, strict=True)]
    else:
        scale = [_scale(own, size, wanted) for own, size, wanted in zip(given, sizes, output, strict=True)]
    attributes = {"size": list(output), "scale": scale, "align_corners": align_corners}
    return channels_last(t, input, 2, lambda x: t.op("upsample_bilinear", x, **attributes))

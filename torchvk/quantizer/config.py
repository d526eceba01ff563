"""Quantization configurations: what the user may ask for, and a word about what is wrong otherwise."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torchao.quantization.pt2e import (
    FakeQuantize,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
)
from torchao.quantization.pt2e.quantizer import QuantizationConfig, QuantizationSpec

from torchvk.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from torchvk.quantizer.observers import (
    CalibratedAverage,
    CalibratedObserver,
    PerChannelFakeQuantize,
    PerChannelGroupFakeQuantize,
    PerChannelGroupObserver,
    PerTokenFakeQuantize,
    PerTokenObserver,
)

WEIGHT_BITS = (4, 8)
ACTIVATION_BITS = (8,)

_GROUPS = (PerChannelGroupObserver, PerChannelGroupFakeQuantize)
_TOKENS = (PerTokenObserver, PerTokenFakeQuantize)


def get_symmetric_quantization_config(
    is_dynamic: bool = False,
    weight_bits: int = 8,
    act_bits: int = 8,
    act_qmin: int | None = None,
    act_qmax: int | None = None,
    weight_qmin: int | None = None,
    weight_qmax: int | None = None,
    *,
    is_static: bool = False,
    is_per_token: bool = False,
    is_per_channel: bool = True,
    group_size: int | None = None,
    is_qat: bool = False,
) -> QuantizationConfig:
    """A configuration for :class:`VulkanQuantizer`; the positional parameters are those of ExecuTorch's function.

    What each combination gives (``weight_bits=4`` with any of them gives -8…7 in place of -128…127):

    =============================================  =======================================  =========================
    arguments                                      activations                              operators quantized
    =============================================  =======================================  =========================
    none                                           floating point (weight-only)             linear, convolution
    ``is_dynamic=True``                            int8, per tensor, asymmetric, scale and  linear, convolution
                                                   zero point chosen at run time
    ``is_dynamic=True, is_per_token=True``         the same, for each row of the last       linear; convolution, which
                                                   dimension                                has no tokens, per tensor
    ``is_static=True``                             int8, per tensor, asymmetric, scale and  every one that the class
                                                   zero point from calibration              lists; outputs int8, too
    =============================================  =======================================  =========================

    =============================================  ==================================================================
    arguments                                      weights (symmetric, int8 with float32 scales)
    =============================================  ==================================================================
    none                                           a scale for each output channel (for each row of an embedding)
    ``is_per_channel=False``                       one scale; embeddings keep one for each row
    ``group_size=G``                               linear: a scale for each G input channels of an output channel, of
                                                   the weight's dtype; convolution and embedding: as without
    =============================================  ==================================================================

    ``is_qat=True`` gives any of these for ``prepare_qat_pt2e``: training sees values that are quantized and
    dequantized. The range of static activations is then the moving average of that of the batches.

    Formulas: ``scale = max |w| / ((weight_qmax - weight_qmin) / 2)`` for weights; for activations, whose range always
    includes 0, ``scale = (max - min) / (act_qmax - act_qmin)`` and ``zero_point = act_qmin - round(min / scale)``.
    Static activations come from a histogram, of which outliers may be clipped where that makes the error smaller.

    Args:
        is_dynamic: see above.
        weight_bits: 8 or 4.
        act_bits: 8.
        act_qmin, act_qmax: range of quantized activations within -128…127, the default; in weight-only
            configurations the range is not used.
        weight_qmin, weight_qmax: range of quantized weights around 0, within the range of ``weight_bits``,
            the default: -128…127 or -8…7.
        is_static, is_per_token, is_per_channel, group_size, is_qat: see above. ``group_size`` is a number
            above 1 that divides the input channels of each linear.

    Raises:
        ArgumentTypeError: an argument has the wrong type.
        ArgumentError: an argument has a value that is not allowed, and the message lists those that are; or two
            contradict each other: ``is_static`` and ``is_dynamic``, ``is_per_token`` without ``is_dynamic``,
            ``group_size`` with ``is_per_channel=False`` or with ``is_static``.
    """
    flags = {"is_dynamic": is_dynamic, "is_static": is_static, "is_per_token": is_per_token}
    for name, flag in {**flags, "is_per_channel": is_per_channel, "is_qat": is_qat}.items():
        if not isinstance(flag, bool):
            raise ArgumentTypeError(f"{name} must be a bool, not {type(flag).__name__}")
    weight_range = _range("weight", _bits("weight_bits", weight_bits, WEIGHT_BITS), weight_qmin, weight_qmax)
    if not weight_range[0] < 0 < weight_range[1]:
        raise ArgumentError(
            f"weight_qmin={weight_range[0]}, weight_qmax={weight_range[1]}: the range of symmetric weights must hold "
            "negative and positive values: weight_qmin < 0 < weight_qmax"
        )
    act_range = _range("act", _bits("act_bits", act_bits, ACTIVATION_BITS), act_qmin, act_qmax)
    if is_static and is_dynamic:
        raise ArgumentError("is_static and is_dynamic contradict each other: scales come from calibration or run time")
    if is_per_token and not is_dynamic:
        raise ArgumentError("is_per_token needs is_dynamic=True: tokens get their scales at run time")
    if group_size is not None:
        if _integer("group_size", group_size) < 2:
            raise ArgumentError(f"group_size={group_size} is not supported: a group has 2 input channels or more")
        if not is_per_channel:
            raise ArgumentError("group_size and is_per_channel=False contradict each other: groups lie within channels")
        if is_static:
            raise ArgumentError("group_size and is_static contradict each other: static linears have a scale a channel")

    weight = _weight(weight_range, is_per_channel, group_size, is_qat)
    activation = None
    if is_dynamic:
        activation = _dynamic(act_range, is_per_token, is_qat)
    elif is_static:
        activation = _static(act_range, is_qat)
    output = activation if is_static else None
    return QuantizationConfig(
        input_activation=activation, output_activation=output, weight=weight, bias=None, is_qat=is_qat
    )


def check_config(config: object) -> QuantizationConfig:
    """Return ``config`` if torchvk knows what it means, else raise.

    Raises:
        ArgumentTypeError: not a ``torchao.quantization.pt2e.quantizer.QuantizationConfig``.
        UnsupportedError: a configuration that torchvk does not run; the message says which part of it.
    """
    if not isinstance(config, QuantizationConfig):
        raise ArgumentTypeError(
            "the quantization configuration must be a torchao.quantization.pt2e.quantizer.QuantizationConfig, as "
            f"get_symmetric_quantization_config() returns it, not {type(config).__name__}"
        )
    if config.bias is not None:
        raise UnsupportedError("quantization of bias is not supported: it must be None")
    weight, activation, output = config.weight, config.input_activation, config.output_activation
    if weight is None:
        raise UnsupportedError("a configuration without quantized weights is not supported: weight must not be None")
    schemes = (torch.per_channel_symmetric, torch.per_tensor_symmetric)
    _check_part("weight", weight, () if _is_one_of(weight, _GROUPS) else schemes, dynamic=(False,))
    schemes = (torch.per_tensor_affine, torch.per_tensor_symmetric)
    if activation is not None:
        _check_part(
            "input_activation", activation, () if _is_one_of(activation, _TOKENS) else schemes, dynamic=(False, True)
        )
    if output is not None:
        _check_part("output_activation", output, schemes, dynamic=(False,))
        if not is_static(config):
            raise UnsupportedError("a quantized output_activation needs a static input_activation")
    return config


def is_static(config: QuantizationConfig) -> bool:
    """Whether activations are quantized with parameters from calibration."""
    return config.input_activation is not None and not config.input_activation.is_dynamic


def is_per_token(activation: QuantizationSpec) -> bool:
    """Whether each row of the last dimension has parameters of its own."""
    return _is_one_of(activation, _TOKENS)


def per_tensor(activation: QuantizationSpec) -> QuantizationSpec:
    """``activation``, with tokens replaced by the whole tensor: for operators whose rows are no tokens."""
    if not is_per_token(activation):
        return activation
    is_qat = _class(activation) is PerTokenFakeQuantize
    return _dynamic((activation.quant_min, activation.quant_max), False, is_qat)


def per_channel(weight: QuantizationSpec, axis: int, *, always: bool = False) -> QuantizationSpec:
    """``weight`` for tensors without groups, with its channels along ``axis``.

    ``always``: a scale for each channel even where ``weight`` says one for the tensor.
    """
    if _is_one_of(weight, _GROUPS) or (always and weight.qscheme == torch.per_tensor_symmetric):
        is_qat = issubclass(_class(weight), (PerChannelGroupFakeQuantize, FakeQuantize))
        weight = _weight((weight.quant_min, weight.quant_max), True, None, is_qat)
    return along(weight, axis)


def along(weight: QuantizationSpec, axis: int) -> QuantizationSpec:
    """``weight`` with its output channels along ``axis``."""
    return weight if weight.qscheme == torch.per_tensor_symmetric else replace(weight, ch_axis=axis)


def group_size_of(weight: QuantizationSpec) -> int | None:
    """The number of input channels that share a scale, or None for all of them."""
    if not _is_one_of(weight, _GROUPS):
        return None
    return int(weight.observer_or_fake_quant_ctr.p.keywords["group_size"])


def _weight(limits: tuple[int, int], channels: bool, group_size: int | None, is_qat: bool) -> QuantizationSpec:
    if group_size is not None:
        return _spec(_groups(group_size, is_qat), limits, None, ch_axis=0)
    if channels:
        constructor = _QAT_CHANNELS if is_qat else PerChannelMinMaxObserver
        return _spec(constructor, limits, torch.per_channel_symmetric, ch_axis=0)
    return _spec(_QAT_LATEST if is_qat else MinMaxObserver, limits, torch.per_tensor_symmetric)


def _dynamic(limits: tuple[int, int], tokens: bool, is_qat: bool) -> QuantizationSpec:
    if tokens:
        return _spec(PerTokenFakeQuantize if is_qat else PerTokenObserver, limits, None, is_dynamic=True)
    return _spec(_QAT_LATEST if is_qat else PlaceholderObserver, limits, torch.per_tensor_affine, is_dynamic=True)


def _static(limits: tuple[int, int], is_qat: bool) -> QuantizationSpec:
    return _spec(_QAT_AVERAGE if is_qat else CalibratedObserver, limits, torch.per_tensor_affine)


# Specifications are equal if their constructors are the same object, so each is made once.
_QAT_AVERAGE = FakeQuantize.with_args(observer=CalibratedAverage, averaging_constant=0.1)
_QAT_LATEST = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, averaging_constant=1)
_QAT_CHANNELS = PerChannelFakeQuantize.with_args(observer=MovingAveragePerChannelMinMaxObserver, averaging_constant=1)


@functools.cache
def _groups(group_size: int, is_qat: bool) -> Any:
    return (PerChannelGroupFakeQuantize if is_qat else PerChannelGroupObserver).with_args(group_size=group_size)


def _spec(constructor: Any, limits: tuple[int, int], qscheme: torch.qscheme | None, **more: Any) -> QuantizationSpec:
    # A scheme of None for tokens and groups: PT2E lets edges of one tensor share an observer if their schemes are
    # equal, whatever observers they name, and these are neither per tensor nor per channel.
    return QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=constructor,
        quant_min=limits[0],
        quant_max=limits[1],
        qscheme=qscheme,
        **more,
    )


def _class(spec: QuantizationSpec) -> type:
    constructor = spec.observer_or_fake_quant_ctr
    made: type = constructor.p.func if hasattr(constructor, "p") else constructor
    return made


def _is_one_of(spec: object, classes: tuple[type, ...]) -> bool:
    return isinstance(spec, QuantizationSpec) and _class(spec) in classes


def _check_part(
    part: str, spec: QuantizationSpec, schemes: tuple[torch.qscheme, ...], *, dynamic: tuple[bool, ...]
) -> None:
    if not isinstance(spec, QuantizationSpec):
        raise UnsupportedError(f"{part} must be a QuantizationSpec, not {type(spec).__name__}")
    allowed: dict[str, tuple[Any, ...]] = {"dtype": (torch.int8,), "qscheme": schemes, "is_dynamic": dynamic}
    for name, values in allowed.items():
        if values and getattr(spec, name) not in values:
            known = " or ".join(str(value) for value in values)
            raise UnsupportedError(f"{part} with {name}={getattr(spec, name)} is not supported: it must be {known}")


def _bits(name: str, value: int, allowed: tuple[int, ...]) -> int:
    if _integer(name, value) not in allowed:
        raise ArgumentError(f"{name}={value} is not supported: it must be {' or '.join(map(str, allowed))}")
    return int(value)


def _range(name: str, bits: int, low: int | None, high: int | None) -> tuple[int, int]:
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    qmin = least if low is None else _integer(f"{name}_qmin", low)
    qmax = most if high is None else _integer(f"{name}_qmax", high)
    if not least <= qmin < qmax <= most:
        raise ArgumentError(
            f"{name}_qmin={qmin}, {name}_qmax={qmax} is not a range of {bits}-bit values: "
            f"{least} <= {name}_qmin < {name}_qmax <= {most}"
        )
    return qmin, qmax


def _integer(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"{name} must be an int, not {type(value).__name__}")
    return value

"""Quantization configurations: what the user may ask for, and a word about what is wrong otherwise."""

from __future__ import annotations

import torch
from torchao.quantization.pt2e import PerChannelMinMaxObserver, PlaceholderObserver
from torchao.quantization.pt2e.quantizer import QuantizationConfig, QuantizationSpec

from torchvk.errors import ArgumentError, ArgumentTypeError, UnsupportedError

WEIGHT_BITS = (4, 8)
ACTIVATION_BITS = (8,)


def get_symmetric_quantization_config(
    is_dynamic: bool = False,
    weight_bits: int = 8,
    act_bits: int = 8,
    act_qmin: int | None = None,
    act_qmax: int | None = None,
    weight_qmin: int | None = None,
    weight_qmax: int | None = None,
) -> QuantizationConfig:
    """A configuration for :meth:`VulkanQuantizer.set_global`; parameters as ExecuTorch's function of this name.

    Weights are symmetric, with a float32 scale per output channel:
    ``scale[n] = max |w[n, :]| / ((weight_qmax - weight_qmin) / 2)``.

    Args:
        is_dynamic: False quantizes weights only. True also quantizes activations to int8, per tensor, asymmetric,
            with scale and zero point chosen from each input at run time.
        weight_bits: 8 or 4.
        act_bits: 8.
        act_qmin, act_qmax: range of quantized activations within -128…127, the default; without ``is_dynamic``
            activations are not quantized and the range is not used.
        weight_qmin, weight_qmax: range of quantized weights around 0, within the range of ``weight_bits``,
            the default: -128…127 or -8…7.

    Raises:
        ArgumentTypeError: an argument has the wrong type.
        ArgumentError: an argument has a value that is not allowed; the message lists those that are.
    """
    if not isinstance(is_dynamic, bool):
        raise ArgumentTypeError(f"is_dynamic must be a bool, not {type(is_dynamic).__name__}")
    weight_range = _range("weight", _bits("weight_bits", weight_bits, WEIGHT_BITS), weight_qmin, weight_qmax)
    if not weight_range[0] < 0 < weight_range[1]:
        raise ArgumentError(
            f"weight_qmin={weight_range[0]}, weight_qmax={weight_range[1]}: the range of symmetric weights must hold "
            "negative and positive values: weight_qmin < 0 < weight_qmax"
        )
    act_range = _range("act", _bits("act_bits", act_bits, ACTIVATION_BITS), act_qmin, act_qmax)

    weight = QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver,
        quant_min=weight_range[0],
        quant_max=weight_range[1],
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )
    activation = QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=PlaceholderObserver,
        quant_min=act_range[0],
        quant_max=act_range[1],
        qscheme=torch.per_tensor_affine,
        is_dynamic=True,
    )
    return QuantizationConfig(
        input_activation=activation if is_dynamic else None, output_activation=None, weight=weight, bias=None
    )


def check_config(config: object) -> QuantizationConfig:
    """Return ``config`` if torchvk has operators for it, else raise.

    Raises:
        ArgumentTypeError: not a ``torchao.quantization.pt2e.quantizer.QuantizationConfig``.
        UnsupportedError: a configuration that torchvk does not run; the message says which part of it.
    """
    if not isinstance(config, QuantizationConfig):
        raise ArgumentTypeError(
            "the quantization configuration must be a torchao.quantization.pt2e.quantizer.QuantizationConfig, as "
            f"get_symmetric_quantization_config() returns it, not {type(config).__name__}"
        )
    for part in ("output_activation", "bias"):
        if getattr(config, part) is not None:
            raise UnsupportedError(f"quantization of {part} is not supported: it must be None")
    if config.is_qat:
        raise UnsupportedError("quantization-aware training is not supported: is_qat must be False")

    weight = config.weight
    if weight is None:
        raise UnsupportedError("a configuration without quantized weights is not supported: weight must not be None")
    _check_part("weight", weight, (torch.per_channel_symmetric, torch.per_tensor_symmetric), is_dynamic=False)
    if config.input_activation is not None:
        _check_part("input_activation", config.input_activation, (torch.per_tensor_affine,), is_dynamic=True)
    return config


def _check_part(part: str, spec: QuantizationSpec, schemes: tuple[torch.qscheme, ...], *, is_dynamic: bool) -> None:
    if not isinstance(spec, QuantizationSpec):
        raise UnsupportedError(f"{part} must be a QuantizationSpec, not {type(spec).__name__}")
    allowed = {"dtype": (torch.int8,), "qscheme": schemes, "is_dynamic": (is_dynamic,)}
    for name, values in allowed.items():
        if getattr(spec, name) not in values:
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

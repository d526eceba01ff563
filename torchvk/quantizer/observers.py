"""Observers and fake quantizers for what torchao's do not express in PT2E: activations per token, weights per group.

``prepare_pt2e`` puts an observer at every tensor that an annotation names, ``prepare_qat_pt2e`` a fake quantizer, and
``convert_pt2e`` asks each for the quantize and dequantize nodes that take its place (``convert``). Those here write
torchao's affine operators, the same that ``quantize_`` with ``Int8DynamicActivationIntxWeightConfig`` exports.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import (
    FakeQuantize,
    FakeQuantizeBase,
    HistogramObserver,
    MovingAverageMinMaxObserver,
    ObserverBase,
)
from torchao.quantization.pt2e.utils import create_getattr_from_value
from torchao.quantization.quant_primitives import MappingType, _fake_quantize_affine, choose_qparams_affine

from torchvk.errors import ArgumentError

_EPS = torch.finfo(torch.float32).eps
# As packets, not overloads: convert_pt2e looks for these, and computes quantize_affine of a constant ahead.
_torchao = torch.ops.torchao


class _Calibrated:
    """A range of the values seen; without any there is none, and converting is an error.

    ``where`` says whose values, for the message; the quantizer sets it.
    """

    where = ""
    min_val: torch.Tensor
    max_val: torch.Tensor

    @property
    def _name(self) -> str:
        return f" {self.where}" if self.where else ""

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale (float32) and zero point (int32), each of shape [1].

        Raises ``ArgumentError`` when no data came by, or some that is not finite.
        """
        if not bool((self.min_val <= self.max_val).all()):  # they start at +inf and -inf; NaN compares false
            raise ArgumentError(
                f"no range is known for the activation{self._name}: run the prepared model on representative inputs "
                "(calibration, or training) before convert_pt2e"
            )
        if not bool(torch.isfinite(self.max_val - self.min_val).all()):
            raise ArgumentError(f"the activation{self._name} had infinite values in calibration: it has no scale")
        parameters: tuple[torch.Tensor, torch.Tensor] = super().calculate_qparams()  # type: ignore[misc]
        return parameters


class CalibratedObserver(_Calibrated, HistogramObserver):  # type: ignore[misc]  # torchao is untyped
    """Takes a histogram, and from it the range with the least squared error."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` itself. Infinite values are not counted; raises ``ArgumentError`` for NaN."""
        if bool(torch.isnan(x).any()):
            raise ArgumentError(
                f"the activation{self._name} was NaN in calibration: calibrate with other inputs, or switch "
                "quantization off there (set_module_name or set_object_type with None)"
            )
        result: torch.Tensor = super().forward(x)
        return result


class CalibratedAverage(_Calibrated, MovingAverageMinMaxObserver):  # type: ignore[misc]
    """Takes the moving average of smallest and largest value."""


class PerChannelFakeQuantize(FakeQuantize):  # type: ignore[misc]
    """torchao's fake quantizer. PT2E tells the channel's axis only to classes with PerChannel in their name."""


class PerTokenObserver(ObserverBase):  # type: ignore[misc]
    """Marks an activation that is quantized at run time: int8, a scale and zero point for each row of the last
    dimension. Nothing is observed, so no calibration is needed."""

    qscheme = None

    def __init__(self, dtype: torch.dtype = torch.int8, quant_min: int = -128, quant_max: int = 127, **_: Any) -> None:
        super().__init__(dtype=dtype, is_dynamic=True)
        self.quant_min, self.quant_max = quant_min, quant_max

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` itself."""
        return x

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Raises ``ArgumentError``: there are none before run time."""
        raise ArgumentError("activations per token have no scale before run time")

    def convert(self, model: GraphModule, node: Node) -> None:
        """Replace the call ``node`` by choose → quantize → dequantize."""
        _convert_per_token(model, node, self.dtype, self.quant_min, self.quant_max)


class PerTokenFakeQuantize(FakeQuantizeBase):  # type: ignore[misc]
    """:class:`PerTokenObserver` for training: forward gives what the converted model will compute, the gradient
    passes where nothing was clamped."""

    qscheme = None

    def __init__(self, dtype: torch.dtype = torch.int8, quant_min: int = -128, quant_max: int = 127, **_: Any) -> None:
        super().__init__()
        self.dtype, self.is_dynamic = dtype, True
        self.quant_min, self.quant_max = quant_min, quant_max

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` quantized and dequantized, in its own dtype."""
        if not self.fake_quant_enabled[0]:
            return x
        block = _token(x.shape)
        limits = (self.dtype, self.quant_min, self.quant_max)
        with torch.no_grad():
            scale, zero_point = choose_qparams_affine(
                x, MappingType.ASYMMETRIC, block, *limits, _EPS, zero_point_dtype=torch.int8
            )
        return _fake_quantize_affine(x, block, scale, zero_point, *limits)

    def calculate_qparams(self, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Raises ``ArgumentError``: there are none before run time."""
        raise ArgumentError("activations per token have no scale before run time")

    def convert(self, model: GraphModule, node: Node) -> None:
        """Replace the call ``node`` by choose → quantize → dequantize."""
        _convert_per_token(model, node, self.dtype, self.quant_min, self.quant_max)


class _Groups:
    """Scale of a weight matrix for groups of input channels: symmetric, ``max |w| / ((quant_max - quant_min) / 2)``,
    as torchao's ``MappingType.SYMMETRIC``."""

    dtype: torch.dtype
    quant_min: int
    quant_max: int
    group_size: int
    ch_axis: int
    qparams: tuple[torch.Tensor, torch.Tensor] | None

    def _configure(self, group_size: int, dtype: torch.dtype, quant_min: int, quant_max: int, ch_axis: int) -> None:
        self.dtype, self.quant_min, self.quant_max = dtype, quant_min, quant_max
        self.group_size, self.ch_axis, self.qparams = group_size, ch_axis, None

    def _block(self) -> tuple[int, int]:
        return (1, self.group_size) if self.ch_axis == 0 else (self.group_size, 1)

    def _observe(self, weight: torch.Tensor) -> None:
        with torch.no_grad():
            self.qparams = choose_qparams_affine(
                weight.detach(),
                MappingType.SYMMETRIC,
                self._block(),
                self.dtype,
                self.quant_min,
                self.quant_max,
                zero_point_dtype=torch.int8,
            )

    def _found(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.qparams is None:
            raise ArgumentError("a weight was never shown to its observer")
        return self.qparams

    def _convert(self, model: GraphModule, node: Node) -> None:
        (weight,) = node.args
        assert isinstance(weight, Node)
        dtype = _example(weight).dtype
        limits = (self.dtype, self.quant_min, self.quant_max)
        with model.graph.inserting_before(node):
            parameters = [
                create_getattr_from_value(model, model.graph, f"{weight.name}_{name}_", value, value.device)
                for name, value in zip(("scale", "zero_point"), self._found(), strict=True)
            ]
            quantized = model.graph.call_function(
                _torchao.quantize_affine, (weight, self._block(), *parameters, *limits)
            )
            dequantized = model.graph.call_function(
                _torchao.dequantize_affine,
                (quantized, self._block(), *parameters, *limits),
                {"output_dtype": dtype},
            )
        node.replace_all_uses_with(dequantized)
        model.graph.erase_node(node)


class PerChannelGroupObserver(_Groups, ObserverBase):  # type: ignore[misc]
    """A weight matrix with a scale for every ``group_size`` input channels of each output channel.

    ``ch_axis`` is the dimension of output channels: 0 for [N, K], 1 for [K, N].
    """

    qscheme = None

    def __init__(
        self,
        group_size: int,
        dtype: torch.dtype = torch.int8,
        quant_min: int = -128,
        quant_max: int = 127,
        ch_axis: int = 0,
        **_: Any,
    ) -> None:
        ObserverBase.__init__(self, dtype=dtype, is_dynamic=False)
        self._configure(group_size, dtype, quant_min, quant_max, ch_axis)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Take the scales of ``weight``, and return it."""
        self._observe(weight)
        return weight

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale (of the weight's dtype) and zero point (int8 zeros), one an element for each group."""
        return self._found()

    def convert(self, model: GraphModule, node: Node) -> None:
        """Replace the call ``node`` by quantize → dequantize."""
        self._convert(model, node)


class PerChannelGroupFakeQuantize(_Groups, FakeQuantizeBase):  # type: ignore[misc]
    """:class:`PerChannelGroupObserver` for training; the scales follow the weight."""

    qscheme = None

    def __init__(
        self,
        group_size: int,
        dtype: torch.dtype = torch.int8,
        quant_min: int = -128,
        quant_max: int = 127,
        ch_axis: int = 0,
        **_: Any,
    ) -> None:
        FakeQuantizeBase.__init__(self)
        self.is_dynamic = False
        self._configure(group_size, dtype, quant_min, quant_max, ch_axis)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` quantized and dequantized."""
        if self.observer_enabled[0] or self.qparams is None:
            self._observe(weight)
        if not self.fake_quant_enabled[0]:
            return weight
        scale, zero_point = self._found()
        return _fake_quantize_affine(
            weight, self._block(), scale, zero_point, self.dtype, self.quant_min, self.quant_max
        )

    def calculate_qparams(self, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale (of the weight's dtype) and zero point (int8 zeros), one an element for each group."""
        return self._found()

    def convert(self, model: GraphModule, node: Node) -> None:
        """Replace the call ``node`` by quantize → dequantize."""
        self._convert(model, node)


def _token(shape: Sequence[int]) -> tuple[int, ...]:
    return (1,) * (len(shape) - 1) + (int(shape[-1]),)


def _example(node: Node) -> torch.Tensor:
    """What ``node`` gave when it was exported; dequantized tensors are like what was quantized."""
    while "val" not in node.meta:
        node = node.all_input_nodes[0]
    value: torch.Tensor = node.meta["val"]
    return value


def _convert_per_token(model: GraphModule, node: Node, dtype: torch.dtype, quant_min: int, quant_max: int) -> None:
    (x,) = node.args
    assert isinstance(x, Node)
    value = _example(x)
    block, limits, graph = _token(value.shape), (dtype, quant_min, quant_max), model.graph
    with graph.inserting_before(node):
        chosen = graph.call_function(
            _torchao.choose_qparams_affine,
            (x, MappingType.ASYMMETRIC.name, block, *limits, _EPS, None, torch.int8),
        )
        parameters = [graph.call_function(operator.getitem, (chosen, i)) for i in range(2)]
        quantized = graph.call_function(_torchao.quantize_affine, (x, block, *parameters, *limits))
        dequantized = graph.call_function(
            _torchao.dequantize_affine, (quantized, block, *parameters, *limits), {"output_dtype": value.dtype}
        )
    node.replace_all_uses_with(dequantized)
    graph.erase_node(node)

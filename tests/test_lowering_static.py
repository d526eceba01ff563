"""Statically quantized models run on integers, and agree with what PT2E converted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from tests.edge import Lowered, lower_module, lower_program
from tests.pt2e import quantize
from torchvk.errors import ArgumentError
from torchvk.graph import DType

pytestmark = pytest.mark.export

QD = torch.ops.quantized_decomposed
INTEGER = {"quantize", "dequantize", "quantized_linear", "lookup", "quantized_arithmetic", "reshape"}


class Function(nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x: torch.Tensor) -> torch.Tensor:
        return self.function(*x)


def steps_apart(
    converted: torch.fx.GraphModule, inputs: tuple[torch.Tensor, ...], device: str | None = None
) -> Lowered:
    """Lowered whole; results in steps of their own scale are equal, but for one in ten thousand, by one step."""
    with torch.no_grad():
        expected = converted(*inputs)
        lowered = lower_program(torch.export.export(converted, inputs))
    assert not lowered.cpu, [str(refusal) for refusal in lowered.report]
    last = [n for n in converted.graph.nodes if "dequantize_per_tensor" in str(n.target)][-1]
    (y,) = lowered.run(*inputs, device=None)
    steps = ((y - expected) / last.args[1]).abs()
    assert y.shape == expected.shape
    assert float(steps.max()) <= 1.001
    assert int((steps > 0.5).sum()) <= max(1, y.numel() // 10000)
    return lowered


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lead=st.sampled_from([(), (1,), (5,), (2, 3), (2, 1, 3), (1, 2, 3, 2)]),
    k=st.sampled_from([97, 32, 20]),
    n=st.sampled_from([51, 8]),
    bias=st.booleans(),
    activation=st.sampled_from([nn.Identity(), nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.3, 0.2)]),
    config=st.fixed_dictionaries({"weight_bits": st.sampled_from([8, 4]), "is_per_channel": st.booleans()}),
)
def test_linear(lead: tuple[int, ...], k: int, n: int, bias: bool, activation: nn.Module, config: Any) -> None:
    model = nn.Sequential(nn.Linear(k, n, bias=bias), activation, nn.Linear(n, 7))
    x = torch.randn(*lead, k)
    lowered = steps_apart(quantize(model, (x,), is_static=True, **config), (x,))
    found = lowered.operators()
    assert set(found) <= INTEGER
    assert (found["quantize"], found["quantized_linear"], found["dequantize"]) == (1, 2, 1)


UNARY = (
    *(torch.sigmoid, F.silu, F.gelu, torch.tanh, F.hardswish, F.hardsigmoid, F.relu, lambda x: x.clamp(-0.5, 1)),
    *(lambda x: F.gelu(x, approximate="tanh"), lambda x: x * 1.5 - 0.25, F.elu, F.leaky_relu),
)


def test_functions_of_one_tensor_are_tables() -> None:
    """Between static quantizations, whatever they are; equal but for ties."""

    def between(x: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor], scale: float) -> torch.Tensor:
        q = QD.quantize_per_tensor(x, 0.03, -10, -128, 127, torch.int8)
        y = function(QD.dequantize_per_tensor(q, 0.03, -10, -128, 127, torch.int8))
        q = QD.quantize_per_tensor(y, scale, 100, 0, 255, torch.uint8)
        return QD.dequantize_per_tensor(q, scale, 100, 0, 255, torch.uint8)

    scales = [0.013 + 0.001 * i for i in range(len(UNARY))]
    model = Function(lambda x: torch.stack([between(x, f, s) for f, s in zip(UNARY, scales, strict=True)]))
    x = torch.linspace(-5, 5, 1003).reshape(17, 59)
    lowered = lower_module(model, (x,))
    assert not lowered.cpu
    assert lowered.operators()["lookup"] == len(UNARY)
    assert not set(lowered.operators()) & {"sigmoid", "tanh", "erf", "mul", "clamp", "elu", "where"}
    (y,), want = lowered.run(x, device=None), model(x)
    for number, scale in enumerate(scales):
        apart = ((y[number] - want[number]) / scale).abs()
        assert float(apart.max()) <= 1.001
        assert int((apart > 0.5).sum()) <= 4, UNARY[number]  # 256 values at most, many times


@pytest.mark.parametrize("shapes", [((3, 5, 7), (3, 5, 7)), ((2, 3, 8), (3, 1))], ids=str)
def test_arithmetic(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    a, b = (torch.randn(shape) for shape in shapes)
    model = Function(lambda a, b: F.relu((a + b) * a - b) * b)
    lowered = steps_apart(quantize(model, (a, b), is_static=True), (a, b))
    assert lowered.operators()["quantized_arithmetic"] == 4
    assert set(lowered.operators()) <= INTEGER


@pytest.mark.parametrize("name", ["xnnpack", "x86"])
def test_other_quantizers(name: str) -> None:
    if name == "xnnpack":
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )

        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    else:
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    model, x = nn.Sequential(nn.Linear(40, 33), nn.ReLU(), nn.Linear(33, 10)), torch.randn(6, 40)
    prepared = prepare_pt2e(torch.export.export(model.eval(), (x,)).module(), quantizer)
    prepared(x)
    converted = convert_pt2e(prepared)
    with torch.no_grad():
        expected = converted(x)
        lowered = lower_program(torch.export.export(converted, (x,)))
    assert not lowered.cpu
    assert lowered.operators()["quantized_linear"] == 2
    (y,) = lowered.run(x, device=None)
    assert float((y - expected).abs().max()) <= 0.02 * float(expected.abs().max())
    assert float(((y - expected).abs() > 1e-4).float().mean()) <= 0.05


def test_force_fp16_leaves_integers_as_they_are() -> None:
    """What is quantized is read, and what is dequantized at the end is given, in float32; only floats between are
    float16."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(20, 16), nn.Linear(8, 5), nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = F.relu(self.first(x))
            return self.second(y.unflatten(1, (2, 8))), self.third(torch.softmax(y, -1))

    x = torch.randn(40, 20) * 300
    converted = quantize(Two(), (x,), is_static=True)
    lowered = lower_program(torch.export.export(converted, (x,)), compile_options={"force_fp16": True})
    graph = lowered.graph
    half = {node.op for node in graph.nodes if graph.tensors[node.outputs[0]].dtype is DType.FLOAT16}
    assert half == {"dequantize", "softmax"}
    (exact, rounded), (want, other) = lowered.run(x, device=None), converted(x)
    assert torch.equal(exact, want)
    assert float((rounded - other).abs().max()) <= 0.05 * float(other.abs().max())


def test_bad_parameters_are_errors_that_name_the_module() -> None:
    class Broken(nn.Module):
        def __init__(self, scale: float, zero_point: int, scales: int = 4) -> None:
            super().__init__()
            self.scale, self.zero_point = scale, zero_point
            self.register_buffer("scales", torch.full((scales,), 0.1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = QD.quantize_per_tensor(x, self.scale, self.zero_point, -128, 127, torch.int8)
            y = QD.dequantize_per_tensor(q, self.scale, self.zero_point, -128, 127, torch.int8)
            q = QD.quantize_per_channel(y, self.scales, torch.zeros(4, dtype=torch.int64), 0, -128, 127, torch.int8)
            return QD.dequantize_per_channel(
                q, self.scales, torch.zeros(4, dtype=torch.int64), 0, -128, 127, torch.int8
            )

    for broken, words in (
        (Broken(0.0, 0), "scale 0.0"),
        (Broken(float("inf"), 0), "scale inf"),
        (Broken(0.1, 200), "zero point 200"),
        (Broken(0.1, 0, 3), "3 scales for 4"),
    ):
        with pytest.raises(ArgumentError, match=rf"module '1'.*{words}"):
            lower_module(nn.Sequential(nn.Identity(), broken), (torch.randn(4, 6),))


def test_dynamic_quantization_of_anything() -> None:
    """PT2E's and torchao's chains of operators around something that has no integer kernel: exact as they stand."""
    ao = torch.ops.torchao

    def per_tensor(x: torch.Tensor) -> torch.Tensor:
        scale, zero = QD.choose_qparams.tensor(x, 0, 255, 1e-5, torch.uint8)
        q = QD.quantize_per_tensor.tensor(x, scale, zero, 0, 255, torch.uint8)
        return QD.dequantize_per_tensor.tensor(q, scale, zero, 0, 255, torch.uint8)

    def per_token(x: torch.Tensor) -> torch.Tensor:
        scale, zero = QD.choose_qparams_per_token_asymmetric(x, torch.int8)
        q = QD.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
        return QD.dequantize_per_token(q, scale, zero, -128, 127, torch.int8, torch.float32)

    def in_groups(x: torch.Tensor) -> torch.Tensor:
        block = [1, 1, 4]
        scale, zero = ao.choose_qparams_affine(x, "ASYMMETRIC", block, torch.int8, -128, 127, None, None, torch.int8)
        q = ao.quantize_affine(x, block, scale, zero, torch.int8, -128, 127)
        return ao.dequantize_affine(q, block, scale, zero, torch.int8, -128, 127)

    model = Function(lambda x: torch.sin(per_tensor(x)) + torch.cos(per_token(x)) + in_groups(x))
    x = torch.randn(3, 7, 16)
    lowered = lower_module(model, (x,))
    assert not lowered.cpu, [str(refusal) for refusal in lowered.report]
    assert {lowered.operators()[name] for name in ("choose_qparams", "quantize", "dequantize")} == {3}
    for device in ("reference", None):
        (y,) = lowered.run(x, device=device)
        torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-6)

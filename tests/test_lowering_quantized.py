"""Linears quantized by torchao and PT2E become ``quantized_linear``, in every form in which exir hands them over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from executorch.exir import to_edge
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.quant_api import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
from torchao.utils import unwrap_tensor_subclass

import torchvk
from tests import edge
from tests.edge import Lowered, compare, lower_module
from torchvk.graph import DType
from torchvk.partitioner.vulkan_partitioner import Refusal, VulkanPartitioner
from torchvk.quantizer.vulkan_quantizer import VulkanQuantizer, get_symmetric_quantization_config

# The references add in another order than torch: K products, each off by half a unit of 24 bits.
FLOAT32 = 1e-5
# Eager float16 rounds weights, activations and results to 11 bits; the references only results.
FLOAT16 = 2**-8


def assert_same(
    module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], tolerance: float = FLOAT32, **options: Any
) -> Lowered:
    """Lowered whole; the references and the device give what eager gives."""
    lowered = edge.assert_same(module, inputs, tolerance, **options)
    with torch.no_grad():
        compare(lowered.run(*inputs, device=None), module(*inputs), tolerance)
    return lowered


def torchao(module: torch.nn.Module, config: Any) -> torch.nn.Module:
    quantize_(module, config)
    unwrap_tensor_subclass(module)
    return module


def pt2e(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], **config: Any) -> torch.nn.Module:
    quantizer = VulkanQuantizer().set_global(get_symmetric_quantization_config(**config))
    prepared = prepare_pt2e(torch.export.export(module.eval(), inputs).module(), quantizer)
    prepared(*inputs)
    converted: torch.nn.Module = convert_pt2e(prepared)
    # exported modules know only train and eval of torchao
    converted.eval = lambda: converted  # type: ignore[method-assign,return-value]
    return converted


def weights_of(graph: Any) -> list[str]:
    """dtype and shape of every weight of a quantized_linear."""
    return [str(graph.tensors[node.inputs[1]].type) for node in graph.nodes if node.op == "quantized_linear"]


def is_product(refusal: Refusal) -> bool:
    return refusal.operator in ("aten.mm.default", "aten.addmm.default")


def attributes_of(graph: Any) -> list[dict[str, Any]]:
    return [dict(node.attributes) for node in graph.nodes if node.op == "quantized_linear"]


class Linears(torch.nn.Module):
    """Linear layers, each with an input of its own."""

    def __init__(self, sizes: list[tuple[int, int, bool]]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(k, n, bias=bias) for k, n, bias in sizes)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(layer(x) for layer, x in zip(self.layers, inputs, strict=True))


# (K, N, bias) and the leading dimensions of the input; M is 1, less and more than K, and a batch.
CASES: list[tuple[tuple[int, int, bool], tuple[int, ...]]] = [
    ((64, 7, False), ()),
    ((64, 13, True), (1,)),
    ((32, 8, True), (40,)),
    ((96, 12, False), (2, 5)),
    ((64, 1, True), (3, 1, 2)),
    ((128, 20, True), (2, 1, 2, 3)),
    ((64, 17, False), (1, 1, 1, 1)),
]

SCHEMES: dict[str, Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], torch.nn.Module]] = {
    "8da4w": lambda m, x: torchao(m, Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32))),
    "8da8w": lambda m, x: torchao(m, Int8DynamicActivationIntxWeightConfig(torch.int8, PerAxis(0))),
    "4w": lambda m, x: torchao(m, IntxWeightOnlyConfig(torch.int4, PerGroup(32))),
    "8w": lambda m, x: torchao(m, IntxWeightOnlyConfig(torch.int8, PerAxis(0))),
    "PT2E 8w": lambda m, x: pt2e(m, x, weight_bits=8),
    "PT2E 4w": lambda m, x: pt2e(m, x, weight_bits=4),
    "PT2E 8da8w": lambda m, x: pt2e(m, x, is_dynamic=True, weight_bits=8),
    "PT2E 8da4w": lambda m, x: pt2e(m, x, is_dynamic=True, weight_bits=4),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_and_shapes(scheme: str) -> None:
    torch.manual_seed(0)
    inputs = tuple(torch.randn(*lead, sizes[0]) for sizes, lead in CASES)
    module = SCHEMES[scheme](Linears([sizes for sizes, _ in CASES]), inputs)
    lowered = assert_same(module, inputs, FLOAT32)
    operators = lowered.operators()
    assert operators["quantized_linear"] == len(CASES)
    assert set(operators) <= {"quantized_linear", "reshape"}
    bits = "int4" if "4w" in scheme else "int8"
    assert sorted(weights_of(lowered.graph)) == sorted(f"{bits}[{n}, {k}]" for (k, n, _), _ in CASES)
    activation = {"P": "dynamic_per_tensor", "8": "dynamic_per_token"}[scheme[0]] if "da" in scheme else "none"
    assert {a["activation"] for a in attributes_of(lowered.graph)} == {activation}
    # 4-bit weights take half a byte.
    elements = sum(k * n for (k, n, _), _ in CASES)
    stored = sum(t.data.size for t in lowered.graph.tensors if t.data and t.dtype in (DType.INT4, DType.INT8))
    assert stored == elements // (2 if bits == "int4" else 1)


def test_empty_batch() -> None:
    """No rows at all (torchao cannot export dynamic activations of this shape)."""
    module = torchao(Linears([(64, 5, True)]), IntxWeightOnlyConfig(torch.int4, PerGroup(32)))
    lowered = assert_same(module, (torch.zeros(0, 64),))
    assert lowered.operators() == {"quantized_linear": 1}


def test_any_number_of_channels() -> None:
    """Per output channel K may be any number, N too."""
    torch.manual_seed(0)
    inputs = (torch.randn(3, 97), torch.randn(2, 2, 5), torch.randn(4, 2))
    module = torchao(
        Linears([(97, 11, True), (5, 3, False), (2, 2, True)]), IntxWeightOnlyConfig(torch.int4, PerAxis(0))
    )
    lowered = assert_same(module, inputs)
    assert lowered.operators()["quantized_linear"] == 3
    assert [a["group_size"] for a in attributes_of(lowered.graph)] == [97, 5, 2]


@pytest.mark.parametrize("config", [Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig])
def test_group_sizes(config: Any) -> None:
    torch.manual_seed(0)
    groups = [16, 64, 128, 256]
    module = Linears([(256, 9, True)] * len(groups))
    for layer, group in zip(module.layers, groups, strict=True):
        torchao(layer, config(torch.int4, PerGroup(group)))
    lowered = assert_same(module, tuple(torch.randn(3, 256) for _ in groups))
    assert [a["group_size"] for a in attributes_of(lowered.graph)] == groups


@pytest.mark.parametrize("scale", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model", [torch.float32, torch.float16])
def test_dtypes(model: torch.dtype, scale: torch.dtype) -> None:
    """Models and scales in float32, float16 and bfloat16, in torchao's two ways."""
    torch.manual_seed(0)
    tolerance = FLOAT32 if model == torch.float32 else FLOAT16
    module = Linears([(64, 32, True), (32, 8, False)]).to(model)
    torchao(module.layers[0], IntxWeightOnlyConfig(torch.int4, PerGroup(32), scale_dtype=scale))
    dynamic = Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32), weight_scale_dtype=scale)
    torchao(module.layers[1], dynamic)
    lowered = assert_same(module, (torch.randn(5, 64).to(model), torch.randn(5, 32).to(model)), tolerance)
    assert lowered.operators() == {"quantized_linear": 2}
    stored = {str(lowered.graph.tensors[node.inputs[2]].dtype.value) for node in lowered.graph.nodes}
    assert stored == {"float16" if scale == torch.float16 else "float32"}


class Dequantized(torch.nn.Module):
    """``form(x, w)`` with a 4-bit weight w [16, 64] (or [64, 16]) that a function of PT2E or torchao dequantizes."""

    def __init__(
        self,
        form: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        dequantize: Callable[..., torch.Tensor],
        shape: tuple[int, int] = (16, 64),
        scale: tuple[int, ...] = (16, 2),
        low: int = -8,
        high: int = 7,
        zero: int = 0,
        dtype: torch.dtype = torch.int8,
    ) -> None:
        super().__init__()
        self.form, self.dequantize, self.range = form, dequantize, (low, high)
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("q", torch.randint(low, high + 1, shape, generator=generator).to(dtype))
        self.register_buffer("scale", torch.rand(scale, generator=generator) / 10 + 0.01)
        self.register_buffer("zero", torch.full(scale, zero))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.form(x, self.dequantize(self.q, self.scale, self.zero, *self.range))


def affine(block: list[int]) -> Callable[..., torch.Tensor]:
    def dequantize(q: torch.Tensor, s: torch.Tensor, z: torch.Tensor, low: int, high: int) -> torch.Tensor:
        result: torch.Tensor = torch.ops.torchao.dequantize_affine(q, block, s, z, q.dtype, low, high)
        return result

    return dequantize


BIAS = torch.linspace(-1, 1, 16)
FORMS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "linear": F.linear,
    "linear with bias": lambda x, w: F.linear(x, w, BIAS),
    "mm": lambda x, w: torch.mm(x.flatten(0, -2), w.t()),
    "addmm": lambda x, w: torch.addmm(BIAS, x.flatten(0, -2), w.t()),
    "addmm with factors": lambda x, w: torch.addmm(BIAS, x.flatten(0, -2), w.t(), beta=0.5, alpha=2),
    "addmm with an input as addend": lambda x, w: torch.addmm(x.flatten(0, -2)[:, :16], x.flatten(0, -2), w.t()),
    "matmul": lambda x, w: x @ w.t(),
    "matmul and bias": lambda x, w: x @ w.t() + BIAS,
    "bmm": lambda x, w: torch.bmm(x, w.t().expand(x.shape[0], -1, -1)),
    "bmm, repeated": lambda x, w: torch.bmm(x, w.t()[None].expand(x.shape[0], -1, -1).contiguous()),
    "transposed input": lambda x, w: F.linear(x.transpose(0, 1), w, BIAS),
    "einsum": lambda x, w: torch.einsum("bmk,nk->bmn", x, w),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str) -> None:
    lowered = assert_same(Dequantized(FORMS[form], affine([1, 32])), (torch.randn(3, 5, 64),))
    operators = lowered.operators()
    assert operators["quantized_linear"] == 1
    assert operators["matmul"] == operators["linear"] == 0
    if "bias" in form or form == "addmm":
        assert operators["add"] == 0


QD = torch.ops.quantized_decomposed
PT2E_WEIGHTS: dict[str, tuple[Callable[..., torch.Tensor], tuple[int, ...], tuple[int, int], int]] = {
    # dequantize, shape of scales, shape of the weight, group size
    "per channel": (
        lambda q, s, z, low, high: QD.dequantize_per_channel(q, s, z, 0, low, high, q.dtype),
        (16,),
        (16, 64),
        64,
    ),
    "per channel, [K, N]": (
        lambda q, s, z, low, high: QD.dequantize_per_channel(q, s, z, 1, low, high, q.dtype).t(),
        (16,),
        (64, 16),
        64,
    ),
    "per channel without zero points": (
        lambda q, s, z, low, high: QD.dequantize_per_channel(q, s, None, 0, low, high, q.dtype),
        (16,),
        (16, 64),
        64,
    ),
    "per group": (
        lambda q, s, z, low, high: QD.dequantize_per_channel_group(q, s, None, low, high, q.dtype, 32, torch.float32),
        (16, 2),
        (16, 64),
        32,
    ),
    "per tensor": (
        lambda q, s, z, low, high: QD.dequantize_per_tensor(q, 0.05, 0, low, high, q.dtype),
        (),
        (16, 64),
        64,
    ),
    "per tensor, scale as tensor": (
        lambda q, s, z, low, high: QD.dequantize_per_tensor(q, s, z, low, high, q.dtype),
        (),
        (16, 64),
        64,
    ),
    "torchao per tensor": (affine([16, 64]), (1, 1), (16, 64), 64),
    "torchao per channel, [K, N]": (
        lambda q, s, z, low, high: affine([64, 1])(q, s, z, low, high).t(),
        (1, 16),
        (64, 16),
        64,
    ),
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", PT2E_WEIGHTS)
def test_weights(kind: str, bits: int) -> None:
    dequantize, scale, shape, group = PT2E_WEIGHTS[kind]
    low, high = (-8, 7) if bits == 4 else (-127, 127)
    module = Dequantized(F.linear, dequantize, shape, scale, low, high)
    lowered = assert_same(module, (torch.randn(5, 64),))
    assert lowered.operators() == {"quantized_linear": 1}
    assert weights_of(lowered.graph) == [f"int{bits}[16, 64]"]
    assert attributes_of(lowered.graph)[0]["group_size"] == group


def per_tensor(choose: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def quantize(x: torch.Tensor) -> torch.Tensor:
        scale, zero = choose(x, -128, 127, 1e-5, torch.int8)
        q = QD.quantize_per_tensor.tensor(x, scale, zero, -128, 127, torch.int8)
        return QD.dequantize_per_tensor.tensor(q, scale, zero, -128, 127, torch.int8)

    return quantize


def per_token(choose: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def quantize(x: torch.Tensor) -> torch.Tensor:
        scale, zero = choose(x, torch.int8)
        q = QD.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
        return QD.dequantize_per_token(q, scale, zero, -128, 127, torch.int8, torch.float32)

    return quantize


def by_torchao(mapping: str, per_token: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    def quantize(x: torch.Tensor) -> torch.Tensor:
        block = [*([1] * (x.dim() - 1)), x.shape[-1]] if per_token else list(x.shape)
        choose = torch.ops.torchao.choose_qparams_affine
        scale, zero = choose(x, mapping, block, torch.int8, -128, 127, 1e-4, torch.float32, torch.int32)
        q = torch.ops.torchao.quantize_affine(x, block, scale, zero, torch.int8, -128, 127)
        result: torch.Tensor = torch.ops.torchao.dequantize_affine(q, block, scale, zero, torch.int8, -128, 127)
        return result

    return quantize


ACTIVATIONS = {
    "dynamic_per_tensor, asymmetric": per_tensor(QD.choose_qparams.tensor),
    "dynamic_per_tensor, symmetric": per_tensor(QD.choose_qparams_symmetric.tensor),
    "dynamic_per_token, asymmetric": per_token(QD.choose_qparams_per_token_asymmetric),
    "dynamic_per_token, symmetric": per_token(QD.choose_qparams_per_token),
    "torchao dynamic_per_tensor, asymmetric": by_torchao("ASYMMETRIC", False),
    "torchao dynamic_per_tensor, symmetric": by_torchao("SYMMETRIC", False),
    "torchao dynamic_per_token, asymmetric": by_torchao("ASYMMETRIC", True),
    "torchao dynamic_per_token, symmetric": by_torchao("SYMMETRIC", True),
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(kind: str) -> None:
    module = Dequantized(lambda x, w: F.linear(ACTIVATIONS[kind](x), w, BIAS), affine([1, 32]))
    lowered = assert_same(module, (torch.randn(2, 5, 64),))
    assert lowered.operators()["quantized_linear"] == 1
    assert lowered.operators().keys() <= {"quantized_linear", "reshape"}
    (attributes,) = attributes_of(lowered.graph)
    assert f"{attributes['activation']}, {'' if attributes['symmetric'] else 'a'}symmetric" == kind.removeprefix(
        "torchao "
    )
    assert attributes["qparams"] == ("torchao" if kind.startswith("torchao") else "pt2e")


@pytest.mark.parametrize("config", [Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig])
def test_force_fp16(config: Any) -> None:
    """Also rows of zeros, whose scale would round to 0 in float16."""
    torch.manual_seed(0)
    x = torch.randn(5, 64)
    x[2] = 0
    module = torchao(Linears([(64, 9, True)]), config(torch.int4, PerGroup(32)))
    # Activations are rounded to 11 bits and then to 8: the integers may differ by one step.
    lowered = assert_same(module, (x,), 2**-5, compile_options={"force_fp16": True})
    assert lowered.operators() == {"cast": 2, "quantized_linear": 1}


def test_weight_used_twice_is_stored_once() -> None:
    module = Dequantized(lambda x, w: F.linear(F.linear(x, w).repeat(1, 4) + x, w), affine([1, 32]))
    lowered = assert_same(module, (torch.randn(5, 64),))
    assert lowered.operators()["quantized_linear"] == 2
    first, second = (node.inputs[1:3] for node in lowered.graph.nodes if node.op == "quantized_linear")
    assert first == second


def test_two_linears_with_one_quantized_input() -> None:
    """Both read the same x with the same attributes: a plan quantizes it once."""

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(64, 16), torch.nn.Linear(64, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.a(x), self.b(x)], -1)

    inputs = (torch.randn(2, 3, 64),)
    for module in (
        torchao(Two(), Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32))),
        pt2e(Two(), inputs, is_dynamic=True),
    ):
        lowered = assert_same(module, inputs)
        nodes = [node for node in lowered.graph.nodes if node.op == "quantized_linear"]
        assert len(nodes) == 2
        assert len({node.inputs[0] for node in nodes}) == 1
        assert nodes[0].attributes == nodes[1].attributes


def test_source_is_the_path_of_the_module() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Sequential(torch.nn.Linear(32, 8)))
    lowered = lower_module(torchao(module, IntxWeightOnlyConfig(torch.int4, PerGroup(32))), (torch.randn(1, 32),))
    assert [node.source for node in lowered.graph.nodes] == ["0", "1.0"]


def static(x: torch.Tensor) -> torch.Tensor:
    q = QD.quantize_per_tensor(x, 0.02, 3, -128, 127, torch.int8)
    return QD.dequantize_per_tensor(q, 0.02, 3, -128, 127, torch.int8)


def in_blocks(x: torch.Tensor) -> torch.Tensor:
    block = [1, 32]
    scale, zero = torch.ops.torchao.choose_qparams_affine(
        x, "ASYMMETRIC", block, torch.int8, -128, 127, None, None, torch.int8
    )
    q = torch.ops.torchao.quantize_affine(x, block, scale, zero, torch.int8, -128, 127)
    return torch.ops.torchao.dequantize_affine(q, block, scale, zero, torch.int8, -128, 127)


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    scale, zero = QD.choose_qparams.tensor(x, 0, 255, 1e-5, torch.uint8)
    q = QD.quantize_per_tensor.tensor(x, scale, zero, 0, 255, torch.uint8)
    return QD.dequantize_per_tensor.tensor(q, scale, zero, 0, 255, torch.uint8)


REFUSED: dict[str, tuple[torch.nn.Module, str]] = {
    "scale per block of output channels": (Dequantized(F.linear, affine([4, 64]), scale=(4, 1)), "output channels"),
}
IN_PARTS = {
    "weights of 16 bits": Dequantized(F.linear, affine([1, 32]), dtype=torch.int16),
    "activations in blocks": Dequantized(lambda x, w: F.linear(in_blocks(x), w), affine([1, 32])),
    "uint8 activations": Dequantized(lambda x, w: F.linear(to_uint8(x), w), affine([1, 32])),
    "float weights": Dequantized(
        lambda x, w: ACTIVATIONS["dynamic_per_token, asymmetric"](x) @ w.float(), lambda q, *_: q.t()
    ),
}


@pytest.mark.parametrize("kind", IN_PARTS)
def test_what_has_no_integer_kernel_runs_in_floating_point(kind: str) -> None:
    inputs = (torch.randn(5, 64),)
    lowered = lower_module(IN_PARTS[kind], inputs)
    assert not lowered.cpu
    packed = kind.endswith("activations") or kind.startswith("activations")  # the weight is 4 or 8 bits all the same
    assert lowered.operators()["quantized_linear" if packed else "linear"] == 1
    compare(lowered.run(*inputs), IN_PARTS[kind](*inputs))


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str) -> None:
    """Not claimed, with the reason; the CPU runs it as exir leaves it."""
    module, reason = REFUSED[kind]
    inputs = (torch.randn(5, 64),)
    lowered = lower_module(module, inputs)
    assert lowered.graphs == []
    assert any(reason in refusal.reason and is_product(refusal) for refusal in lowered.report)
    # The whole chain stays together: no view of a dequantized matrix is sent to the GPU and back.
    assert len(lowered.report) >= len(lowered.cpu)
    compare(lowered.run(*inputs), module(*inputs))


def test_static_activations_are_not_refused() -> None:
    module, inputs = Dequantized(lambda x, w: F.linear(static(x), w), affine([1, 32])), (torch.randn(5, 64),)
    lowered = lower_module(module, inputs)
    assert not lowered.cpu
    compare(lowered.run(*inputs), module(*inputs))


def test_quantized_operands_that_others_read() -> None:
    """The dequantized input is also a result, so it must exist: the linear that would swallow it stays on the CPU."""
    quantize = ACTIVATIONS["dynamic_per_tensor, asymmetric"]

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = Dequantized(F.linear, affine([1, 32]))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = quantize(x)
            return self.linear(x), x

    inputs = (torch.randn(5, 64),)
    lowered = lower_module(Both(), inputs)
    assert lowered.graphs == []
    assert any("reads its quantized operands" in refusal.reason for refusal in lowered.report)
    compare(lowered.run(*inputs), Both()(*inputs))


def test_one_refused_linear_takes_those_with_it_that_share_its_operands() -> None:
    """One chain feeds two linears, one with a scale for several output channels: both stay, a third one is claimed."""
    quantize = ACTIVATIONS["dynamic_per_token, asymmetric"]

    class Three(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good = Dequantized(F.linear, affine([1, 32]))
            self.bad = Dequantized(F.linear, affine([4, 64]), scale=(4, 1))
            self.other = Dequantized(F.linear, affine([1, 32]))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = quantize(x)
            return self.good(y), self.bad(y), self.other(x)

    inputs = (torch.randn(5, 64),)
    lowered = lower_module(Three(), inputs)
    assert lowered.operators() == {"quantized_linear": 1}
    assert {r.module for r in lowered.report if is_product(r)} == {"good", "bad"}
    compare(lowered.run(*inputs), Three()(*inputs))


def test_constants_that_exir_hides_are_found_out_when_lowering() -> None:
    """``to_edge`` and ``to_backend`` never show the partitioner the weights, such as whether zero points are zeros."""
    inputs = (torch.randn(5, 64),)
    for zero in (0, 2):
        module = Dequantized(F.linear, affine([1, 32]), zero=zero)
        lowered = edge.inspect_edge(to_edge(torch.export.export(module, inputs)).to_backend(VulkanPartitioner()))
        (node,) = lowered.graph.nodes
        assert (len(node.inputs) == 6) is (zero != 0)
        compare(lowered.run(*inputs), module(*inputs))


def test_packed_values_are_the_models() -> None:
    module = Dequantized(F.linear, affine([1, 32]))
    (node,) = (graph := lower_module(module, (torch.randn(5, 64),)).graph).nodes
    assert np.array_equal(graph.constant_array(node.inputs[1]), module.q.numpy())  # type: ignore[operator]
    assert np.array_equal(graph.constant_array(node.inputs[2]), module.scale.numpy())  # type: ignore[operator]


def test_dynamic_batch_runs_on_the_cpu() -> None:
    """Nothing with symbolic sizes is claimed yet; the program runs as exir leaves it, at every size."""
    torch.manual_seed(0)
    example = torch.randn(4, 64)
    module = torchao(
        torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU()),
        Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32)),
    )
    lowered = lower_module(module, (example,), dynamic_shapes=(({0: torch.export.Dim("batch", min=2, max=16)},)))
    assert not lowered.graphs
    with torch.no_grad(), torchvk.load(lowered.edge.to_executorch()) as program:
        for x in (example, torch.randn(7, 64)):
            compare((program(x),), module(x))

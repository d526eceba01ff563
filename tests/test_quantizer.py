"""VulkanQuantizer and weights: linears in all their forms, weight-only and dynamic. Everything runs in eager mode."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization.pt2e import MinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import ComposableQuantizer, QuantizationAnnotation
from torchao.quantization.quant_api import IntxWeightOnlyConfig, quantize_
from torchao.utils import unwrap_tensor_subclass
from transformers import BertConfig, BertModel

import torchvk.errors
from tests.pt2e import (
    CHOOSE,
    DEQUANTIZE_CHANNEL,
    DEQUANTIZE_TENSOR,
    QUANTIZE_CHANNEL,
    QUANTIZE_TENSOR,
    convert,
    operators,
    spec,
)
from torchvk.quantizer.linear import linear_operands
from torchvk.quantizer.vulkan_quantizer import VulkanQuantizer, get_symmetric_quantization_config

SCHEMES = {
    "8w": {"is_dynamic": False, "weight_bits": 8},
    "4w": {"is_dynamic": False, "weight_bits": 4},
    "8da8w": {"is_dynamic": True, "weight_bits": 8},
    "8da4w": {"is_dynamic": True, "weight_bits": 4},
}


def quantized_weight(weight: torch.Tensor, bits: int, channel_dim: int = 0) -> torch.Tensor:
    """The definition: symmetric, a scale per output channel, round half to even, clamp."""
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    weight32 = weight.detach().float()
    scale = weight32.abs().amax(1 - channel_dim, keepdim=True) / ((qmax - qmin) / 2)
    scale = scale.clamp(min=torch.finfo(torch.float32).eps)
    # quantize_per_channel multiplies with the reciprocal
    return (torch.clamp(torch.round(weight32 * (1.0 / scale)), qmin, qmax) * scale).to(weight.dtype)


class Apply(nn.Module):
    """A module of one function of (module, input), with parameters given by name."""

    def __init__(self, function: Callable[..., torch.Tensor], **tensors: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


# --- what is annotated, and what convert_pt2e makes of it ----------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear(scheme: str, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(33, 7, bias=bias).to(dtype)
    x = torch.randn(5, 33, dtype=dtype)
    converted = convert(model, x, **SCHEMES[scheme])
    is_dynamic = SCHEMES[scheme]["is_dynamic"]
    expected = Counter({DEQUANTIZE_CHANNEL: 1, "aten.linear.default": 1})
    if is_dynamic:
        expected += Counter({CHOOSE: 1, "<built-in function getitem>": 2, QUANTIZE_TENSOR: 1, DEQUANTIZE_TENSOR: 1})
    assert operators(converted) == expected

    bits = SCHEMES[scheme]["weight_bits"]
    weight = quantized_weight(model.weight, bits)
    integers = next(buffer for buffer in converted.buffers() if buffer.dtype == torch.int8)
    assert integers.shape == (7, 33)
    assert integers.min() >= -(2 ** (bits - 1))
    assert integers.max() <= 2 ** (bits - 1) - 1
    y, reference = converted(x), F.linear(x.double(), weight.double(), None if not bias else model.bias.double())
    if is_dynamic:
        # the input is off by at most half a step, of which there are 255 in its range (which includes 0)
        step = (x.max().clamp(min=0) - x.min().clamp(max=0)).item() / 255
        bound = 0.5 * step * weight.double().abs().sum(1)
    else:
        bound = torch.zeros(7, dtype=torch.float64)
    # rounding: K products and sums (float32 inside), the output, and a quantized input rounded to the dtype
    magnitude = F.linear(x.double().abs(), weight.double().abs()) + reference.abs()
    rounding = 33 * torch.finfo(torch.float32).eps * magnitude + 2 * torch.finfo(dtype).eps * magnitude
    assert y.dtype == dtype
    assert ((y.double() - reference).abs() <= bound + rounding).all()


WEIGHT, SQUARE, BIAS = torch.randn(6, 9), torch.randn(6, 6), torch.randn(9)
FORMS = {
    "mm": (lambda m, x: torch.mm(x, m.w), {"w": WEIGHT}, 1),
    "mm_transposed": (lambda m, x: torch.mm(x, m.w.t()), {"w": WEIGHT.t().contiguous()}, 1),
    "matmul": (lambda m, x: x @ m.w, {"w": WEIGHT}, 1),
    "matmul_3d": (lambda m, x: x.reshape(1, 4, 6) @ m.w, {"w": WEIGHT}, 1),
    "matmul_1d": (lambda m, x: x[0] @ m.w, {"w": WEIGHT}, 1),
    "matmul_transposed": (lambda m, x: x @ m.w.mT, {"w": WEIGHT.t().contiguous()}, 1),
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w), {"w": WEIGHT, "b": BIAS}, 1),
    "linear_keywords": (lambda m, x: F.linear(input=x, weight=m.w, bias=m.b), {"w": WEIGHT.t(), "b": BIAS}, 0),
    "linear_5d": (lambda m, x: F.linear(x.reshape(1, 2, 1, 2, 6), m.w), {"w": WEIGHT.t()}, 0),
    "computed_weight": (lambda m, x: F.linear(x, m.w * 2), {"w": WEIGHT.t()}, 0),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_linear(form: str) -> None:
    function, tensors, channel_dim = FORMS[form]
    model, x = Apply(function, **tensors), torch.randn(4, 6)
    converted = convert(model, x)
    dequantize = [node for node in converted.graph.nodes if str(node.target) == DEQUANTIZE_CHANNEL]
    assert [node.args[3] for node in dequantize] == [channel_dim]
    assert QUANTIZE_CHANNEL not in operators(converted), "the weight is stored quantized"
    scale = getattr(converted, dequantize[0].args[1].target)
    assert scale.shape == (9,)
    # off by at most half a step in each weight
    rows = x.abs().sum(-1).amax() * scale / 2
    assert ((converted(x) - model(x)).abs() <= rows * (1 + 1e-5) + 1e-5).all()


def test_weight_norm_is_folded() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    converted = convert(model, torch.randn(2, 6))
    assert operators(converted) == Counter({DEQUANTIZE_CHANNEL: 1, "aten.linear.default": 1})


NOT_LINEAR = {
    "weight_is_an_input": (lambda m, x: F.linear(x, x), {}),
    "weight_depends_on_input": (lambda m, x: F.linear(x, m.w * x.sum()), {"w": SQUARE}),
    "two_activations": (lambda m, x: x @ x.mT, {}),
    "constant_on_the_left": (lambda m, x: m.w @ x.mT, {"w": SQUARE}),
    "batch_of_weights": (lambda m, x: x @ m.w, {"w": torch.randn(3, 6, 9)}),
    "vector": (lambda m, x: x @ m.w, {"w": torch.randn(6)}),
    "float64": (lambda m, x: F.linear(x.double(), m.w), {"w": SQUARE.double()}),
    "bfloat16": (lambda m, x: F.linear(x.bfloat16(), m.w), {"w": SQUARE.bfloat16()}),
    "integer": (lambda m, x: torch.mm(x.long(), m.w), {"w": torch.arange(36).reshape(6, 6)}),
    "random_weight": (lambda m, x: F.linear(x, F.dropout(m.w, 0.5, training=True)), {"w": SQUARE}),
    "scaled_addmm": (lambda m, x: torch.addmm(m.b, x, m.w, alpha=2), {"w": WEIGHT, "b": BIAS}),
    "weight_is_its_own_input": (lambda m, x: F.linear(m.w, m.w) + x.sum(), {"w": SQUARE}),
}


@pytest.mark.parametrize("case", NOT_LINEAR)
def test_left_alone(case: str, caplog: pytest.LogCaptureFixture) -> None:
    function, tensors = NOT_LINEAR[case]
    model, x = Apply(function, **tensors), torch.randn(4, 6)
    exported = torch.export.export(model.eval(), (x,)).module()
    before = operators(exported)
    with caplog.at_level(logging.WARNING, logger="torchvk"):
        prepared = prepare_pt2e(exported, VulkanQuantizer().set_global(get_symmetric_quantization_config()))
    assert operators(prepared) == before
    assert not [node for node in prepared.graph.nodes if node.op == "call_module" and "post_process" in node.target]
    assert "no floating-point operator" in caplog.text


def test_written_weight_is_left_alone() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", SQUARE.clone())
            self.register_buffer("written", SQUARE.clone())
            self.register_buffer("row_written", SQUARE.clone())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.linear(x, self.kept) + F.linear(x, self.written) + F.linear(x, self.row_written)
            self.written.add_(1)
            self.row_written[0].mul_(2)
            return y

    converted = convert(Counted(), torch.randn(2, 6))
    assert operators(converted)[DEQUANTIZE_CHANNEL] == 1


def test_filter_function() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4))
    x = torch.randn(2, 6)
    converted = convert(model, x, filter_function=lambda node: node.args[1].target != "1.weight")
    linears = [node for node in converted.graph.nodes if str(node.target) == "aten.linear.default"]
    quantized = [str(node.args[1].target) == DEQUANTIZE_CHANNEL for node in linears]
    assert quantized == [True, False, True]


def test_quantized_already_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 8))
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4), filter_fn=lambda module, name: name == "0")
    unwrap_tensor_subclass(model)
    converted = convert(model, torch.randn(2, 32))
    counts = operators(converted)
    assert counts[DEQUANTIZE_CHANNEL] == 1
    assert counts["torchao.dequantize_affine.default"] == 1


def test_annotations_of_another_quantizer_stay() -> None:
    class Other(VulkanQuantizer):
        def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            node = next(node for node in model.graph.nodes if linear_operands(node) is not None)
            node.meta["quantization_annotation"] = QuantizationAnnotation(_annotated=True)
            return model

    x = torch.randn(2, 6)
    exported = torch.export.export(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), (x,)).module()
    vulkan = VulkanQuantizer().set_global(get_symmetric_quantization_config())
    prepared = prepare_pt2e(exported, ComposableQuantizer([Other(), vulkan]))
    prepared(x)
    converted = convert_pt2e(prepared)
    assert operators(converted)[DEQUANTIZE_CHANNEL] == 1


def test_validate_names_the_node() -> None:
    class Wrong(VulkanQuantizer):
        def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            node = next(node for node in model.graph.nodes if linear_operands(node) is not None)
            bias_spec = spec(qscheme=torch.per_tensor_symmetric, observer_or_fake_quant_ctr=MinMaxObserver)
            node.meta["quantization_annotation"] = QuantizationAnnotation(input_qspec_map={node.args[2]: bias_spec})
            return model

    exported = torch.export.export(nn.Linear(6, 6), (torch.randn(2, 6),)).module()
    with pytest.raises(torchvk.errors.UnsupportedError, match="linear: bias"):
        prepare_pt2e(exported, Wrong())
    exported = torch.export.export(Apply(lambda m, x: F.linear(x, x)), (torch.randn(2, 6),)).module()
    node = next(node for node in exported.graph.nodes if linear_operands(node) is not None)
    node.meta["quantization_annotation"] = QuantizationAnnotation(input_qspec_map={node.args[1]: spec()})
    with pytest.raises(torchvk.errors.UnsupportedError, match="the weight x is not a constant"):
        VulkanQuantizer().validate(exported)


# --- sharing -------------------------------------------------------------------------------------------------


def test_one_weight_used_twice_is_stored_once() -> None:
    model = Apply(lambda m, x: F.linear(torch.relu(F.linear(x, m.w)), m.w), w=SQUARE)
    x = torch.randn(3, 6)
    converted = convert(model, x)
    assert sum(buffer.dtype == torch.int8 for buffer in converted.buffers()) == 1
    assert operators(converted)["aten.linear.default"] == 2
    weight = quantized_weight(SQUARE, 8)
    torch.testing.assert_close(converted(x), F.linear(torch.relu(F.linear(x, weight)), weight))


def test_tied_modules_share_the_weight() -> None:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    converted = convert(nn.Sequential(first, nn.ReLU(), second), torch.randn(3, 6))
    assert sum(buffer.dtype == torch.int8 for buffer in converted.buffers()) == 1


def test_one_weight_in_both_orientations() -> None:
    model = Apply(lambda m, x: F.linear(x, m.w) + x @ m.w, w=SQUARE)
    x = torch.randn(3, 6)
    converted = convert(model, x)
    torch.testing.assert_close(
        converted(x), F.linear(x, quantized_weight(SQUARE, 8)) + x @ quantized_weight(SQUARE, 8, channel_dim=1)
    )


def test_weight_that_is_also_an_embedding_stays_float_there() -> None:
    model = Apply(lambda m, x: F.linear(F.embedding(x, m.w), m.w), w=SQUARE)
    x = torch.tensor([[0, 5, 2]])
    torch.testing.assert_close(convert(model, x)(x), F.linear(SQUARE[x], quantized_weight(SQUARE, 8)))


def test_shared_input_is_quantized_once() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(6, size) for size in (6, 4, 4))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.q(x), self.k(x), self.v(x), x + 1

    x = torch.randn(3, 6)
    converted = convert(Heads(), x, is_dynamic=True)
    counts = operators(converted)
    assert counts[CHOOSE] == counts[QUANTIZE_TENSOR] == 1
    assert counts[DEQUANTIZE_CHANNEL] == 3
    assert torch.equal(converted(x)[3], x + 1), "other users get the float input"


# --- calibration, and the way on -----------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_calibration_does_not_change_weights(scheme: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)))
    x = torch.randn(3, 6)
    without = convert(model, x, calibrate=False, **SCHEMES[scheme])
    assert torch.equal(without(x), convert(model, x, **SCHEMES[scheme])(x))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_exports_again(scheme: str) -> None:
    model = nn.Sequential(nn.Linear(128, 64, bias=False), nn.Linear(64, 32, bias=False), nn.Linear(32, 16, bias=False))
    x = torch.randn(32, 128)
    converted = convert(model, x, **SCHEMES[scheme])
    exported = torch.export.export(converted, (x,))
    assert torch.equal(exported.module()(x), converted(x))
    assert operators(exported.graph_module)[DEQUANTIZE_CHANNEL] == 3


def test_integer_arithmetic_is_left_alone() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.linear = nn.Embedding(10, 6), nn.Linear(6, 6)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            position = torch.arange(ids.shape[1]) * 1 + 0
            shifted = torch.bitwise_and(ids * 3 - 1, 7)
            allowed = (position[:, None] >= position[None, :]) & (mask[:, None, :] > 0)
            return torch.where(allowed, 0.0, -1.0).sum(-1, keepdim=True) + self.linear(self.embedding(shifted))

    model, inputs = Masked(), (torch.tensor([[3, 4, 5]]), torch.tensor([[1, 1, 0]]))
    converted = convert(model, *inputs, is_dynamic=True)
    exported = torch.export.export(model, inputs).module()
    integers = [node.meta["val"].dtype for node in exported.graph.nodes if str(node.target) == "aten.mul.Tensor"]
    assert integers == [torch.int64, torch.int64]
    for name in ("aten.mul.Tensor", "aten.sub.Tensor", "aten.add.Tensor", "aten.bitwise_and.Scalar"):
        assert operators(converted)[name] == operators(exported)[name]
    torch.testing.assert_close(converted(*inputs), model(*inputs), atol=0.05, rtol=0)


@pytest.mark.parametrize("is_dynamic", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bert(attention: str, is_dynamic: bool) -> None:
    """transformers 5 builds its attention masks with integer arithmetic inside the model."""
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(0)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = BertModel(config, add_pooling_layer=False)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.bert(input_ids=ids, attention_mask=mask).last_hidden_state

    model = Encoder().eval()
    inputs = (torch.randint(0, 50, (2, 5)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]))
    converted = convert(model, *inputs, is_dynamic=is_dynamic)
    counts = operators(converted)
    assert counts[DEQUANTIZE_CHANNEL] == 12, "query, key, value and three more linears in each of two layers"
    assert counts[CHOOSE] == (8 if is_dynamic else 0), "query, key and value share one quantized input"
    exported = torch.export.export(converted, inputs)
    assert torch.equal(exported.module()(*inputs), converted(*inputs))
    # the outputs are layer-normalized, of size about 1; 8 bits keep two digits of them
    assert (converted(*inputs) - model(*inputs)).abs().max() < 0.05

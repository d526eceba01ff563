"""Static configurations: which tensors of which operators are quantized, with which parameters, and how well."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

import torchvk.errors
from tests.edge import lower_program
from tests.pt2e import (
    DEQUANTIZE,
    DEQUANTIZE_CHANNEL,
    QUANTIZE,
    arithmetic,
    convert,
    find,
    operators,
    prepare,
    quantize,
    sqnr,
)
from torchvk.quantizer.vulkan_quantizer import VulkanQuantizer, get_symmetric_quantization_config

Function = Callable[..., torch.Tensor]


class Apply(nn.Module):
    """One function of its inputs; ``modules`` are what it may use."""

    def __init__(self, function: Function, *modules: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*self.parts, *inputs)


def calls(model: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """What computes in floating point, in order."""
    return [
        node
        for node in model.graph.nodes
        if node.op == "call_function" and str(node.target).startswith("aten.") and torch.is_tensor(node.meta["val"])
    ]


def quantized_inputs(node: torch.fx.Node) -> list[tuple[float, int] | None]:
    """Scale and zero point of every activation that ``node`` reads, None for floating-point ones."""
    return [
        tuple(each.args[1:3]) if str(each.target) == DEQUANTIZE else None
        for each in node.all_input_nodes
        if each.op != "get_attr" and str(each.target) != DEQUANTIZE_CHANNEL
    ]


def quantized_output(node: torch.fx.Node) -> tuple[float, int] | None:
    (user,) = node.users
    return tuple(user.args[1:3]) if str(user.target) == QUANTIZE else None


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 4, 9, 9)))


BN, RELU6 = nn.BatchNorm2d, nn.ReLU6
# name → function of modules and inputs, modules, inputs, operators of the converted model
COMPUTE: dict[str, tuple[Function, list[nn.Module], list[torch.Tensor], list[str]]] = {
    "linear": (lambda f, x: f(x), [nn.Linear(16, 8)], [image(5, 16)], ["linear"]),
    "linear_3d_no_bias": (lambda f, x: f(x), [nn.Linear(16, 8, bias=False)], [image(2, 5, 16)], ["linear"]),
    "linear_relu": (lambda f, x: F.relu(f(x)), [nn.Linear(16, 8)], [image(5, 16)], ["linear", "relu"]),
    "mm": (lambda f, x: x @ f.weight, [nn.Linear(16, 12)], [image(5, 12)], ["matmul"]),
    "conv1d": (lambda f, x: f(x), [nn.Conv1d(4, 6, 3)], [image(2, 4, 20)], ["conv1d"]),
    "conv2d": (lambda f, x: f(x), [nn.Conv2d(4, 6, 3, padding=1)], [image()], ["conv2d"]),
    "conv2d_same": (lambda f, x: f(x), [nn.Conv2d(4, 6, 3, padding="same")], [image()], ["conv2d"]),
    "depthwise": (lambda f, x: f(x), [nn.Conv2d(4, 8, 3, groups=4, stride=2)], [image()], ["conv2d"]),
    "conv_bn_relu6": (lambda f, b, r, x: r(b(f(x))), [nn.Conv2d(4, 6, 3), BN(6), RELU6()], [image()],
                      ["conv2d", "hardtanh"]),
    "conv_bn_relu6_in_place": (lambda f, b, r, x: r(b(f(x))), [nn.Conv2d(4, 6, 3), BN(6), RELU6(True)], [image()],
                               ["conv2d", "hardtanh"]),
    "conv_bn": (lambda f, b, x: b(f(x)), [nn.Conv2d(4, 6, 3, bias=False), BN(6)], [image()], ["conv2d"]),
    "conv_clamp": (lambda f, x: f(x).clamp(-0.5, 0.25), [nn.Conv2d(4, 6, 3)], [image()], ["conv2d", "clamp"]),
    "conv1d_bn_relu": (lambda f, b, x: F.relu(b(f(x))), [nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)], [image(2, 4, 20)],
                       ["conv1d", "relu"]),
    "conv_transpose1d": (lambda f, x: f(x), [nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1)],
                         [image(2, 4, 9)], ["conv_transpose1d"]),
    "conv_transpose2d_groups": (lambda f, x: f(x), [nn.ConvTranspose2d(4, 6, 3, groups=2)], [image()],
                                ["conv_transpose2d"]),
    "conv_transpose_bn_relu": (lambda f, b, x: F.relu(b(f(x))), [nn.ConvTranspose2d(4, 6, 2, stride=2), BN(6)],
                               [image()], ["conv_transpose2d", "relu"]),
    "add": (torch.add, [], [image(), image()], ["add"]),
    "add_broadcast": (torch.add, [], [image(), image(4, 1, 1)], ["add"]),
    "add_number": (lambda x: x + 1.5, [], [image()], ["add"]),
    "add_relu": (lambda x, y: F.relu(x + y), [], [image(), image()], ["add", "relu"]),
    "add_in_place_relu": (lambda x, y: F.relu((x * 1.0).add_(y), inplace=True), [], [image(), image()],
                          ["mul", "add", "relu"]),
    "sub_relu": (lambda x, y: F.relu(x - y), [], [image(), image()], ["sub", "relu"]),
    "mul": (torch.mul, [], [image(), image()], ["mul"]),
    "mul_relu6": (lambda x, y: F.relu6(x * y), [], [image(), image()], ["mul", "relu6"]),
    "div_number": (lambda x: x / 3.0, [], [image()], ["div"]),
    "matmul": (lambda x, y: x @ y, [], [image(2, 3, 5, 8), image(2, 3, 8, 7)], ["matmul"]),
    "bmm": (torch.bmm, [], [image(3, 5, 8), image(3, 8, 7)], ["bmm"]),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3, 2, 1), [], [image()], ["avg_pool2d"]),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 1), [], [image()], ["adaptive_avg_pool2d"]),
    "mean": (lambda x: x.mean((2, 3)), [], [image()], ["mean"]),
    **{
        name: (function, [], [image()], [name])
        for name, function in {
            "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid, "sigmoid": torch.sigmoid, "silu": F.silu,
            "gelu": F.gelu, "tanh": torch.tanh, "relu": F.relu, "hardtanh": F.hardtanh,
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("case", COMPUTE)
def test_operators_that_compute(case: str) -> None:
    """Every activation that goes in and the one that comes out is int8, nothing between is, and the values are near.

    255 steps over about 8 standard deviations, each rounded by step/√12 on average: 40 dB. Three of those are 35.
    """
    torch.manual_seed(0)
    function, modules, inputs, names = COMPUTE[case]
    model = Apply(function, *modules).eval()
    converted = quantize(model, tuple(inputs), is_static=True)
    assert arithmetic(converted) == names
    nodes = calls(converted)
    assert None not in quantized_inputs(nodes[0])
    assert quantized_output(nodes[-1]) is not None
    if case != "add_in_place_relu":  # of two operators
        assert len(quantized_inputs(nodes[0])) == len(inputs)
        assert [quantized_output(node) for node in nodes[:-1]] == [None] * (len(nodes) - 1)
    weights = len([module for module in modules if not isinstance(module, BN | nn.BatchNorm1d | RELU6)])
    assert len(find(converted, DEQUANTIZE_CHANNEL)) == weights
    expected, y = model(*inputs), converted(*inputs)
    assert y.shape == expected.shape
    assert sqnr(expected, y) > 30


SHARING: dict[str, tuple[Function, list[torch.Tensor]]] = {
    "max_pool1d": (lambda x: F.max_pool1d(x, 2), [image(2, 4, 20)]),
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, 1), [image()]),
    "upsample": (lambda x: F.interpolate(x, scale_factor=2), [image()]),
    "upsample_size": (lambda x: F.interpolate(x, size=(20, 11)), [image()]),
    "cat": (lambda x, y: torch.cat([x, y], 1), [image(), 3 * image()]),
    "cat_twice": (lambda x, y: torch.cat([x, y, x], 1), [image(), 3 * image()]),
    "stack": (lambda x, y: torch.stack([x, y]), [image(), 3 * image()]),
}


@pytest.mark.parametrize("case", SHARING)
def test_operators_that_choose_values_share_parameters(case: str) -> None:
    function, inputs = SHARING[case]
    converted = quantize(Apply(function), tuple(inputs), is_static=True)
    (node,) = calls(converted)
    parameters = {*quantized_inputs(node), quantized_output(node)}
    assert len(parameters) == 1
    assert None not in parameters
    assert sqnr(function(*inputs), converted(*inputs)) > 35


MOVES: dict[str, Function] = {
    "view": lambda x: x.view(2, 4, 81), "reshape": lambda x: x.reshape(8, 81), "flatten": lambda x: x.flatten(1),
    "permute": lambda x: x.permute(0, 2, 3, 1), "transpose": lambda x: x.transpose(1, 2),
    "slice": lambda x: x[:, 1:3], "select": lambda x: x[:, 1], "unsqueeze": lambda x: x.unsqueeze(1),
    "squeeze": lambda x: x[:, :1].squeeze(1), "expand": lambda x: x[:, :1].expand(2, 3, 9, 9),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)), "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "dropout": lambda x: F.dropout(x, 0.5, training=False), "contiguous": lambda x: x.mT.contiguous(),
    "chunk": lambda x: x.chunk(2, 1)[1], "split": lambda x: x.split([1, 3], 1)[0], "unbind": lambda x: x.unbind(1)[2],
    "repeat": lambda x: x.repeat(1, 2, 1, 1), "flip": lambda x: x.flip(2),
}  # fmt: skip


@pytest.mark.parametrize("case", MOVES)
def test_moves_share_the_parameters_of_their_input(case: str) -> None:
    function, x = MOVES[case], image()
    converted = quantize(Apply(lambda x: torch.tanh(function(x * 2.0))), (x,), is_static=True)
    multiply, *_, tanh = calls(converted)
    assert quantized_output(multiply) is not None
    assert quantized_inputs(tanh) == [quantized_output(multiply)]
    assert len({tuple(node.args[1:3]) for node in find(converted, QUANTIZE)}) == 3, "input, product, result"


def test_views_of_float_tensors_stay_float() -> None:
    converted = quantize(Apply(lambda x: x.flatten(1).transpose(0, 1)), (image(),), is_static=True)
    assert arithmetic(converted) == ["flatten", "transpose"]
    assert not find(converted, QUANTIZE)


def test_padding_with_other_values_stays_float() -> None:
    converted = quantize(Apply(lambda x: F.pad(x * 2.0, (1, 1), value=9.0)), (image(),), is_static=True)
    assert quantized_output(calls(converted)[-1]) is None


@pytest.mark.parametrize("name", ["softmax", "layer_norm"])
def test_normalizations_are_int8_where_their_neighbours_are(name: str) -> None:
    def normalize(x: torch.Tensor) -> torch.Tensor:
        return F.softmax(x, -1) if name == "softmax" else F.layer_norm(x, x.shape[-1:])

    linear, x = nn.Linear(16, 16), image(5, 16)
    alone = quantize(Apply(normalize), (x,), is_static=True)
    assert not find(alone, QUANTIZE), "floating point on both sides: nothing to gain"
    at_the_end = quantize(Apply(lambda f, x: normalize(f(x)), linear), (x,), is_static=True)
    assert None not in quantized_inputs(calls(at_the_end)[-1])
    assert quantized_output(calls(at_the_end)[-1]) is None
    model = Apply(lambda f, g, x: g(normalize(f(x)).view(1, 5, 16)), linear, nn.Linear(16, 16)).eval()
    between = quantize(model, (x,), is_static=True)
    node = calls(between)[1]
    assert None not in quantized_inputs(node)
    assert quantized_output(node) == quantized_inputs(calls(between)[2])[0]
    assert sqnr(model(x), between(x)) > 25


def test_residual_network_stays_int8_throughout() -> None:
    """Between two operators there is one quantize and its dequantize, with one pair of parameters."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expand, self.bn1, self.relu = nn.Conv2d(4, 8, 1, bias=False), BN(8), RELU6(inplace=True)
            self.project, self.bn2 = nn.Conv2d(8, 4, 3, padding=1, bias=False), BN(4)
            self.fc = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.bn2(self.project(self.relu(self.bn1(self.expand(x)))))
            out += x
            return self.fc(F.max_pool2d(out, 2).mean((2, 3)).flatten(1))

    model, x = Block().eval(), image()
    converted = quantize(model, (x,), is_static=True)
    assert arithmetic(converted) == ["conv2d", "hardtanh", "conv2d", "add", "max_pool2d", "mean", "flatten", "linear"]
    for node in calls(converted):
        if str(node.target) != "aten.hardtanh.default":
            assert None not in quantized_inputs(node), node
        if node is not calls(converted)[0]:
            assert quantized_output(node) is not None, node
    assert sqnr(model(x), converted(x)) > 25


def test_attention() -> None:
    def attend(q: nn.Module, k: nn.Module, v: nn.Module, x: torch.Tensor) -> torch.Tensor:
        scores = q(x) @ k(x).transpose(1, 2) / 4.0
        return torch.softmax(scores, -1) @ v(x)

    model, x = Apply(attend, *(nn.Linear(16, 16) for _ in range(3))).eval(), image(2, 6, 16)
    converted = quantize(model, (x,), is_static=True)
    for node in calls(converted):
        assert None not in quantized_inputs(node), node
        assert quantized_output(node) is not None, node
    assert sqnr(model(x), converted(x)) > 25


def test_batch_norm_alone_and_integers_stay_as_they_are() -> None:
    def function(bn: nn.Module, x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return bn(x) + torch.cat([i + 1, i * 2]).sum()

    # (Not converted: with batch norm, torchao exports a hundred patterns to look for.)
    model, inputs = Apply(function, BN(4)).eval(), (image(), torch.arange(3))
    prepared = prepare(model, inputs, VulkanQuantizer().set_global(get_symmetric_quantization_config(is_static=True)))
    for name in ("aten.batch_norm.default", "aten.mul.Tensor", "aten.cat.default"):
        (node,) = find(prepared, name)
        assert all(other.op != "call_module" for other in (*node.all_input_nodes, *node.users))


def test_constant_operand_is_stored_quantized() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 9, 9))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.table

    model, x = Positions(), image()
    converted = quantize(model, (x,), is_static=True)
    assert [buffer.dtype for buffer in converted.buffers()] == [torch.int8]
    assert sqnr(model(x), converted(x)) > 30


def test_weights_per_tensor_and_with_4_bits() -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(294, 5)).eval(), image()
    per_tensor = quantize(model, (x,), is_static=True, is_per_channel=False)
    assert DEQUANTIZE_CHANNEL not in operators(per_tensor)
    assert sum(buffer.dtype == torch.int8 for buffer in per_tensor.buffers()) == 2
    assert sqnr(model(x), per_tensor(x)) > 25
    four = quantize(model, (x,), is_static=True, weight_bits=4)
    assert all(buffer.abs().max() <= 8 for buffer in four.buffers() if buffer.dtype == torch.int8)
    assert sqnr(model(x), four(x)) > 10


def test_float16() -> None:
    model, x = nn.Sequential(nn.Linear(16, 8), nn.GELU()).eval().half(), image(5, 16).half()
    converted = quantize(model, (x,), is_static=True)
    y = converted(x)
    assert y.dtype == torch.float16
    assert sqnr(model(x), y) > 25


def test_activation_range_and_formula() -> None:
    """scale = (max - min) / (qmax - qmin), zero_point = qmin - round(min / scale); few values are all kept."""
    x = torch.tensor([[-1.0, 3.0, 1.0, 0.5]])
    config = get_symmetric_quantization_config(is_static=True, act_qmin=-100, act_qmax=100)
    converted = quantize(Apply(torch.relu), (x,), VulkanQuantizer().set_global(config))
    node = find(converted, QUANTIZE)[0]
    assert node.args[1] == pytest.approx(4 / 200, rel=0.02)
    assert node.args[2] == pytest.approx(-50, abs=1)
    assert node.args[3:] == (-100, 100, torch.int8)


# --- calibration ---------------------------------------------------------------------------------------------


def test_calibration_never_run_is_an_error_that_names_the_module() -> None:
    prepared = prepare(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)),
        (image(3, 4),),
        VulkanQuantizer().set_module_name("1", get_symmetric_quantization_config(is_static=True)),
    )
    with pytest.raises(torchvk.errors.ArgumentError, match=r"linear \(of the module 0\).*calibration"):
        convert_pt2e(prepared)


def test_calibration_with_infinite_values_alone() -> None:
    quantizer = VulkanQuantizer().set_global(get_symmetric_quantization_config(is_static=True))
    prepared = prepare(Apply(torch.tanh), (image(3, 4),), quantizer)
    with pytest.warns(UserWarning, match="inf"):
        prepared(torch.full((3, 4), float("inf")))
    with pytest.raises(torchvk.errors.ArgumentError, match="no range is known for the activation inputs_0"):
        convert_pt2e(prepared)


def test_values_without_a_scale_are_errors_that_name_the_module() -> None:
    for config in ({}, {"is_dynamic": True}, {"is_static": True}, {"weight_bits": 4, "group_size": 2}):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        with torch.no_grad():
            model[1].weight[0, 1] = float("nan")
        with pytest.raises(torchvk.errors.ArgumentError, match="the weight of 1 holds NaN"):
            convert(model, torch.ones(3, 4), **config)
    nan = torch.full((3, 4), float("nan"))
    with pytest.raises(torchvk.errors.ArgumentError, match="the activation input_1 was NaN"):
        convert(nn.Sequential(nn.Linear(4, 2)), nan, is_static=True)


def test_damaged_scales_are_errors_that_name_the_module() -> None:
    """PT2E's nodes of a weight are of no module: it is that of their reader."""
    for model, words in (
        (nn.Linear(4, 2), "weight of 0 is damaged"),
        (nn.Conv1d(4, 2, 1), "module '0': the scale inf"),
    ):
        x = torch.ones(3, 4, 1) if isinstance(model, nn.Conv1d) else torch.ones(3, 4)
        converted = convert(nn.Sequential(model), x)
        converted._scale_0.fill_(float("inf"))
        with pytest.raises(torchvk.errors.ArgumentError, match=words):
            lower_program(torch.export.export(converted, (x,)))


def test_constant_and_zero_activations() -> None:
    for value in (0.0, 2.5, -3.0):
        x = torch.full((3, 4), value)
        converted = quantize(Apply(lambda x: x * 2.0), (x,), is_static=True)
        assert (converted(x) - 2 * x).abs().max() <= 0.02 * abs(value)


# --- in-place operators --------------------------------------------------------------------------------------


def test_write_through_a_view_is_seen_by_all() -> None:
    """A quantized tensor would be a copy that the write misses."""

    for begin in (torch.tanh, lambda x: F.relu(x * 2.0)):

        def function(x: torch.Tensor, begin: Function = begin) -> torch.Tensor:
            y = begin(x)
            y.view(-1).mul_(2)
            return torch.sigmoid(y) + y

        x = image(3, 4)
        converted = quantize(Apply(function), (x,), is_static=True)
        assert sqnr(function(x), converted(x)) > 25


def test_write_to_an_input_stays() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return torch.tanh(x) * 2.0

    x = image(3, 4)
    converted = quantize(Apply(function), (x.clone(),), is_static=True)
    given, expected = x.clone(), x.clone()
    y = converted(given)
    assert sqnr(function(expected), y) > 25
    assert torch.equal(given, expected)


def test_weight_only_and_dynamic_touch_nothing_else() -> None:
    model = Apply(lambda f, c, x: torch.tanh(F.relu(f(c(x).flatten(2))) + 1), nn.Linear(49, 8), nn.Conv2d(4, 6, 3))
    for config in ({}, {"is_dynamic": True}, {"is_dynamic": True, "is_per_token": True}):
        converted = convert(model, image(), **config)
        assert not find(converted, QUANTIZE)
        assert operators(converted)[DEQUANTIZE_CHANNEL] == 2

"""VulkanPartitioner: what it claims, what it leaves and says about it, its options, and what becomes of partitions."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executorch.exir import to_edge_transform_and_lower
from executorch.exir.dialects._ops import ops as exir_ops

import torchvk
from tests.edge import Lowered, assert_same, compare, lower_module, lower_program
from torchvk.errors import ArgumentError, ArgumentTypeError, TorchVkError
from torchvk.graph import DType
from torchvk.lowering.options import CompileOptions
from torchvk.partitioner.vulkan_partitioner import Refusal, VulkanPartitioner


class Function(torch.nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


X = torch.linspace(-2, 2, 12).view(3, 4)


def lower(function: Any, *inputs: torch.Tensor, **options: Any) -> Lowered:
    return lower_module(Function(function), inputs or (X,), **options)


def check_values(lowered: Lowered, function: Any, *inputs: torch.Tensor) -> None:
    compare(lowered.run(*(inputs or (X,))), function(*(inputs or (X,))))


def test_whole_module_is_one_partition() -> None:
    """Also parts that have nothing to do with each other."""
    lowered = assert_same(Function(lambda x, y: (torch.exp(x), torch.sin(y), x[:, 0] * 2)), (X, X + 1))
    assert lowered.report == []
    assert lowered.claimed >= 4


def test_report() -> None:
    """An operator without a translation: its name, why, and the module it is from; a log line says the same."""

    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cosh(x)

    lowered = lower_module(torch.nn.Sequential(torch.nn.Linear(4, 4), Odd(), torch.nn.ReLU()), (X,))
    (refusal,) = lowered.report
    assert refusal == Refusal("aten_cosh_default", "aten.cosh.default", "torchvk has no operator for it", "1")
    with pytest.raises(dataclasses.FrozenInstanceError):
        refusal.reason = ""  # type: ignore[misc]
    assert lowered.cpu == ["aten::cosh"]
    assert [sorted(node.op for node in graph.nodes) for graph in lowered.graphs] == [["linear"], ["relu"]]


def test_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="torchvk.partitioner"):
        lowered = lower(lambda x: torch.cosh(x) * 2)
    said = [record.getMessage() for record in caplog.records if record.name == "torchvk.partitioner"]
    assert said[0] == str(lowered.report[0])
    assert "aten.cosh.default" in said[0]
    assert "stays on the CPU: torchvk has no operator for it" in said[0]
    assert said[-1] == f"claimed {lowered.claimed} nodes in 1 partitions, left 1 to the CPU"


def test_partitions_are_acyclic() -> None:
    """exp and mul on the GPU with cosh between them, and a path beside it: they cannot be one partition."""

    def function(x: torch.Tensor) -> torch.Tensor:
        a = torch.exp(x)
        return torch.cosh(a) * a + torch.sin(a)

    lowered = lower(function)
    assert [sorted(node.op for node in graph.nodes) for graph in lowered.graphs] == [["exp", "sin"], ["add", "mul"]]
    check_values(lowered, function)


def test_as_few_partitions_as_possible() -> None:
    """Two branches, each GPU, CPU, GPU: the branches share partitions."""

    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.sin(torch.cosh(torch.exp(x))), torch.neg(torch.sinh(torch.tanh(x)))

    lowered = lower(function)
    assert [sorted(node.op for node in graph.nodes) for graph in lowered.graphs] == [["exp", "tanh"], ["neg", "sin"]]
    check_values(lowered, function)


def test_constants_are_made_where_they_are_needed() -> None:
    """A mask made of nothing is not handed from the first partition to the second."""

    def function(x: torch.Tensor) -> torch.Tensor:
        mask = torch.arange(4) % 2 == 0
        return torch.where(mask, torch.cosh(torch.exp(x)), 0.0)

    lowered = lower(function)
    assert [len(graph.outputs) for graph in lowered.graphs] == [1, 1]
    assert [len(graph.inputs) for graph in lowered.graphs] == [1, 1]
    check_values(lowered, function)


def test_weights_used_in_two_partitions() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cosh(self.linear(x)) @ self.linear.weight.t() + torch.cosh(self.linear.bias)

    module = Twice()
    lowered = lower_module(module, (X,))
    assert [len(graph.inputs) for graph in lowered.graphs] == [1, 2]
    compare(lowered.run(X), module(X))


def test_a_quantized_weight_used_in_two_partitions() -> None:
    """It is dequantized in neither, so both linears stay on the CPU: one node cannot be in two partitions."""

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("q", torch.arange(-8, 8).view(4, 4).to(torch.int8))
            self.register_buffer("scale", torch.full((4,), 0.25))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            w = torch.ops.quantized_decomposed.dequantize_per_channel(self.q, self.scale, None, 0, -8, 7, torch.int8)
            return F.linear(torch.cosh(F.linear(torch.exp(x), w) / 8), w)

    lowered = lower_module(Twice(), (X,))
    assert lowered.operators()["quantized_linear"] == 0
    assert "exp" in lowered.operators()
    reasons = {refusal.reason for refusal in lowered.report if refusal.operator == "aten.mm.default"}
    assert len(reasons) == 1
    assert "shared with a linear that must run before or after another operator on the CPU" in reasons.pop()
    compare(lowered.run(X), Twice()(X))


@pytest.mark.parametrize("device", ["reference", None])
def test_results_that_no_operator_computes(device: str | None) -> None:
    """An input, a constant and a result given back twice."""

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = torch.exp(x)
        return x.clone(), torch.ones(3) * 2, y, y.view(4, 3).view(3, 4), y.view(12)

    lowered = lower(function)
    with torchvk.load(lowered.edge.to_executorch(), device=device) as program:
        compare(program(X), function(X))
    assert lowered.operators() == {"exp": 1, "reshape": 1}


def test_results_of_one_operator_stay_together() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = x.split(2, 1)
        return torch.cosh(a) + b, a * 2

    lowered = lower(function)
    check_values(lowered, function)
    assert lowered.cpu == ["aten::cosh"]


def test_unused_results_do_not_matter_and_used_ones_do() -> None:
    assert lower(lambda x: torch.native_layer_norm(x, (4,), None, None, 1e-5)[0]).report == []
    lowered = lower(lambda x: torch.native_layer_norm(x, (4,), None, None, 1e-5))
    assert [refusal.operator for refusal in lowered.report] == ["aten.native_layer_norm.default"]
    assert "does not compute all of its results" in lowered.report[0].reason


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(4, 3),
        lambda x: torch.cosh(x).view(4, 3),
        lambda x: torch.cosh(x + 0) + torch.ones(4).cumsum(0)[0:1],
    ],
)
def test_no_delegates_of_views_and_constants(function: Any) -> None:
    lowered = lower(function)
    for graph in lowered.graphs:
        assert any(node.op not in ("reshape",) for node in graph.nodes)
    reasons = {refusal.reason for refusal in lowered.report if "cosh" not in refusal.operator}
    assert reasons <= {"only views and constants are here together, which the CPU has at no cost"}
    check_values(lowered, function)


def test_a_lone_view_stays_on_the_cpu() -> None:
    lowered = lower(lambda x: x.view(4, 3))
    assert lowered.graphs == []
    assert lowered.claimed == 0
    assert "only views and constants" in lowered.report[0].reason


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [(torch.float64, "float64 tensors"), (torch.bfloat16, "bfloat16 tensors")],
)
def test_dtypes_that_are_not_claimed(dtype: torch.dtype, reason: str) -> None:
    partitioner = VulkanPartitioner()
    to_edge_transform_and_lower(
        torch.export.export(Function(lambda x: x + x), (torch.ones(3, dtype=dtype),)), partitioner=[partitioner]
    )
    assert partitioner.claimed == 0
    assert reason in partitioner.report[0].reason


def test_dtypes_inside() -> None:
    """A detour over float64 stays outside, what is before and after it goes to the GPU."""

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.sin((torch.exp(x).double() + 1).float())

    lowered = lower(function)
    assert len(lowered.graphs) == 2
    assert all("float64 tensors are not supported" in refusal.reason for refusal in lowered.report)
    check_values(lowered, function)


def test_symbolic_shapes_are_not_claimed() -> None:
    batch = torch.export.Dim("batch", min=2, max=8)
    lowered = lower(lambda x: torch.exp(x) + 1, dynamic_shapes=((({0: batch}),),))
    assert lowered.graphs == []
    reasons = {refusal.operator: refusal.reason for refusal in lowered.report}
    for operator in ("aten.exp.default", "aten.add.Tensor"):
        assert "symbolic: only fixed shapes are supported" in reasons[operator]


def test_a_part_with_fixed_shapes_is_claimed() -> None:
    batch = torch.export.Dim("batch", min=2, max=8)
    lowered = lower(lambda x, y: (torch.exp(x), torch.exp(y)), X, torch.ones(2), dynamic_shapes=(({0: batch}, None),))
    assert lowered.operators() == {"exp": 1}
    assert lowered.graphs[0].tensors[lowered.graphs[0].inputs[0]].shape == (2,)


def test_memory_formats() -> None:
    image = torch.randn(1, 3, 4, 4)

    def function(x: torch.Tensor) -> torch.Tensor:
        return (torch.exp(x).to(memory_format=torch.channels_last) + 1).contiguous() * 2

    lowered = lower(function, image)
    assert not lowered.cpu
    check_values(lowered, function, image)
    channels_last = image.to(memory_format=torch.channels_last)
    lowered = lower(torch.exp, channels_last)
    assert not lowered.cpu
    check_values(lowered, torch.exp, channels_last)


class Counter(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(4))
        self.register_buffer("fixed", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)  # type: ignore[operator]
        return torch.exp(x) + self.count + self.fixed


def test_mutable_buffers_are_not_claimed() -> None:
    lowered = lower_module(Counter(), (X,))
    reasons = [refusal.reason for refusal in lowered.report]
    assert any("'count'" in reason and "state on the device is not supported" in reason for reason in reasons)
    assert "exp" in lowered.operators()
    with torchvk.load(lowered.edge.to_executorch(), device="reference") as program:
        for count in (1, 2, 3):
            compare([program(X)], torch.exp(X) + count + 1)


def test_mutated_inputs_are_not_claimed() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return torch.exp(x)

    program = torch.export.export(Function(function), (X.clone(),))
    lowered = lower_program(program)
    assert any("which the program changes" in r.reason or "a new value" in r.reason for r in lowered.report)


def test_control_flow_is_not_claimed() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (torch.exp(x),))

    lowered = lower(function)
    assert "cond" in [refusal.operator for refusal in lowered.report]
    assert "exp" in lowered.operators()


def test_rank_above_eight() -> None:
    lowered = lower(lambda x: torch.exp(x) + torch.sin(x.view(3, 4, *[1] * 7)).sum())
    assert any("rank 9" in refusal.reason for refusal in lowered.report)
    assert "exp" in lowered.operators()


# --- options


@pytest.mark.parametrize("name", ["force_fp17", "texture_limits"])
def test_unknown_options(name: str) -> None:
    with pytest.raises(ArgumentError, match=f"'{name}'.*force_fp16, require_dynamic_shapes"):
        VulkanPartitioner({name: True})


def test_wrong_types() -> None:
    with pytest.raises(ArgumentTypeError, match="force_fp16"):
        VulkanPartitioner({"force_fp16": "yes"})
    with pytest.raises(ArgumentTypeError, match="dict"):
        VulkanPartitioner(["force_fp16"])  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="operator_blocklist"):
        VulkanPartitioner(operator_blocklist="aten.add.Tensor")
    with pytest.raises(ArgumentTypeError, match="operator_allowlist"):
        VulkanPartitioner(operator_allowlist=[torch.exp])
    with pytest.raises(ArgumentTypeError, match="nn_module_blocklist"):
        VulkanPartitioner(nn_module_blocklist=[torch.nn.Linear])  # type: ignore[list-item]
    assert issubclass(ArgumentTypeError, TorchVkError)


def test_options_travel_with_the_delegate() -> None:
    options = CompileOptions(force_fp16=True)
    assert CompileOptions.from_specs(options.to_specs()) == options
    assert CompileOptions.from_specs([]) == CompileOptions()


def test_force_fp16() -> None:
    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 8)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            scores = self.linear(x) + torch.where(mask, 0.0, torch.finfo(torch.float32).min)
            return scores.softmax(-1)

    module, mask = Masked(), torch.arange(8) % 3 > 0
    # Scores and results are rounded to 11 bits: 2^-11 of scores below 4, through a softmax.
    lowered = assert_same(module, (X, mask), 2**-8, compile_options={"force_fp16": True})
    graph = lowered.graph
    assert [graph.tensors[i].dtype for i in (*graph.inputs, *graph.outputs)] == [
        DType.FLOAT32,
        DType.BOOL,
        DType.FLOAT32,
    ]
    inside = {graph.tensors[i].dtype for node in graph.nodes if node.op != "cast" for i in node.outputs}
    assert inside <= {DType.FLOAT16, DType.BOOL}
    assert DType.FLOAT32 not in {tensor.dtype for tensor in graph.tensors if tensor.data}


def test_require_dynamic_shapes() -> None:
    lowered = lower(torch.exp, compile_options={"require_dynamic_shapes": True})
    assert lowered.graphs == []
    assert "require_dynamic_shapes" in lowered.report[0].reason
    assert lower(torch.exp, compile_options={"require_dynamic_shapes": False}).report == []


EXP_BLOCKED = [
    exir_ops.edge.aten.exp.default,
    torch.ops.aten.exp.default,
    torch.ops.aten.exp,
    "aten.exp.default",
    "aten::exp",
]


@pytest.mark.parametrize("entry", EXP_BLOCKED, ids=str)
def test_operator_blocklist(entry: Any) -> None:
    lowered = lower(lambda x: torch.exp(x) + 1, operator_blocklist=[entry])
    assert lowered.cpu == ["aten::exp"]
    assert lowered.report[0].reason == "its operator is in operator_blocklist"


def test_operator_allowlist() -> None:
    lowered = lower(lambda x: torch.exp(x) + 1, operator_allowlist=[torch.ops.aten.exp])
    assert lowered.operators() == {"exp": 1}
    assert lowered.report[0].reason == "its operator is not in operator_allowlist"
    assert lower(torch.exp, operator_allowlist=[]).graphs == []


def test_linears_may_be_listed_as_such() -> None:
    """exir has made addmm of it by then."""
    linear = torch.nn.Linear(4, 4)
    assert "addmm" in lower_module(linear, (X,), operator_blocklist=[torch.ops.aten.linear.default]).cpu[-1]
    lowered = lower_module(
        torch.nn.Sequential(linear, torch.nn.ReLU()), (X,), operator_allowlist=[exir_ops.edge.aten.linear.default]
    )
    assert "aten::relu" in lowered.cpu
    assert lowered.claimed >= 1


class Act(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = Act()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(self.act(x))


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"nn_module_blocklist": ["Act"]}, {"sin"}),
        ({"nn_module_blocklist": ["Block"]}, {"sin", "exp"}),
        ({"nn_module_allowlist": ["Act"]}, {"exp", "neg"}),
        ({"nn_module_allowlist": ["Block"]}, {"neg"}),
        ({"nn_module_blocklist": ["Act"], "nn_module_allowlist": ["Block"]}, {"sin", "neg"}),
    ],
)
def test_module_lists(options: dict[str, Any], left: set[str]) -> None:
    """Parts of class names; a module's list entry holds for what is inside of it."""

    class Root(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -self.block(x)

    lowered = lower_module(Root(), (X,), **options)
    assert {name.removeprefix("aten::") for name in lowered.cpu} == left
    assert all("nn_module" in refusal.reason for refusal in lowered.report)
    compare(lowered.run(X), Root()(X))


# --- several methods, several partitioners


def test_several_methods() -> None:
    """One partitioner for two methods that share parameters' names, not values."""
    first, second = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
    partitioner = VulkanPartitioner()
    edge = to_edge_transform_and_lower(
        {name: torch.export.export(module, (X,)) for name, module in (("first", first), ("second", second))},
        partitioner={"first": [partitioner], "second": [partitioner]},
    )
    assert partitioner.report == []
    with torchvk.load(edge.to_executorch(), device="reference") as program:
        compare([program.method("first")(X)], first(X))
        compare([program.method("second")(X)], second(X))


def test_one_partitioner_after_another() -> None:
    """The second one sees the first one's delegates and has nothing to say about them."""
    first, second = VulkanPartitioner(operator_allowlist=["aten.exp.default"]), VulkanPartitioner()
    edge = to_edge_transform_and_lower(
        torch.export.export(Function(lambda x: torch.sin(torch.exp(x))), (X,)), partitioner=[first, second]
    )
    assert [refusal.operator for refusal in first.report] == ["aten.sin.default"]
    assert second.report == []
    with torchvk.load(edge.to_executorch(), device="reference") as program:
        compare([program(X)], torch.sin(torch.exp(X)))


def test_programs_are_left_as_they_are() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    program = torch.export.export(module, (X,))
    before = str(program)
    lower_program(program)
    assert str(program) == before


def test_bytes_are_deterministic() -> None:
    program = torch.export.export(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()), (X,))
    first, second = (lower_program(program).edge.to_executorch().buffer for _ in range(2))
    assert first == second


def test_functional_names() -> None:
    """torchvk.VulkanPartitioner is the documented class."""
    assert torchvk.VulkanPartitioner is VulkanPartitioner
    assert F is torch.nn.functional


class Keeps(torch.nn.Module):
    """Returns its parameter beside what is computed from it, by one partition or by two."""

    def __init__(self, split: bool) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.linspace(1, 2, 4))
        self.split = split

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x * self.scale
        if self.split:
            y = torch.sort(y)[0] + self.scale
        return self.scale, y


@pytest.mark.parametrize("split", [False, True])
def test_parameter_is_used_and_returned(split: bool) -> None:
    module = Keeps(split)
    lowered = lower_module(module, (X,))
    with torch.no_grad():
        compare(lowered.run(X), module(X))
    assert len(lowered.graphs) == 1 + split

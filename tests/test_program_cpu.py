"""Programs with operators on the CPU: what exir leaves there runs with torch and gives what eager gives."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass, ToOutVarPass
from executorch.exir.passes.init_mutable_pass import InitializedMutableBufferPass
from executorch.exir.schema import IntList, JumpFalseCall, MoveCall, TensorList
from functorch.experimental.control_flow import map as torch_map
from pte_files import BACKEND, Plan, affine_graph, call, delegate_call, tensor, write
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import torchvk
from torchvk.errors import ArgumentError, ArgumentTypeError, FormatError, TorchVkError, UnsupportedError
from torchvk.graph import to_bytes

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

UNPLANNED = ExecutorchBackendConfig(
    memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
)
FUNCTIONAL = ExecutorchBackendConfig(to_out_var_pass=ToOutVarPass(ignore_to_out_var_failure=True))


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Any) -> Any:
        return self.function(*arguments)


class Cache(nn.Module):
    """Writes v into row ``position`` of a buffer that lives on between calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(4, 3))

    def forward(self, position: Tensor, v: Tensor) -> Tensor:
        self.rows.index_put_((position,), v)
        return self.rows.sum(0) + v


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)).eval()


def channels_last(x: Tensor) -> Tensor:
    x = x.to(memory_format=torch.channels_last)
    return nn.functional.conv2d(x, torch.ones(4, 3, 3, 3)).contiguous()


def pointwise(x: Tensor) -> tuple[Tensor, ...]:
    gelu = nn.functional.gelu
    return gelu(x), gelu(x, approximate="tanh"), x.clamp(min=0), x.pow(2), torch.where(x > 0, x, -x), x.half() + 1


def reductions(x: Tensor) -> tuple[Tensor, ...]:
    return x.sum(0, dtype=torch.float64), x.mean(), x.to(torch.int32).sum(), x.argmax(1), *torch.topk(x, 2)


def created(x: Tensor) -> tuple[Tensor, ...]:
    return torch.arange(4) + x, torch.full((2,), 3.5), torch.zeros_like(x), torch.tensor([1.0, 2.0])


@dataclass(frozen=True)
class Case:
    """A module and its inputs; ``more`` inputs of later calls; ``dynamic`` for torch.export."""

    module: nn.Module | Callable[..., Any]
    inputs: tuple[Any, ...]
    more: tuple[tuple[Any, ...], ...] = ()
    dynamic: Any = None
    config: ExecutorchBackendConfig | None = None


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
BATCH = torch.export.Dim("batch", min=1, max=8)

CASES: dict[str, Callable[[], Case]] = {
    "linear": lambda: Case(nn.Linear(4, 5), (X,)),
    "convolution": lambda: Case(convolution(), (torch.ones(1, 3, 8, 8),)),
    "lstm": lambda: Case(nn.LSTM(4, 6, batch_first=True), (X[None],)),
    "attention": lambda: Case(lambda q: nn.functional.scaled_dot_product_attention(q, q, q), (X[None],)),
    "embedding": lambda: Case(nn.Embedding(10, 4), (torch.tensor([[1, 2], [9, 0]]),)),
    "pointwise": lambda: Case(pointwise, (X,)),
    "reductions": lambda: Case(reductions, (X,)),
    "created": lambda: Case(created, (X,)),
    "views share memory": lambda: Case(lambda x: ((x + 1).view(2, 6) * 2, x.view(12) + 1, x.t()), (X,)),
    "views of unplanned inputs": lambda: Case(
        lambda x: ((x + 1).view(2, 6) * 2, x.view(12) + 1), (X,), config=UNPLANNED
    ),
    "lists of tensors": lambda: Case(lambda x: [*torch.split(x, [1, 3], 1), torch.cat([x, x])], (X,)),
    "nested": lambda: Case(lambda d: {"a": d["x"] + 1, "b": [d["y"], d["x"]]}, ({"x": X, "y": X + 1},)),
    "numbers": lambda: Case(lambda x, n, f, b, none: x * n * f if b else x, (X, 3, 2.5, True, None)),
    "size as output": lambda: Case(lambda x: (x + 1, x.shape[0]), (X,)),
    "nothing to do": lambda: Case(lambda x: x, (X,)),
    "bfloat16": lambda: Case(lambda x: x.bfloat16() * 2, (X,)),
    "channels last": lambda: Case(channels_last, (torch.ones(1, 3, 8, 8),)),
    "0-D": lambda: Case(lambda x: x + 1, (torch.tensor(2.0),)),
    "nothing in it": lambda: Case(lambda x: x[:0] + 1, (X,)),
    "strided": lambda: Case(lambda x: x * 2, (X.t(),)),
    "requires grad": lambda: Case(lambda x: x * 2, (X.clone().requires_grad_(),)),
    "cond": lambda: Case(
        lambda x, p: torch.cond(p, lambda a: a.sin(), lambda a: a.cos() + 1, (x,)),
        (X, torch.tensor(True)),
        more=((X, torch.tensor(False)),),
    ),
    "map": lambda: Case(lambda xs, y: torch_map(lambda a, b: a * b + 1, xs, y), (X, X[0].clone())),
    "state": lambda: Case(Cache(), (torch.tensor([1]), X[:1, :3]), more=((torch.tensor([2]), X[1:2, :3]),) * 2),
    "item": lambda: Case(lambda x, i: x * i.sum().item(), (X, torch.tensor([2]))),
    "dynamic": lambda: Case(
        nn.Sequential(nn.Linear(4, 5), nn.Flatten()), (X,), more=((torch.ones(8, 4),), (X[:1],)), dynamic=({0: BATCH},)
    ),
    "dynamic views": lambda: Case(
        lambda x: (x.view(x.shape[0] * 2, 2), x.shape[0], x.reshape(-1)[1:]),
        (X,),
        more=((torch.ones(8, 4),), (X[:2],)),
        dynamic=(({0: BATCH},),),
    ),
}


def lower(case: Case) -> Any:
    module = case.module if isinstance(case.module, nn.Module) else Function(case.module)
    if not isinstance(module, torch.fx.GraphModule):
        module.eval()
    exported = torch.export.export(copy.deepcopy(module), case.inputs, dynamic_shapes=case.dynamic)
    return module, to_edge_transform_and_lower(exported).to_executorch(case.config)


@pytest.mark.parametrize("name", CASES)
def test_same_as_eager(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    module, lowered = lower(case)
    program = torchvk.load(lowered)
    for inputs in (case.inputs, *case.more):
        expected = pytree.tree_leaves(module(*inputs))
        actual = program(*pytree.tree_leaves(inputs))
        actual = list(actual) if isinstance(actual, tuple) else [actual]
        assert len(actual) == len(expected)
        for value, wanted in zip(actual, expected, strict=True):
            if isinstance(wanted, Tensor):
                # Same kernels, other memory formats at most: float32 sums of a few terms in another order.
                torch.testing.assert_close(value, wanted.detach(), rtol=1e-5, atol=1e-6)
                assert not value.requires_grad
            else:
                assert value == wanted


def test_numpy_runs_through_torch_operators() -> None:
    _, lowered = lower(Case(lambda x: (x.exp(), x.shape[0], x[:1]), (X,)))
    program = torchvk.load(lowered)
    given = np.asfortranarray(X.numpy())[::-1]
    exp, size, row = program(given)
    assert type(exp) is np.ndarray
    np.testing.assert_allclose(exp, np.exp(given), rtol=1e-6)
    assert (size, row.tolist()) == (3, given[:1].tolist())


def test_bfloat16_has_no_numpy() -> None:
    _, lowered = lower(Case(lambda x: x.bfloat16() * 2, (X,)))
    with pytest.raises(ArgumentTypeError, match=r"torch\.bfloat16, which NumPy has no dtype for"):
        torchvk.load(lowered)(X.numpy())


def test_outputs_are_the_callers() -> None:
    _, lowered = lower(Case(lambda x: (x, x + 1), (X,)))
    program = torchvk.load(lowered)
    first, second = program(X)
    first.zero_()
    second.zero_()
    again = program(X)
    assert torch.equal(again[0], X)
    assert torch.equal(again[1], X + 1)
    assert not second.any()


def test_state_that_starts_with_values() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.tensor([5.0, 6.0]))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(x)
            return self.count * 1

    config = ExecutorchBackendConfig(passes=[InitializedMutableBufferPass(["count"])])
    _, lowered = lower(Case(Counter(), (torch.ones(2),), config=config))
    program, other = torchvk.load(lowered), torchvk.load(lowered)
    assert [program(torch.ones(2)).tolist() for _ in range(2)] == [[6, 7], [7, 8]]
    # Another program starts anew: nothing was written back into the bytes.
    assert other(torch.ones(2)).tolist() == [6, 7]


def test_methods_that_only_return_values() -> None:
    exported = {"forward": torch.export.export(nn.Linear(4, 4), (X,)), "decode": torch.export.export(nn.ReLU(), (X,))}
    constants = {"length": 7, "ends": [1, 2], "kind": "abc", "rate": 0.5, "flag": True, "ids": torch.arange(3)}
    program = torchvk.load(to_edge_transform_and_lower(exported, constant_methods=constants).to_executorch())
    assert set(program.method_names) == {"forward", "decode", *constants}
    assert torch.equal(program.method("decode")(X), X.relu())
    values = {name: program.method(name)() for name in constants}
    assert values.pop("ids").tolist() == [0, 1, 2]
    assert values == {"length": 7, "ends": (1, 2), "kind": "abc", "rate": 0.5, "flag": True}


def test_baked_in_numbers_are_checked() -> None:
    _, lowered = lower(Case(lambda x, n, f, b, none: x * n, (X, 3, 2.5, True, None)))
    program = torchvk.load(lowered)
    assert torch.equal(program(X, 3, 2.5, True, None), X * 3)
    for inputs, error, message in (
        ((X, 4, 2.5, True, None), ArgumentError, "input 1 must be 3, not 4: the program was exported for that value"),
        ((X, 3, 2.25, True, None), ArgumentError, "input 2 must be 2.5"),
        ((X, 3, 2.5, False, None), ArgumentError, "input 3 must be True"),
        ((X, 3, 2.5, 1, None), ArgumentTypeError, "input 3 must be the bool True, not int"),
        ((X, 3, 2.5, True, 0), ArgumentTypeError, "input 4 must be the NoneType None, not int"),
        ((X, torch.tensor(3), 2.5, True, None), ArgumentTypeError, "input 1 must be the int 3, not Tensor"),
    ):
        with pytest.raises(error, match=message):
            program(*inputs)


def test_dynamic_shapes_have_bounds() -> None:
    case = CASES["dynamic"]()
    program = torchvk.load(lower(case)[1])
    with pytest.raises(ArgumentError, match=r"input 0 is float32\[9, 4\], the method takes float32\[≤8, ≤4\]"):
        program(torch.ones(9, 4))


def test_an_operator_that_fails_says_so() -> None:
    _, lowered = lower(CASES["embedding"]())
    program = torchvk.load(lowered)
    with pytest.raises(TorchVkError, match=r"operator aten::embedding\.out failed on the CPU: index out of range"):
        program(torch.tensor([[1, 2], [10, 0]]))
    assert program(torch.tensor([[1, 2], [9, 0]])).shape == (2, 2, 4)


def int3_linear() -> Case:
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_api import IntxWeightOnlyConfig, quantize_
    from torchao.utils import unwrap_tensor_subclass

    module = nn.Sequential(nn.Linear(64, 32)).eval()
    quantize_(module, IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerGroup(32)))
    unwrap_tensor_subclass(module)
    return Case(module, (torch.randn(3, 64),), config=FUNCTIONAL)


def pt2e_linear() -> Case:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    inputs = (torch.randn(3, 64),)
    exported = torch.export.export(nn.Sequential(nn.Linear(64, 32)).eval(), inputs).module()
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True))
    prepared = prepare_pt2e(exported, quantizer)
    prepared(*inputs)
    return Case(convert_pt2e(prepared), inputs, config=FUNCTIONAL)


@pytest.mark.parametrize("make", [int3_linear, pt2e_linear])
def test_quantized_operators_on_the_cpu(make: Callable[[], Case]) -> None:
    torch.manual_seed(0)
    case = make()
    module, lowered = lower(case)
    program = torchvk.load(lowered)
    names = program.describe().methods[0].cpu_operators
    assert any(name.startswith(("torchao::", "quantized_decomposed::")) for name in names)
    torch.testing.assert_close(program(*case.inputs), module(*case.inputs))


def test_out_variants_that_only_executorch_has() -> None:
    """quantized_decomposed::choose_qparams.Tensor_out is torch's quantized_decomposed::choose_qparams.tensor."""
    int8 = 1  # dtypes are numbers in the file
    values = [tensor((4,)), -128, 127, 1e-6, int8, tensor((1,), "float64"), tensor((1,), "int64"), TensorList([5, 6])]
    operator = ("quantized_decomposed::choose_qparams", "Tensor_out")
    program = torchvk.load(write(Plan(values, [0], [5, 6], [call(0, *range(8))], [operator])))
    scale, zero_point = program(torch.tensor([-1.0, 0, 2, 3]))
    assert scale.item() == pytest.approx(4 / 255)
    assert zero_point.item() == round(-128 + 255 / 4)


def test_out_variants_of_executorch_are_left_alone() -> None:
    """Once they are loaded they exist in torch, too; given an output to be resized, they end the process."""
    importlib.import_module("executorch.kernels.quantized")
    values = [tensor((2, 3)), 0.5, 0, -128, 127, 1, tensor((0,), "int8")]
    operator = ("quantized_decomposed::quantize_per_tensor", "out")
    assert hasattr(torch.ops.quantized_decomposed.quantize_per_tensor, "out")
    program = torchvk.load(write(Plan(values, [0], [6], [call(0, *range(7))], [operator])))
    with pytest.raises(TorchVkError):
        program(torch.ones(2, 3))


@pytest.mark.parametrize(
    ("name", "overload"),
    [
        ("aten::no_such_operator", "out"),
        ("aten::add", "no_such_overload"),
        ("aten::from_file", "out"),
        ("aten::save", ""),
        ("aten::resize_", ""),
        ("aten::set_", "source_Tensor"),
        ("c10d::barrier", ""),
        ("load_library::x", ""),
        ("aten::__class__", "mro"),
        ("aten", ""),
        ("", ""),
    ],
)
def test_operators_that_are_not_for_files(name: str, overload: str) -> None:
    plan = Plan([tensor((1,))], [0], [0], [call(0, 0, 0)], [(name, overload)])
    with pytest.raises(UnsupportedError, match="no kernel for the CPU is known"):
        torchvk.load(write(plan))


def test_custom_operators_by_permission() -> None:
    with torch.library._scoped_library("torchvk_test", "DEF") as library:
        library.define("triple.out(Tensor x, *, Tensor(a!) out) -> Tensor(a!)")
        library.impl("triple.out", lambda x, *, out: out.copy_(x * 3), "CompositeExplicitAutograd")
        plan = Plan(
            [tensor((2,), place=0), tensor((2,), place=16)],
            [0],
            [1],
            [call(0, 0, 1, 1)],
            [("torchvk_test::triple", "out")],
        )
        with pytest.raises(UnsupportedError, match=r"torchvk_test::triple\.out.*custom_operators"):
            torchvk.load(write(plan))
        program = torchvk.load(write(plan), custom_operators=["torchvk_test"])
        assert program(torch.ones(2)).tolist() == [3, 3]


# Delegates and CPU operators together, without torch where it is not needed: written by hand, since exir never
# leaves exactly these on the CPU.


def mixed_plan(*after: Any, operators: Any = (), values: Any = (), outputs: Any = (2, 3)) -> Plan:
    """x (0), y (1) → delegate → 2x + y (2), x − y (3); then ``after``."""
    base = [tensor((2, 3), place=32 * index) for index in range(4)]
    return Plan(
        [*base, *values],
        [0, 1],
        outputs,
        [delegate_call(0, 0, 1, 2, 3), *after],
        operators,
        [(BACKEND, to_bytes(affine_graph()))],
    )


A = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.tier
@pytest.mark.parametrize("device", ["reference", None])
def test_delegate_between_cpu_operators(device: str | None) -> None:
    plan = mixed_plan(
        call(0, 2, 4, 4),
        delegate_call(0, 4, 1, 2, 3),
        operators=[("aten::neg", "out")],
        values=[tensor((2, 3), place=128)],
        outputs=(2, 3, 4),
    )
    with torchvk.load(write(plan), device=device) as program:
        for cast in (np.asarray, torch.from_numpy):
            total, difference, negated = program(cast(A), cast(np.ones((2, 3), np.float32)))
            np.testing.assert_array_equal(np.asarray(negated), -(2 * A + 1))
            np.testing.assert_array_equal(np.asarray(total), -2 * (2 * A + 1) + 1)
            np.testing.assert_array_equal(np.asarray(difference), -(2 * A + 1) - 1)


@pytest.mark.tier
@pytest.mark.parametrize("device", ["reference", None])
def test_exir_splits_a_model(device: str | None) -> None:
    """GPU, CPU, GPU: what the partitioner leaves out runs with torch, whatever the caller comes with."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Softmax(-1), nn.Linear(8, 5)).eval()
    partitioner = torchvk.VulkanPartitioner(operator_blocklist=["aten._softmax.default"])
    lowered = to_edge_transform_and_lower(torch.export.export(module, (X,)), partitioner=[partitioner])
    with torchvk.load(lowered.to_executorch(), device=device) as program:
        (method,) = program.describe().methods
        assert [dict(delegate.operators)["linear"] for delegate in method.delegates] == [1, 1]
        assert dict(method.cpu_operators) == {"aten::_softmax.out": 1}
        for x in (X, torch.flip(X, [0])):
            # float32 sums of up to 8 terms of size 1, in another order.
            torch.testing.assert_close(program(x), module(x), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(torch.from_numpy(program(x.numpy())), module(x), rtol=1e-5, atol=1e-6)
        profile = program.profile(X)
    where = "GPU" if device is None else "CPU"
    assert {(row.operator, row.where, row.count) for row in profile.rows} == {
        ("linear", where, 2),
        ("aten::_softmax.out", "CPU", 1),
    }


def test_views_by_shared_memory_need_no_torch() -> None:
    """exir drops a view and places its tensor where the original is."""
    plan = mixed_plan(values=[tensor((3, 2), place=64)], outputs=(4, 2))
    program = torchvk.load(write(plan), device="reference")
    flat, total = program(A, A)
    assert flat.tolist() == (3 * A).reshape(3, 2).tolist()
    assert not np.shares_memory(flat, total)


def test_dimension_order_of_memory() -> None:
    """A tensor that lies column by column in memory has the same elements."""
    values = [tensor((2, 3), place=0, order=[1, 0]), tensor((6,), place=0), False, None]
    plan = Plan([*values, tensor((2, 3), "float16", place=64)], [0], [0, 1, 4], [call(0, 0, 2, 3, 4, 4)])
    plan.operators = [("dim_order_ops::_to_dim_order_copy", "out")]
    same, memory, half = torchvk.load(write(plan))(A)
    assert same.tolist() == A.tolist()
    assert memory.tolist() == A.T.reshape(-1).tolist()
    assert (half.dtype, half.tolist()) == (np.float16, A.tolist())


def test_moves_and_jumps() -> None:
    # values: 0 condition, 1 and 2 tensors, 3 result, 4 False
    values = [
        tensor((), "bool", place=0),
        tensor((2,), place=16),
        tensor((2,), place=32),
        tensor((2,), place=48),
        False,
    ]
    steps = [JumpFalseCall(0, 3), MoveCall(1, 3), JumpFalseCall(4, 4), MoveCall(2, 3)]
    program = torchvk.load(write(Plan(values, [0, 1, 2], [3], steps)))
    one, two = np.ones(2, np.float32), np.full(2, 2, np.float32)
    assert program(np.array(True), one, two).tolist() == [1, 1]
    assert program(np.array(False), one, two).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("add", (2, 3), 5),
        ("sub", (2, 3.5), -1.5),
        ("mul", (2, 3), 6),
        ("floordiv", (-7, 2), -4),
        ("truediv", (7, 2), 3.5),
        ("mod", (-7, 3), 2),
        ("eq", (2, 2), True),
        ("gt", (2, 2), False),
        ("le", (2, 2), True),
        ("neg", (2,), -2),
        ("ceil", (2.5,), 3),
        ("round", (2.5,), 2),
        ("trunc", (-2.5,), -2),
        ("sym_float", (2,), 2.0),
        ("sym_max", (2, 3), 3),
        ("sym_not", (True,), False),
        ("sym_ite", (False, 1, 2), 2),
    ],
)
def test_number_operators(name: str, arguments: tuple[Any, ...], expected: Any) -> None:
    count = len(arguments)
    plan = Plan([*arguments, 0], [], [count], [call(0, *range(count + 1))], [(f"executorch_prim::{name}", "Scalar")])
    result = torchvk.load(write(plan))
    assert result() == expected
    assert type(result()) is type(expected)


HOSTILE: dict[str, tuple[Plan, type[Exception], str]] = {
    "endless loop": (Plan([False], [], [0], [JumpFalseCall(0, 0)]), FormatError, "does not end: it jumped back"),
    "growing number": (
        Plan([3, False], [], [0], [call(0, 0, 0, 0), JumpFalseCall(1, 0)], [("executorch_prim::mul", "Scalar")]),
        FormatError,
        "integer overflow",
    ),
    "division by zero": (
        Plan([3, 0, 0], [], [2], [call(0, 0, 1, 2)], [("executorch_prim::floordiv", "Scalar")]),
        TorchVkError,
        "division by zero|modulo by zero",
    ),
    "numbers from tensors": (
        Plan([tensor((2,), place=0), 0], [0], [1], [call(0, 0, 0, 1)], [("executorch_prim::add", "Scalar")]),
        FormatError,
        "takes numbers",
    ),
    "output never written": (Plan([tensor((2,))], [], [0]), FormatError, "never written"),
    "size of no dimension": (
        Plan([tensor((2,), place=0), 5, 0], [0], [2], [call(0, 0, 1, 2)], [("aten::sym_size", "int")]),
        TorchVkError,
        "out of range",
    ),
    "wrong view": (
        Plan(
            [tensor((2,), place=0), 5, tensor((5,))],
            [0],
            [2],
            [call(0, 0, 1, 2)],
            [("executorch_prim::et_view", "default")],
        ),
        TorchVkError,
        "et_view",
    ),
    "vector as a condition": (Plan([tensor((2,), place=0)], [0], [0], [JumpFalseCall(0, 0)]), FormatError, "condition"),
    "no such dtype": (  # torch itself looks it up in a table, far outside
        Plan(
            [tensor((2,), place=0), IntList([2]), 0, False, -127, tensor((), place=16)],
            [0],
            [5],
            [call(0, 0, 1, 3, 4, 5, 5)],
            [("aten::sum", "IntList_out")],
        ),
        FormatError,
        "no such dtype: -127",
    ),
    "wrong arguments": (
        Plan([tensor((2,), place=0), "two"], [0], [0], [call(0, 0, 1, 1, 0, 0)], [("aten::add", "out")]),
        TorchVkError,
        "failed on the CPU",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_steps_fail_when_they_run(case: str) -> None:
    plan, error, message = HOSTILE[case]
    program = torchvk.load(write(plan))
    inputs = [np.zeros(2, np.float32)] * len(plan.inputs)
    for _ in range(2):
        with pytest.raises(error, match=message):
            program(*inputs)


def test_constants_cannot_be_written() -> None:
    plan = Plan([tensor((2,), constant=1), tensor((2,), place=0)], [1], [0], [call(0, 1, 0, 0)], [("aten::neg", "out")])
    constant = np.ones(2, np.float32).tobytes()
    with pytest.raises(FormatError, match="writes value 0, which is a constant"):
        torchvk.load(write(plan, constants=[constant]))
    plan.instructions, plan.operators = [call(0, 1, 0)], [("aten::neg", "")]
    program = torchvk.load(write(plan, constants=[constant]))
    with pytest.raises(FormatError, match="writes value 0, which is a constant"):
        program(np.ones(2, np.float32))


def test_too_few_arguments() -> None:
    plan = Plan([tensor((2,), place=0)], [0], [0], [call(0, 0)], [("aten::add", "out")])
    with pytest.raises(FormatError, match=r"aten::add\.out is called with 1 arguments, it takes 4"):
        torchvk.load(write(plan))


def test_memory_beyond_the_machine() -> None:
    plan = Plan([tensor((1 << 18, 1 << 18), place=0)], [0], [0])
    with pytest.raises(torchvk.errors.OutOfMemoryError, match=r"need 274877906944 bytes of host memory"):
        torchvk.load(write(plan))


def test_describe_and_profile_a_mixed_program(tmp_path: Path) -> None:
    plan = mixed_plan(
        call(0, 2, 4, 4), operators=[("aten::neg", "out")], values=[tensor((2, 3), place=128)], outputs=(3, 4)
    )
    program = torchvk.load(write(plan), device="reference")
    (method,) = program.describe().methods
    assert dict(method.cpu_operators) == {"aten::neg.out": 1}
    assert "left to the CPU by the partitioner" in method.cpu_reason
    assert "1 × aten::neg.out" in str(program.describe())
    profile = program.profile(A, A)
    assert {row.operator for row in profile.rows} == {"mul", "add", "sub", "aten::neg.out"}
    starts = {record.operator: record.start for record in profile.records}
    assert starts["mul"] < starts["aten::neg.out"]
    profile.write_trace(tmp_path / "trace.json")
    names = [event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    assert "aten::neg.out" in names
    np.testing.assert_array_equal(program(A, A)[1], -3 * A)

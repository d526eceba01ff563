"""Programs with operators on the CPU: what exir leaves there runs with torch and gives what eager gives."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass, ToOutVarPass
from executorch.exir.passes.init_mutable_pass import InitializedMutableBufferPass
from executorch.exir.schema import TensorList
from functorch.experimental.control_flow import map as torch_map
from pte_files import Plan, call, tensor, write
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import torchvk
from torchvk.errors import ArgumentError, ArgumentTypeError, TorchVkError, UnsupportedError

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

"""Delegates and CPU operators together, without torch where it is not needed: written by hand, since exir never leaves
exactly these on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from executorch.exir import to_edge_transform_and_lower
from executorch.exir.schema import IntList, JumpFalseCall, MoveCall
from pte_files import BACKEND, Plan, affine_graph, call, delegate_call, tensor, write
from torch import nn

import torchvk
from torchvk.errors import FormatError, TorchVkError
from torchvk.graph import to_bytes

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


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
    x = torch.randn(3, 4)
    partitioner = torchvk.VulkanPartitioner(operator_blocklist=["aten._softmax.default"])
    lowered = to_edge_transform_and_lower(torch.export.export(module, (x,)), partitioner=[partitioner])
    with torchvk.load(lowered.to_executorch(), device=device) as program:
        (method,) = program.describe().methods
        assert [dict(delegate.operators)["linear"] for delegate in method.delegates] == [1, 1]
        assert dict(method.cpu_operators) == {"aten::_softmax.out": 1}
        for each in (x, torch.flip(x, [0])):
            # float32 sums of up to 8 terms of size 1, in another order.
            torch.testing.assert_close(program(each), module(each), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(torch.from_numpy(program(each.numpy())), module(each), rtol=1e-5, atol=1e-6)
        profile = program.profile(x)
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

"""Sessions on a device: calls, bad input, life and death."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from sample_graphs import Builder, arithmetic, arithmetic_inputs, arithmetic_result

from torchvk.errors import (
    ArgumentError,
    ArgumentTypeError,
    ClosedError,
    DeviceLostError,
    FormatError,
    OutOfMemoryError,
    UnsupportedError,
)
from torchvk.graph import DType, TensorType
from torchvk.ops import Capabilities, Kernels, operator
from torchvk.runtime import Session, by_operator, chrome_trace, validation_messages
from torchvk.runtime import session as session_module
from torchvk.runtime.device import Device, open_device
from torchvk.runtime.execution import Execution

Array = np.ndarray[Any, Any]


@pytest.mark.parametrize("options", [{}, {"staged": True}, {"poison": True}, {"max_tier": 0}, {"device": "reference"}])
def test_a_graph_runs(options: dict[str, Any]) -> None:
    with Session(arithmetic(), **options) as session:
        for seed in range(3):
            inputs = arithmetic_inputs(seed)
            (result,) = session.run(inputs)
            np.testing.assert_array_equal(result, arithmetic_result(inputs))


def test_kernels_are_chosen_for_the_matmul_precision() -> None:
    """It reaches kernel choice as plain data."""
    seen: list[str] = []
    known = operator.get("mul")

    def kernels(attributes: Any, inputs: Any, outputs: Any, capabilities: Capabilities) -> Kernels:
        seen.append(capabilities.matmul_precision)
        return known.kernels(attributes, inputs, outputs, capabilities)

    operator._registry["mul"] = replace(known, kernels=kernels)
    try:
        for precision in (None, "highest", "high"):
            Session(arithmetic(), matmul_precision=precision).close()
    finally:
        operator._registry["mul"] = known
    assert set(seen) == {"highest", "high"}
    for device in (None, "reference"):
        with pytest.raises(ArgumentError, match="matmul_precision must be 'highest' or 'high', not 'low'"):
            Session(arithmetic(), device, matmul_precision="low")


def test_results_belong_to_the_caller() -> None:
    with Session(arithmetic()) as session:
        (first,) = session.run(arithmetic_inputs(1))
        kept = first.copy()
        (second,) = session.run(arithmetic_inputs(2))
        second[:] = 0
    np.testing.assert_array_equal(first, kept)
    assert first.flags.writeable
    assert first.flags.owndata


def strided(array: Array) -> Iterator[Array]:
    """The same values behind other strides."""
    yield np.asfortranarray(array)
    wide = np.zeros((array.shape[0], array.shape[1] * 2), array.dtype)
    wide[:, ::2] = array
    yield wide[:, ::2]
    yield np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1]
    readonly = array.copy()
    readonly.flags.writeable = False
    yield readonly


def test_any_strides_will_do() -> None:
    inputs = arithmetic_inputs()
    with Session(arithmetic()) as session:
        for a in strided(inputs[0]):
            np.testing.assert_array_equal(session.run([a, inputs[1]])[0], arithmetic_result(inputs))


@pytest.mark.parametrize("device", [None, "reference"])
def test_scalars_and_empty_tensors(device: str | None) -> None:
    builder = Builder()
    scalar = builder.input("scalar", TensorType(DType.FLOAT32, ()))
    empty = builder.input("empty", TensorType(DType.FLOAT32, (0, 4)))
    total = builder.op("add", scalar, scalar)
    nothing = builder.op("add", empty, scalar)
    graph = builder.build([total, nothing, empty])
    with Session(graph, device) as session:
        for value in (np.array(3, np.float32), np.float32(3)):
            total_, nothing_, empty_ = session.run([value, np.zeros((0, 4), np.float32)])  # type: ignore[list-item]
            assert total_.shape == ()
            assert total_ == 6
            assert nothing_.shape == empty_.shape == (0, 4)


def bad_inputs() -> dict[str, tuple[Callable[[list[Array]], list[Any]], type[Exception], str]]:
    return {
        "one missing": (lambda i: i[:1], ArgumentError, r"1 inputs were given, 2 are taken \(a: float32\[3, 5\]"),
        "none": (lambda i: [], ArgumentError, "0 inputs were given"),
        "one too many": (lambda i: [*i, i[0]], ArgumentError, "3 inputs were given"),
        "rank": (
            lambda i: [i[0], i[1][0]],
            ArgumentError,
            r"input 1 \('b'\) is float32\[5\], expected float32\[3, 5\]",
        ),
        "shape": (lambda i: [i[0].T, i[1]], ArgumentError, r"input 0 \('a'\) is float32\[5, 3\]"),
        "dtype": (lambda i: [i[0].astype(np.float64), i[1]], ArgumentTypeError, r"'a'\) is float64\[3, 5\]"),
        "byte order": (lambda i: [i[0].astype(">f4"), i[1]], ArgumentTypeError, "'a'"),
        "list": (lambda i: [i[0].tolist(), i[1]], ArgumentTypeError, r"'a'\) is a list, expected .*float32\[3, 5\]"),
        "None": (lambda i: [i[0], None], ArgumentTypeError, r"'b'\) is a NoneType"),
    }


@pytest.mark.parametrize("case", bad_inputs())
@pytest.mark.parametrize("device", [None, "reference"])
def test_bad_inputs_are_named(case: str, device: str | None) -> None:
    change, error, message = bad_inputs()[case]
    inputs = arithmetic_inputs()
    with Session(arithmetic(), device) as session:
        with pytest.raises(error, match=message):
            session.run(change(inputs))
        with pytest.raises(error, match=message):
            session.profile(change(inputs))
        np.testing.assert_array_equal(session.run(inputs)[0], arithmetic_result(inputs))


def test_graphs_are_checked_before_use() -> None:
    graph = arithmetic()
    nodes = (replace(graph.nodes[0], op="launch_missiles"), *graph.nodes[1:])
    with pytest.raises(FormatError, match="launch_missiles"):
        Session(replace(graph, nodes=nodes))


@pytest.mark.parametrize("device", [None, "reference"])
@pytest.mark.parametrize("staged", [False, True])
def test_outputs_that_alias_inputs_constants_and_each_other(device: str | None, staged: bool) -> None:
    builder = Builder()
    x = builder.input("x", TensorType(DType.INT64, (2, 3)))
    c = builder.constant("c", np.arange(4, dtype=np.int32))
    view = builder.op("reshape", x, shape=[3, 2])
    total = builder.op("add", view, view)
    total_view = builder.op("reshape", total, shape=[6])
    graph = builder.build([x, view, c, total, total_view, total])
    value = np.arange(6).reshape(2, 3) - 2**40
    with Session(graph, device, staged=staged) as session:
        outputs = session.run([value])
        double = 2 * value.reshape(3, 2)
        expected: list[Array] = [value, value.reshape(3, 2), np.arange(4, dtype=np.int32), double]
        expected += [double.reshape(6), double]
        for output, wanted in zip(outputs, expected, strict=True):
            np.testing.assert_array_equal(output, wanted)
            assert output.dtype == wanted.dtype
        outputs[0][:] = 0
        assert value[0, 0] == -(2**40)


@pytest.mark.parametrize("device", [None, "reference"])
def test_closed_sessions_say_so(device: str | None) -> None:
    session = Session(arithmetic(), device)
    session.close()
    session.close()
    for use in (session.run, session.profile):
        with pytest.raises(ClosedError):
            use(arithmetic_inputs())
    with Session(arithmetic(), device) as session:
        pass
    with pytest.raises(ClosedError):
        session.run(arithmetic_inputs())


def test_threads_queue_up() -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        inputs = arithmetic_inputs(seed)
        results = [session.run(inputs)[0] for _ in range(50)]
        wrong.extend(seed for result in results if not np.array_equal(result, arithmetic_result(inputs)))

    with Session(arithmetic()) as session:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_sessions_on_one_device_do_not_disturb_each_other() -> None:
    """Calls, openings and closings in several threads."""
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        inputs = arithmetic_inputs(seed)
        try:
            for _ in range(5):
                with Session(arithmetic(), staged=seed % 2 == 1) as session:
                    np.testing.assert_array_equal(session.run(inputs)[0], arithmetic_result(inputs))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_everything_is_freed(own_device: Device) -> None:
    for staged in (False, True):
        with Session(arithmetic(), staged=staged) as session:
            session.run(arithmetic_inputs())
            session.profile(arithmetic_inputs())
            assert own_device.allocator.usage()[0] > 0
        assert own_device.allocator.usage() == (0, 0)


def test_the_garbage_collector_frees_too(own_device: Device) -> None:
    session = Session(arithmetic())
    session.run(arithmetic_inputs())
    del session
    assert own_device.allocator.usage() == (0, 0)
    cycle: list[Any] = [Session(arithmetic())]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert own_device.allocator.usage() == (0, 0)


def test_a_finalizer_that_meets_the_lock_leaves_the_work_for_later(own_device: Device) -> None:
    session = Session(arithmetic())
    with own_device.lock:
        del session
        assert own_device.allocator.usage()[0] > 0
    with Session(arithmetic()):
        pass
    assert own_device.allocator.usage() == (0, 0)


def test_a_session_that_cannot_be_made_leaves_nothing(own_device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise OutOfMemoryError("vkAllocateDescriptorSets failed: VK_ERROR_OUT_OF_DEVICE_MEMORY")

    monkeypatch.setattr(own_device.functions, "vkAllocateDescriptorSets", broken, raising=False)
    with pytest.raises(OutOfMemoryError):
        Session(arithmetic())
    assert own_device.allocator.usage() == (0, 0)


def test_a_lost_device_is_replaced(own_device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*arguments: Any) -> Any:
        raise DeviceLostError("vkQueueSubmit2 failed: VK_ERROR_DEVICE_LOST")

    with Session(arithmetic()) as session:
        monkeypatch.setattr(own_device.functions, "vkQueueSubmit2", lost, raising=False)
        with pytest.raises(DeviceLostError, match=r"vkQueueSubmit2.*was lost, open a new session"):
            session.run(arithmetic_inputs())
    with Session(arithmetic()) as session:
        assert open_device() is not own_device
        np.testing.assert_array_equal(session.run(arithmetic_inputs())[0], arithmetic_result(arithmetic_inputs()))
    open_device().close()


def test_a_device_lost_while_opening_is_replaced(own_device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*arguments: Any) -> Any:
        raise DeviceLostError("vkAllocateMemory failed: VK_ERROR_DEVICE_LOST")

    with monkeypatch.context() as patch:
        patch.setattr(own_device.functions, "vkAllocateMemory", lost, raising=False)
        with pytest.raises(DeviceLostError, match="open a new session"):
            Session(arithmetic())
    assert open_device() is not own_device
    open_device().close()


def test_ctrl_c_waits_for_the_device(own_device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with Session(arithmetic()) as session:
        with monkeypatch.context() as patch:
            patch.setattr(own_device.functions, "vkWaitForFences", interrupted, raising=False)
            patch.setattr(own_device.functions, "vkGetFenceStatus", interrupted, raising=False)
            with pytest.raises(KeyboardInterrupt):
                session.run(arithmetic_inputs())
        np.testing.assert_array_equal(session.run(arithmetic_inputs())[0], arithmetic_result(arithmetic_inputs()))


def test_recorded_plans_are_kept_and_the_oldest_dropped(own_device: Device) -> None:
    """Shapes are static today, so a session makes one; the keys here stand for sets of shapes."""
    with Session(arithmetic()) as session:
        runner = session._runner
        assert isinstance(runner, session_module._OnDevice)
        first = runner._current()
        constants = dict(runner._constants)
        for key in range(session_module.MAX_EXECUTIONS - 1):
            runner.prepare(key)
        runner.prepare(tuple(type.shape for type in session._types))
        assert runner._current() is first
        runner.prepare("another")
        assert next(iter(runner._executions)) == 1
        assert len(runner._executions) == session_module.MAX_EXECUTIONS
        assert runner._constants == constants
        np.testing.assert_array_equal(session.run(arithmetic_inputs())[0], arithmetic_result(arithmetic_inputs()))


def test_on_a_gpu_the_host_spins_first(own_device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_device, "info", replace(own_device.info, kind="discrete"))
    for seconds in (0.0, 10.0):
        monkeypatch.setattr("torchvk.runtime.execution.SPIN_SECONDS", seconds)
        with Session(arithmetic()) as session:
            inputs = arithmetic_inputs()
            np.testing.assert_array_equal(session.run(inputs)[0], arithmetic_result(inputs))


def test_describe_counts() -> None:
    with Session(arithmetic()) as session:
        description = session.describe()
    assert description.operators == {"add": 1, "mul": 1, "permute": 1}
    # Where the host cannot read what kernels write, the output is copied.
    copies = int(open_device().allocator.types["result"] is None)
    assert (description.dispatches, description.copies, description.barriers) == (3, copies, 2 + copies)
    assert description.constant_bytes == 256
    assert description.arena_bytes == 512
    assert description.input_bytes == 512
    with Session(arithmetic(), staged=True) as session:
        assert session.describe().copies == 3
    with Session(arithmetic(), "reference") as session:
        assert session.describe().device == "reference"
        assert session.device is None


@pytest.mark.parametrize("options", [{}, {"staged": True}, {"device": "reference"}])
def test_profiles(options: dict[str, Any]) -> None:
    with Session(arithmetic(), **options) as session:
        rows = session.profile(arithmetic_inputs())
        again = session.profile(arithmetic_inputs())
        np.testing.assert_array_equal(session.run(arithmetic_inputs())[0], arithmetic_result(arithmetic_inputs()))
    assert len(rows) == len(again)
    computed = [row for row in rows if row.op != "copy"]
    assert [row.op for row in computed] == ["add", "mul", "permute"]
    assert [row.source for row in computed[:2]] == ["model.add", "model.mul"]
    for row, following in pairwise(rows):
        assert 0 <= row.start <= row.end <= following.start
        assert row.seconds == pytest.approx(row.end - row.start)
    assert all(row.bytes > 0 for row in rows)
    summary = by_operator([*rows, *rows])
    assert [row.seconds for row in summary] == sorted((row.seconds for row in summary), reverse=True)
    add = next(row for row in summary if row.op == "add")
    assert (add.count, add.source, add.bytes) == (2, "model.add", 2 * computed[0].bytes)
    trace = chrome_trace(rows)
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [event["name"] for event in events] == [row.op for row in rows]
    assert events[-1]["ts"] == pytest.approx(rows[-1].start * 1e6)


def test_without_timestamps_there_is_no_profile(own_device: Device) -> None:
    own_device.physical.timestamp_bits = 0
    with Session(arithmetic()) as session, pytest.raises(UnsupportedError, match="no timestamps"):
        session.profile(arithmetic_inputs())


@pytest.mark.validation
def test_the_validation_layers_see_a_missing_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    """That they are silent elsewhere means something."""
    messages = validation_messages()
    before = len(messages)
    monkeypatch.setattr(Execution, "_barrier", lambda *arguments: None)
    with Session(arithmetic()) as session:
        session.run(arithmetic_inputs())
    assert any("SYNC-HAZARD-READ-AFTER-WRITE" in message for message in messages[before:])
    del messages[before:]


def test_a_profile_of_nothing_is_empty() -> None:
    builder = Builder()
    graph = builder.build([builder.input("x", TensorType(DType.FLOAT32, (0,)))])
    with Session(graph) as session:
        assert session.profile([np.zeros(0, np.float32)]) == []


def test_the_environment_chooses_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHVK_DEVICE", "reference")
    with Session(arithmetic()) as session:
        assert session.device is None
    monkeypatch.setenv("TORCHVK_DEVICE", "no such device")
    with pytest.raises(ArgumentError, match="no such device"):
        Session(arithmetic())


EXIT = """
import os, sys, threading
sys.path.insert(0, {tests!r})
from sample_graphs import arithmetic, arithmetic_inputs
from torchvk.runtime import Session, validation_messages
import atexit

# Registered before the first session, so it runs after the sessions' own clean-up.
atexit.register(lambda: print("messages:", validation_messages()))
sessions = [Session(arithmetic(), staged=staged) for staged in (False, True)]
inputs = arithmetic_inputs()
sessions[0].run(inputs)
{extra}
print("end")
"""
DAEMON = """
def forever():
    while True:
        sessions[1].run(inputs)
started = threading.Thread(target=forever, daemon=True).start()
"""


@pytest.mark.parametrize("extra", ["", DAEMON, "sessions[0].cycle = sessions"], ids=["alive", "daemon thread", "cycle"])
def test_interpreters_exit_cleanly_with_sessions_alive(extra: str) -> None:
    code = EXIT.format(tests=os.path.dirname(__file__), extra=extra)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "Validation Error" not in result.stderr
    assert [line for line in result.stdout.splitlines() if line] == ["end", "messages: []"]

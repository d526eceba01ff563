"""Calling programs whose methods are delegates: inputs, outputs, errors, threads, closing, profile."""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pte_files import BACKEND, Plan, affine_graph, delegate_call, delegate_file, delegate_plan, tensor, write

import torchvk
from torchvk.errors import ArgumentError, ArgumentTypeError, ClosedError, FormatError
from torchvk.graph import DType, TensorType, to_bytes
from torchvk.graph.build import GraphBuilder


def load(source: Any, **keywords: Any) -> torchvk.Program:
    return torchvk.load(source, "reference", **keywords)


@pytest.fixture
def program() -> torchvk.Program:
    """x, y float32 [2, 3] → (2x + y, x − y)."""
    return load(delegate_file(affine_graph()))


def numbers(shape: tuple[int, ...] = (2, 3), seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_affine(outputs: Any, x: Any, y: Any) -> None:
    assert isinstance(outputs, tuple)
    np.testing.assert_array_equal(np.asarray(outputs[0]), 2 * np.asarray(x) + np.asarray(y))
    np.testing.assert_array_equal(np.asarray(outputs[1]), np.asarray(x) - np.asarray(y))


@pytest.mark.tier
@pytest.mark.parametrize("segments", [True, False])
def test_on_the_device(segments: bool) -> None:
    x, y = numbers(seed=1), numbers(seed=2)
    with torchvk.load(delegate_file(affine_graph(), segments=segments)) as program:
        assert_affine(program(x, y), x, y)
        assert_affine(program(torch.from_numpy(x), torch.from_numpy(y)), x, y)


@pytest.mark.parametrize(
    ("tune", "environment", "expected"),
    [
        (None, None, "on a GPU"),
        (None, "0", "no"),
        (None, "1", "everywhere"),
        (False, "1", "no"),
        (True, "0", "everywhere"),
    ],
)
def test_whether_kernels_are_timed(
    tune: bool | None, environment: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    real = torchvk.runtime.Session

    def session(graph: Any, device: Any, *, tuning: Any, **options: Any) -> Any:
        seen.append(tuning)
        return real(graph, "reference", **options)

    monkeypatch.setattr(torchvk.runtime, "Session", session)
    monkeypatch.delenv("TORCHVK_TUNE")
    if environment is not None:
        monkeypatch.setenv("TORCHVK_TUNE", environment)
    plans = delegate_plan(affine_graph()), delegate_plan(affine_graph(scale=3.0), "other")
    load(write(*plans), tune=tune).close()
    first, second = seen
    assert first is second, "one budget a program"
    assert {"no": first is None, "on a GPU": first and not first.on_cpu, "everywhere": first and first.on_cpu}[expected]


def test_an_unknown_word_for_tuning_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHVK_TUNE", "often")
    with pytest.raises(ArgumentError, match="TORCHVK_TUNE must be 0 or 1, not 'often'"):
        load(delegate_file(affine_graph()))


def test_numpy_in_numpy_out_torch_in_torch_out(program: torchvk.Program) -> None:
    x, y = numbers(seed=1), numbers(seed=2)
    outputs = program(x, y)
    assert all(type(output) is np.ndarray for output in outputs)
    assert_affine(outputs, x, y)
    outputs = program(torch.from_numpy(x), torch.from_numpy(y))
    assert all(type(output) is torch.Tensor for output in outputs)
    assert_affine(outputs, x, y)
    # One tensor is enough for tensors to come back.
    assert type(program(x, torch.from_numpy(y))[0]) is torch.Tensor


def test_one_output_is_bare() -> None:
    builder = GraphBuilder()
    type = TensorType(DType.FLOAT32, (3,))
    x = builder.input("x", type)
    (y,) = builder.node("add", [x, x], [type])
    program = load(delegate_file(builder.build([y])))
    assert program(np.ones(3, np.float32)).tolist() == [2, 2, 2]


def test_outputs_belong_to_the_caller(program: torchvk.Program) -> None:
    x, y = numbers(seed=1), numbers(seed=2)
    first = program(x, y)
    first[0][:] = 17
    assert_affine(program(x, y), x, y)
    assert (first[0] == 17).all()
    tensor_out = program(torch.from_numpy(x), y)[0]
    tensor_out.add_(1)


def test_the_same_output_twice_gives_two_arrays() -> None:
    graph = affine_graph()
    plan = delegate_plan(graph)
    program = load(write(Plan(plan.values, plan.inputs, [2, 3, 2], plan.instructions, delegates=plan.delegates)))
    first, _, third = program(numbers(), numbers())
    np.testing.assert_array_equal(first, third)
    assert not np.shares_memory(first, third)


def test_inputs_of_a_method_in_another_order() -> None:
    plan = delegate_plan(affine_graph())
    swapped = Plan(plan.values, [1, 0], [3, 2], plan.instructions, delegates=plan.delegates)
    x, y = numbers(seed=1), numbers(seed=2)
    difference, total = load(write(swapped))(y, x)
    assert_affine((total, difference), x, y)


class Parametrized:
    """Inputs that are not dense row-major arrays, but mean the same."""

    @staticmethod
    def cases() -> dict[str, Any]:
        x = numbers(seed=1)
        grad = torch.from_numpy(x.copy()).requires_grad_()
        negated = torch.view_as_complex(torch.stack([torch.zeros(2, 3), -torch.from_numpy(x)], -1)).conj().imag
        assert negated.is_neg()
        read_only = x.copy()
        read_only.flags.writeable = False
        unaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(2, 3)
        return {
            "fortran": np.asfortranarray(x),
            "transposed": np.ascontiguousarray(x.T).T,
            "negative strides": np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1],
            "every other": np.repeat(x, 2, axis=1)[:, ::2],
            "read-only": read_only,
            "unaligned": unaligned,
            "matrix": np.asmatrix(x),
            "requires grad": grad,
            "parameter": torch.nn.Parameter(torch.from_numpy(x.copy())),
            "torch transposed": torch.from_numpy(np.ascontiguousarray(x.T)).t(),
            "torch sliced": torch.from_numpy(np.repeat(x, 2, axis=1))[:, ::2],
            "negative bit": negated,
        }


@pytest.mark.tier
@pytest.mark.parametrize("device", ["reference", None])
@pytest.mark.filterwarnings("ignore:.*matrix subclass.*:PendingDeprecationWarning")
@pytest.mark.parametrize("case", Parametrized.cases())
def test_any_strides(case: str, device: str | None) -> None:
    x, y = numbers(seed=1), numbers(seed=2)
    with torchvk.load(delegate_file(affine_graph()), device=device) as program:
        outputs = program(Parametrized.cases()[case], y)
    assert_affine(outputs, x, y)


@pytest.mark.tier
@pytest.mark.parametrize("device", ["reference", None])
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1, 1, 1, 1, 1, 1, 1, 2)])
def test_any_shape(shape: tuple[int, ...], device: str | None) -> None:
    x, y = numbers(shape, 1), numbers(shape, 2)
    with torchvk.load(delegate_file(affine_graph(shape)), device=device) as program:
        outputs = program(x, y)
        assert outputs[0].shape == shape
        assert_affine(outputs, x, y)
        outputs = program(torch.as_tensor(x), torch.as_tensor(y))
        assert outputs[0].shape == shape


def test_numpy_scalars_are_0d_arrays() -> None:
    total, _ = load(delegate_file(affine_graph(())))(np.float32(3), np.float32(4))
    assert total == 10


X = numbers()

WRONG: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "too few": ((X,), ArgumentError, r"takes 2 inputs \(x: float32\[2, 3\], y: float32\[2, 3\]\), 1 was given"),
    "too many": ((X, X, X), ArgumentError, "3 were given"),
    "none": ((), ArgumentError, "0 were given"),
    "shape": (
        (X, X.T),
        ArgumentError,
        r"input 1 \('y'\) is float32\[3, 2\], the method takes float32\[2, 3\]",
    ),
    "rank": ((X, X[None]), ArgumentError, r"float32\[1, 2, 3\]"),
    "dtype": (
        (X.astype(np.float64), X),
        ArgumentTypeError,
        r"input 0 \('x'\) is float64\[2, 3\], the method takes float32\[2, 3\]",
    ),
    "byte order": ((X.astype(">f4"), X), ArgumentTypeError, r">f4"),
    "integers": ((X.astype(np.int32), X), ArgumentTypeError, "int32"),
    "objects": ((X.astype(object), X), ArgumentTypeError, "object"),
    "torch shape": ((torch.ones(3, 2), X), ArgumentError, r"input 0 \('x'\) is float32\[3, 2\]"),
    "torch dtype": ((X, torch.ones(2, 3, dtype=torch.bfloat16)), ArgumentTypeError, r"input 1 \('y'\) is bfloat16"),
    "meta tensor": ((torch.ones(2, 3, device="meta"), X), ArgumentTypeError, "on meta; move it to the CPU"),
    "sparse tensor": ((torch.ones(2, 3).to_sparse(), X), ArgumentTypeError, "sparse_coo"),
    "list": (([[1.0, 2, 3], [4, 5, 6]], X), ArgumentTypeError, "not list; use np.asarray"),
    "number": ((3.0, X), ArgumentTypeError, "not float"),
    "None": ((None, X), ArgumentTypeError, "not NoneType"),
    "string": ((X, "y"), ArgumentTypeError, "not str"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs(case: str, program: torchvk.Program) -> None:
    inputs, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        program(*inputs)
    # Both families: ours, and the built-in one that says the same.
    assert issubclass(error, torchvk.TorchVkError)
    assert issubclass(error, TypeError if error is ArgumentTypeError else ValueError)
    assert_affine(program(X, X), X, X)


def test_methods_share_a_delegate() -> None:
    graph = affine_graph()
    program = load(write(delegate_plan(graph), delegate_plan(graph, "again")))
    assert program.method_names == ("forward", "again")
    assert program.method("again")._sessions[0] is program.method("forward")._sessions[0]
    assert_affine(program.method("again")(X, X), X, X)
    only = load(write(delegate_plan(graph), delegate_plan(graph, "again")), methods=["again"])
    assert only.method_names == ("again",)
    with pytest.raises(ArgumentError, match="no method 'forward'; it has again"):
        only(X, X)
    with pytest.raises(ArgumentError, match="no method other; there are forward, again"):
        load(write(delegate_plan(graph), delegate_plan(graph, "again")), methods=["other"])
    with pytest.raises(ArgumentTypeError, match="methods must be a list of names, not the str 'again'"):
        load(write(delegate_plan(graph)), methods="again")


def test_unknown_device() -> None:
    with pytest.raises(ArgumentError, match="no-such-device"):
        torchvk.load(delegate_file(affine_graph()), device="no-such-device")


def test_delegate_and_method_must_agree() -> None:
    graph = affine_graph()
    plan = delegate_plan(graph)
    wrong_shape = [tensor((3, 2)), *plan.values[1:]]
    with pytest.raises(FormatError, match=r"takes float32\[2, 3\] for 'x', the method gives float32\[3, 2\]"):
        load(write(Plan(wrong_shape, [0, 1], [2, 3], plan.instructions, delegates=plan.delegates)))
    with pytest.raises(FormatError, match="3 arguments, its graph has 2 inputs and 2 outputs"):
        load(write(Plan(plan.values, [0, 1], [2], [delegate_call(0, 0, 1, 2)], delegates=plan.delegates)))


def test_close(program: torchvk.Program) -> None:
    method = program.method("forward")
    program.close()
    program.close()
    for use in (lambda: program(X, X), lambda: method(X, X), program.describe, lambda: method.profile(X, X)):
        with pytest.raises(ClosedError, match="closed"):
            use()
    assert "closed" in repr(program)


def test_context_manager_closes() -> None:
    with load(delegate_file(affine_graph())) as program:
        assert_affine(program(X, X), X, X)
    with pytest.raises(ClosedError):
        program(X, X)
    with pytest.raises(ClosedError), program:
        pass


def test_nothing_is_left_behind() -> None:
    gc.collect()
    gc.disable()
    try:
        program = load(delegate_file(affine_graph()))
        program(X, X)
        session = weakref.ref(program.method("forward")._sessions[0])
        gone = weakref.ref(program)
        del program
        # By counting references alone: device memory must not wait for the cycle collector.
        assert gone() is None
        assert session() is None
    finally:
        gc.enable()


def test_a_method_outlives_its_program_object() -> None:
    method = load(delegate_file(affine_graph())).method("forward")
    gc.collect()
    assert_affine(method(X, X), X, X)


@pytest.mark.tier
@pytest.mark.parametrize("device", ["reference", None])
def test_threads_queue_up(device: str | None) -> None:
    errors: list[BaseException] = []
    with torchvk.load(delegate_file(affine_graph((64, 64))), device=device) as program:

        def work(seed: int) -> None:
            try:
                for round in range(10):
                    x, y = numbers((64, 64), seed), numbers((64, 64), 100 + round)
                    assert_affine(program(x, y), x, y)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors


def test_closing_waits_for_a_call_in_another_thread(program: torchvk.Program, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, results = threading.Event(), []
    session = program.method("forward")._sessions[0]
    run = session.run

    def slow(inputs: Any) -> Any:
        inside.set()
        time.sleep(0.2)
        return run(inputs)

    monkeypatch.setattr(session, "run", slow)
    thread = threading.Thread(target=lambda: results.append(program(X, X)))
    thread.start()
    inside.wait(10)
    program.close()
    thread.join()
    assert_affine(results[0], X, X)


@pytest.mark.tier
@pytest.mark.parametrize("device", ["'reference'", "None"])
def test_clean_exit_with_programs_alive(tmp_path: Path, device: str) -> None:
    (tmp_path / "model.pte").write_bytes(delegate_file(affine_graph()))
    script = f"""
import numpy as np, torchvk
program = torchvk.load({str(tmp_path / "model.pte")!r}, device={device})
x = np.ones((2, 3), np.float32)
print(program(x, x)[0].sum())
cycle = [program]; cycle.append(cycle)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "18.0\n", "")


def test_describe(program: torchvk.Program) -> None:
    description = program.describe()
    (method,) = description.methods
    (delegate,) = method.delegates
    assert (delegate.backend, delegate.constant_bytes) == (BACKEND, 4)
    assert dict(delegate.operators) == {"mul": 1, "add": 1, "sub": 1}
    assert [(entry.name, entry.type) for entry in method.inputs] == [
        ("x", "float32[2, 3]"),
        ("y", "float32[2, 3]"),
    ]
    assert [entry.type for entry in method.outputs] == ["float32[2, 3]"] * 2
    assert (dict(method.cpu_operators), method.gpu_operators) == ({}, 3)
    text = str(description)
    for part in ("method forward", "x: float32[2, 3]", "1 × mul", "on the CPU: nothing", "4 of them constants"):
        assert part in text


@pytest.mark.tier
def test_profile_on_the_device(tmp_path: Path) -> None:
    with torchvk.load(delegate_file(affine_graph((64, 64)))) as program:
        x, y = numbers((64, 64), 1), numbers((64, 64), 2)
        profile = program.profile(x, y)
        assert_affine(program(x, y), x, y)
    assert {row.operator for row in profile.rows} >= {"mul", "add", "sub"}
    assert all(row.where == "GPU" for row in profile.rows)
    assert sum(row.share for row in profile.rows) == pytest.approx(1)
    assert profile.seconds > 0
    assert {record.source for record in profile.records} >= {"layers.0", "layers.1"}
    profile.write_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == len(profile.records)
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in spans)


@pytest.mark.tier
def test_measure() -> None:
    with torchvk.load(delegate_file(affine_graph((64, 64)))) as program:
        x, y = numbers((64, 64), 1), numbers((64, 64), 2)
        measured = program.measure(x, y, repeats=3)
        assert len(measured.seconds) == 3
        assert min(measured.seconds) <= measured.median <= max(measured.seconds)
        assert measured.dispatches >= 2
        assert measured.barriers >= 1
        assert_affine(program(x, y), x, y)
        with pytest.raises(ArgumentError):
            program.measure(x)


def test_measure_on_the_references() -> None:
    with torchvk.load(delegate_file(affine_graph((4, 4))), device="reference") as program:
        measured = program.measure(numbers((4, 4), 1), numbers((4, 4), 2), repeats=2)
    assert len(measured.seconds) == 2
    assert measured.dispatches == 0


def test_profile_table(program: torchvk.Program) -> None:
    lines = program.profile(X, X).table().splitlines()
    assert lines[0].split() == ["operator", "where", "count", "time/µs", "share", "GB/s", "GFLOP/s"]
    assert {line.split()[0] for line in lines[1:-1]} == {"mul", "add", "sub"}
    assert "forward on reference" in lines[-1]
    with pytest.raises(ArgumentError, match="takes 2 inputs"):
        program.profile(X)


def test_python_share_of_a_call_is_small() -> None:
    """Not a timing: the number of Python function calls that a call makes, up to and without the session's own."""
    program = load(delegate_file(affine_graph()))
    inputs = torch.from_numpy(X), X
    program(*inputs)
    session = program.method("forward")._sessions[0]
    results = session.run([X, X])
    session.run = lambda inputs: results  # type: ignore[method-assign]
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        program(*inputs)
    finally:
        sys.setprofile(None)
    assert calls < 80


def test_a_bad_graph_names_file_method_and_delegate(tmp_path: Path) -> None:
    graph = affine_graph()
    nodes = tuple(dataclasses.replace(node, op=node.op.replace("mul", "mux")) for node in graph.nodes)
    blob = to_bytes(dataclasses.replace(graph, nodes=nodes))
    path = tmp_path / "model.pte"
    plan = delegate_plan(graph)
    bad = Plan(plan.values, [0, 1], [2, 3], plan.instructions, delegates=[(BACKEND, blob)])
    path.write_bytes(write(bad))
    with pytest.raises(FormatError, match=r"model\.pte: method 'forward', delegate 0: .*unknown operator 'mux'"):
        load(path)

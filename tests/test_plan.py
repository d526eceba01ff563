"""The planner, without a device: order, sharing, memory. Plans are also carried out on plain bytes."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchvk.errors import TorchVkError, UnsupportedError
from torchvk.graph import DType, Graph, TensorType
from torchvk.graph.build import GraphBuilder
from torchvk.ops import Capabilities, Dispatch, Kernels, Layout, Operator
from torchvk.ops import operator as registry
from torchvk.ops.operator import Arg, read, scratch_read, scratch_write, write
from torchvk.runtime.arena import place
from torchvk.runtime.hazards import hazards
from torchvk.runtime.plan import make_plan
from torchvk.runtime.steps import ALIGNMENT, Plan, Step

DEVICE = Capabilities(
    tier=1,
    kind="cpu",
    subgroup_size=8,
    max_workgroup_invocations=1024,
    max_workgroup_size=(1024, 1024, 64),
    max_workgroup_count=(65535, 65535, 65535),
    shared_memory=32768,
    max_storage_range=1 << 20,
)


@dataclass(frozen=True)
class Work:
    """What a test operator's kernels do."""

    scratch: list[int] = field(default_factory=list)  # bytes; a kernel each, reading the first input
    salt: int = 0
    steps: int = 1  # kernels that write the output one after another, reading it
    groups: list[int] = field(default_factory=lambda: [1, 1, 1])
    push: int = 0
    layout: str = ""
    parts: bool = False  # two more kernels: each writes a part of the output, from the same part of the first input


def kernels(work: Work, inputs: Any, outputs: Any, capabilities: Capabilities) -> Kernels:
    layout = Layout(work.layout, lambda array: array) if work.layout else None
    dispatches = [
        Dispatch(f"prepare{work.salt}", (read(0), scratch_write(i)), (1, 1, 1), (size,))
        for i, size in enumerate(work.scratch)
    ]
    reads = [read(i, layout if i == 1 else None) for i, type in enumerate(inputs) if type is not None]
    reads += [scratch_read(i) for i in range(len(work.scratch))]
    for step in range(work.steps):
        result = write(0) if step == 0 else Arg("output", 0, write=True, read=True)
        groups = (work.groups[0], work.groups[1], work.groups[2])
        dispatches.append(Dispatch(f"work{work.salt}", (*reads, result), groups, (step,), bytes(work.push)))
    for part in PARTS if work.parts else ():
        result = Arg("output", 0, write=True, read=False, part=part)
        dispatches.append(
            Dispatch(f"part{work.salt}", (replace(read(0), part=part), *reads[1:], result), (1, 1, 1), part)
        )
    return Kernels(tuple(dispatches), tuple(work.scratch))


def first(attributes: Any, inputs: Any) -> Any:
    """Output like the first input."""
    return (inputs[0],)


def operator(name: str, **changes: Any) -> Operator:
    return replace(Operator(name, "", first, first, kernels, Work), **changes)


@pytest.fixture(autouse=True, scope="module")
def _test_operators() -> Any:
    mine = {"test_work": operator("test_work"), "test_view": operator("test_view", alias=True)}
    with pytest.MonkeyPatch.context() as patch:
        for name, entry in mine.items():
            patch.setitem(registry._registry, name, entry)
        yield


FLOATS = TensorType(DType.FLOAT32, (100,))
PARTS = ((0, 256), (256, 144))


def digest(*parts: bytes, size: int) -> bytes:
    return hashlib.shake_128(b"|".join(parts)).digest(size)


def expected(graph: Graph, inputs: list[bytes]) -> list[bytes]:
    """The graph's outputs, computed from its nodes with no plan: the test kernels are hashes of what they read."""
    values: dict[int, bytes] = dict(zip(graph.inputs, inputs, strict=True))

    def value(index: int) -> bytes:
        return values[index] if index in values else bytes(graph.constant_bytes(index))

    for node in graph.nodes:
        work = registry.get(node.op).decode(node)
        arguments = [value(index) for index in node.inputs if index is not None]
        if node.op == "test_view":
            values[node.outputs[0]] = arguments[0]
            continue
        scratch = [digest(f"prepare{work.salt}({size},)".encode(), arguments[0], size=size) for size in work.scratch]
        packed = [work.layout.encode() + a if i == 1 and work.layout else a for i, a in enumerate(arguments)]
        result = b""
        for step in range(work.steps):
            read_back = [result] if step else []
            parts = [f"work{work.salt}({step},)".encode(), *packed, *scratch, *read_back]
            result = digest(*parts, size=graph.tensors[node.outputs[0]].type.nbytes)
        if work.parts:
            pieces = [(f"part{work.salt}{part}".encode(), arguments[0][part[0] :][: part[1]], part) for part in PARTS]
            result = b"".join(digest(name, x, *packed[1:], *scratch, size=part[1]) for name, x, part in pieces)
        values[node.outputs[0]] = result
    return [value(index) for index in graph.outputs]


def carry_out(graph: Graph, plan: Plan, inputs: list[bytes], shuffle: random.Random) -> list[bytes]:
    """The plan on real bytes at its own offsets; the steps of a stage in any order."""
    memory: dict[str, bytearray] = {"input": bytearray(plan.input_bytes), "output": bytearray(plan.output_bytes)}
    memory["arena"] = bytearray(b"\xff" * plan.arena_bytes)
    sizes = real_sizes(graph, plan)

    def get(index: int) -> bytes:
        storage = plan.storages[index]
        if storage.kind == "constant":
            constant = plan.constants[storage.offset]
            prefix = constant.layout.name.encode() if constant.layout else b""
            return prefix + bytes(graph.constant_bytes(constant.tensor))
        return bytes(memory[storage.kind][storage.offset : storage.offset + sizes[index]])

    def put(index: int, data: bytes) -> None:
        storage = plan.storages[index]
        assert len(data) == sizes[index] <= storage.nbytes
        memory[storage.kind][storage.offset : storage.offset + len(data)] = data

    for index, data in zip(plan.inputs, inputs, strict=True):
        put(index, data)
    for stage in plan.stages:
        for step in shuffle.sample(stage, len(stage)):
            if step.dispatch is None:
                put(step.buffers[1], get(step.buffers[0])[: sizes[step.buffers[1]]])
                continue
            name = f"{step.dispatch.kernel}{step.dispatch.constants}".encode()
            parts = [get(index) for index in step.reads]
            for index in step.writes:
                put(index, digest(name, *parts, size=sizes[index]))
    return [get(index) for index in plan.outputs]


def real_sizes(graph: Graph, plan: Plan) -> dict[int, int]:
    """Bytes without padding: of graph tensors and scratch. In the tests all tensors have one size."""
    sizes = {index: FLOATS.nbytes for step in plan.steps for index in step.buffers}
    sizes |= dict.fromkeys((*plan.inputs, *plan.outputs), FLOATS.nbytes)
    sizes |= {i: storage.nbytes for i, storage in enumerate(plan.storages) if storage.whole is not None}
    for step in plan.steps:
        if step.dispatch is not None and step.dispatch.kernel.startswith("prepare"):
            sizes[step.writes[0]] = int(step.dispatch.constants[0])
    return sizes


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    builder = GraphBuilder()
    tensors = [builder.input(f"x{i}", FLOATS) for i in range(draw(st.integers(1, 3)))]
    tensors += [builder.constant(f"c{i}", np.full(100, i, np.float32)) for i in range(draw(st.integers(0, 2)))]
    constants = {i for i in tensors if builder.tensors[i].data is not None}
    fixed = set(constants)  # and views of them
    for _ in range(draw(st.integers(0, 14))):
        taken = draw(st.lists(st.sampled_from(tensors), min_size=1, max_size=3))
        if draw(st.integers(0, 4)) == 0:
            tensors += builder.node("test_view", taken[:1], [FLOATS])
            fixed |= {tensors[-1]} if taken[0] in fixed else set()
            continue
        parts = taken[0] not in fixed and draw(st.booleans())
        work = Work(
            scratch=draw(st.lists(st.sampled_from([4, 400, 1000]), max_size=2)),
            salt=draw(st.integers(0, 1)),
            steps=draw(st.integers(0 if parts else 1, 2)),
            parts=parts,
            layout="packed" if len(taken) > 1 and taken[1] in constants and draw(st.booleans()) else "",
        )
        tensors += builder.node("test_work", taken, [FLOATS], work)
    return builder.build(draw(st.lists(st.sampled_from(tensors), min_size=1, max_size=4)))


@given(graphs(), st.booleans(), st.booleans(), st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_plans_compute_the_graph(graph: Graph, stage_inputs: bool, stage_outputs: bool, shuffle: random.Random) -> None:
    plan = make_plan(graph, DEVICE, stage_inputs=stage_inputs, stage_outputs=stage_outputs)
    assert hazards(plan) == []
    inputs = [bytes([i]) * FLOATS.nbytes for i in range(len(graph.inputs))]
    assert carry_out(graph, plan, inputs, shuffle) == expected(graph, inputs)
    assert len(set(plan.outputs)) == len(plan.outputs)
    for storage in plan.storages:
        assert storage.kind == "constant" or storage.offset % ALIGNMENT == 0
    if stage_inputs:
        touched = {b for step in plan.steps if step.dispatch for b in step.buffers}
        assert touched.isdisjoint(plan.inputs)
    if stage_outputs:
        touched = {b for step in plan.steps if step.dispatch for b in step.buffers}
        assert touched.isdisjoint(plan.outputs)


def test_parts_of_one_buffer_are_written_together() -> None:
    builder = GraphBuilder()
    x = builder.input("x", FLOATS)
    (y,) = builder.node("test_work", [x], [FLOATS], Work(steps=0, parts=True))
    (z,) = builder.node("test_work", [y], [FLOATS], Work())
    plan = make_plan(builder.build([z]), DEVICE)
    assert [len(stage) for stage in plan.stages] == [2, 1]
    assert hazards(plan) == []
    storages = list(plan.storages)
    second = plan.stages[0][1].writes[0]
    storages[second] = replace(storages[second], offset=storages[second].offset - 16)
    found = hazards(replace(plan, storages=tuple(storages)))
    assert any("touch the same bytes" in text for text in found)
    assert any("not (or no longer) there" in text for text in found)


@given(graphs(), st.data())
@settings(max_examples=200, deadline=None)
def test_the_checker_finds_missing_barriers(graph: Graph, data: st.DataObject) -> None:
    """Every barrier of a plan is needed: without it the checker speaks."""
    plan = make_plan(graph, DEVICE)
    if plan.barriers:
        at = data.draw(st.integers(0, plan.barriers - 1))
        stages = [*plan.stages[:at], (*plan.stages[at], *plan.stages[at + 1]), *plan.stages[at + 2 :]]
        assert hazards(replace(plan, stages=tuple(stages)))


def chain(length: int, **work: Any) -> Graph:
    builder = GraphBuilder()
    last = builder.input("x", FLOATS)
    for salt in range(length):
        (last,) = builder.node("test_work", [last], [FLOATS], Work(salt=salt, **work))
    return builder.build([last])


def test_the_checker_finds_overlapping_memory() -> None:
    plan = make_plan(chain(3), DEVICE)
    assert hazards(plan) == []
    arena = [i for i, storage in enumerate(plan.storages) if storage.kind == "arena"]
    storages = list(plan.storages)
    for index in arena:
        storages[index] = replace(storages[index], offset=0)
    assert hazards(replace(plan, storages=tuple(storages)))


def test_the_checker_finds_memory_used_again_too_early() -> None:
    """y is overwritten by z before its second reader runs."""
    builder = GraphBuilder()
    x = builder.input("x", FLOATS)
    (y,) = builder.node("test_work", [x], [FLOATS], Work(salt=1))
    (z,) = builder.node("test_work", [y], [FLOATS], Work(salt=2))
    (w,) = builder.node("test_work", [z], [FLOATS], Work(salt=3))
    (out,) = builder.node("test_work", [w, y], [FLOATS], Work(salt=4))
    plan = make_plan(builder.build([out]), DEVICE)
    y_storage, _, w_storage = (step.writes[0] for step in plan.steps[:3])
    storages = list(plan.storages)
    storages[w_storage] = replace(storages[w_storage], offset=storages[y_storage].offset)
    assert any("no longer" in text for text in hazards(replace(plan, storages=tuple(storages))))


def test_a_chain_reuses_memory_and_has_a_barrier_a_step() -> None:
    plan = make_plan(chain(6), DEVICE)
    assert plan.barriers == 5
    assert plan.arena_bytes == 2 * 512  # 400 bytes aligned to 256; two alive at any time


def test_independent_steps_share_a_stage() -> None:
    builder = GraphBuilder()
    x = builder.input("x", FLOATS)
    branches = [builder.node("test_work", [x], [FLOATS], Work(salt=salt))[0] for salt in range(5)]
    (out,) = builder.node("test_work", branches, [FLOATS], Work())
    plan = make_plan(builder.build([out]), DEVICE)
    assert [len(stage) for stage in plan.stages] == [5, 1]


def test_a_step_without_dependencies_waits_until_it_is_needed() -> None:
    builder = GraphBuilder()
    x = builder.input("x", FLOATS)
    (early,) = builder.node("test_work", [x], [FLOATS], Work(salt=9))
    last = x
    for salt in range(4):
        (last,) = builder.node("test_work", [last], [FLOATS], Work(salt=salt))
    (out,) = builder.node("test_work", [last, early], [FLOATS], Work())
    plan = make_plan(builder.build([out]), DEVICE)
    assert [len(stage) for stage in plan.stages] == [1, 1, 1, 2, 1]


def kernel_names(plan: Plan) -> list[str]:
    return [step.dispatch.kernel if step.dispatch else "copy" for step in plan.steps]


def shared_input(second: Work, first: Work | None = None) -> Plan:
    builder = GraphBuilder()
    x = builder.input("x", FLOATS)
    (a,) = builder.node("test_work", [x], [FLOATS], first or Work(scratch=[64]))
    (view,) = builder.node("test_view", [x], [FLOATS])
    (b,) = builder.node("test_work", [view], [FLOATS], second)
    return make_plan(builder.build([a, b]), DEVICE)


def test_equal_dispatches_into_scratch_run_once() -> None:
    assert sorted(kernel_names(shared_input(Work(scratch=[64])))) == ["prepare0", "work0", "work0"]


@pytest.mark.parametrize(
    "second",
    [Work(scratch=[65]), Work(scratch=[64], salt=1)],
    ids=["another size and constant", "another kernel"],
)
def test_different_dispatches_into_scratch_all_run(second: Work) -> None:
    assert len(kernel_names(shared_input(second))) == 4


def one_operator_plan(entry: Operator, monkeypatch: pytest.MonkeyPatch, copies: int = 2) -> Plan:
    monkeypatch.setitem(registry._registry, entry.name, entry)
    builder = GraphBuilder()
    x = builder.input("x", FLOATS)
    outputs = [builder.node(entry.name, [x], [FLOATS], Work())[0] for _ in range(copies)]
    return make_plan(builder.build(outputs), DEVICE)


def test_scratch_that_is_written_twice_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(work: Any, inputs: Any, outputs: Any, capabilities: Any) -> Kernels:
        fill = Dispatch("fill", (scratch_write(0),), (1, 1, 1))
        add = Dispatch("add", (read(0), Arg("scratch", 0, write=True)), (1, 1, 1))
        return Kernels((fill, add, Dispatch("work", (scratch_read(0), write()), (1, 1, 1))), (64,))

    plan = one_operator_plan(operator("test_twice", kernels=twice), monkeypatch)
    assert sorted(kernel_names(plan)) == ["add", "add", "fill", "fill", "work", "work"]
    assert hazards(plan) == []


def test_integer_and_float_constants_are_different_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed(work: Any, inputs: Any, outputs: Any, capabilities: Any) -> Kernels:
        whole = Dispatch("scale", (read(0), scratch_write(0)), (1, 1, 1), (1,))
        real = Dispatch("scale", (read(0), scratch_write(1)), (1, 1, 1), (1.0,))
        return Kernels(
            (whole, real, Dispatch("work", (scratch_read(0), scratch_read(1), write()), (1, 1, 1))), (64, 64)
        )

    plan = one_operator_plan(operator("test_mixed", kernels=mixed), monkeypatch, copies=1)
    assert len(plan.steps) == 3


def test_what_no_output_needs_is_dropped() -> None:
    builder = GraphBuilder()
    x = builder.input("x", FLOATS)
    (y,) = builder.node("test_work", [x], [FLOATS], Work())
    builder.node("test_work", [y], [FLOATS], Work(scratch=[64], salt=1))
    plan = make_plan(builder.build([y]), DEVICE)
    assert kernel_names(plan) == ["work0"]
    assert plan.arena_bytes == 0


def test_outputs_that_share_bytes_are_copied() -> None:
    builder = GraphBuilder()
    x = builder.input("x", FLOATS)
    c = builder.constant("c", np.zeros(100, np.float32))
    (y,) = builder.node("test_work", [x], [FLOATS], Work())
    (view,) = builder.node("test_view", [y], [FLOATS])
    (constant_view,) = builder.node("test_view", [c], [FLOATS])
    plan = make_plan(builder.build([x, c, y, view, y, constant_view]), DEVICE)
    assert sorted(kernel_names(plan)) == ["copy"] * 5 + ["work0"]


def test_equal_constants_in_equal_layouts_are_uploaded_once() -> None:
    builder = GraphBuilder()
    x = builder.input("x", FLOATS)
    c = builder.constant("c", np.zeros(100, np.float32))
    works = [Work(layout="rows"), Work(layout="rows", salt=1), Work(layout="columns"), Work(), Work(salt=1)]
    outputs = [builder.node("test_work", [x, c], [FLOATS], work)[0] for work in works]
    plan = make_plan(builder.build(outputs), DEVICE)
    assert [constant.layout and constant.layout.name for constant in plan.constants] == ["rows", "columns", None]


def test_empty_tensors_need_no_work() -> None:
    empty = TensorType(DType.FLOAT32, (0, 3))
    builder = GraphBuilder()
    x = builder.input("x", empty)
    (y,) = builder.node("test_work", [x], [empty], Work(groups=[0, 1, 1]))
    (z,) = builder.node("test_work", [y], [empty], Work(groups=[0, 1, 1], salt=1))
    plan = make_plan(builder.build([z, y, x]), DEVICE)
    assert plan.steps == ()
    assert len(plan.outputs) == 3


def test_reading_an_empty_tensor_that_nothing_wrote_is_fine() -> None:
    empty = TensorType(DType.FLOAT32, (0,))
    builder = GraphBuilder()
    x = builder.input("x", FLOATS)
    e = builder.input("e", empty)
    (y,) = builder.node("test_work", [e], [empty], Work(groups=[0, 1, 1]))
    (z,) = builder.node("test_work", [x, y], [FLOATS], Work())
    plan = make_plan(builder.build([z]), DEVICE)
    assert kernel_names(plan) == ["work0"]
    assert hazards(plan) == []


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (Work(groups=[65536, 1, 1]), "65536"),
        (Work(groups=[1, -1, 1]), "-1"),
        (Work(push=132), "132 bytes of push constants"),
        (Work(push=6), "6 bytes of push constants"),
        (Work(scratch=[1 << 21]), "2,097,152"),
        (Work(groups=[0, 1, 1]), "never written"),
    ],
)
def test_broken_dispatches_are_refused(work: Work, message: str) -> None:
    builder = GraphBuilder()
    (y,) = builder.node("test_work", [builder.input("x", FLOATS)], [FLOATS], work, source="encoder.layer")
    with pytest.raises(TorchVkError, match=message):
        make_plan(builder.build([y]), DEVICE)


def test_tensors_above_the_storage_range_are_refused_with_numbers() -> None:
    large = TensorType(DType.FLOAT32, (1 << 19,))
    builder = GraphBuilder()
    (y,) = builder.node("test_work", [builder.input("x", FLOATS)], [large], Work(), source="encoder.layer")
    with pytest.raises(UnsupportedError, match=r"encoder.layer.*2,097,152.*1,048,576"):
        make_plan(builder.build([y]), DEVICE)
    builder = GraphBuilder()
    with pytest.raises(UnsupportedError, match=r"input 'x'.*2,097,152"):
        make_plan(builder.build([builder.input("x", large)]), DEVICE)


def test_int4_cannot_be_an_output() -> None:
    builder = GraphBuilder()
    c = builder.constant("c", np.zeros((2, 4), np.int8), DType.INT4)
    with pytest.raises(UnsupportedError, match="int4"):
        make_plan(builder.build([c]), DEVICE)


def test_reading_scratch_that_nothing_wrote_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(work: Any, inputs: Any, outputs: Any, capabilities: Any) -> Kernels:
        return Kernels((Dispatch("work", (scratch_read(0), write()), (1, 1, 1)),), (64,))

    with pytest.raises(TorchVkError, match="nothing wrote"):
        one_operator_plan(operator("test_broken", kernels=broken), monkeypatch)


@pytest.mark.parametrize(
    ("buffers", "message"),
    [
        ((Arg("input", 0, write=True), write()), "writes input 0"),
        ((read(1), write()), "binds its absent input 1"),
        ((Arg("output", 0, write=True, read=False, texels=True),), "writes a buffer of texels"),
        ((read(0, texels=True), write()), "reads 400 bytes as texels; this device binds at most 16"),
    ],
)
def test_broken_bindings_are_refused(buffers: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(work: Any, inputs: Any, outputs: Any, capabilities: Any) -> Kernels:
        return Kernels((Dispatch("work", buffers, (1, 1, 1)),))

    monkeypatch.setitem(registry._registry, "test_broken", operator("test_broken", kernels=broken))
    builder = GraphBuilder()
    x = builder.input("x", FLOATS)
    (y,) = builder.node("test_broken", [x, None], [FLOATS], Work())
    with pytest.raises(TorchVkError, match=message):
        make_plan(builder.build([y]), replace(DEVICE, max_texels=1))


def test_a_plan_that_writes_an_input_is_found() -> None:
    plan = make_plan(chain(1), DEVICE)
    (step,) = plan.steps
    writes_input = replace(step, writes=(*step.writes, *step.reads))
    assert any("kind input" in text for text in hazards(replace(plan, stages=((writes_input,),))))


@given(st.dictionaries(st.integers(0, 50), st.tuples(st.integers(0, 5000), st.integers(0, 9), st.integers(0, 9))))
@settings(deadline=None)
def test_the_arena_never_overlaps_what_lives_together(wanted: dict[int, tuple[int, int, int]]) -> None:
    wanted = {i: (n, min(a, b), max(a, b)) for i, (n, a, b) in wanted.items()}
    offsets, size = place(wanted)
    peak = 0
    for i, (n, first, last) in wanted.items():
        assert offsets[i] % ALIGNMENT == 0
        assert offsets[i] + n <= size
        for j, (m, other_first, other_last) in wanted.items():
            if i != j and n and m and first <= other_last and other_first <= last:
                assert offsets[i] + n <= offsets[j] or offsets[j] + m <= offsets[i]
    for stage in range(10):
        peak = max(peak, sum(n for n, first, last in wanted.values() if first <= stage <= last))
    assert size >= peak


def test_steps_say_what_they_read_and_write() -> None:
    (step,) = make_plan(chain(1), DEVICE).steps
    assert isinstance(step, Step)
    assert (len(step.reads), len(step.writes), step.node) == (1, 1, 0)

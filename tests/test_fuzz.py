"""Damaged and hostile files: whatever the bytes, only torchvk's own errors come out, soon and without much memory.

Files that still load after the damage are run, too, as long as what they describe stays small.
"""

from __future__ import annotations

import resource
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from executorch.exir.schema import IntList, JumpFalseCall, MoveCall, TensorList
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pte_files import BACKEND, Plan, affine_graph, call, delegate_call, delegate_plan, tensor, write

import torchvk
from torchvk import ops
from torchvk.errors import FormatError, TorchVkError
from torchvk.graph import DType, Graph, TensorType, from_bytes, to_bytes
from torchvk.graph.build import GraphBuilder
from torchvk.graph.serialize import frame
from torchvk.program import describe, pte
from torchvk.program.pte import TensorValue
from torchvk.program.source import open_source

SMALL = 1 << 20  # bytes of tensors of a program that is run
SECONDS = 10
MEGABYTES = 500


@pytest.fixture(autouse=True)
def _memory_stays_bounded() -> Iterator[None]:
    before = peak()
    yield
    assert peak() - before < MEGABYTES


def peak() -> float:
    """The most memory that this process ever had, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def program_files() -> dict[str, bytes]:
    values = [tensor((2, 3), place=32 * index) for index in range(5)]
    mixed = Plan(
        [*values, 1, None, IntList([5, 5]), TensorList([0, 1]), tensor((2,), constant=1), tensor((4, 3), place=192), 0],
        [0, 1],
        [2, 4, 9, 10],
        [
            delegate_call(0, 0, 1, 2, 3),
            call(0, 2, 3, 5, 4, 4),
            call(1, 8, 11, 10, 10),
            MoveCall(3, 2),
        ],
        [("aten::add", "out"), ("aten::cat", "out")],
        [(BACKEND, to_bytes(affine_graph()))],
    )
    loop = Plan(
        [0, 1, 4, False, tensor((2,), place=0)],
        [4],
        [0, 4],
        [call(0, 0, 1, 0), call(1, 0, 2, 3), JumpFalseCall(3, 0), call(2, 0, 2, 0)],
        [("executorch_prim::add", "Scalar"), ("executorch_prim::eq", "Scalar"), ("executorch_prim::sub", "Scalar")],
    )
    constant = np.arange(2, dtype=np.float32).tobytes()
    return {
        "delegate": write(delegate_plan(affine_graph())),
        "inline": write(delegate_plan(affine_graph()), segments=False),
        "mixed": write(mixed, delegate_plan(affine_graph(), "other"), constants=[constant]),
        "loop": write(loop, segments=False),
    }


FILES = program_files()


def test_the_files_are_good() -> None:
    for name, data in FILES.items():
        assert attempt(data) == "ran", name


def attempt(data: bytes, device: str | None = "reference") -> str:
    """Do with ``data`` all that a user could; gives how far it got. Anything but a torchvk error is a failure."""
    start = time.perf_counter()
    try:
        try:
            print_length = len(str(describe(data)))
            assert print_length < 1000 + 100 * len(data)
            # Memory is taken for what the file describes; damage can make that the machine's whole memory.
            if planned_bytes(data) > SMALL:
                return "large"
            program = torchvk.load(data, device=device)
        except TorchVkError:
            return "refused"
        try:
            for name in program.method_names:
                method = program.method(name)
                method(*[example(parameter) for parameter in method.parameters])
        except TorchVkError:
            return "failed"
        return "ran"
    finally:
        assert time.perf_counter() - start < SECONDS


def planned_bytes(data: bytes) -> int:
    plans = pte.decode(open_source(data).view).plans
    tensors = [value for plan in plans for value in plan.values if isinstance(value, TensorValue)]
    places = [value.nbytes + (value.allocation or (0, 0))[1] for value in tensors]
    graphs = [from_bytes(d.data) for plan in plans for d in plan.delegates if d.backend == BACKEND]
    return sum(places) + sum(tensor.type.nbytes for graph in graphs for tensor in graph.tensors)


def example(parameter: Any) -> Any:
    if not parameter.is_tensor:
        return parameter.baked
    if parameter.numpy is None:
        import torch

        return torch.ones(parameter.shape, dtype=getattr(torch, parameter.dtype))
    return np.ones(parameter.shape, parameter.numpy)


INTERESTING = [0, 1, 2, 3, 4, 7, 8, 16, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """``data`` after one to four accidents: bits, bytes and words changed, ranges lost, doubled or moved, the end
    cut off."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        if not out:
            break
        kind = draw(st.sampled_from(["bit", "byte", "word", "word", "delete", "double", "splice", "cut"]))
        at = draw(st.integers(0, len(out) - 1))
        if kind == "bit":
            out[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte":
            out[at] = draw(st.integers(0, 255))
        elif kind == "word":
            at = min(at & ~3, max(len(out) - 4, 0))
            word = draw(st.one_of(st.sampled_from(INTERESTING), st.integers(0, len(data))))
            out[at : at + 4] = struct.pack("<I", word)
        elif kind == "cut":
            del out[at:]
        else:
            length = draw(st.integers(1, 64))
            part = out[at : at + length]
            if kind == "delete":
                del out[at : at + length]
            elif kind == "double":
                out[at:at] = part
            else:
                to = draw(st.integers(0, len(out) - 1))
                out[to : to + len(part)] = part
    return bytes(out)


relaxed = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=250, **relaxed)  # type: ignore[arg-type]
@given(st.data())
def test_damaged_files(name: str, data: st.DataObject) -> None:
    attempt(data.draw(damaged(FILES[name])))


@settings(max_examples=100, **relaxed)  # type: ignore[arg-type]
@given(st.binary(max_size=300))
def test_noise_behind_the_identifier(noise: bytes) -> None:
    attempt(struct.pack("<I", 8) + b"ET12" + noise)


class Sketch(GraphBuilder):
    """A builder that infers the outputs' types."""

    def __call__(self, name: str, *inputs: int | None, **attributes: Any) -> Any:
        operator = ops.get(name)
        types = [None if index is None else self.tensors[index].type for index in inputs]
        outputs = operator.infer(operator.attributes(**attributes), types)
        results = self.node(name, inputs, outputs, attributes, name=name)
        return results[0] if len(results) == 1 else results


F32 = DType.FLOAT32


def arithmetic() -> Graph:
    sketch = Sketch()
    x = sketch.input("x", TensorType(F32, (2, 6)))
    two = sketch.constant("two", np.array(2, np.float32))
    clamped = sketch("clamp", sketch("mul", x, two), min=-1.0, max=1.0)
    chosen = sketch("where", sketch("gt", clamped, two), x, sketch("gelu", clamped, approximate="tanh"))
    steps = sketch("arange", start=0, step=1, size=6, dtype=DType.INT64)
    shifted = sketch("add", sketch("cast", chosen, dtype=DType.INT64), steps)
    return sketch.build([chosen, shifted])


def movement() -> Graph:
    sketch = Sketch()
    x = sketch.input("x", TensorType(DType.FLOAT16, (2, 3, 4)))
    ids = sketch.input("ids", TensorType(DType.INT64, (2, 2)))
    turned = sketch("permute", sketch("reshape", x, shape=[3, 2, 4]), dims=[2, 0, 1])
    part = sketch("slice", turned, dim=0, start=1, end=4, step=2)
    joined = sketch("cat", part, sketch("flip", part, dims=[1]), dim=2)
    padded = sketch("pad", joined, padding=[0, 1, 1, 0, 0, 0], value=3.0)
    row = sketch("expand", sketch("select", padded, dim=0, index=1), shape=[2, 4, 4])
    table = sketch.constant("table", np.arange(10, dtype=np.float16).reshape(5, 2))
    found = sketch("gather", sketch("embedding", table, ids), sketch("reshape", ids, shape=[2, 2, 1]), dim=2)
    return sketch.build([row, found, sketch("index", x, None, ids)])


def matrices() -> Graph:
    sketch = Sketch()
    x = sketch.input("x", TensorType(F32, (3, 32)))
    weight = sketch.constant("weight", np.arange(-128, 128).reshape(8, 32).astype(np.int8) % 8, DType.INT4)
    scale = sketch.constant("scale", np.full((8, 2), 0.5, np.float32))
    dynamic = {"group_size": 16, "activation": "dynamic_per_token", "quant_min": -128, "quant_max": 127}
    y = sketch("quantized_linear", x, weight, scale, None, **dynamic)
    ones = sketch.constant("ones", np.ones(8, np.float32))
    normal = sketch("layer_norm", y, ones, None, dims=1, eps=1e-5)
    scores = sketch("softmax", sketch("matmul", normal, y, transpose_b=True), dim=-1 % 2)
    square = sketch.constant("square", np.ones((4, 8), np.float32))
    coarse = sketch.constant("coarse", np.arange(80).reshape(5, 16).astype(np.int8) % 4 - 2, DType.INT2)
    steps = sketch.constant("steps", np.full((5, 1), 0.25, np.float32))
    zeros = sketch.constant("zeros", np.arange(5, dtype=np.int8).reshape(5, 1) % 4 - 2)
    narrow = sketch("reshape", x, shape=[6, 16])
    more = sketch("quantized_linear", narrow, coarse, steps, None, None, zeros, group_size=16)
    projected = sketch("linear", sketch("matmul", scores, normal), square, None)
    return sketch.build([projected, sketch("sum", scores, dims=(0,), keepdim=True), sketch("argmax", y, dim=1), more])


def integers() -> Graph:
    sketch = Sketch()
    x = sketch.input("x", TensorType(F32, (1, 6, 5, 8)))
    scale, zero = sketch(
        "choose_qparams",
        x,
        blocks=[1, 1, 1, 1],
        symmetric=False,
        quant_min=-128,
        quant_max=127,
        eps=1e-5,
        formula="pt2e",
    )
    q = sketch("quantize", x, scale, zero, dtype=DType.INT8, quant_min=-128, quant_max=127)
    geometry = {"stride": [1, 2], "padding": [1, 0, 1, 1], "dilation": [1, 1], "input_dilation": [1, 1]}
    weight = sketch.constant("weight", np.arange(-96, 96).reshape(4, 3, 2, 8).astype(np.int8))
    grouped = sketch.constant("grouped", np.arange(72).reshape(4, 3, 3, 2).astype(np.int8) % 8, DType.INT4)
    fours = sketch.constant("fours", np.full(4, 0.5, np.float32))
    output = {"output_dtype": "int8", "output_scale": 0.25, "output_zero_point": 3, "output_min": -128}
    output["output_max"] = 127
    y = sketch("quantized_conv", q, weight, fours, fours, scale, zero, **geometry, activation="dynamic", **output)
    given = {"input_scale": 0.25, "input_zero_point": 3}
    more = {"stride": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1], "input_dilation": [2, 1], "groups": 2}
    pooled = {"kernel": [2, 2], "stride": [1, 1], "padding": [1, 0], "output": [6, 2]}
    z = sketch("quantized_avg_pool", y, **pooled, **given, **output)
    z = sketch("quantized_adaptive_avg_pool", z, output=[2, 3], **given, **output)
    reals = sketch("quantized_conv", z, grouped, fours, None, **more, activation="static", **given, epilogue="relu")
    table = sketch.constant("table", np.arange(256).astype(np.uint8))
    both = {"other_scale": 0.5, "other_zero_point": 7, **output}
    sums = sketch("quantized_arithmetic", y, sketch("lookup", y, table), operation="add", **given, **both)
    ids = sketch.input("ids", TensorType(DType.INT64, (3,)))
    rows = sketch.constant("rows", np.arange(40).reshape(5, 8).astype(np.int8) % 4 - 2, DType.INT2)
    steps = sketch.constant("steps", np.full((5, 2), 0.25, np.float32))
    return sketch.build([reals, sums, sketch("quantized_embedding", rows, steps, ids, group_size=4)])


GRAPHS = {"integers": integers(), "arithmetic": arithmetic(), "movement": movement(), "matrices": matrices()}

plain = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 5, 6, 7, 8, 2**31, 2**40, 2**63]),
    st.sampled_from([0.5, -0.0, 1e308, float("nan"), float("inf")]),
    st.sampled_from(["", "x", "input", "output", "constant", "temporary", *[dtype.value for dtype in DType]]),
    st.sampled_from(["add", "matmul", "softmax", "quantized_linear", "embedding", "reshape", "cat", "nothing"]),
    st.lists(st.integers(-2, 8), max_size=9),
    st.dictionaries(st.sampled_from(["dim", "dims", "shape", "eps"]), st.integers(-2, 8), max_size=2),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything inside ``value``."""
    found = [path] if path else []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in entries:
        found += places(item, (*path, key))
    return found


@st.composite
def edited(draw: st.DrawFn, graph: Graph) -> bytes:
    """The graph's bytes after one to three fields of its header were replaced, dropped, or swapped."""
    blob = to_bytes(graph)
    (size,) = struct.unpack_from("<I", blob, 12)
    header = msgspec.msgpack.decode(blob[20 : 20 + size])
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(places(header)))
        parent = header
        for key in path:
            parent = parent[key]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "drop", "copy"]))
        if kind == "replace":
            parent[last] = draw(plain)
        elif kind == "drop":
            del parent[last]
        else:
            *other, key = draw(st.sampled_from(places(header)))
            source = header
            for step in other:
                source = source[step]
            parent[last] = msgspec.msgpack.decode(msgspec.msgpack.encode(source[key]))
    try:
        body = msgspec.msgpack.encode(header)
    except OverflowError:  # an integer that MessagePack cannot hold cannot be in a file
        body = b""
    return frame(body, graph.constants)


def file_of(blob: bytes) -> bytes:
    """A program whose only delegate is ``blob``, and whose values fit to it if it can be read at all."""
    try:
        graph = from_bytes(blob)
    except FormatError:
        return write(Plan([], [], [], [delegate_call(0)], delegates=[(BACKEND, blob)]))
    types = [graph.tensors[index].type for index in (*graph.inputs, *graph.outputs)]
    known = all(not type.dtype.packed and max(type.shape, default=0) < 2**31 for type in types)
    values = [tensor(type.shape, type.dtype.value) for type in types] if known else []
    count = len(graph.inputs) if known else 0
    step = delegate_call(0, *range(len(values)))
    return write(Plan(values, range(count), range(count, len(values)), [step], delegates=[(BACKEND, blob)]))


@pytest.mark.parametrize("name", GRAPHS)
@settings(max_examples=200, **relaxed)  # type: ignore[arg-type]
@given(st.data())
def test_edited_graphs(name: str, data: st.DataObject) -> None:
    attempt(file_of(data.draw(edited(GRAPHS[name]))))


@pytest.mark.tier
@pytest.mark.parametrize("name", GRAPHS)
@settings(max_examples=40, derandomize=True, **relaxed)  # type: ignore[arg-type]
@given(st.data())
def test_edited_graphs_on_the_device(name: str, data: st.DataObject) -> None:
    attempt(file_of(data.draw(edited(GRAPHS[name]))), device=None)


@pytest.mark.tier
@pytest.mark.parametrize("name", GRAPHS)
def test_the_graphs_are_good(name: str) -> None:
    assert attempt(file_of(to_bytes(GRAPHS[name]))) == "ran"
    assert attempt(file_of(to_bytes(GRAPHS[name])), device=None) == "ran"

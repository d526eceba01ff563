"""The reader of .pte files: what it reads, and what it says of files that it cannot read."""

from __future__ import annotations

import mmap
import re
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flatbuffers
import numpy as np
import pytest
from executorch.exir import schema
from executorch.exir._serialize._program import deserialize_pte_binary
from pte_files import BACKEND, Plan, affine_graph, call, delegate_file, delegate_plan, tensor, write

import torchvk
from torchvk.errors import ArgumentTypeError, FormatError, UnsupportedError
from torchvk.graph import to_bytes
from torchvk.program import describe, pte
from torchvk.program.source import open_source

X = np.ones((2, 3), np.float32)


def decode(data: bytes) -> pte.PteFile:
    return pte.decode(memoryview(data))


def rich_plan() -> Plan:
    """One of everything that the schema knows."""
    values = [
        tensor((2, 3), place=0),
        tensor((3, 2), "int64", place=32, order=[1, 0]),
        tensor((4,), "float16", constant=1),
        tensor((8,), "bool", place=128, dynamic=True),
        None,
        5,
        True,
        2.5,
        "text é",
        schema.IntList([5, 5]),
        schema.DoubleList([0.5, -1.5]),
        schema.BoolList([True, False]),
        schema.TensorList([0, 1]),
        schema.OptionalTensorList([0, -1, 4]),
    ]
    steps = [
        call(0, 0, 1, 2),
        call(1, 5, 5),
        schema.DelegateCall(0, [0, 1]),
        schema.MoveCall(0, 1),
        schema.JumpFalseCall(6, 0),
        schema.FreeCall(3),
    ]
    return Plan(values, [0, 3], [1, 5], steps, [("aten::add", "out"), ("aten::x", "")], [("Other", b"blob" * 5)], "go")


CONSTANT = np.arange(4, dtype=np.float16)


@pytest.mark.parametrize("segments", [True, False])
def test_reads_everything_that_the_schema_knows(segments: bool) -> None:
    data = write(rich_plan(), constants=[CONSTANT.tobytes()], segments=segments)
    (plan,) = decode(data).plans
    assert (plan.name, plan.inputs, plan.outputs) == ("go", (0, 3), (1, 5))
    assert plan.operators == ("aten::add.out", "aten::x")
    first, second, third, fourth, *rest = plan.values
    assert first == pte.TensorValue("float32", 4, (2, 3), (0, 1), allocation=(1, 0))
    assert second == pte.TensorValue("int64", 8, (3, 2), (1, 0), allocation=(1, 32))
    assert isinstance(third, pte.TensorValue)
    assert third.constant is not None
    assert np.frombuffer(third.constant, np.float16).tolist() == [0, 1, 2, 3]
    assert fourth == pte.TensorValue("bool", 1, (8,), (0,), dynamic=True, allocation=(1, 128))
    assert rest == [
        None,
        5,
        True,
        2.5,
        "text é",
        pte.ListValue("int", (5, 5)),
        pte.ListValue("float", (0.5, -1.5)),
        pte.ListValue("bool", (True, False)),
        pte.ListValue("tensor", (0, 1)),
        pte.ListValue("optional", (0, None, 4)),
    ]
    assert plan.chains == (
        (
            pte.KernelCall(0, (0, 1, 2)),
            pte.KernelCall(1, (5, 5)),
            pte.DelegateCall(0, (0, 1)),
            pte.MoveCall(0, 1),
            pte.JumpFalseCall(6, 0),
            pte.FreeCall(3),
        ),
    )
    (delegate,) = plan.delegates
    assert (delegate.backend, bytes(delegate.data)) == ("Other", b"blob" * 5)


def test_agrees_with_executorchs_own_reader() -> None:
    data = write(rich_plan(), delegate_plan(affine_graph()), constants=[CONSTANT.tobytes()])
    (theirs, also_theirs), ours = deserialize_pte_binary(data).program.execution_plan, decode(data).plans
    for their_plan, plan in ((theirs, ours[0]), (also_theirs, ours[1])):
        assert len(their_plan.values) == len(plan.values)
        for their_value, value in zip(their_plan.values, plan.values, strict=True):
            if isinstance(their_value.val, schema.Tensor):
                assert isinstance(value, pte.TensorValue)
                assert list(value.shape) == their_value.val.sizes
                place = their_value.val.allocation_info
                assert value.allocation == (place and (place.memory_id, place.memory_offset))
        assert [len(chain) for chain in plan.chains] == [len(chain.instructions) for chain in their_plan.chains]


def test_blobs_are_views() -> None:
    data = delegate_file(affine_graph())
    (delegate,) = decode(data).plans[0].delegates
    assert np.shares_memory(np.frombuffer(data, np.uint8), np.frombuffer(delegate.data, np.uint8))


def test_a_path_is_memory_mapped(tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(delegate_file(affine_graph()))
    view = open_source(path).view
    assert isinstance(view.obj, mmap.mmap)
    # Private: what is written into the pages never reaches the file.
    before = path.read_bytes()
    view[100:104] = b"\xff" * 4
    assert path.read_bytes() == before


def test_sources(tmp_path: Path) -> None:
    data = delegate_file(affine_graph())
    path = tmp_path / "model.pte"
    path.write_bytes(data)
    manager = SimpleNamespace(buffer=data)
    array: Any = np.frombuffer(data, np.uint8)
    for source in (path, str(path), data, bytearray(data), memoryview(data), array.reshape(2, -1), manager):
        program = torchvk.load(source, device="reference")
        assert program(X, X)[0].tolist() == [[3, 3, 3]] * 2
    wrong: Any
    for wrong in (3, None, [data], object(), array[::2], memoryview(data)[::2], SimpleNamespace(buffer=data.hex())):
        with pytest.raises(ArgumentTypeError, match=r"must be a path, .* or an ExecutorchProgramManager"):
            torchvk.load(wrong)


def test_a_callers_buffer_is_never_written() -> None:
    """Not even by a program that writes into a constant behind a view of it."""
    values = [tensor((2,), constant=1), schema.IntList([2]), 2, tensor((2,)), 1]
    steps = [call(0, 0, 1, 3), call(1, 3, 3, 4, 3)]
    plan = Plan(values, [], [3], steps, [("executorch_prim::et_view", "default"), ("aten::add_", "Tensor")])
    data = bytearray(write(plan, constants=[np.ones(2, np.float32).tobytes()]))
    before = bytes(data)
    assert torchvk.load(data)().tolist() == [2, 2]
    assert bytes(data) == before


GOOD = delegate_file(affine_graph())


def patched(offset: int, data: bytes, base: bytes = GOOD) -> bytes:
    return base[:offset] + data + base[offset + len(data) :]


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "one byte": (b"E", "not a .pte file"),
    "text": (b"#!/bin/sh\necho this is not a model\n" * 9, r"not a .pte file: bytes 4 to 8 are b'in/s'"),
    "pickle": (b"PK\x03\x04" + b"\0" * 99, "not a .pte file"),
    "newer identifier": (patched(4, b"ET13"), "identifier 'ET13'; this torchvk reads 'ET12'"),
    "newer extended header": (patched(8, b"eh01"), r"extended header b'eh01'"),
    "newer schema": (write(delegate_plan(affine_graph()), version=1), "schema version 1; this torchvk reads version 0"),
    "bare graph": (to_bytes(affine_graph()), "a bare torchvk graph"),
    "header only": (GOOD[:30], "truncated"),
    "half": (GOOD[: len(GOOD) // 2], rf"truncated: the header says {len(GOOD)} bytes, the file has {len(GOOD) // 2}"),
    "last byte lost": (GOOD[:-1], "truncated"),
    "program size": (patched(16, struct.pack("<Q", 1 << 60)), "truncated"),
    "segments inside the program": (patched(24, struct.pack("<Q", 8)), "damaged extended header"),
    "root outside": (patched(0, struct.pack("<I", 1 << 31)), "damaged"),
    "other backend": (
        write(Plan([tensor((2,))], [0], [0], delegates=[("XnnpackBackend", b"xnn")])),
        "method 'forward': delegate 0 is for 'XnnpackBackend'; torchvk runs 'TorchVkBackend'",
    ),
    "executorch's Vulkan": (
        write(Plan([tensor((2,))], [0], [0], delegates=[("VulkanBackend", b"VH00")])),
        r"'VulkanBackend'.*ExecuTorch's own",
    ),
    "newer graph": (
        write(
            Plan([], [], [], delegates=[(BACKEND, to_bytes(affine_graph()).replace(b"TORCHVK\0\1", b"TORCHVK\0\2"))])
        ),
        "delegate 0: torchvk graph has format version 2; this torchvk reads version 1",
    ),
    "blob is no graph": (write(Plan([], [], [], delegates=[(BACKEND, b"x" * 99)])), "not a torchvk graph"),
    "no methods": (write(), "no methods"),
    "two of a name": (write(Plan([], [], []), Plan([1], [], [0])), "same name"),
    "value out of range": (write(Plan([1], [], [1])), "names value 1 of 1"),
    "negative value": (write(Plan([1], [-1], [])), "names value -1 of 1"),
    "operator out of range": (write(Plan([1], [], [], [call(0, 0)])), "names operator 0 of 0"),
    "delegate out of range": (write(Plan([1], [], [], [schema.DelegateCall(2, [])])), "names delegate 2 of 0"),
    "jump outside": (write(Plan([True], [], [], [schema.JumpFalseCall(0, 5)])), "names instruction 5"),
    "list of wrong things": (write(Plan([schema.IntList([0])], [], [])), "a list of ints has ListValue inside"),
    "list outside": (write(Plan([schema.TensorList([3])], [], [])), "names value 3 of 1"),
    "list as input": (write(Plan([schema.IntList([1]), 3], [0], [])), "lists as inputs or outputs"),
    "negative size": (write(Plan([tensor((-1,))], [0], [0])), r"shape \[-1\]"),
    "huge tensor": (write(Plan([tensor((1 << 30, 1 << 30))], [0], [0])), "too large"),
    "hidden overflow": (write(Plan([tensor((0, 1 << 30, 1 << 30))], [0], [0])), "too large"),
    "dimension order": (write(Plan([tensor((2, 2), order=[0, 0])], [0], [0])), r"dimension order \[0, 0\]"),
    "rank 17": (write(Plan([tensor((1,) * 17)], [0], [0])), "shape"),
    "misaligned place": (write(Plan([tensor((2,), place=2)], [0], [0])), "misaligned memory offset 2"),
    "constant out of range": (write(Plan([tensor((2,), constant=7)], [], [0])), "constant 7 of 1"),
    "constant too short": (
        write(Plan([tensor((9,), constant=1)], [], [0]), constants=[b"1234"]),
        "outside its segment",
    ),
    "unknown data": (write(Plan([tensor((2,), "float32", place=0, constant=1)], [], [0])), "mutable segment 0 of 0"),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_files(case: str, tmp_path: Path) -> None:
    data, message = FILES[case]
    path = tmp_path / "model.pte"
    path.write_bytes(data)
    error = UnsupportedError if "Vulkan" in case or "backend" in case or "list as input" in case else FormatError
    with pytest.raises(error, match=message) as caught:
        torchvk.load(path, device="reference")
    assert str(caught.value).startswith(f"{path}: ")
    if data:
        with pytest.raises(error, match=message):
            torchvk.load(data, device="reference")


def test_missing_and_unreadable_paths(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "nothing.pte", "no such file"), (tmp_path, "cannot be read"), ("a\0b", "cannot")):
        with pytest.raises(FormatError, match=message) as caught:
            torchvk.load(path)
        assert str(path) in str(caught.value)


def test_external_data() -> None:
    value = tensor((2,), constant=1)
    value.extra_tensor_info = schema.ExtraTensorInfo(
        fully_qualified_name="layer.weight", location=schema.TensorDataLocation.EXTERNAL
    )
    with pytest.raises(UnsupportedError, match=r"'layer\.weight' is stored in another file \(\.ptd\)"):
        decode(write(Plan([value], [], [0])))


@pytest.mark.parametrize("inline", [True, False])
def test_every_truncation_is_refused(inline: bool) -> None:
    data = delegate_file(affine_graph(), segments=not inline)
    whole = decode(data)
    for length in range(0, len(data), 1 if inline else 3):
        try:
            file = decode(data[:length])
        except FormatError:
            continue
        # Without an extended header nothing says how long the file is: padding at the end may be missing.
        assert inline
        assert file.plans == whole.plans


def amplified(copies: int) -> bytes:
    """A file whose method list refers to one method again and again, and that method's values to one value."""
    builder = flatbuffers.Builder()

    def shared_vector(item: int, count: int) -> Any:
        builder.StartVector(4, count, 4)
        for _ in range(count):
            builder.PrependUOffsetTRelative(item)
        return builder.EndVector()

    def table(fields: int, entries: dict[int, int]) -> Any:
        builder.StartObject(fields)
        for slot, offset in entries.items():
            builder.PrependUOffsetTRelativeSlot(slot, offset, 0)
        return builder.EndObject()

    text = builder.CreateString("x" * 4 * copies)
    operator = table(2, {0: text})
    value = table(2, {})
    method = table(9, {2: shared_vector(value, copies), 6: shared_vector(operator, copies)})
    program = table(10, {1: shared_vector(method, copies)})
    builder.Finish(program, file_identifier=b"ET12")
    return bytes(builder.Output())


def test_amplification_is_refused() -> None:
    """10 kB that would be a billion values, or gigabytes of names, when written out."""
    data = amplified(1000)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="describes more than its bytes can hold"):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < 100 * len(data) + 1_000_000
    finally:
        tracemalloc.stop()


def test_lengths_are_not_believed() -> None:
    """Each aligned word of the file, taken for a length or an offset, is made huge."""
    data = bytearray(write(rich_plan(), constants=[CONSTANT.tobytes()]))
    (end,) = struct.unpack_from("<Q", data, 16)
    tracemalloc.start()
    try:
        for offset in range(0, end, 4):
            for word in (0xFFFFFFFF, end * 8):
                damaged = bytearray(data)
                struct.pack_into("<I", damaged, offset, word)
                try:
                    decode(bytes(damaged))
                except (FormatError, UnsupportedError):
                    continue
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_description_needs_no_device_and_takes_any_backend() -> None:
    data = write(rich_plan(), constants=[CONSTANT.tobytes()])
    (method,) = describe(data).methods
    assert (method.delegates[0].backend, method.delegates[0].bytes) == ("Other", 20)
    assert dict(method.cpu_operators) == {"aten::add.out": 1, "aten::x": 1}
    assert method.constant_bytes == 8
    assert [entry.type for entry in method.inputs] == ["float32[2, 3]", "bool[≤8]"]
    assert [entry.type for entry in method.outputs] == ["int64[3, 2]", "5"]
    assert re.search(r"delegate 0: Other, 20 bytes", str(describe(data)))


def test_generated_schema_is_current() -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, str(root / "tools" / "generate_pte_schema.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    path.touch()
    with pytest.raises(FormatError) as caught:
        torchvk.load(path)
    assert str(caught.value) == f"{path}: the file is empty"

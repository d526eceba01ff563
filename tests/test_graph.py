"""The IR: builder, bytes and back, what validation refuses, 4-bit packing."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from torchvk.errors import FormatError
from torchvk.graph import (
    ByteRange,
    DType,
    Graph,
    Node,
    Role,
    Tensor,
    TensorType,
    from_bytes,
    pack_bits,
    to_bytes,
    unpack_bits,
)
from torchvk.graph.build import GraphBuilder
from torchvk.graph.serialize import align, frame
from torchvk.graph.validate import CONSTANT_ALIGNMENT

F32 = DType.FLOAT32


def small_graph() -> Graph:
    """x [2, 3] → (add(x, c), x); c and an int4 weight are constants."""
    builder = GraphBuilder()
    x = builder.input("x", TensorType(F32, (2, 3)))
    c = builder.constant("c", np.arange(3, dtype=np.float32))
    w = builder.constant("w", np.arange(-7, 8, dtype=np.int8).reshape(3, 5), DType.INT4)
    (y,) = builder.node("add", [x, c, None], [TensorType(F32, (2, 3))], {"alpha": 1.5}, name="y", source="model.add")
    builder.node("weigh", [y, w], [TensorType(F32, (2, 5))])
    return builder.build([y, x])


def edit(graph: Graph, **changes: Any) -> Graph:
    """The graph with fields replaced and nothing checked."""
    return replace(graph, **changes)


def with_tensor(graph: Graph, index: int, **changes: Any) -> Graph:
    tensors = list(graph.tensors)
    tensors[index] = replace(tensors[index], **changes)
    return edit(graph, tensors=tuple(tensors))


def test_round_trip() -> None:
    graph = small_graph()
    blob = to_bytes(graph)
    back = from_bytes(blob)
    assert (back.tensors, back.nodes, back.inputs, back.outputs) == (
        graph.tensors,
        graph.nodes,
        graph.inputs,
        graph.outputs,
    )
    assert bytes(back.constants) == bytes(graph.constants)
    assert to_bytes(back) == blob
    np.testing.assert_array_equal(back.constant_array(1), np.arange(3, dtype=np.float32))
    np.testing.assert_array_equal(back.constant_array(2), np.arange(-7, 8).reshape(3, 5))


def test_constants_are_views() -> None:
    blob = bytearray(to_bytes(small_graph()))
    graph = from_bytes(blob)
    where = bytes(blob).index(np.arange(3, dtype=np.float32).tobytes())
    blob[where : where + 4] = np.float32(7).tobytes()
    assert graph.constant_array(1)[0] == 7
    with pytest.raises(ValueError, match="read-only"):
        graph.constant_array(1)[0] = 1


def test_constants_are_aligned_in_the_blob() -> None:
    graph = small_graph()
    blob = to_bytes(graph)
    (header,) = struct.unpack_from("<I", blob, 12)
    begin = align(16 + header)
    data = graph.tensors[1].data
    assert data is not None
    assert begin % CONSTANT_ALIGNMENT == 0
    assert data.offset % CONSTANT_ALIGNMENT == 0
    assert np.frombuffer(blob, np.float32, 3, begin + data.offset).tolist() == [0, 1, 2]


def test_builder_stores_equal_constants_once() -> None:
    builder = GraphBuilder()
    ones = np.ones((4, 4), np.float32)
    first = builder.constant("a", ones)
    assert builder.constant("b", ones.copy()) == first
    # Same bytes, other type: another tensor.
    assert builder.constant("c", ones.reshape(16)) != first
    assert builder.constant("d", ones.view(np.int32)) != first


def test_builder_takes_0d_empty_and_strided_constants() -> None:
    builder = GraphBuilder()
    scalar = builder.constant("scalar", np.array(3.0, np.float32))
    empty = builder.constant("empty", np.zeros((0, 3), np.int64))
    strided = builder.constant("strided", np.arange(6, dtype=np.int32).reshape(2, 3).T)
    x = builder.input("x", TensorType(F32, ()))
    graph = from_bytes(to_bytes(builder.build([x])))
    assert graph.constant_array(scalar).shape == ()
    assert graph.constant_array(scalar) == 3
    assert graph.constant_array(empty).shape == (0, 3)
    assert graph.constant_array(strided).tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("dtype", [DType.INT4, DType.INT2])
@given(data=st.data())
def test_pack_bits_round_trip(dtype: DType, data: st.DataObject) -> None:
    top = 1 << (dtype.bits - 1)
    shapes = arrays.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=9)
    values = data.draw(arrays.arrays(np.int8, shapes, elements=st.integers(-top, top - 1)))
    packed = pack_bits(values, dtype.bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (*values.shape[:-1], -(-values.shape[-1] * dtype.bits // 8))
    assert packed.nbytes == TensorType(dtype, values.shape).nbytes
    np.testing.assert_array_equal(unpack_bits(packed.reshape(-1), dtype.bits, values.shape), values)


def test_pack_bits_layout() -> None:
    # The first column in the lowest bits, two's complement, rows padded with 0.
    assert pack_bits(np.array([[1, -1, 7], [-8, 0, 3]]), 4).tolist() == [[0xF1, 0x07], [0x08, 0x03]]
    assert pack_bits(np.array([[1, -1, 0, -2, 1]]), 2).tolist() == [[0b10_00_11_01, 0b01]]


@pytest.mark.parametrize(("value", "bits"), [(8, 4), (-9, 4), (127, 4), (2, 2), (-3, 2)])
def test_pack_bits_refuses_what_does_not_fit(value: int, bits: int) -> None:
    with pytest.raises(ValueError, match=r"\[-8, 7\]" if bits == 4 else r"\[-2, 1\]"):
        pack_bits(np.array([0, value]), bits)


@pytest.mark.parametrize("dtype", list(DType))
def test_dtypes(dtype: DType) -> None:
    assert TensorType(dtype, (3, 4)).nbytes == 12 * dtype.bits // 8
    assert str(TensorType(dtype, (3, 4))) == f"{dtype.value}[3, 4]"
    if not dtype.packed:
        assert DType.of(dtype.numpy) is dtype
    with pytest.raises(ValueError, match="complex64"):
        DType.of(np.dtype("complex64"))


CONTRADICTIONS: dict[str, tuple[Any, str]] = {
    "negative size": (lambda g: with_tensor(g, 0, shape=(2, -3)), "negative size"),
    "rank": (lambda g: with_tensor(g, 0, shape=(1,) * 9), "rank 9"),
    "overflow": (lambda g: with_tensor(g, 0, shape=(1 << 40, 1 << 40)), "too large"),
    "overflow behind a zero": (lambda g: with_tensor(g, 0, shape=(0, 1 << 40, 1 << 40)), "too large"),
    "constant without data": (lambda g: with_tensor(g, 1, data=None), "must have data"),
    "input with data": (lambda g: with_tensor(g, 0, data=ByteRange(0, 24)), "must not have data"),
    "int4 input": (lambda g: with_tensor(g, 0, dtype=DType.INT4), "int4"),
    "int2 input": (lambda g: with_tensor(g, 0, dtype=DType.INT2), "int2"),
    "int2 of the wrong size": (lambda g: with_tensor(g, 2, dtype=DType.INT2), "needs 6 bytes"),
    "int4 scalar": (lambda g: with_tensor(g, 2, shape=(), data=ByteRange(64, 1)), "last dimension"),
    "misaligned": (lambda g: with_tensor(g, 1, data=ByteRange(4, 12)), "misaligned"),
    "behind the end": (lambda g: with_tensor(g, 1, data=ByteRange(1 << 40, 12)), "outside"),
    "negative offset": (lambda g: with_tensor(g, 1, data=ByteRange(-64, 12)), "outside"),
    "wrong size": (lambda g: with_tensor(g, 1, data=ByteRange(0, 8)), "needs 12 bytes"),
    "unknown input of a node": (lambda g: edit(g, nodes=(Node("add", (9, 1), (3,)),)), "names tensor 9"),
    "negative index": (lambda g: edit(g, nodes=(Node("add", (-1, 1), (3,)),)), "names tensor -1"),
    "use before definition": (lambda g: edit(g, nodes=g.nodes[::-1]), "before it is written"),
    "two writers": (lambda g: edit(g, nodes=(*g.nodes, g.nodes[0])), "already has a value"),
    "writes an input": (lambda g: edit(g, nodes=(*g.nodes, Node("add", (3,), (0,)))), "already has a value"),
    "writes a constant": (lambda g: edit(g, nodes=(*g.nodes, Node("add", (3,), (1,)))), "already has a value"),
    "output never written": (lambda g: edit(g, nodes=()), "never written"),
    "unknown graph output": (lambda g: edit(g, outputs=(17,)), "names tensor 17"),
    "unknown graph input": (lambda g: edit(g, inputs=(-1,)), "names tensor -1"),
    "input twice": (lambda g: edit(g, inputs=(0, 0)), "twice"),
    "input not listed": (lambda g: edit(g, inputs=()), "differ"),
    "output not returned": (lambda g: with_tensor(g, 4, role=Role.OUTPUT), "not returned"),
    "temporary returned": (lambda g: with_tensor(g, 3, role=Role.TEMPORARY), "role temporary"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_validate_refuses(case: str) -> None:
    change, message = CONTRADICTIONS[case]
    graph = change(small_graph())
    with pytest.raises(FormatError, match=message):
        graph.validate()
    with pytest.raises(FormatError, match=message):
        to_bytes(graph)


def test_validate_takes_shared_and_constant_outputs() -> None:
    graph = small_graph()
    edit(graph, outputs=(3, 3, 0, 1)).validate()


def packed(header: Any, version: int = 1, magic: bytes = b"TORCHVK\0") -> bytes:
    return frame(msgspec.msgpack.encode(header), memoryview(b""), version, magic)


def reseal(blob: bytes | bytearray) -> bytes:
    """``blob`` with the checksum that its bytes have, so that what stands behind the checksum is tested too."""
    return bytes(blob[:16]) + struct.pack("<I", zlib.crc32(blob[20:])) + bytes(blob[20:])


EMPTY: dict[str, Any] = {"tensors": [], "nodes": [], "inputs": [], "outputs": []}

DAMAGES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "short": (b"TORCHVK\0\1", "truncated"),
    "other magic": (packed(EMPTY, magic=b"VK00\0\0\0\0"), "not a torchvk graph"),
    "newer version": (packed(EMPTY, version=2), "version 2; this torchvk reads version 1"),
    "header longer than the file": (struct.pack("<8sIII", b"TORCHVK\0", 1, 1 << 31, 0), "truncated"),
    "not MessagePack": (frame(b"\xc1", memoryview(b"")), "header is damaged"),
    "nesting": (frame(b"\x91" * 100_000, memoryview(b"")), "header is damaged"),
    "missing field": (packed({"tensors": []}), "damaged"),
    "list instead of a table": (packed([1, 2, 3]), "damaged"),
    "unknown dtype": (packed({**EMPTY, "tensors": [{"name": "x", "dtype": "f8", "shape": [], "role": "input"}]}), "f8"),
    "float in a shape": (
        packed({**EMPTY, "tensors": [{"name": "x", "dtype": "int8", "shape": [1.5], "role": "input"}]}),
        "damaged",
    ),
    "a length that is not there": (frame(b"\xdd\xff\xff\xff\xff", memoryview(b"")), "header is damaged"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_from_bytes_refuses(case: str) -> None:
    blob, message = DAMAGES[case]
    with pytest.raises(FormatError, match=message):
        from_bytes(blob)


def test_every_truncation_is_refused() -> None:
    blob = to_bytes(small_graph())
    for length in range(len(blob)):
        with pytest.raises(FormatError):
            from_bytes(blob[:length])


def test_a_flipped_bit_is_noticed_wherever_it_is() -> None:
    blob = bytearray(to_bytes(small_graph()))
    for position in range(len(blob)):
        blob[position] ^= 1 << position % 8
        with pytest.raises(FormatError):
            from_bytes(blob)
        blob[position] ^= 1 << position % 8
    assert from_bytes(blob)


@settings(max_examples=300)
@given(st.data())
def test_damaged_bytes_give_format_errors_only(data: st.DataObject) -> None:
    blob = bytearray(to_bytes(small_graph()))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        graph = from_bytes(reseal(blob))
    except FormatError:
        return
    graph.validate()
    assert to_bytes(graph)
    for index, tensor in enumerate(graph.tensors):
        if tensor.data is not None:
            assert graph.constant_array(index).shape == tensor.shape


names = st.text(max_size=8)


@given(names, names, st.dictionaries(names, st.one_of(st.none(), st.booleans(), st.integers(-(2**31), 2**31), names)))
def test_any_names_and_attributes_survive(name: str, source: str, attributes: dict[str, Any]) -> None:
    tensors = (
        Tensor(name, F32, (0,), Role.INPUT),
        Tensor("", F32, (0,), Role.OUTPUT),
    )
    graph = Graph(tensors, (Node("relu", (0,), (1,), attributes, source),), (0,), (1,))
    assert from_bytes(to_bytes(graph)).nodes == graph.nodes

"""Constants on their way to the device, and models that do not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sample_graphs import Builder, arithmetic, arithmetic_inputs

from torchvk import ops
from torchvk.errors import OutOfMemoryError, UnsupportedError
from torchvk.graph import DType, Graph, TensorType
from torchvk.ops import Layout
from torchvk.ops import operator as registry
from torchvk.runtime import Session, upload
from torchvk.runtime.device import Device
from torchvk.runtime.memory import GRANULE
from torchvk.runtime.steps import Constant
from torchvk.runtime.upload import upload_constants

Array = np.ndarray[Any, Any]


def with_large_constant(nbytes: int) -> Graph:
    builder = Builder()
    constant = builder.constant("weight", np.zeros(nbytes, np.int8))
    return builder.build([builder.op("reshape", constant, shape=[nbytes // 2, 2])])


def test_models_larger_than_the_memory_are_refused_with_numbers(own_device: Device) -> None:
    heaps = own_device.allocator._heaps
    heaps[:] = [1 << 20] * len(heaps)
    with pytest.raises(OutOfMemoryError, match=r"the model needs [\d,]+ bytes.*; 1,048,576 of 1,048,576 are"):
        Session(with_large_constant(2 << 20))
    with Session(arithmetic()) as session:  # the process can go on
        session.run(arithmetic_inputs())


def test_constants_above_the_storage_range_are_refused_with_numbers(own_device: Device) -> None:
    limit = 1 << 20
    own_device.physical.limits.maxStorageBufferRange = limit
    with pytest.raises(UnsupportedError, match=r"2,097,152 bytes.*1,048,576"):
        Session(with_large_constant(2 * limit))
    assert own_device.allocator.usage() == (0, 0)


@pytest.mark.parametrize("staged", [False, True])
def test_constants_arrive_whole(staged: bool, own_device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a small ring: constants that share a chunk, end with one, and take several."""
    monkeypatch.setattr(upload, "CHUNK", 4096)
    random = np.random.default_rng(0)
    arrays = [random.integers(-128, 128, size, np.int8) for size in (1, 15, 16, 4064, 17, 4096, 20_001, 5, 0)]
    builder = Builder()
    graph = builder.build([builder.constant(f"c{i}", array) for i, array in enumerate(arrays)])
    with Session(graph, staged=staged) as session:
        for output, array in zip(session.run([]), arrays, strict=True):
            np.testing.assert_array_equal(output, array)


@pytest.mark.parametrize("staged", [False, True])
def test_a_session_takes_little_more_memory_than_the_plan_needs(staged: bool, own_device: Device) -> None:
    """Packed weights and arena, and at most 5 % (and a page a block)."""
    builder = Builder()
    sizes = [20 << 20, *[3 << 20] * 7, *[1 << 19] * 30, *[2000] * 60, 17 << 20]
    x = builder.input("x", TensorType(DType.FLOAT32, (1 << 20,)))
    outputs = [builder.op("neg", builder.op("neg", x))]
    for number, size in enumerate(sizes):
        constant = builder.constant(f"c{number}", np.full(size // 4, number, np.float32))
        outputs.append(builder.op("sum", constant, dims=[0], keepdim=False))
    with Session(builder.build(outputs), staged=staged) as session:
        described = session.describe()
        inside = described.constant_bytes + described.arena_bytes
        inside += described.input_bytes + described.output_bytes
        blocks, taken = own_device.allocator.usage()
        assert sum(sizes) <= described.constant_bytes <= sum(sizes) + 256 * len(sizes)
        assert inside <= taken <= 1.05 * inside + GRANULE * blocks
        assert blocks <= 6


def test_layouts_pack_constants_once(own_device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[Array] = []

    def reverse(array: Array) -> Array:
        packed.append(array)
        return array[::-1]

    neg = ops.get("neg")

    def kernels(attributes: Any, inputs: Any, outputs: Any, capabilities: Any) -> Any:
        made = neg.kernels(attributes, inputs, outputs, capabilities)
        layout = Layout("reversed", reverse)
        dispatches = [
            replace(d, buffers=tuple(replace(arg, layout=layout) if not arg.write else arg for arg in d.buffers))
            for d in made.dispatches
        ]
        return replace(made, dispatches=tuple(dispatches))

    constant_neg = replace(neg, name="test_neg", kernels=kernels, constant_inputs=frozenset({0}))
    monkeypatch.setitem(registry._registry, "test_neg", constant_neg)
    builder = Builder()
    values = np.arange(7, dtype=np.float32)
    c = builder.constant("c", values)
    graph = builder.build([builder.op("test_neg", c), builder.op("test_neg", c), builder.op("neg", c)])
    with Session(graph) as session:
        first, second, plain = session.run([])
    assert len(packed) == 1
    for output in (first, second):
        np.testing.assert_array_equal(output, -values[::-1])
    np.testing.assert_array_equal(plain, -values)


def test_uploads_that_fail_free_what_they_made(own_device: Device) -> None:
    graph = with_large_constant(1 << 16)

    def broken(array: Array) -> Array:
        raise RuntimeError("cannot pack")

    for staged in (False, True):
        with pytest.raises(RuntimeError, match="cannot pack"), own_device.lock:
            upload_constants(own_device, graph, [Constant(0), Constant(0, Layout("broken", broken))], staged=staged)
        assert own_device.allocator.usage() == (0, 0)

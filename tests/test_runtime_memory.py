"""Sub-allocation and the choice of memory types."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchvk.errors import OutOfMemoryError
from torchvk.runtime import memory
from torchvk.runtime import vulkan as vk
from torchvk.runtime.device import Device, open_device
from torchvk.runtime.memory import ALIGNMENT, BLOCK_SIZE, CACHED, LOCAL, VISIBLE, Allocation, Allocator, choose_types


@pytest.fixture
def allocator() -> Iterator[Allocator]:
    device = open_device()
    made = Allocator(device)
    yield made
    made.close()
    assert made.usage() == (0, 0)


GIB = 1 << 30
# (flags, heap) as drivers list them.
LAVAPIPE = ([(LOCAL | VISIBLE | CACHED, 0)], [2 * GIB])
H200 = (
    [(0, 1), (LOCAL, 0), (VISIBLE, 1), (VISIBLE | CACHED, 1), (LOCAL | VISIBLE, 0)],
    [140 * GIB, 500 * GIB],
)
SMALL_WINDOW = (
    [(LOCAL, 0), (VISIBLE, 1), (LOCAL | VISIBLE, 2), (VISIBLE | CACHED, 1)],
    [8 * GIB, 16 * GIB, GIB // 4],
)
RASPBERRY_PI = ([(LOCAL | VISIBLE, 0)], [4 * GIB])
INTEL = ([(LOCAL, 0), (LOCAL | VISIBLE, 0), (LOCAL | VISIBLE | CACHED, 0)], [16 * GIB])
COHERENT_AMD = 0x40
AMD = (
    [(LOCAL, 0), (VISIBLE, 1), (LOCAL | VISIBLE, 0), (VISIBLE | CACHED, 1), (LOCAL | VISIBLE | COHERENT_AMD, 0)],
    [16 * GIB, 32 * GIB],
)


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        (LAVAPIPE, {"device": 0, "direct": 0, "result": 0, "upload": 0, "download": 0}),
        (H200, {"device": 1, "direct": 4, "result": None, "upload": 2, "download": 3}),
        (SMALL_WINDOW, {"device": 0, "direct": None, "result": None, "upload": 1, "download": 3}),
        (RASPBERRY_PI, {"device": 0, "direct": 0, "result": 0, "upload": 0, "download": 0}),
        (INTEL, {"device": 0, "direct": 1, "result": 2, "upload": 1, "download": 2}),
        (AMD, {"device": 0, "direct": 2, "result": None, "upload": 1, "download": 3}),
    ],
    ids=["lavapipe", "H200", "small window", "Raspberry Pi", "Intel", "AMD"],
)
def test_memory_types(properties: tuple[list[tuple[int, int]], list[int]], expected: dict[str, int | None]) -> None:
    types, heaps = properties
    assert choose_types(types, heaps, allowed=2 ** len(types) - 1) == expected


def test_types_that_buffers_may_not_use_are_not_chosen() -> None:
    types, heaps = H200
    assert choose_types(types, heaps, allowed=0b01111)["direct"] is None


def test_small_allocations_share_a_block_and_large_ones_do_not(allocator: Allocator) -> None:
    small = [allocator.allocate(1000, "device") for _ in range(10)]
    assert len({id(a.block) for a in small}) == 1
    large = allocator.allocate(BLOCK_SIZE, "device")
    assert large.block.size == BLOCK_SIZE
    assert allocator.usage()[0] == 2
    allocator.free(large)
    assert allocator.usage()[0] == 1
    for allocation in small:
        allocator.free(allocation)
    assert allocator.usage() == (0, 0)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3_000_000), st.integers(0, 100)), max_size=60))
@settings(max_examples=30, deadline=None)
def test_ranges_never_overlap_and_all_come_back(steps: list[tuple[bool, int, int]]) -> None:
    allocator = Allocator(open_device())
    live: list[tuple[Allocation, int]] = []
    try:
        for number, (free, size, which) in enumerate(steps):
            if free and live:
                allocation, value = live.pop(which % len(live))
                assert (allocation.bytes() == value).all()
                allocator.free(allocation)
            else:
                allocation = allocator.allocate(size, "upload")
                assert allocation.offset % ALIGNMENT == 0
                assert allocation.size >= size
                allocation.bytes()[:] = number
                live.append((allocation, number))
        for allocation, value in live:
            assert (allocation.bytes() == value).all()
            allocator.free(allocation)
        assert allocator.usage() == (0, 0)
    finally:
        allocator.close()


def test_what_does_not_fit_the_heap_is_refused_with_numbers(allocator: Allocator) -> None:
    heap = max(allocator._heaps)
    with pytest.raises(OutOfMemoryError, match=rf"the arena needs .*{allocator._physical.info.name[:8]}"):
        allocator.allocate(2 * heap, "device", "the arena")
    with pytest.raises(OutOfMemoryError, match=f"needs {2 * heap:,} bytes.*direct.*available"):
        allocator.check({"direct": heap, "device": heap})
    assert allocator.usage() == (0, 0)
    allocator.free(allocator.allocate(1000, "device"))


def test_the_driver_s_budget_counts(allocator: Allocator, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other programs use is not available to us."""

    def memory_properties(handle: vk.Struct, properties: vk.Struct) -> None:
        budget = vk.ffi.cast("VkPhysicalDeviceMemoryBudgetPropertiesEXT *", properties.pNext)
        budget.heapBudget[0] = 5 << 20
        budget.heapUsage[0] = 3 << 20

    functions = allocator._physical.instance.functions
    monkeypatch.setattr(functions, "vkGetPhysicalDeviceMemoryProperties2", memory_properties)
    monkeypatch.setattr(allocator._physical, "extensions", {b"VK_EXT_memory_budget"})
    assert allocator.available(0) == 2 << 20
    with pytest.raises(OutOfMemoryError, match=r"3,145,728 bytes; 2,097,152 of"):
        allocator.allocate(3 << 20, "device")
    small = allocator.allocate(1 << 20, "device")  # the block for many would not fit, one for this does
    assert small.block.size == 1 << 20
    allocator.free(small)


def test_many_large_allocations_stop_at_the_heap(allocator: Allocator) -> None:
    """Some drivers would hand out more than there is, and the process would be killed on first touch."""
    largest = min(allocator._largest, max(allocator._heaps) // 2)
    made: list[Allocation] = []
    with pytest.raises(OutOfMemoryError, match=r"needs [\d,]+ bytes"):
        made.extend(allocator.allocate(largest, "device") for _ in range(4))
    assert 1 <= len(made) <= 2
    for allocation in made:
        allocator.free(allocation)


def test_a_driver_that_refuses_leaves_nothing_behind(allocator: Allocator, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(vk.Functions):
        def __init__(self, real: vk.Functions) -> None:
            super().__init__(real._get_address)

        def vkAllocateMemory(self, *arguments: object) -> int:
            raise OutOfMemoryError("vkAllocateMemory failed: VK_ERROR_OUT_OF_DEVICE_MEMORY")

    monkeypatch.setattr(allocator, "_functions", Refusing(allocator._functions))
    with pytest.raises(OutOfMemoryError, match=r"weights needs 1,024 bytes and the driver refused.*available"):
        allocator.allocate(1000, "device", "weights")
    assert allocator.usage() == (0, 0)


def test_a_closed_device_leaves_no_objects_behind() -> None:
    """vkDestroyDevice makes the validation layers name every object that still lives."""
    device = Device(open_device().physical)
    allocation = device.allocator.allocate(1000, "upload")
    allocation.bytes()[:] = np.arange(allocation.size, dtype=np.uint8)
    device.allocator.allocate(memory.BLOCK_SIZE, "device")
    device.close()
    assert device.allocator.usage() == (0, 0)

"""Device memory: sub-allocation from blocks, each one VkDeviceMemory under one VkBuffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from torchvk.errors import OutOfMemoryError
from torchvk.runtime import vulkan as vk

if TYPE_CHECKING:
    from torchvk.runtime.device import Device

# Small allocations share blocks, of no more than they need; a large one has a block of its own. So the end of a full
# block, where the next small one found no room, is at most LARGE / LARGEST_BLOCK = 3 % of it.
LARGE = 16 << 20
LARGEST_BLOCK = 512 << 20
GRANULE = 64 << 10  # drivers hand out memory in pages of at least this
ALIGNMENT = 256  # the largest minStorageBufferOffsetAlignment that Vulkan allows
USAGE = (
    vk.VK_BUFFER_USAGE_STORAGE_BUFFER_BIT
    | vk.VK_BUFFER_USAGE_UNIFORM_TEXEL_BUFFER_BIT
    | vk.VK_BUFFER_USAGE_TRANSFER_SRC_BIT
    | vk.VK_BUFFER_USAGE_TRANSFER_DST_BIT
)
LOCAL = vk.VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT
VISIBLE = vk.VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT | vk.VK_MEMORY_PROPERTY_HOST_COHERENT_BIT
CACHED = vk.VK_MEMORY_PROPERTY_HOST_CACHED_BIT

# device: kernels only. direct: written by the host, read by kernels. result: written by kernels, read by the host.
# upload, download: host memory on either side of a copy.
Use = Literal["device", "direct", "result", "upload", "download"]


def choose_types(types: Sequence[tuple[int, int]], heaps: Sequence[int], allowed: int) -> dict[Use, int | None]:
    """The memory type of every use, or None where there is none and copies must help ("direct", "result").

    types: (property flags, heap) of each type. heaps: their sizes. allowed: a bit for each type.
    """
    local = max((heaps[heap] for flags, heap in types if flags & LOCAL), default=0)

    def find(need: int, avoid: int = 0, smallest_heap: int = 0) -> int | None:
        """The first type with all of ``need``, if possible without any of ``avoid``."""
        fitting = [
            index
            for index, (flags, heap) in enumerate(types)
            if allowed >> index & 1
            and flags & need == need
            # Protected, lazily allocated and vendors' uncached types are for others.
            and not flags & ~(LOCAL | VISIBLE | CACHED)
            and heaps[heap] >= smallest_heap
        ]
        return min(fitting, key=lambda index: ((types[index][0] & avoid).bit_count(), index), default=None)

    host = find(VISIBLE, avoid=LOCAL | CACHED)
    device = find(LOCAL, avoid=VISIBLE | CACHED)
    # A window of a few hundred MiB onto a large card is not worth filling: ask for half the card at least.
    direct = find(LOCAL | VISIBLE, avoid=CACHED, smallest_heap=local // 2)
    cached = find(VISIBLE | CACHED, avoid=LOCAL)
    # Reading memory that is not cached is slow; where nothing is cached, a copy would not help.
    result = direct if cached is None else find(LOCAL | VISIBLE | CACHED, smallest_heap=local // 2)
    return {
        "device": host if device is None else device,
        "direct": direct,
        "result": result,
        "upload": host,
        "download": host if cached is None else cached,
    }


@dataclass(eq=False)
class Block:
    """One VkDeviceMemory with one VkBuffer over all of it; ``free`` lists (offset, size), ascending."""

    memory: vk.Struct
    buffer: vk.Struct
    size: int
    type: int
    mapped: np.ndarray[Any, Any] | None
    free: list[tuple[int, int]] = field(default_factory=list)


@dataclass(eq=False)
class Allocation:
    """A byte range of a block. ``size`` is a multiple of the alignment."""

    block: Block
    offset: int
    size: int

    def bytes(self) -> np.ndarray[Any, Any]:
        """The mapped memory as uint8 [size]; only for uses that the host sees."""
        assert self.block.mapped is not None
        return self.block.mapped[self.offset : self.offset + self.size]


def aligned(size: int) -> int:
    """What an allocation of ``size`` bytes takes."""
    return max(-(-size // ALIGNMENT), 1) * ALIGNMENT


def block_size(size: int, following: Sequence[int]) -> int:
    """The block to make for an (aligned) allocation that no block has room for: for it alone if it is large, else
    for the small ones that follow it, too."""
    if size > LARGE:
        return size
    for more in map(aligned, following):
        if more <= LARGE:
            if size + more > LARGEST_BLOCK:
                break
            size += more
    return -(-size // GRANULE) * GRANULE


class Allocator:
    """Memory of one device. The caller holds the device's lock."""

    def __init__(self, device: Device) -> None:
        self._functions = device.functions
        self._device = device.handle
        self._physical = device.physical
        self._blocks: list[Block] = []
        properties = device.physical.memory.memoryProperties
        self._types = [(t.propertyFlags, t.heapIndex) for t in properties.memoryTypes[0 : properties.memoryTypeCount]]
        self._heaps = [heap.size for heap in properties.memoryHeaps[0 : properties.memoryHeapCount]]
        self._used = [0] * len(self._heaps)
        self._largest = min(
            device.physical.maintenance4.maxBufferSize, device.physical.vulkan11.maxMemoryAllocationSize
        )
        self.types = choose_types(self._types, self._heaps, self._allowed_types())

    def _allowed_types(self) -> int:
        buffer = self._create_buffer(ALIGNMENT)
        requirements = vk.ffi.new("VkMemoryRequirements *")
        self._functions.vkGetBufferMemoryRequirements(self._device, buffer, requirements)
        self._functions.vkDestroyBuffer(self._device, buffer, vk.ffi.NULL)
        return int(requirements.memoryTypeBits)

    def _create_buffer(self, size: int) -> vk.Struct:
        info = vk.make("VkBufferCreateInfo", size=size, usage=USAGE)
        buffer = vk.ffi.new("VkBuffer *")
        self._functions.vkCreateBuffer(self._device, info, vk.ffi.NULL, buffer)
        return buffer[0]

    def allocate(self, size: int, use: Use, what: str = "buffer", following: Sequence[int] = ()) -> Allocation:
        """``size`` bytes, aligned to 256; raises OutOfMemoryError with numbers, naming ``what``.

        ``following``: sizes, perhaps roughly, that will be asked for next, so that a block is made for all of them.
        """
        type = self._type_for(use)
        size = aligned(size)
        for block in self._blocks if size <= LARGE else ():
            if block.type == type and (offset := _take(block, size)) is not None:
                return Allocation(block, offset, size)
        block = self._new_block(size, type, what, block_size(size, following))
        offset = _take(block, size)
        assert offset is not None
        return Allocation(block, offset, size)

    def free(self, allocation: Allocation) -> None:
        """Give the range back; the last one of a block frees the block."""
        block = allocation.block
        merged: list[tuple[int, int]] = []
        for offset, size in sorted([*block.free, (allocation.offset, allocation.size)]):
            if merged and sum(merged[-1]) == offset:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((offset, size))
        block.free = merged
        if merged == [(0, block.size)]:
            self._blocks.remove(block)
            self._destroy(block)

    def _type_for(self, use: Use) -> int:
        type = self.types[use]
        assert type is not None, f"this device has no memory for use {use!r}"
        return type

    def available(self, heap: int) -> int:
        """Bytes that the heap still has for us."""
        left = self._heaps[heap] - self._used[heap]
        if b"VK_EXT_memory_budget" in self._physical.extensions:
            budget = vk.make("VkPhysicalDeviceMemoryBudgetPropertiesEXT")
            self._physical.instance.functions.vkGetPhysicalDeviceMemoryProperties2(
                self._physical.handle, vk.make("VkPhysicalDeviceMemoryProperties2", pNext=budget)
            )
            left = min(left, max(0, budget.heapBudget[heap] - budget.heapUsage[heap]))
        return int(left)

    def room(self, use: Use) -> int:
        """Bytes that are left for this use."""
        return self.available(self._types[self._type_for(use)][1])

    def check(self, sizes: dict[Use, int]) -> None:
        """Raise OutOfMemoryError with numbers if so many bytes more cannot fit."""
        need: dict[int, int] = {}
        for use, size in sizes.items():
            heap = self._types[self._type_for(use)][1]
            need[heap] = need.get(heap, 0) + size
        for heap, size in need.items():
            left = self.available(heap)
            if size > left:
                raise OutOfMemoryError(
                    f"the model needs {size:,} bytes of memory on {self._physical.info.name!r} "
                    f"({', '.join(f'{use} {n:,}' for use, n in sizes.items())}); "
                    f"{left:,} of {self._heaps[heap]:,} are available"
                )

    def _new_block(self, needed: int, type: int, what: str, wanted: int) -> Block:
        """A block of ``wanted`` bytes, or where there are not so many, of what is ``needed`` at least."""
        heap = self._types[type][1]
        left = self.available(heap)
        name = self._physical.info.name
        if needed > self._largest:
            raise OutOfMemoryError(
                f"{what} needs {needed:,} bytes; {name!r} allocates at most {self._largest:,} at once"
            )
        if needed > left:
            raise OutOfMemoryError(
                f"{what} needs {needed:,} bytes; {left:,} of the {self._heaps[heap]:,} bytes of memory of {name!r} "
                "are available"
            )
        size = max(needed, min(wanted, self._largest)) if wanted <= left else needed
        try:
            return self._create_block(size, type)
        except OutOfMemoryError as error:
            if size > needed:
                return self._new_block(needed, type, what, needed)
            raise OutOfMemoryError(
                f"{what} needs {needed:,} bytes and the driver refused them ({error}); {left:,} of "
                f"{self._heaps[heap]:,} bytes seemed available on {name!r}"
            ) from None

    def _create_block(self, size: int, type: int) -> Block:
        functions, device = self._functions, self._device
        flags, heap = self._types[type]
        buffer = self._create_buffer(size)
        memory = vk.ffi.new("VkDeviceMemory *")
        try:
            requirements = vk.ffi.new("VkMemoryRequirements *")
            functions.vkGetBufferMemoryRequirements(device, buffer, requirements)
            info = vk.make("VkMemoryAllocateInfo", allocationSize=requirements.size, memoryTypeIndex=type)
            functions.vkAllocateMemory(device, info, vk.ffi.NULL, memory)
            functions.vkBindBufferMemory(device, buffer, memory[0], 0)
            mapped = None
            if flags & VISIBLE == VISIBLE:
                pointer = vk.ffi.new("void **")
                functions.vkMapMemory(device, memory[0], 0, vk.VK_WHOLE_SIZE, 0, pointer)
                mapped = np.frombuffer(vk.ffi.buffer(pointer[0], size), np.uint8)
        except BaseException:
            functions.vkDestroyBuffer(device, buffer, vk.ffi.NULL)
            functions.vkFreeMemory(device, memory[0], vk.ffi.NULL)
            raise
        block = Block(memory[0], buffer, size, type, mapped, [(0, size)])
        self._blocks.append(block)
        self._used[heap] += size
        return block

    def _destroy(self, block: Block) -> None:
        self._used[self._types[block.type][1]] -= block.size
        self._functions.vkDestroyBuffer(self._device, block.buffer, vk.ffi.NULL)
        self._functions.vkFreeMemory(self._device, block.memory, vk.ffi.NULL)  # unmaps, too

    def close(self) -> None:
        for block in self._blocks:
            self._destroy(block)
        self._blocks = []

    def usage(self) -> tuple[int, int]:
        """(blocks, bytes) that are allocated from Vulkan now."""
        return len(self._blocks), sum(block.size for block in self._blocks)


def _take(block: Block, size: int) -> int | None:
    """Best fit: the smallest free range that is large enough; its offset, or None."""
    fitting = [entry for entry in block.free if entry[1] >= size]
    if not fitting:
        return None
    best = min(fitting, key=lambda entry: entry[1])
    position = block.free.index(best)
    offset, length = best
    block.free[position : position + 1] = [(offset + size, length - size)] if length > size else []
    return offset

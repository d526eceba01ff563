"""Constants to device memory: written in place where the host can, else through a ring of staging buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from torchvk.errors import UnsupportedError
from torchvk.graph import Graph
from torchvk.runtime import vulkan as vk
from torchvk.runtime.device import Device
from torchvk.runtime.memory import Allocation
from torchvk.runtime.plan import Constant

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

CHUNK = 8 << 20
SLOTS = 2  # one is filled while the other is copied
FOREVER = 2**64 - 1


def upload_constants(
    device: Device, graph: Graph, constants: Sequence[Constant], *, staged: bool = False
) -> dict[Constant, Allocation]:
    """Put every constant into device memory, packed by its layout first. The caller frees the allocations.

    Packed constants exist in host memory one at a time; the others are read straight from the graph's bytes.
    ``staged`` forces the way of cards whose memory the host cannot reach. Raises OutOfMemoryError, and
    UnsupportedError for one that is too large to bind.
    """
    direct = device.allocator.types["direct"] is not None and not staged
    ring = None if direct else _Ring(device)
    result: dict[Constant, Allocation] = {}
    try:
        for constant in constants:
            name = f"constant {graph.tensors[constant.tensor].name!r}"
            data = constant_bytes(graph, constant)
            limit = device.physical.limits.maxStorageBufferRange
            if data.size > limit:
                raise UnsupportedError(f"{name} has {data.size:,} bytes; this device binds at most {limit:,} at once")
            result[constant] = device.allocator.allocate(data.size, "direct" if direct else "device", name)
            if ring is None:
                result[constant].bytes()[: data.size] = data
            else:
                ring.write(data, result[constant])
        if ring is not None:
            ring.finish()
    except BaseException:
        if ring is not None:
            ring.close()
        for allocation in result.values():
            device.allocator.free(allocation)
        raise
    if ring is not None:
        ring.close()
    return result


def constant_bytes(graph: Graph, constant: Constant) -> Bytes:
    """What is uploaded: a view of the graph's bytes, or the layout's array."""
    if constant.layout is None:
        return np.frombuffer(graph.constant_bytes(constant.tensor), np.uint8)
    packed = np.ascontiguousarray(constant.layout.pack(graph.constant_array(constant.tensor)))
    return packed.reshape(-1).view(np.uint8)


class _Slot:
    """A staging buffer, the copies out of it that wait, and the command buffer that makes them."""

    def __init__(self, device: Device, pool: vk.Struct) -> None:
        functions = device.functions
        self.memory = device.allocator.allocate(CHUNK, "upload", "the staging buffer")
        info = vk.make("VkCommandBufferAllocateInfo", commandPool=pool, commandBufferCount=1)
        self.commands = vk.ffi.new("VkCommandBuffer *")
        functions.vkAllocateCommandBuffers(device.handle, info, self.commands)
        self.fence = vk.ffi.new("VkFence *")
        functions.vkCreateFence(device.handle, vk.make("VkFenceCreateInfo"), vk.ffi.NULL, self.fence)
        self.used = 0
        self.copies: list[tuple[int, Allocation, int, int]] = []  # from, target, to, size
        self.pending = False


class _Ring:
    """Staging buffers in turn; small writes share one submission."""

    def __init__(self, device: Device) -> None:
        self._device = device
        flags = vk.VK_COMMAND_POOL_CREATE_RESET_COMMAND_BUFFER_BIT
        info = vk.make("VkCommandPoolCreateInfo", flags=flags, queueFamilyIndex=device.physical.queue_family)
        self._pool = vk.ffi.new("VkCommandPool *")
        device.functions.vkCreateCommandPool(device.handle, info, vk.ffi.NULL, self._pool)
        self._slots: list[_Slot] = []
        try:
            for _ in range(SLOTS):
                self._slots.append(_Slot(device, self._pool[0]))
        except BaseException:
            self.close()
            raise
        self._current = 0

    def write(self, data: Bytes, target: Allocation) -> None:
        """Queue bytes for the start of ``target``; they are copied from ``data`` before this returns."""
        done = 0
        while done < data.size:
            slot = self._slots[self._current]
            if slot.used == CHUNK:
                self._submit(slot)
                self._current = (self._current + 1) % SLOTS
                slot = self._slots[self._current]
                self._wait(slot)
            size = min(CHUNK - slot.used, data.size - done)
            slot.memory.bytes()[slot.used : slot.used + size] = data[done : done + size]
            slot.copies.append((slot.used, target, done, size))
            # Copies start at multiples of 16: cheap, and some devices copy faster.
            slot.used = min(-(-(slot.used + size) // 16) * 16, CHUNK)
            done += size

    def finish(self) -> None:
        """Wait until everything is on the device."""
        self._submit(self._slots[self._current])
        for slot in self._slots:
            self._wait(slot)

    def _submit(self, slot: _Slot) -> None:
        functions, commands = self._device.functions, slot.commands[0]
        flags = vk.VK_COMMAND_BUFFER_USAGE_ONE_TIME_SUBMIT_BIT
        functions.vkBeginCommandBuffer(commands, vk.make("VkCommandBufferBeginInfo", flags=flags))
        for begin, target, at, size in slot.copies:
            region = vk.make(
                "VkBufferCopy", srcOffset=slot.memory.offset + begin, dstOffset=target.offset + at, size=size
            )
            functions.vkCmdCopyBuffer(commands, slot.memory.block.buffer, target.block.buffer, 1, region)
        functions.vkEndCommandBuffer(commands)
        info = vk.make("VkCommandBufferSubmitInfo", commandBuffer=commands)
        submission = vk.make("VkSubmitInfo2", commandBufferInfoCount=1, pCommandBufferInfos=info)
        with self._device.queue_lock:
            functions.vkQueueSubmit2(self._device.queue, 1, submission, slot.fence[0])
        slot.pending = True

    def _wait(self, slot: _Slot) -> None:
        if slot.pending:
            functions, handle = self._device.functions, self._device.handle
            functions.vkWaitForFences(handle, 1, slot.fence, 1, FOREVER)
            functions.vkResetFences(handle, 1, slot.fence)
        slot.pending, slot.used, slot.copies = False, 0, []

    def close(self) -> None:
        functions, handle = self._device.functions, self._device.handle
        for slot in self._slots:
            self._wait(slot)
            functions.vkDestroyFence(handle, slot.fence[0], vk.ffi.NULL)
            self._device.allocator.free(slot.memory)
        functions.vkDestroyCommandPool(handle, self._pool[0], vk.ffi.NULL)

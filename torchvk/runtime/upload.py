"""Constants to device memory: written in place where the host can, else through a ring of staging buffers."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from torchvk.errors import UnsupportedError
from torchvk.graph import Graph
from torchvk.runtime import vulkan as vk
from torchvk.runtime.device import Device
from torchvk.runtime.memory import Allocation, Use
from torchvk.runtime.steps import Constant

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

CHUNK = 8 << 20
THREADS = 4  # that pack and copy
SLOTS = 2  # one is filled while the other is copied
FOREVER = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Source:
    """Where the bytes of a constant come from. ``nbytes`` may be a guess: ``read`` may pack them."""

    name: str
    nbytes: int
    read: Callable[[], Bytes]


def upload_constants(
    device: Device, graph: Graph, constants: Sequence[Constant], *, staged: bool = False
) -> dict[Constant, Allocation]:
    """Put constants of the graph into device memory, packed by their layouts first; as :func:`upload`."""
    tensors = [graph.tensors[constant.tensor] for constant in constants]
    sources = {
        constant: Source(f"constant {tensor.name!r}", tensor.type.nbytes, partial(constant_bytes, graph, constant))
        for constant, tensor in zip(constants, tensors, strict=True)
    }
    return upload(device, sources, staged=staged)


def upload(device: Device, sources: Mapping[Constant, Source], *, staged: bool = False) -> dict[Constant, Allocation]:
    """Put bytes into device memory. The caller frees the allocations.

    Several are read (packed, that is) at a time, each in host memory only until it is written. ``staged`` forces the
    way of cards whose memory the host cannot reach. Raises OutOfMemoryError, and UnsupportedError for what is too
    large to bind.
    """
    direct = device.allocator.types["direct"] is not None and not staged
    work = _Upload(device, sources, None if direct else _Ring(device))
    try:
        # Packing and copying are NumPy's, which lets other threads run meanwhile. Largest first: no long tail.
        order = sorted(sources, key=lambda constant: -sources[constant].nbytes)
        with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, THREADS)) as pool:
            jobs = [pool.submit(work.one, constant) for constant in order]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                for job in jobs:
                    job.cancel()
                raise
        if work.ring is not None:
            work.ring.finish()
    except BaseException:
        for allocation in work.done.values():
            device.allocator.free(allocation)
        raise
    finally:
        if work.ring is not None:
            work.ring.close()
    return work.done


class _Upload:
    """Constants on their way. ``done`` holds those that have memory."""

    def __init__(self, device: Device, sources: Mapping[Constant, Source], ring: _Ring | None) -> None:
        self.ring = ring
        self.done: dict[Constant, Allocation] = {}
        self._device = device
        self._sources = sources
        self._waiting = {constant: source.nbytes for constant, source in sources.items()}
        self._lock = threading.Lock()

    def one(self, constant: Constant) -> None:
        """Pack, allocate and write; for several threads."""
        name = self._sources[constant].name
        data = self._sources[constant].read()
        limit = self._device.physical.limits.maxStorageBufferRange
        if data.size > limit:
            raise UnsupportedError(f"{name} has {data.size:,} bytes; this device binds at most {limit:,} at once")
        with self._lock:
            del self._waiting[constant]
            use: Use = "direct" if self.ring is None else "device"
            following = tuple(self._waiting.values())
            self.done[constant] = self._device.allocator.allocate(data.size, use, name, following)
            if self.ring is not None:
                self.ring.write(data, self.done[constant])
        if self.ring is None:
            self.done[constant].bytes()[: data.size] = data


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

"""A plan on a device: its buffers, its command buffer recorded once, and what a call does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from torchvk.errors import UnsupportedError
from torchvk.graph import Graph
from torchvk.runtime import vulkan as vk
from torchvk.runtime.device import Device
from torchvk.runtime.memory import Allocation, Use
from torchvk.runtime.pipeline import PipelineKey
from torchvk.runtime.steps import PADDING, TEXEL, Constant, Kind, Plan, Step, Storage

Array = np.ndarray[Any, Any]

# Spinning saves the wake-up (26 µs on an H200), but on a CPU device it takes time from the work itself.
SPIN_SECONDS = 200e-6
WAIT_NANOSECONDS = 100_000_000  # then Python gets a chance to see Ctrl-C

COMPUTE = (
    vk.VK_PIPELINE_STAGE_2_COMPUTE_SHADER_BIT,
    vk.VK_ACCESS_2_SHADER_STORAGE_WRITE_BIT,
    vk.VK_ACCESS_2_SHADER_STORAGE_READ_BIT
    | vk.VK_ACCESS_2_SHADER_STORAGE_WRITE_BIT
    | vk.VK_ACCESS_2_SHADER_SAMPLED_READ_BIT,  # texel buffers
)
TRANSFER = (
    vk.VK_PIPELINE_STAGE_2_TRANSFER_BIT,
    vk.VK_ACCESS_2_TRANSFER_WRITE_BIT,
    vk.VK_ACCESS_2_TRANSFER_READ_BIT | vk.VK_ACCESS_2_TRANSFER_WRITE_BIT,
)


class Execution:
    """Buffers and command buffers of one plan. Not thread-safe: the session calls it under its lock."""

    def __init__(
        self,
        device: Device,
        graph: Graph,
        plan: Plan,
        constants: Mapping[Constant, Allocation],
        uses: Mapping[Kind, Use],
        poison: bool,
    ) -> None:
        self.device = device
        self.plan = plan
        self._constants = [constants[constant] for constant in plan.constants]
        self._poison = poison
        self._owned: list[tuple[str, vk.Struct]] = []
        self._buffers: dict[Kind, Allocation] = {}
        try:
            sizes: dict[Kind, int] = {"input": plan.input_bytes, "output": plan.output_bytes, "arena": plan.arena_bytes}
            for kind, size in sizes.items():
                if size:
                    self._buffers[kind] = device.allocator.allocate(size, uses[kind], f"the {kind} buffer")
            self._fence = self._create("vkCreateFence", "vkDestroyFence", "VkFence", vk.make("VkFenceCreateInfo"))
            self._fences = vk.array("VkFence", [self._fence])
            self._record_objects()
        except BaseException:
            self.close()
            raise
        self._inputs = [self._view(graph, t, s) for t, s in zip(graph.inputs, plan.inputs, strict=True)]
        self._outputs = [self._view(graph, t, s) for t, s in zip(graph.outputs, plan.outputs, strict=True)]

    def _view(self, graph: Graph, tensor: int, storage: int) -> Array:
        """The mapped bytes of an input or output as an array."""
        type = graph.tensors[tensor].type
        where = self.plan.storages[storage]
        raw = self.buffer_bytes(where)[: type.nbytes]
        return raw.view(type.dtype.numpy).reshape(type.shape)

    def buffer_bytes(self, storage: Storage) -> Array:
        """The mapped bytes of an input or output storage, as uint8."""
        return self._buffers[storage.kind].bytes()[storage.offset : storage.offset + storage.nbytes]

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        """Copy in, submit, wait, copy out. ``arrays`` are checked by the caller."""
        for view, array in zip(self._inputs, arrays, strict=True):
            np.copyto(view, array)
        if self.plan.stages or self._poison:
            self._submit(self._submission)
        return [view.copy() for view in self._outputs]

    def _create(self, function: str, destroy: str, type: str, info: vk.Struct) -> vk.Struct:
        """Create a Vulkan object that close() destroys."""
        handle = vk.ffi.new(f"{type} *")
        getattr(self.device.functions, function)(self.device.handle, info, vk.ffi.NULL, handle)
        self._owned.append((destroy, handle[0]))
        return handle[0]

    def _record_objects(self) -> None:
        steps = [step for step in self.plan.steps if step.dispatch is not None]
        self._pipelines = self.device.pipelines.get(pipeline_keys(self.plan))
        self._sets = self._descriptor_sets(steps)
        info = vk.make("VkCommandPoolCreateInfo", queueFamilyIndex=self.device.physical.queue_family)
        self._pool = self._create("vkCreateCommandPool", "vkDestroyCommandPool", "VkCommandPool", info)
        self._submission = self._submission_of(self._record())

    def _buffer_of(self, storage: Storage) -> tuple[vk.Struct, int, int]:
        """VkBuffer, offset and range of a storage."""
        if storage.kind == "constant":
            limit = self.device.physical.limits.maxStorageBufferRange
            if storage.whole is not None:
                allocation = self._constants[self.plan.storages[storage.whole].offset]
                size = min(storage.nbytes, allocation.size - storage.offset, limit)
                return allocation.block.buffer, allocation.offset + storage.offset, size
            allocation = self._constants[storage.offset]
            return allocation.block.buffer, allocation.offset, min(allocation.size, limit)
        allocation = self._buffers[storage.kind]
        return allocation.block.buffer, allocation.offset + storage.offset, max(storage.nbytes, PADDING)

    def _descriptor_sets(self, steps: Sequence[Step]) -> list[vk.Struct]:
        """One descriptor set a dispatch, written once."""
        if not steps:
            return []
        functions, device = self.device.functions, self.device.handle
        texels = sum(len(_texels(step)) for step in steps)
        counts = {
            vk.VK_DESCRIPTOR_TYPE_STORAGE_BUFFER: sum(len(step.buffers) for step in steps) - texels,
            vk.VK_DESCRIPTOR_TYPE_UNIFORM_TEXEL_BUFFER: texels,
        }
        sizes = [
            vk.make("VkDescriptorPoolSize", type=type, descriptorCount=count) for type, count in counts.items() if count
        ]
        info = vk.make(
            "VkDescriptorPoolCreateInfo",
            maxSets=len(steps),
            poolSizeCount=len(sizes),
            pPoolSizes=vk.array("VkDescriptorPoolSize", sizes),
        )
        pool = self._create("vkCreateDescriptorPool", "vkDestroyDescriptorPool", "VkDescriptorPool", info)
        layouts = vk.array("VkDescriptorSetLayout", [pipeline.set_layout for pipeline in self._pipelines])
        info = vk.make(
            "VkDescriptorSetAllocateInfo", descriptorPool=pool, descriptorSetCount=len(steps), pSetLayouts=layouts
        )
        sets = vk.ffi.new("VkDescriptorSet[]", len(steps))
        functions.vkAllocateDescriptorSets(device, info, sets)
        # Filled in place: hundreds of structures made one by one take longer than the driver does.
        total = sum(counts.values())
        writes = vk.structures("VkWriteDescriptorSet", total)
        infos = vk.ffi.new("VkDescriptorBufferInfo[]", total)
        views = vk.ffi.new("VkBufferView[]", total)
        position = 0
        for number, step in enumerate(steps):
            as_texels = _texels(step)
            for binding, storage in enumerate(step.buffers):
                write, info = writes[position], infos[position]
                write.dstSet, write.dstBinding, write.descriptorCount = sets[number], binding, 1
                where = self._buffer_of(self.plan.storages[storage])
                if binding in as_texels:
                    views[position] = self._texel_view(*where)
                    write.descriptorType = vk.VK_DESCRIPTOR_TYPE_UNIFORM_TEXEL_BUFFER
                    write.pTexelBufferView = views + position
                else:
                    info.buffer, info.offset, info.range = where
                    write.descriptorType = vk.VK_DESCRIPTOR_TYPE_STORAGE_BUFFER
                    write.pBufferInfo = infos + position
                position += 1
        functions.vkUpdateDescriptorSets(device, total, writes, 0, vk.ffi.NULL)
        return list(sets)

    def _texel_view(self, buffer: vk.Struct, offset: int, size: int) -> vk.Struct:
        """A view of these bytes as texels of four 32-bit words."""
        info = vk.make(
            "VkBufferViewCreateInfo",
            buffer=buffer,
            format=vk.VK_FORMAT_R32G32B32A32_UINT,
            offset=offset,
            range=size // TEXEL * TEXEL,
        )
        return self._create("vkCreateBufferView", "vkDestroyBufferView", "VkBufferView", info)

    def _submission_of(self, commands: vk.Struct) -> vk.Struct:
        info = vk.make("VkCommandBufferSubmitInfo", commandBuffer=commands)
        return vk.make("VkSubmitInfo2", commandBufferInfoCount=1, pCommandBufferInfos=info)

    def _record(self, queries: vk.Struct = None, whole: bool = False) -> vk.Struct:
        """Record the plan. With a query pool: a timestamp before and after every step, and one step at a time; or,
        for the ``whole``, as always, with one at the begin and one at the end."""
        functions = self.device.functions
        info = vk.make("VkCommandBufferAllocateInfo", commandPool=self._pool, commandBufferCount=1)
        pointer = vk.ffi.new("VkCommandBuffer *")
        functions.vkAllocateCommandBuffers(self.device.handle, info, pointer)
        commands = pointer[0]
        functions.vkBeginCommandBuffer(commands, vk.make("VkCommandBufferBeginInfo"))
        if self._poison:
            for kind in ("output", "arena"):
                if kind in self._buffers:
                    where = self._buffers[kind]
                    functions.vkCmdFillBuffer(commands, where.block.buffer, where.offset, where.size, 0xFFFFFFFF)
            self._barrier(commands, {TRANSFER}, {COMPUTE, TRANSFER})
        if queries is not None:
            functions.vkCmdResetQueryPool(commands, queries, 0, 2 if whole else 2 * len(self.plan.steps))
        if whole:
            self._timestamp(commands, queries, 0)
            whole_queries, queries = queries, None
        kinds = [{TRANSFER if step.dispatch is None else COMPUTE for step in stage} for stage in self.plan.stages]
        dispatches = 0
        count = 0
        for number, stage in enumerate(self.plan.stages):
            if number:
                # This barrier answers for the stage before it, towards everything that comes later.
                self._barrier(commands, kinds[number - 1], set().union(*kinds[number:]))
            for step in stage:
                if queries is not None:
                    self._timestamp(commands, queries, 2 * count)
                if step.dispatch is None:
                    self._copy(commands, step)
                else:
                    self._dispatch(commands, step, dispatches)
                    dispatches += 1
                if queries is not None:
                    self._timestamp(commands, queries, 2 * count + 1)
                    self._barrier(commands, {COMPUTE, TRANSFER}, {COMPUTE, TRANSFER})
                count += 1
        if whole:
            self._timestamp(commands, whole_queries, 1)
        host = (vk.VK_PIPELINE_STAGE_2_HOST_BIT, 0, vk.VK_ACCESS_2_HOST_READ_BIT)
        self._barrier(commands, {COMPUTE, TRANSFER}, {host})
        functions.vkEndCommandBuffer(commands)
        return commands

    def _dispatch(self, commands: vk.Struct, step: Step, number: int) -> None:
        functions, dispatch, pipeline = self.device.functions, step.dispatch, self._pipelines[number]
        assert dispatch is not None
        functions.vkCmdBindPipeline(commands, vk.VK_PIPELINE_BIND_POINT_COMPUTE, pipeline.handle)
        sets = vk.array("VkDescriptorSet", [self._sets[number]])
        functions.vkCmdBindDescriptorSets(
            commands, vk.VK_PIPELINE_BIND_POINT_COMPUTE, pipeline.layout, 0, 1, sets, 0, vk.ffi.NULL
        )
        if dispatch.push:
            functions.vkCmdPushConstants(
                commands,
                pipeline.layout,
                vk.VK_SHADER_STAGE_COMPUTE_BIT,
                0,
                len(dispatch.push),
                vk.ffi.from_buffer(dispatch.push),
            )
        functions.vkCmdDispatch(commands, *dispatch.groups)

    def _copy(self, commands: vk.Struct, step: Step) -> None:
        source, source_offset, _ = self._buffer_of(self.plan.storages[step.buffers[0]])
        target, target_offset, size = self._buffer_of(self.plan.storages[step.buffers[1]])
        region = vk.make("VkBufferCopy", srcOffset=source_offset, dstOffset=target_offset, size=size)
        self.device.functions.vkCmdCopyBuffer(commands, source, target, 1, region)

    def _barrier(
        self, commands: vk.Struct, before: set[tuple[int, int, int]], after: set[tuple[int, int, int]]
    ) -> None:
        """One global memory barrier: (stage, accesses that write, all accesses) on either side.

        A chain of tiny dispatches on an H200: 2.1 µs each with these barriers, whether or not transfers and texel
        reads are in the masks; 3.2 µs with barriers of the buffers, 4.9 µs between all commands, 0.3 µs without.
        """
        barrier = vk.make("VkMemoryBarrier2")
        for stage, writes, _ in before:
            barrier.srcStageMask |= stage
            barrier.srcAccessMask |= writes
        for stage, _, accesses in after:
            barrier.dstStageMask |= stage
            barrier.dstAccessMask |= accesses
        info = vk.make("VkDependencyInfo", memoryBarrierCount=1, pMemoryBarriers=barrier)
        self.device.functions.vkCmdPipelineBarrier2(commands, info)

    def _timestamp(self, commands: vk.Struct, queries: vk.Struct, index: int) -> None:
        self.device.functions.vkCmdWriteTimestamp2(commands, vk.VK_PIPELINE_STAGE_2_ALL_COMMANDS_BIT, queries, index)

    def _submit(self, submission: vk.Struct) -> None:
        """Run a command buffer to its end."""
        functions, device = self.device.functions, self.device
        with device.queue_lock:
            functions.vkQueueSubmit2(device.queue, 1, submission, self._fence)
        try:
            self._wait()
        except BaseException:
            # Ctrl-C: the device still works on our buffers, which the caller may now free.
            with device.queue_lock:
                functions.vkQueueWaitIdle(device.queue)
            raise
        finally:
            functions.vkResetFences(device.handle, 1, self._fences)

    def _wait(self) -> None:
        functions, handle = self.device.functions, self.device.handle
        if self.device.info.kind != "cpu":
            until = time.perf_counter() + SPIN_SECONDS
            while time.perf_counter() < until:
                if functions.vkGetFenceStatus(handle, self._fence) == vk.VK_SUCCESS:
                    return
        while functions.vkWaitForFences(handle, 1, self._fences, 1, WAIT_NANOSECONDS) == vk.VK_TIMEOUT:
            pass

    def profile(self, arrays: Sequence[Array]) -> list[tuple[float, float]]:
        """Run once, one step at a time; (begin, end) of every step in seconds from the first."""
        if not self.plan.steps:
            return []
        for view, array in zip(self._inputs, arrays, strict=True):
            np.copyto(view, array)
        with self._timed(2 * len(self.plan.steps), whole=False) as run:
            return [(float(a), float(b)) for a, b in run().reshape(-1, 2)]

    def measure(self, repeats: int) -> list[float]:
        """Run so often, on whatever the inputs hold; seconds that the device took each time, without copies to and
        from the host."""
        if not self.plan.steps:
            return [0.0] * repeats
        with self._timed(2, whole=True) as run:
            return [float(run()[1]) for _ in range(repeats)]

    @contextmanager
    def _timed(self, count: int, whole: bool) -> Iterator[Callable[[], Array]]:
        """A function that runs the plan once and gives its ``count`` timestamps in seconds from the first."""
        if not self.device.physical.timestamp_bits:
            raise UnsupportedError(f"device {self.device.info.name!r} has no timestamps, so it cannot be profiled")
        functions, device = self.device.functions, self.device.handle
        info = vk.make("VkQueryPoolCreateInfo", queryType=vk.VK_QUERY_TYPE_TIMESTAMP, queryCount=count)
        queries = self._create("vkCreateQueryPool", "vkDestroyQueryPool", "VkQueryPool", info)
        # Counters of fewer than 64 bits wrap: differences modulo their width are right.
        mask = np.uint64(2**self.device.physical.timestamp_bits - 1)
        period = self.device.physical.limits.timestampPeriod * 1e-9
        flags = vk.VK_QUERY_RESULT_64_BIT | vk.VK_QUERY_RESULT_WAIT_BIT
        ticks = np.zeros(count, np.uint64)
        try:
            commands = self._record(queries, whole)
            submission = self._submission_of(commands)

            def run() -> Array:
                self._submit(submission)
                functions.vkGetQueryPoolResults(
                    device, queries, 0, count, ticks.nbytes, vk.ffi.from_buffer(ticks), 8, flags
                )
                seconds: Array = ((ticks - ticks[0]) & mask) * period
                return seconds

            yield run
            functions.vkFreeCommandBuffers(device, self._pool, 1, vk.array("VkCommandBuffer", [commands]))
        finally:
            self._owned.pop()
            functions.vkDestroyQueryPool(device, queries, vk.ffi.NULL)

    def close(self) -> None:
        """Free everything; the device must not be at work on it."""
        for function, handle in reversed(self._owned):
            getattr(self.device.functions, function)(self.device.handle, handle, vk.ffi.NULL)
        for allocation in self._buffers.values():
            self.device.allocator.free(allocation)
        self._owned, self._buffers = [], {}


def pipeline_keys(plan: Plan) -> list[PipelineKey]:
    """The pipeline of every dispatch, in order."""
    return [
        PipelineKey(step.dispatch.kernel, step.dispatch.constants, len(step.buffers), _texels(step))
        for step in plan.steps
        if step.dispatch is not None
    ]


def _texels(step: Step) -> tuple[int, ...]:
    """The bindings of a dispatch that are texel buffers."""
    assert step.dispatch is not None
    return tuple(index for index, arg in enumerate(step.dispatch.buffers) if arg.texels)

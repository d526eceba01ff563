"""Compute pipelines: made from SPIR-V in parallel, kept per device and on disk."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import struct
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torchvk import shaders
from torchvk.runtime import vulkan as vk

if TYPE_CHECKING:
    from torchvk.runtime.device import Device

log = logging.getLogger("torchvk.vulkan")

PUSH_SIZE = 128
DIGEST_SIZE = hashlib.sha256().digest_size
THREADS = 16

Identity = tuple[str, bytes, int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class PipelineKey:
    """What a pipeline depends on: the kernel, its specialization constants, how many buffers it binds and which
    of them as texel buffers."""

    kernel: str
    constants: tuple[int | float, ...]
    buffers: int
    texels: tuple[int, ...] = ()

    def words(self) -> bytes:
        """The specialization constants as 32-bit words. (1 == 1.0 == True in Python, their words differ.)"""
        return b"".join(
            struct.pack("<f", value) if isinstance(value, float) else struct.pack("<I", int(value) & 0xFFFFFFFF)
            for value in self.constants
        )

    def identity(self) -> Identity:
        return self.kernel, self.words(), self.buffers, self.texels


@dataclass(frozen=True, slots=True)
class Pipeline:
    handle: vk.Struct
    layout: vk.Struct
    set_layout: vk.Struct


class Pipelines:
    """All pipelines of one device. The caller holds the device's lock."""

    def __init__(self, device: Device) -> None:
        self._functions = device.functions
        self._device = device.handle
        self._pipelines: dict[Identity, Pipeline] = {}
        self._jobs: dict[Identity, Future[Pipeline]] = {}
        self._threads = ThreadPoolExecutor(min(os.cpu_count() or 1, THREADS), "torchvk-compile")
        self._layouts: dict[tuple[int, tuple[int, ...]], tuple[vk.Struct, vk.Struct]] = {}
        self._subgroup_size = _required_subgroup_size(device)
        self._flags = vk.VK_PIPELINE_CREATE_CAPTURE_STATISTICS_BIT_KHR if device.statistics else 0
        self._path = cache_path(device.physical.cache_key)
        data = read_cache(self._path)
        self._cache = self._create_cache(data)
        self._written = len(data)
        self._changed = False  # since the cache was last written

    def _create_cache(self, data: bytes) -> vk.Struct:
        initial = vk.ffi.from_buffer(data) if data else vk.ffi.NULL
        info = vk.make("VkPipelineCacheCreateInfo", initialDataSize=len(data), pInitialData=initial)
        cache = vk.ffi.new("VkPipelineCache *")
        self._functions.vkCreatePipelineCache(self._device, info, vk.ffi.NULL, cache)
        return cache[0]

    def start(self, keys: Iterable[PipelineKey]) -> None:
        """Begin to compile those of these pipelines that are missing, several at a time, in other threads."""
        for key in keys:
            identity = key.identity()
            if identity not in self._pipelines and identity not in self._jobs:
                self._layout(key.buffers, key.texels)
                # cffi releases the GIL in calls, so the driver compiles in parallel.
                self._jobs[identity] = self._threads.submit(self._compile, key)

    def ready(self, keys: Iterable[PipelineKey], deadline: float) -> bool:
        """Whether :meth:`get` would return at once; waits for it until ``deadline`` (time.perf_counter())."""
        jobs = [self._jobs[identity] for key in keys if (identity := key.identity()) in self._jobs]
        return not wait(jobs, max(0.0, deadline - time.perf_counter())).not_done

    def get(self, keys: Iterable[PipelineKey]) -> list[Pipeline]:
        """The pipelines of these keys; missing ones are compiled, several at a time."""
        wanted = list(keys)
        self.start(wanted)
        identities = [key.identity() for key in wanted]
        mine = {identity: self._jobs[identity] for identity in identities if identity in self._jobs}
        wait(mine.values())
        # Keep what was made, even if some failed: close() destroys it.
        self._collect()
        if self._changed:
            self._changed = False
            self._threads.submit(self._write)
        for job in mine.values():
            job.result()
        return [self._pipelines[identity] for identity in identities]

    def cancel(self) -> None:
        """Forget what was started and nobody waits for; what is being compiled is still kept."""
        for identity, job in list(self._jobs.items()):
            if job.cancel():
                del self._jobs[identity]

    def _collect(self) -> None:
        """Take over what is finished."""
        for identity, job in list(self._jobs.items()):
            if job.done():
                del self._jobs[identity]
                if not job.cancelled() and job.exception() is None:
                    self._pipelines[identity] = job.result()
                    self._changed = True

    def _layout(self, buffers: int, texels: tuple[int, ...]) -> tuple[vk.Struct, vk.Struct]:
        """Set layout and pipeline layout for so many storage buffers (those in ``texels``: uniform texel buffers)
        and PUSH_SIZE bytes of push constants."""
        if (buffers, texels) not in self._layouts:
            bindings = [
                vk.make(
                    "VkDescriptorSetLayoutBinding",
                    binding=index,
                    descriptorType=vk.VK_DESCRIPTOR_TYPE_UNIFORM_TEXEL_BUFFER
                    if index in texels
                    else vk.VK_DESCRIPTOR_TYPE_STORAGE_BUFFER,
                    descriptorCount=1,
                    stageFlags=vk.VK_SHADER_STAGE_COMPUTE_BIT,
                )
                for index in range(buffers)
            ]
            info = vk.make(
                "VkDescriptorSetLayoutCreateInfo",
                bindingCount=buffers,
                pBindings=vk.array("VkDescriptorSetLayoutBinding", bindings),
            )
            set_layout = vk.ffi.new("VkDescriptorSetLayout *")
            self._functions.vkCreateDescriptorSetLayout(self._device, info, vk.ffi.NULL, set_layout)
            push = vk.make("VkPushConstantRange", stageFlags=vk.VK_SHADER_STAGE_COMPUTE_BIT, size=PUSH_SIZE)
            info = vk.make(
                "VkPipelineLayoutCreateInfo",
                setLayoutCount=1,
                pSetLayouts=set_layout,
                pushConstantRangeCount=1,
                pPushConstantRanges=push,
            )
            layout = vk.ffi.new("VkPipelineLayout *")
            self._functions.vkCreatePipelineLayout(self._device, info, vk.ffi.NULL, layout)
            self._layouts[buffers, texels] = (set_layout[0], layout[0])
        return self._layouts[buffers, texels]

    def _compile(self, key: PipelineKey) -> Pipeline:
        functions, device = self._functions, self._device
        code = shaders.load(key.kernel)
        set_layout, layout = self._layouts[key.buffers, key.texels]
        info = vk.make(
            "VkShaderModuleCreateInfo",
            codeSize=len(code),
            pCode=vk.ffi.cast("uint32_t *", vk.ffi.from_buffer(code)),
        )
        module = vk.ffi.new("VkShaderModule *")
        functions.vkCreateShaderModule(device, info, vk.ffi.NULL, module)
        try:
            words = key.words()
            entries = [
                vk.make("VkSpecializationMapEntry", constantID=index, offset=4 * index, size=4)
                for index in range(len(key.constants))
            ]
            specialization = vk.make(
                "VkSpecializationInfo",
                mapEntryCount=len(entries),
                pMapEntries=vk.array("VkSpecializationMapEntry", entries),
                dataSize=len(words),
                pData=vk.ffi.from_buffer(words),
            )
            # SPIR-V 1.6 lets the subgroup size vary; kernels are chosen for the one in Capabilities.
            required = self._subgroup_size and vk.make(
                "VkPipelineShaderStageRequiredSubgroupSizeCreateInfo", requiredSubgroupSize=self._subgroup_size
            )
            stage = vk.make(
                "VkPipelineShaderStageCreateInfo",
                pNext=required or None,
                stage=vk.VK_SHADER_STAGE_COMPUTE_BIT,
                module=module[0],
                pName=b"main",
                pSpecializationInfo=specialization,
            )
            create = vk.make("VkComputePipelineCreateInfo", flags=self._flags, stage=stage, layout=layout)
            pipeline = vk.ffi.new("VkPipeline *")
            functions.vkCreateComputePipelines(device, self._cache, 1, create, vk.ffi.NULL, pipeline)
        finally:
            functions.vkDestroyShaderModule(device, module[0], vk.ffi.NULL)
        return Pipeline(pipeline[0], layout, set_layout)

    def _write(self) -> None:
        """Write the cache to disk if the driver put something in."""
        size = vk.ffi.new("size_t *")
        self._functions.vkGetPipelineCacheData(self._device, self._cache, size, vk.ffi.NULL)
        if size[0] != self._written:
            data = vk.ffi.new("char[]", size[0])
            self._functions.vkGetPipelineCacheData(self._device, self._cache, size, data)
            write_cache(self._path, bytes(vk.ffi.buffer(data, size[0])))
            self._written = size[0]

    def close(self) -> None:
        self.cancel()
        self._threads.shutdown()
        self._collect()
        if self._changed:
            self._write()
        functions, device = self._functions, self._device
        for pipeline in self._pipelines.values():
            functions.vkDestroyPipeline(device, pipeline.handle, vk.ffi.NULL)
        for set_layout, layout in self._layouts.values():
            functions.vkDestroyPipelineLayout(device, layout, vk.ffi.NULL)
            functions.vkDestroyDescriptorSetLayout(device, set_layout, vk.ffi.NULL)
        functions.vkDestroyPipelineCache(device, self._cache, vk.ffi.NULL)
        self._pipelines, self._layouts = {}, {}


def _required_subgroup_size(device: Device) -> int:
    """The subgroup size to demand, or 0 where the device cannot be told."""
    physical = device.physical
    stages = physical.vulkan13.requiredSubgroupSizeStages
    size: int = physical.vulkan11.subgroupSize
    varies = physical.vulkan13.minSubgroupSize < physical.vulkan13.maxSubgroupSize
    controllable = physical.has("subgroupSizeControl") and stages & vk.VK_SHADER_STAGE_COMPUTE_BIT
    # A workgroup of maxComputeWorkGroupInvocations must remain possible.
    enough = physical.vulkan13.maxComputeWorkgroupSubgroups * size >= physical.limits.maxComputeWorkGroupInvocations
    return size if varies and controllable and enough else 0


def package_version() -> str:
    """The installed version; a checkout that is only on the path has none."""
    try:
        return importlib.metadata.version("torchvk")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def cache_path(key: str, kind: str = "pipelines") -> Path:
    """The cache file for a device and driver: under TORCHVK_CACHE_DIR, else the platform's cache folder."""
    if folder := os.environ.get("TORCHVK_CACHE_DIR"):
        root = Path(folder)
    elif sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "torchvk" / "Cache"
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches" / "torchvk"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchvk"
    return root / f"{kind}-{key}-{package_version()}.bin"


def read_cache(path: Path) -> bytes:
    """The cached data, or nothing if there is none or it is damaged: drivers trust what they are given."""
    try:
        content = path.read_bytes()
    except OSError:
        return b""
    digest, data = content[:DIGEST_SIZE], content[DIGEST_SIZE:]
    if hashlib.sha256(data).digest() != digest:
        log.info("ignoring damaged pipeline cache %s", path)
        return b""
    return data


def write_cache(path: Path, data: bytes) -> None:
    """Write the data with their checksum."""
    replace_file(path, hashlib.sha256(data).digest() + data)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a cache file at once; a folder that cannot be written is no error."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        log.info("cache file %s not written: %s", path, error)

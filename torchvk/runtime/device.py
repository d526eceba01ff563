"""Vulkan devices: listing, choosing, and opening one with the features that the kernels may use."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torchvk.errors import ArgumentError, ArgumentTypeError, VulkanError
from torchvk.ops import Capabilities, CooperativeMatrixShape, MatmulPrecision
from torchvk.ops.fragments import Fragment
from torchvk.runtime import vulkan as vk
from torchvk.runtime.instance import API_VERSION, INSTALL_DRIVER, Instance, instance, version, version_text
from torchvk.runtime.memory import Allocator
from torchvk.runtime.pipeline import Pipelines

Kind = Literal["discrete", "integrated", "cpu", "virtual", "other"]
KINDS: dict[int, Kind] = {
    vk.VK_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU: "discrete",
    vk.VK_PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU: "integrated",
    vk.VK_PHYSICAL_DEVICE_TYPE_VIRTUAL_GPU: "virtual",
    vk.VK_PHYSICAL_DEVICE_TYPE_CPU: "cpu",
}
PREFERENCE: tuple[Kind, ...] = ("discrete", "integrated", "virtual", "other", "cpu")

# Without these nothing runs; Vulkan 1.3 promises all of them.
REQUIRED = ("synchronization2", "maintenance4", "shaderIntegerDotProduct")
# Enabled where present, for the kernels of tiers 1 and 2.
OPTIONAL = (
    "shaderInt16",
    "shaderInt64",
    "storageBuffer16BitAccess",
    "uniformAndStorageBuffer16BitAccess",
    "storageBuffer8BitAccess",
    "shaderFloat16",
    "shaderInt8",
    "scalarBlockLayout",
    "vulkanMemoryModel",
    "vulkanMemoryModelDeviceScope",
    "shaderSubgroupExtendedTypes",
    "subgroupSizeControl",
    "computeFullSubgroups",
    "cooperativeMatrix",
)
TIER_1 = ("shaderFloat16", "storageBuffer16BitAccess", "uniformAndStorageBuffer16BitAccess")
TIER_2 = (
    "cooperativeMatrix",
    "vulkanMemoryModel",
    "vulkanMemoryModelDeviceScope",
    "shaderInt16",
    "shaderInt8",
    "storageBuffer8BitAccess",
)
COOPERATIVE_MATRIX = b"VK_KHR_cooperative_matrix"
MEMORY_BUDGET = b"VK_EXT_memory_budget"
PORTABILITY_SUBSET = b"VK_KHR_portability_subset"
EXECUTABLE_PROPERTIES = b"VK_KHR_pipeline_executable_properties"
EXECUTABLE_FEATURES = "VkPhysicalDevicePipelineExecutablePropertiesFeaturesKHR"
COMPONENTS = {
    vk.VK_COMPONENT_TYPE_FLOAT16_KHR: "float16",
    vk.VK_COMPONENT_TYPE_FLOAT32_KHR: "float32",
    vk.VK_COMPONENT_TYPE_SINT8_KHR: "int8",
    vk.VK_COMPONENT_TYPE_UINT8_KHR: "uint8",
    vk.VK_COMPONENT_TYPE_SINT32_KHR: "int32",
    vk.VK_COMPONENT_TYPE_UINT32_KHR: "uint32",
}


@dataclass(frozen=True)
class DeviceInfo:
    """One Vulkan device. ``memory``: bytes of its largest local heap. ``tier``: see Capabilities.
    ``problem``: in words why torchvk cannot use it, or None."""

    index: int
    name: str
    kind: Kind
    driver: str
    driver_version: str
    api_version: str
    memory: int
    tier: int
    problem: str | None = None

    def __str__(self) -> str:
        return f"{self.index}: {self.name} ({self.kind}, Vulkan {self.api_version}, {self.driver})"


class PhysicalDevice:
    """Properties, features and memory of one VkPhysicalDevice, read once."""

    def __init__(self, owner: Instance, handle: vk.Struct, index: int) -> None:
        self.instance = owner
        self.handle = handle
        self.fragments: tuple[Fragment, ...] = ()  # filled in when the device is opened
        functions = owner.functions
        basic = vk.make("VkPhysicalDeviceProperties2")
        functions.vkGetPhysicalDeviceProperties2(handle, basic)
        properties = basic.properties
        self.api_version: int = properties.apiVersion
        self.limits = properties.limits
        self._basic = basic  # owns limits
        self.extensions = {
            vk.ffi.string(item.extensionName)
            for item in vk.enumerate_all(
                functions.vkEnumerateDeviceExtensionProperties, "VkExtensionProperties", handle, vk.ffi.NULL
            )
        }
        usable = self.api_version >= version(*API_VERSION)
        self.driver = vk.make("VkPhysicalDeviceDriverProperties")
        self.vulkan11 = vk.make("VkPhysicalDeviceVulkan11Properties")
        self.vulkan13 = vk.make("VkPhysicalDeviceVulkan13Properties")
        self.maintenance4 = vk.make("VkPhysicalDeviceMaintenance4Properties")
        if usable:
            structures = [self.driver, self.vulkan11, self.vulkan13, self.maintenance4]
            functions.vkGetPhysicalDeviceProperties2(
                handle, vk.make("VkPhysicalDeviceProperties2", pNext=vk.chain(structures))
            )
        self.features = self._features() if usable else []
        self.memory = vk.make("VkPhysicalDeviceMemoryProperties2")
        functions.vkGetPhysicalDeviceMemoryProperties2(handle, self.memory)
        self.queue_family, self.timestamp_bits = self._queue_family()
        self.info = self._described(index, properties)
        # Which pipelines a disk cache may serve: the same driver build on the same device.
        self.cache_key = bytes(properties.pipelineCacheUUID).hex() + f"-{properties.driverVersion:08x}"
        # For which device speeds were measured: drivers may share a UUID among devices that run the same code.
        self.tuning_key = f"{properties.vendorID:04x}-{properties.deviceID:04x}-{self.cache_key}"

    def _problem(self) -> str | None:
        if self.api_version < version(*API_VERSION):
            return f"it has Vulkan {version_text(self.api_version)}, torchvk needs 1.3 or newer; update its driver"
        if missing := [name for name in REQUIRED if not self.has(name)]:
            return f"its driver lacks {', '.join(missing)}"
        return "it has no compute queue" if self.queue_family < 0 else None

    def _described(self, index: int, properties: vk.Struct) -> DeviceInfo:
        problem, memory = self._problem(), self.memory.memoryProperties
        heaps = [memory.memoryHeaps[i] for i in range(memory.memoryHeapCount)]
        local = [heap.size for heap in heaps if heap.flags & vk.VK_MEMORY_HEAP_DEVICE_LOCAL_BIT]
        driver_name = vk.ffi.string(self.driver.driverName).decode(errors="replace")
        return DeviceInfo(
            index=index,
            name=vk.ffi.string(properties.deviceName).decode(errors="replace"),
            kind=KINDS.get(properties.deviceType, "other"),
            driver=driver_name or "unknown driver",
            driver_version=vk.ffi.string(self.driver.driverInfo).decode(errors="replace")
            or str(properties.driverVersion),
            api_version=version_text(self.api_version),
            memory=max(local, default=0),
            tier=self._tier() if problem is None else 0,
            problem=problem,
        )

    def _features(self) -> list[vk.Struct]:
        names = ["VkPhysicalDeviceVulkan11Features", "VkPhysicalDeviceVulkan12Features"]
        names += ["VkPhysicalDeviceVulkan13Features"]
        if COOPERATIVE_MATRIX in self.extensions:
            names.append("VkPhysicalDeviceCooperativeMatrixFeaturesKHR")
        structures = [vk.make("VkPhysicalDeviceFeatures2"), *map(vk.make, names)]
        vk.chain(structures)
        self.instance.functions.vkGetPhysicalDeviceFeatures2(self.handle, structures[0])
        return structures

    def has(self, feature: str) -> bool:
        """Whether the device has a feature of Vulkan 1.0 to 1.3 or of cooperative matrices."""
        for struct in self.features:
            fields = struct.features if hasattr(struct, "features") else struct
            if hasattr(fields, feature):
                return bool(getattr(fields, feature))
        return False

    def _queue_family(self) -> tuple[int, int]:
        count = vk.ffi.new("uint32_t *")
        query = self.instance.functions.vkGetPhysicalDeviceQueueFamilyProperties
        query(self.handle, count, vk.ffi.NULL)
        families = vk.ffi.new("VkQueueFamilyProperties[]", count[0])
        query(self.handle, count, families)
        for index in range(count[0]):
            if families[index].queueFlags & vk.VK_QUEUE_COMPUTE_BIT:
                return index, families[index].timestampValidBits
        return -1, 0

    def _subgroups(self, operations: int) -> bool:
        """Whether subgroups of compute shaders have these operations."""
        return bool(
            self.vulkan11.subgroupSupportedOperations & operations == operations
            and self.vulkan11.subgroupSupportedStages & vk.VK_SHADER_STAGE_COMPUTE_BIT
        )

    def _tier(self) -> int:
        arithmetic = self._subgroups(vk.VK_SUBGROUP_FEATURE_ARITHMETIC_BIT)
        if not (arithmetic and all(self.has(name) for name in TIER_1)):
            return 0
        if not all(self.has(name) for name in TIER_2):
            return 1
        operands = {shape.a for shape in self.cooperative_matrices() if shape.a == shape.b}
        return 2 if {"float16", "int8"} <= operands else 1

    def cooperative_matrices(self) -> tuple[CooperativeMatrixShape, ...]:
        """The shapes that the driver offers to one subgroup, of the types that kernels use."""
        query = self.instance.functions.vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR
        return tuple(
            CooperativeMatrixShape(
                entry.MSize,
                entry.NSize,
                entry.KSize,
                COMPONENTS[entry.AType],
                COMPONENTS[entry.BType],
                COMPONENTS[entry.CType],
                COMPONENTS[entry.ResultType],
            )
            for entry in vk.enumerate_all(query, "VkCooperativeMatrixPropertiesKHR", self.handle)
            if entry.scope == vk.VK_SCOPE_SUBGROUP_KHR
            and not entry.saturatingAccumulation
            and {entry.AType, entry.BType, entry.CType, entry.ResultType} <= COMPONENTS.keys()
        )

    def capabilities(self, max_tier: int | None = None) -> Capabilities:
        """What kernel choice may ask, with the tier capped."""
        tier = self.info.tier if max_tier is None else min(self.info.tier, max_tier)
        limits = self.limits
        return Capabilities(
            tier=tier,
            kind=self.info.kind,
            subgroup_size=self.vulkan11.subgroupSize,
            max_workgroup_invocations=limits.maxComputeWorkGroupInvocations,
            max_workgroup_size=tuple(limits.maxComputeWorkGroupSize),
            max_workgroup_count=tuple(limits.maxComputeWorkGroupCount),
            shared_memory=limits.maxComputeSharedMemorySize,
            max_storage_range=limits.maxStorageBufferRange,
            cooperative_matrices=self.cooperative_matrices() if tier >= 2 else (),
            shuffle=self._subgroups(vk.VK_SUBGROUP_FEATURE_SHUFFLE_BIT),
            max_texels=limits.maxTexelBufferElements,
            fragments=self.fragments if tier >= 2 else (),
        )


class Device:
    """An open device: one queue, its memory and its pipelines. Shared by all sessions on it.

    ``lock`` guards memory, pipelines and the making of executions; ``queue_lock`` guards submissions.
    """

    def __init__(self, physical: PhysicalDevice) -> None:
        self.physical = physical
        self.info = physical.info
        functions = physical.instance.functions
        extensions = [
            name for name in (COOPERATIVE_MATRIX, MEMORY_BUDGET, PORTABILITY_SUBSET) if name in physical.extensions
        ]
        # See torchvk.runtime.statistics.
        self.statistics = os.environ.get("TORCHVK_STATISTICS") == "1" and EXECUTABLE_PROPERTIES in physical.extensions
        features = _enabled_features(physical)
        if self.statistics:
            extensions.append(EXECUTABLE_PROPERTIES)
            features.append(vk.make(EXECUTABLE_FEATURES, pipelineExecutableInfo=1))
        queue = vk.make(
            "VkDeviceQueueCreateInfo",
            queueFamilyIndex=physical.queue_family,
            queueCount=1,
            pQueuePriorities=vk.array("float", [1.0]),
        )
        info = vk.make(
            "VkDeviceCreateInfo",
            pNext=vk.chain(features),
            queueCreateInfoCount=1,
            pQueueCreateInfos=queue,
            enabledExtensionCount=len(extensions),
            ppEnabledExtensionNames=vk.array("char *", extensions),
        )
        handle = vk.ffi.new("VkDevice *")
        functions.vkCreateDevice(physical.handle, info, vk.ffi.NULL, handle)
        self.handle = handle[0]
        get_address = functions.vkGetDeviceProcAddr
        self.functions = vk.Functions(lambda name: get_address(self.handle, name))
        pointer = vk.ffi.new("VkQueue *")
        self.functions.vkGetDeviceQueue(self.handle, physical.queue_family, 0, pointer)
        self.queue = pointer[0]
        self.lock = threading.Lock()
        self.queue_lock = threading.Lock()
        self._retired: deque[Callable[[], None]] = deque()
        self.allocator = Allocator(self)
        self.pipelines = Pipelines(self)
        self._finalizer = weakref.finalize(
            self,
            _destroy,
            self.functions,
            self.handle,
            self.allocator,
            self.pipelines,
            self._retired,
            physical.instance,
        )

    def retire(self, free: Callable[[], None]) -> None:
        """Free something from a finalizer, which may run in the middle of anything: now if nobody holds the lock,
        else when it is next released or at exit."""
        self._retired.append(free)
        self.collect()

    def collect(self) -> None:
        """Free what finalizers left behind."""
        while self._retired and self.lock.acquire(blocking=False):
            try:
                _drain(self._retired)
            finally:
                self.lock.release()

    def close(self) -> None:
        """Destroy the device; every session on it must be closed."""
        self._finalizer()


def _drain(retired: deque[Callable[[], None]]) -> None:
    with contextlib.suppress(IndexError):
        while True:
            retired.popleft()()


def _destroy(
    functions: vk.Functions,
    handle: vk.Struct,
    allocator: Allocator,
    pipelines: Pipelines,
    retired: deque[Callable[[], None]],
    owner: Instance,  # kept alive until here
) -> None:
    _drain(retired)
    pipelines.close()
    allocator.close()
    functions.vkDestroyDevice(handle, vk.ffi.NULL)


def _enabled_features(physical: PhysicalDevice) -> list[vk.Struct]:
    """Feature structures for VkDeviceCreateInfo with REQUIRED and the OPTIONAL that are there."""
    wanted = [name for name in (*REQUIRED, *OPTIONAL) if physical.has(name)]
    result = []
    for source in physical.features:
        struct = vk.make(vk.ffi.typeof(source).item.cname.removeprefix("struct "))
        fields = struct.features if hasattr(struct, "features") else struct
        for name in wanted:
            if hasattr(fields, name):
                setattr(fields, name, 1)
        result.append(struct)
    return result


def _physical_devices() -> list[PhysicalDevice]:
    owner = instance()
    try:
        handles = vk.enumerate_all(owner.functions.vkEnumeratePhysicalDevices, "VkPhysicalDevice", owner.handle)
    except VulkanError as error:
        # What loaders say where drivers are installed but none finds a device.
        if "VK_ERROR_INITIALIZATION_FAILED" not in str(error):
            raise
        handles = []
    return [PhysicalDevice(owner, handle, index) for index, handle in enumerate(handles)]


def list_devices() -> list[DeviceInfo]:
    """Every Vulkan device of this machine, unusable ones included; raises VulkanError without a loader."""
    return [physical.info for physical in _physical_devices()]


def choose(infos: Sequence[DeviceInfo], request: str | int | None) -> int:
    """The index of the device that ``request`` (index, name substring, None: the best) means.

    Raises VulkanError or ArgumentError that list what is there.
    """
    there = "; ".join(f"{info}{': ' + info.problem if info.problem else ''}" for info in infos)
    if not infos:
        raise VulkanError(f"no Vulkan device found: {INSTALL_DRIVER}")
    if isinstance(request, str) and request.strip().isdigit():
        request = int(request)
    if request is None:
        usable = [info for info in infos if info.problem is None]
        if not usable:
            raise VulkanError(f"no Vulkan device that torchvk can use; found {there}")
        return min(usable, key=lambda info: (PREFERENCE.index(info.kind), info.index)).index
    if isinstance(request, bool) or not isinstance(request, int | str):
        raise ArgumentTypeError(f"device must be an index, a name or None, not {type(request).__name__}")
    if isinstance(request, int):
        found = [info for info in infos if info.index == request]
    else:
        found = [info for info in infos if request.strip().lower() in info.name.lower() and request.strip()]
    if not found:
        raise ArgumentError(f"no Vulkan device {request!r}; found {there} (or device='reference' for NumPy)")
    best = min(found, key=lambda info: (info.problem is not None, PREFERENCE.index(info.kind), info.index))
    if best.problem is not None:
        raise VulkanError(f"device {best.name!r} cannot be used: {best.problem}; found {there}")
    return best.index


_lock = threading.Lock()
_devices: dict[int, Device] = {}


def default_request() -> str | None:
    """What None means as a device: TORCHVK_DEVICE, if it is set."""
    return os.environ.get("TORCHVK_DEVICE") or None


def open_device(request: str | int | None = None) -> Device:
    """The device that ``request`` means (None: TORCHVK_DEVICE, else the best); opened once a process."""
    if request is None:
        request = default_request()
    with _lock:
        physical = _physical_devices()
        index = choose([device.info for device in physical], request)
        if index not in _devices:
            device = Device(physical[index])
            if device.info.tier >= 2:
                from torchvk.runtime.fragments import probe  # imports this module

                device.physical.fragments = probe(device)
            _devices[index] = device
        return _devices[index]


def forget(device: Device) -> None:
    """Take a lost device out of the cache, so that the next session opens a fresh one."""
    with _lock:
        for index, known in list(_devices.items()):
            if known is device:
                del _devices[index]


def max_tier(explicit: int | None = None) -> int | None:
    """The tier cap: the argument, else TORCHVK_MAX_TIER, else None."""
    if explicit is not None:
        return explicit
    text = os.environ.get("TORCHVK_MAX_TIER")
    if not text:
        return None
    if text not in ("0", "1", "2"):
        raise ArgumentError(f"TORCHVK_MAX_TIER must be 0, 1 or 2, not {text!r}")
    return int(text)


def matmul_precision(explicit: str | None = None) -> MatmulPrecision:
    """What the user asks of float32 matrix products: the argument, else TORCHVK_MATMUL_PRECISION, else "highest"."""
    text = explicit if explicit is not None else os.environ.get("TORCHVK_MATMUL_PRECISION") or "highest"
    for known in get_args(MatmulPrecision):
        if text == known:
            return known  # type: ignore[no-any-return]
    where = "matmul_precision" if explicit is not None else "TORCHVK_MATMUL_PRECISION"
    raise ArgumentError(f"{where} must be 'highest' or 'high', not {text!r}")

"""Listing and choosing devices; what is said where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from torchvk.errors import ArgumentError, ArgumentTypeError, VulkanError
from torchvk.ops import CooperativeMatrixShape
from torchvk.runtime import DeviceInfo, list_devices
from torchvk.runtime import vulkan as vk
from torchvk.runtime.device import TIER_1, TIER_2, PhysicalDevice, choose, matmul_precision, max_tier, open_device
from torchvk.runtime.instance import instance, version

CPU = DeviceInfo(0, "llvmpipe (LLVM 15)", "cpu", "llvmpipe", "Mesa 22", "1.3.230", 2 << 30, 1)
IGPU = replace(CPU, index=1, name="Intel UHD", kind="integrated", driver="ANV")
OLD = replace(CPU, index=2, name="Old GPU", kind="discrete", problem="it has Vulkan 1.1.0, torchvk needs 1.3 or newer")
GPU = replace(CPU, index=3, name="NVIDIA H200", kind="discrete", driver="NVIDIA", tier=2)
GPU_2 = replace(GPU, index=4, name="NVIDIA H200 NVL")
ALL = [CPU, IGPU, OLD, GPU, GPU_2]


@pytest.mark.parametrize(
    ("request_", "infos", "index"),
    [
        (None, ALL, 3),
        (None, [CPU, IGPU], 1),
        (None, [CPU], 0),
        (None, [CPU, OLD], 0),
        (0, ALL, 0),
        ("1", ALL, 1),
        ("nvidia", ALL, 3),
        ("NVL", ALL, 4),
        (" llvmpipe ", ALL, 0),
    ],
)
def test_choice(request_: str | int | None, infos: list[DeviceInfo], index: int) -> None:
    assert choose(infos, request_) == index


@pytest.mark.parametrize(
    ("request_", "infos", "error", "message"),
    [
        (None, [], VulkanError, "no Vulkan device found.*mesa-vulkan-drivers"),
        (None, [OLD], VulkanError, "no Vulkan device that torchvk can use.*Old GPU.*Vulkan 1.1.0"),
        ("Radeon", ALL, ArgumentError, "'Radeon'.*llvmpipe.*NVIDIA H200.*reference"),
        (7, ALL, ArgumentError, "no Vulkan device 7.*llvmpipe"),
        (-1, ALL, ArgumentError, "no Vulkan device -1"),
        ("", ALL, ArgumentError, "no Vulkan device ''"),
        ("old", ALL, VulkanError, "'Old GPU' cannot be used.*1.3"),
        (1.5, ALL, ArgumentTypeError, "float"),
        (True, ALL, ArgumentTypeError, "bool"),
    ],
)
def test_choices_that_cannot_be(
    request_: str | int | None, infos: list[DeviceInfo], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        choose(infos, request_)


def test_listed_devices_are_complete() -> None:
    infos = list_devices()
    assert infos
    for position, info in enumerate(infos):
        assert info.index == position
        assert info.name
        assert info.driver
        assert info.driver_version
        assert info.memory > 0
        assert info.problem is not None or (info.tier in (0, 1, 2) and info.api_version.startswith("1."))


def test_a_device_is_opened_once() -> None:
    info = list_devices()[open_device().info.index]
    assert open_device(info.index) is open_device(info.name) is open_device()


@pytest.mark.parametrize("code", ["VK_ERROR_INITIALIZATION_FAILED", "VK_ERROR_OUT_OF_HOST_MEMORY"])
def test_drivers_that_find_no_device(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise VulkanError(f"vkEnumeratePhysicalDevices failed: {code}")

    monkeypatch.setattr(instance().functions, "vkEnumeratePhysicalDevices", refuse, raising=False)
    if code == "VK_ERROR_INITIALIZATION_FAILED":
        assert list_devices() == []
        with pytest.raises(VulkanError, match=r"no Vulkan device found.*mesa-vulkan-drivers"):
            open_device()
    else:
        with pytest.raises(VulkanError, match=code):
            list_devices()


@pytest.mark.parametrize("cap", [0, 1, 2])
def test_the_tier_can_be_capped(cap: int) -> None:
    physical = open_device().physical
    capabilities = physical.capabilities(cap)
    assert capabilities.tier == min(cap, physical.info.tier)
    assert capabilities.tier == 2 or capabilities.cooperative_matrices == ()


def test_the_tier_cap_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHVK_MAX_TIER", "0")
    assert max_tier() == 0
    assert max_tier(1) == 1
    monkeypatch.setenv("TORCHVK_MAX_TIER", "fast")
    with pytest.raises(ArgumentError, match="TORCHVK_MAX_TIER must be 0, 1 or 2, not 'fast'"):
        max_tier()
    monkeypatch.delenv("TORCHVK_MAX_TIER")
    assert max_tier() is None


def test_the_matmul_precision_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHVK_MATMUL_PRECISION", raising=False)
    assert matmul_precision() == "highest"
    assert matmul_precision("high") == "high"
    monkeypatch.setenv("TORCHVK_MATMUL_PRECISION", "high")
    assert matmul_precision() == "high"
    assert matmul_precision("highest") == "highest"
    monkeypatch.setenv("TORCHVK_MATMUL_PRECISION", "medium")
    with pytest.raises(ArgumentError, match="TORCHVK_MATMUL_PRECISION must be 'highest' or 'high', not 'medium'"):
        matmul_precision()
    for wrong in ("", "HIGH"):
        with pytest.raises(ArgumentError, match=f"matmul_precision must be 'highest' or 'high', not '{wrong}'"):
            matmul_precision(wrong)


def call(functions: vk.Functions, name: str, *arguments: Any) -> Any:
    return getattr(functions, name)(*arguments)


class Changed(vk.Functions):
    """The real functions, with some replaced by ``changes`` (each gets the real one first)."""

    def __init__(self, **changes: Callable[..., Any]) -> None:
        real = instance().functions
        super().__init__(real._get_address)
        for name, change in changes.items():
            # Fetched when called: lavapipe does not have all of them.
            setattr(self, name, partial(change, partial(call, real, name)))


def physical_device(**changes: Callable[..., Any]) -> PhysicalDevice:
    """The first device, as drivers with these answers would show it."""
    owner = SimpleNamespace(functions=Changed(**changes))
    return PhysicalDevice(owner, open_device().physical.handle, 0)  # type: ignore[arg-type]


def test_devices_below_vulkan_1_3_are_listed_with_the_reason() -> None:
    def old(real: Callable[..., None], handle: vk.Struct, properties: vk.Struct) -> None:
        real(handle, properties)
        properties.properties.apiVersion = version(1, 1, 77)

    info = physical_device(vkGetPhysicalDeviceProperties2=old).info
    assert (info.api_version, info.driver, info.tier) == ("1.1.77", "unknown driver", 0)
    assert info.problem is not None
    assert "1.1.77, torchvk needs 1.3 or newer; update its driver" in info.problem


def test_missing_features_are_named() -> None:
    info = physical_device(vkGetPhysicalDeviceFeatures2=lambda real, handle, features: None).info
    assert info.problem == "its driver lacks synchronization2, maintenance4, shaderIntegerDotProduct"


def test_a_device_without_a_compute_queue_is_no_use() -> None:
    def graphics_only(real: Callable[..., None], handle: vk.Struct, count: vk.Struct, families: vk.Struct) -> None:
        real(handle, count, families)
        if families != vk.ffi.NULL:
            for index in range(count[0]):
                families[index].queueFlags = 1

    info = physical_device(vkGetPhysicalDeviceQueueFamilyProperties=graphics_only).info
    assert info.problem == "it has no compute queue"


def features(present: set[str]) -> Callable[..., None]:
    def fill(real: Callable[..., None], handle: vk.Struct, structure: vk.Struct) -> None:
        real(handle, structure)
        names = ["", "Vulkan11", "Vulkan12", "Vulkan13", "CooperativeMatrix"]
        while structure != vk.ffi.NULL:
            kind = structure.sType
            for name in names:
                full = f"VkPhysicalDevice{name}Features" + {"": "2", "CooperativeMatrix": "KHR"}.get(name, "")
                if kind == vk.STRUCTURE_TYPES[full]:
                    typed = vk.ffi.cast(f"{full} *", structure)
                    fields = typed.features if name == "" else typed
                    for feature in {*TIER_1, *TIER_2}:
                        if hasattr(fields, feature):
                            setattr(fields, feature, int(feature in present))
            structure = vk.ffi.cast("VkPhysicalDeviceFeatures2 *", typed.pNext)

    return fill


MATRICES: list[tuple[int, ...]] = [
    # M, N, K, A, B, C, result, saturating, scope
    (16, 16, 16, 0, 0, 1, 1, 0, 3),  # float16, float32 accumulation
    (16, 16, 32, 3, 3, 5, 5, 0, 3),  # int8, int32 accumulation
    (16, 16, 32, 3, 3, 5, 5, 1, 3),  # saturating
    (64, 64, 32, 0, 0, 1, 1, 0, 2),  # of a workgroup
    (16, 16, 16, 1000141000, 1000141000, 1, 1, 0, 3),  # bfloat16
]


def extensions(real: Callable[..., int], handle: vk.Struct, layer: vk.Struct, count: vk.Struct, out: vk.Struct) -> int:
    count[0] = 1
    if out != vk.ffi.NULL:
        out[0].extensionName = b"VK_KHR_cooperative_matrix"
    return 0


def with_matrices(offered: list[tuple[int, ...]], present: set[str]) -> PhysicalDevice:
    def matrices(real: Callable[..., int], handle: vk.Struct, count: vk.Struct, out: vk.Struct) -> int:
        count[0] = len(offered)
        names = ("MSize", "NSize", "KSize", "AType", "BType", "CType", "ResultType", "saturatingAccumulation", "scope")
        for index, row in enumerate(offered if out != vk.ffi.NULL else []):
            for name, value in zip(names, row, strict=True):
                setattr(out[index], name, value)
        return 0

    return physical_device(
        vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR=matrices,
        vkEnumerateDeviceExtensionProperties=extensions,
        vkGetPhysicalDeviceFeatures2=features(present),
    )


def test_cooperative_matrices_make_tier_2() -> None:
    physical = with_matrices(MATRICES, {*TIER_1, *TIER_2})
    assert physical.info.tier == 2
    assert physical.capabilities().cooperative_matrices == (
        CooperativeMatrixShape(16, 16, 16, "float16", "float16", "float32", "float32"),
        CooperativeMatrixShape(16, 16, 32, "int8", "int8", "int32", "int32"),
    )
    assert physical.capabilities(1).cooperative_matrices == ()


@pytest.mark.parametrize(
    ("offered", "present"),
    [(MATRICES[:1], {*TIER_1, *TIER_2}), (MATRICES, {*TIER_1}), ([], {*TIER_1, *TIER_2})],
    ids=["no int8", "no feature", "no shapes"],
)
def test_what_lacks_a_part_is_not_tier_2(offered: list[tuple[int, ...]], present: set[str]) -> None:
    assert with_matrices(offered, present).info.tier < 2


def in_a_process(code: str, **environment: str) -> str:
    """What ``code`` prints in a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    return result.stdout


LIST = """
from torchvk.errors import VulkanError
from torchvk.runtime import list_devices
try:
    print(list_devices())
except VulkanError as error:
    print("error:", error)
"""


def test_no_driver_says_what_to_install() -> None:
    output = in_a_process(LIST, VK_ICD_FILENAMES="/nonexistent.json", VK_DRIVER_FILES="/nonexistent.json")
    assert "apt install mesa-vulkan-drivers" in output or output.strip() == "[]"


@pytest.mark.validation
def test_no_validation_layer_says_what_to_install(tmp_path: object) -> None:
    output = in_a_process(LIST, VK_LAYER_PATH=str(tmp_path))
    assert "apt install vulkan-validationlayers" in output


def test_runtime_needs_no_torch() -> None:
    output = in_a_process("import sys, torchvk.runtime; print('torch' in sys.modules, 'executorch' in sys.modules)")
    assert output.split() == ["False", "False"]

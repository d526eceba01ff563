"""Listing and choosing devices; what is said where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from torchvk.errors import ArgumentError, ArgumentTypeError, VulkanError
from torchvk.runtime import DeviceInfo, list_devices
from torchvk.runtime.device import choose, max_tier, open_device
from torchvk.runtime.instance import instance

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


def test_no_validation_layer_says_what_to_install(tmp_path: object) -> None:
    output = in_a_process(LIST, VK_LAYER_PATH=str(tmp_path))
    assert "apt install vulkan-validationlayers" in output


def test_runtime_needs_no_torch() -> None:
    output = in_a_process("import sys, torchvk.runtime; print('torch' in sys.modules, 'executorch' in sys.modules)")
    assert output.split() == ["False", "False"]

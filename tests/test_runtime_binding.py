"""The generated binding and the thin layer over it."""

from __future__ import annotations

import gc
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from torchvk.errors import DeviceLostError, OutOfMemoryError, VulkanError
from torchvk.runtime import vulkan as vk
from torchvk.runtime.vulkan import _registry, api

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_binding", ROOT / "tools" / "generate_binding.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_binding_holds_what_the_runtime_names_and_nothing_else(generator: ModuleType) -> None:
    used = generator.used_names()
    assert {name for name in used if name.startswith("vk")} == set(_registry.FUNCTIONS)
    assert {name for name in used if name.startswith("VK_")} == {n for n in vars(_registry) if n.startswith("VK_")}
    for name in used:
        if name.startswith("Vk"):
            vk.ffi.typeof(name)  # raises if it is not declared
    for name in _registry.FUNCTIONS:
        vk.ffi.typeof(f"PFN_{name}")


def test_the_generator_knows_the_registry(generator: ModuleType, tmp_path: Path) -> None:
    """A registry in miniature: aliases, extension numbers, array sizes, bit positions, function pointers."""
    path = tmp_path / "vk.xml"
    path.write_text(
        """<registry><types>
        <type category="define">#define <name>VK_HEADER_VERSION</name></type>
        <type category="define">// version\n#define VK_HEADER_VERSION 7</type>
        <type category="define">#define <name>VK_HEADER_VERSION_COMPLETE</name>
            VK_MAKE_API_VERSION(0, 1, 4, VK_HEADER_VERSION)</type>
        <type category="basetype">typedef <type>uint64_t</type> <name>VkDeviceSize</name>;</type>
        <type category="enum" name="VkStructureType"/>
        <type category="enum" name="VkResult"/>
        <type category="handle"><type>VK_DEFINE_HANDLE</type>(<name>VkDevice</name>)</type>
        <type category="struct" name="VkThing">
            <member values="VK_STRUCTURE_TYPE_THING"><type>VkStructureType</type> <name>sType</name></member>
            <member>const <type>void</type>* <name>pNext</name><comment>not C</comment></member>
            <member><type>char</type> <name>label</name>[<enum>VK_LABEL_SIZE</enum>]</member>
            <member api="vulkansc"><type>VkDeviceSize</type> <name>never</name></member>
            <member><type>VkDeviceSize</type> <name>size</name></member>
        </type></types>
        <enums name="API Constants"><enum name="VK_LABEL_SIZE" value="16"/><enum name="VK_ALL" value="(~0ULL)"/></enums>
        <enums name="VkResult"><enum name="VK_SUCCESS" value="0"/></enums>
        <enums name="VkStructureType"><enum name="VK_STRUCTURE_TYPE_THING" value="42"/></enums>
        <enums name="VkBits" type="bitmask"><enum name="VK_THIRD_BIT" bitpos="2"/></enums>
        <commands><command><proto><type>VkResult</type> <name>vkDo</name></proto>
            <param><type>VkDevice</type> <name>device</name></param>
            <param>const <type>VkThing</type>* <name>pThing</name></param></command>
            <command name="vkDoKHR" alias="vkDo"/></commands>
        <extensions><extension name="VK_EXT_x" number="3"><require>
            <enum name="VK_ERROR_X" extends="VkResult" offset="1" dir="-"/>
            <enum name="VK_THIRD_BIT_EXT" alias="VK_THIRD_BIT"/></require></extension></extensions></registry>"""
    )
    registry = generator.read_registry(path)
    assert registry.version == "1.4.7"
    assert registry.constants["VK_ERROR_X"] == -1000002001
    assert registry.constants["VK_ALL"] == 2**64 - 1
    declarations, text = generator.generate(registry, {"vkDoKHR", "VK_THIRD_BIT_EXT", "VK_ERROR_X"})
    assert "char label[16];" in declarations
    assert "never" not in declarations
    assert "typedef VkResult (*PFN_vkDoKHR)(VkDevice device, const VkThing* pThing);" in declarations
    values: dict[str, Any] = {}
    exec(text, values)
    assert values["VK_THIRD_BIT_EXT"] == 4
    assert values["STRUCTURE_TYPES"] == {"VkThing": 42}
    assert values["RESULTS"] == {0: "VK_SUCCESS", -1000002001: "VK_ERROR_X"}


@pytest.mark.parametrize(
    ("code", "error", "name"),
    [
        (vk.VK_ERROR_OUT_OF_DEVICE_MEMORY, OutOfMemoryError, "VK_ERROR_OUT_OF_DEVICE_MEMORY"),
        (vk.VK_ERROR_OUT_OF_HOST_MEMORY, OutOfMemoryError, "VK_ERROR_OUT_OF_HOST_MEMORY"),
        (vk.VK_ERROR_DEVICE_LOST, DeviceLostError, "VK_ERROR_DEVICE_LOST"),
        (-8, VulkanError, "VK_ERROR_FEATURE_NOT_PRESENT"),
        (-123456, VulkanError, "VkResult -123456"),
    ],
)
def test_error_codes_become_errors_that_name_call_and_code(code: int, error: type[VulkanError], name: str) -> None:
    callback = vk.ffi.callback("PFN_vkGetFenceStatus", lambda device, fence: code)
    functions = vk.Functions(lambda _: vk.ffi.cast("PFN_vkVoidFunction", callback))
    with pytest.raises(error, match=f"vkGetFenceStatus failed: {name}") as caught:
        functions.vkGetFenceStatus(vk.ffi.NULL, vk.ffi.NULL)
    assert type(caught.value) is error


def test_success_codes_are_returned() -> None:
    callback = vk.ffi.callback("PFN_vkGetFenceStatus", lambda device, fence: 1)
    functions = vk.Functions(lambda _: vk.ffi.cast("PFN_vkVoidFunction", callback))
    assert functions.vkGetFenceStatus(vk.ffi.NULL, vk.ffi.NULL) == 1


def test_a_function_that_the_driver_lacks_is_named() -> None:
    functions = vk.Functions(lambda _: vk.ffi.cast("PFN_vkVoidFunction", 0))
    with pytest.raises(VulkanError, match="vkCmdDispatch"):
        functions.vkCmdDispatch(vk.ffi.NULL, 1, 1, 1)


def test_no_loader_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "LIBRARIES", {"linux": ("libnothing-of-the-kind.so",)})
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(VulkanError, match=r"libnothing-of-the-kind.so.*apt install libvulkan1"):
        vk.load()


def test_structures_keep_what_they_point_to() -> None:
    info = vk.make("VkApplicationInfo", pApplicationName=b"name of the application", apiVersion=3)
    outer = vk.make("VkInstanceCreateInfo", pApplicationInfo=info)
    del info
    gc.collect()
    filler = [vk.ffi.new("char[]", b"something else entirely") for _ in range(100)]
    assert vk.ffi.string(outer.pApplicationInfo.pApplicationName) == b"name of the application"
    assert outer.pApplicationInfo.sType == vk.STRUCTURE_TYPES["VkApplicationInfo"]
    assert len(filler) == 100


def test_embedded_structures_are_copied_and_their_pointers_kept() -> None:
    stage = vk.make("VkPipelineShaderStageCreateInfo", pName=b"entry point of the kernel")
    create = vk.make("VkComputePipelineCreateInfo", stage=stage)
    items = vk.array("VkComputePipelineCreateInfo", [create, create])
    del stage, create
    gc.collect()
    assert vk.ffi.string(items[1].stage.pName) == b"entry point of the kernel"
    assert items[0].stage.sType == vk.STRUCTURE_TYPES["VkPipelineShaderStageCreateInfo"]


def test_chains_link_all_structures() -> None:
    names = ["VkPhysicalDeviceFeatures2", "VkPhysicalDeviceVulkan11Features", "VkPhysicalDeviceVulkan13Features"]
    first = vk.chain([vk.make(name) for name in names])
    gc.collect()
    second = vk.ffi.cast("VkPhysicalDeviceVulkan11Features *", first.pNext)
    third = vk.ffi.cast("VkPhysicalDeviceVulkan13Features *", second.pNext)
    assert [entry.sType for entry in (first, second, third)] == [vk.STRUCTURE_TYPES[name] for name in names]
    assert third.pNext == vk.ffi.NULL
    assert vk.chain([]) == vk.ffi.NULL

"""The Vulkan instance: one a process, made on first use, with the validation layers on request."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from typing import Any

from torchvk.errors import VulkanError
from torchvk.runtime import vulkan as vk

log = logging.getLogger("torchvk.vulkan")

API_VERSION = (1, 3)
VALIDATION_LAYER = b"VK_LAYER_KHRONOS_validation"
INSTALL_DRIVER = (
    "install the GPU's Vulkan driver, or Mesa's drivers, which include lavapipe for CPUs "
    "(Debian, Ubuntu: apt install mesa-vulkan-drivers; Fedora: dnf install mesa-vulkan-drivers)"
)


def version(major: int, minor: int, patch: int = 0) -> int:
    """A version as Vulkan packs it into 32 bits."""
    return major << 22 | minor << 12 | patch


def version_text(value: int) -> str:
    return f"{value >> 22 & 0x7F}.{value >> 12 & 0x3FF}.{value & 0xFFF}"


class Instance:
    """A VkInstance and its functions. ``messages`` collects what the validation layers say, if they are on."""

    def __init__(self, validation: bool) -> None:
        self.validation = validation
        self.messages: list[str] = []
        self._library = vk.load()
        get_address = self._library.vkGetInstanceProcAddr
        entry = vk.Functions(lambda name: get_address(vk.ffi.NULL, name))
        available = {
            vk.ffi.string(item.extensionName)
            for item in vk.enumerate_all(
                entry.vkEnumerateInstanceExtensionProperties, "VkExtensionProperties", vk.ffi.NULL
            )
        }
        extensions, layers, structures, flags = [], [], [], 0
        if b"VK_KHR_portability_enumeration" in available:  # MoltenVK
            extensions.append(b"VK_KHR_portability_enumeration")
            flags |= vk.VK_INSTANCE_CREATE_ENUMERATE_PORTABILITY_BIT_KHR
        if validation:
            installed = vk.enumerate_all(entry.vkEnumerateInstanceLayerProperties, "VkLayerProperties")
            if VALIDATION_LAYER not in {vk.ffi.string(layer.layerName) for layer in installed}:
                raise VulkanError(
                    "TORCHVK_VALIDATION is set but the Khronos validation layer is not installed "
                    "(Debian, Ubuntu: apt install vulkan-validationlayers)"
                )
            layers.append(VALIDATION_LAYER)
            extensions += [b"VK_EXT_debug_utils", b"VK_EXT_validation_features"]
            structures = [self._validation_features(), self._messenger_info()]
        application = vk.make(
            "VkApplicationInfo", pApplicationName=b"torchvk", pEngineName=b"torchvk", apiVersion=version(*API_VERSION)
        )
        info = vk.make(
            "VkInstanceCreateInfo",
            pNext=vk.chain(structures),
            flags=flags,
            pApplicationInfo=application,
            enabledLayerCount=len(layers),
            ppEnabledLayerNames=vk.array("char *", layers),
            enabledExtensionCount=len(extensions),
            ppEnabledExtensionNames=vk.array("char *", extensions),
        )
        handle = vk.ffi.new("VkInstance *")
        try:
            entry.vkCreateInstance(info, vk.ffi.NULL, handle)
        except VulkanError as error:
            if "INCOMPATIBLE_DRIVER" not in str(error):
                raise
            raise VulkanError(f"no Vulkan driver for version 1.3 found: {INSTALL_DRIVER}") from None
        self.handle = handle[0]
        self.functions = vk.Functions(lambda name: get_address(self.handle, name))
        messenger = vk.ffi.new("VkDebugUtilsMessengerEXT *")
        if validation:
            self.functions.vkCreateDebugUtilsMessengerEXT(self.handle, structures[1], vk.ffi.NULL, messenger)
        weakref.finalize(self, _destroy, self.functions, self.handle, messenger[0], self._keep())

    def _keep(self) -> tuple[Any, ...]:
        """What must live as long as the VkInstance."""
        return (self._library, getattr(self, "_callback", None), self.messages)

    def _validation_features(self) -> vk.Struct:
        enabled = [vk.VK_VALIDATION_FEATURE_ENABLE_SYNCHRONIZATION_VALIDATION_EXT]
        return vk.make(
            "VkValidationFeaturesEXT",
            enabledValidationFeatureCount=len(enabled),
            pEnabledValidationFeatures=vk.array("VkValidationFeatureEnableEXT", enabled),
        )

    def _messenger_info(self) -> vk.Struct:
        messages = self.messages

        @vk.ffi.callback("PFN_vkDebugUtilsMessengerCallbackEXT")  # type: ignore[untyped-decorator]
        def collect(severity: int, types: int, data: vk.Struct, user: vk.Struct) -> int:
            name = vk.ffi.string(data.pMessageIdName).decode() if data.pMessageIdName else ""
            text = vk.ffi.string(data.pMessage).decode(errors="replace")[:1000]
            if types & vk.VK_DEBUG_UTILS_MESSAGE_TYPE_GENERAL_BIT_EXT:
                # The loader talking about drivers that it skipped, not about what we do.
                log.debug("%s: %s", name, text)
                return 0
            log.warning("%s: %s", name, text)
            messages.append(f"{name}: {text}")
            return 0

        self._callback = collect
        return vk.make(
            "VkDebugUtilsMessengerCreateInfoEXT",
            messageSeverity=vk.VK_DEBUG_UTILS_MESSAGE_SEVERITY_WARNING_BIT_EXT
            | vk.VK_DEBUG_UTILS_MESSAGE_SEVERITY_ERROR_BIT_EXT,
            messageType=vk.VK_DEBUG_UTILS_MESSAGE_TYPE_GENERAL_BIT_EXT
            | vk.VK_DEBUG_UTILS_MESSAGE_TYPE_VALIDATION_BIT_EXT
            | vk.VK_DEBUG_UTILS_MESSAGE_TYPE_PERFORMANCE_BIT_EXT,
            pfnUserCallback=collect,
        )


def _destroy(functions: vk.Functions, handle: vk.Struct, messenger: vk.Struct, keep: tuple[Any, ...]) -> None:
    if messenger != vk.ffi.NULL:
        functions.vkDestroyDebugUtilsMessengerEXT(handle, messenger, vk.ffi.NULL)
    functions.vkDestroyInstance(handle, vk.ffi.NULL)


_lock = threading.Lock()
_instance: Instance | None = None


def instance() -> Instance:
    """The process's instance; raises VulkanError if there is no loader, layer or driver."""
    global _instance
    with _lock:
        if _instance is None:
            _instance = Instance(validation=os.environ.get("TORCHVK_VALIDATION", "") not in ("", "0"))
        return _instance


def validation_messages() -> list[str]:
    """What the validation layers said so far (warnings and errors); empty if they are off. The list is live."""
    return _instance.messages if _instance is not None else []

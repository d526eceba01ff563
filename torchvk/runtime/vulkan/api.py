"""Finding the loader, checked calls, and structures that keep alive what they point to."""

from __future__ import annotations

import contextlib
import itertools
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from torchvk.errors import DeviceLostError, OutOfMemoryError, VulkanError
from torchvk.runtime.vulkan._ffi import ffi
from torchvk.runtime.vulkan._registry import (
    RESULTS,
    STRUCTURE_TYPES,
    VK_ERROR_DEVICE_LOST,
    VK_ERROR_OUT_OF_DEVICE_MEMORY,
    VK_ERROR_OUT_OF_HOST_MEMORY,
    VK_INCOMPLETE,
)

# A cffi object: a pointer to a struct, an array or a handle.
Struct = Any

LIBRARIES = {
    "linux": ("libvulkan.so.1", "libvulkan.so"),
    "win32": ("vulkan-1.dll",),
    "darwin": (
        "libvulkan.1.dylib",
        "libvulkan.dylib",
        "/opt/homebrew/lib/libvulkan.1.dylib",
        "/usr/local/lib/libvulkan.1.dylib",
        "libMoltenVK.dylib",
        "/opt/homebrew/lib/libMoltenVK.dylib",
    ),
}
INSTALL_LOADER = {
    "linux": "install it (Debian, Ubuntu: apt install libvulkan1; Fedora: dnf install vulkan-loader)",
    "win32": "install the GPU vendor's driver, which brings it",
    "darwin": "install it (brew install vulkan-loader molten-vk)",
}

RESULT = ffi.typeof("VkResult")
_errors = {
    VK_ERROR_OUT_OF_HOST_MEMORY: OutOfMemoryError,
    VK_ERROR_OUT_OF_DEVICE_MEMORY: OutOfMemoryError,
    VK_ERROR_DEVICE_LOST: DeviceLostError,
}
# cffi pointers do not own what they are assigned: the owner is kept here as long as the structure lives.
_alive: weakref.WeakKeyDictionary[Struct, list[Struct]] = weakref.WeakKeyDictionary()


def load() -> Any:
    """The system's Vulkan loader, with vkGetInstanceProcAddr as its attribute; VulkanError if there is none."""
    names = LIBRARIES.get(sys.platform, LIBRARIES["linux"])
    for name in names:
        with contextlib.suppress(OSError):
            return ffi.dlopen(name)
    advice = INSTALL_LOADER.get(sys.platform, INSTALL_LOADER["linux"])
    raise VulkanError(f"no Vulkan loader found (looked for {', '.join(names)}): {advice}")


class Functions:
    """Vulkan functions as attributes, fetched on first use and checked.

    One that returns a VkResult returns it as an int; an error code raises VulkanError (OutOfMemoryError,
    DeviceLostError) with the names of the call and of the code.
    """

    def __init__(self, get_address: Callable[[bytes], Struct]) -> None:
        self._get_address = get_address

    def __getattr__(self, name: str) -> Callable[..., Any]:
        address = self._get_address(name.encode())
        if address == ffi.NULL:
            raise VulkanError(f"this Vulkan driver has no function {name}")
        function = ffi.cast(f"PFN_{name}", address)
        if ffi.typeof(function).result is RESULT:
            function = _checked(name, function)
        setattr(self, name, function)
        return function  # type: ignore[no-any-return]


def _checked(name: str, function: Callable[..., int]) -> Callable[..., int]:
    def call(*arguments: Any) -> int:
        result = function(*arguments)
        if result < 0:
            code = RESULTS.get(result, f"VkResult {result}")
            raise _errors.get(result, VulkanError)(f"{name} failed: {code}")
        return result

    return call


def make(type: str, /, **fields: Any) -> Struct:
    """A new structure with its sType and the given fields; returns the pointer to it.

    A field may be a number, bytes, None (NULL), a pointer, or, for an embedded structure, the pointer that
    ``make`` gave. What is pointed to lives as long as the result.
    """
    struct = ffi.new(f"{type} *")
    if type in STRUCTURE_TYPES:
        struct.sType = STRUCTURE_TYPES[type]
    owned = []
    embedded = _embedded(type)
    for name, value in fields.items():
        if value is None:
            continue
        if isinstance(value, bytes):
            value = ffi.new("char[]", value)
        if isinstance(value, ffi.CData):
            owned.append(value)
            if name in embedded:
                value = value[0]
        setattr(struct, name, value)
    if owned:
        _alive[struct] = owned
    return struct


@cache
def _embedded(type: str) -> frozenset[str]:
    """The fields that are structures themselves."""
    fields = ffi.typeof(type).fields or ()
    return frozenset(name for name, field in fields if field.type.kind in ("struct", "union"))


def array(type: str, items: Sequence[Any]) -> Struct:
    """A C array. Structures are given by pointer, as :func:`make` returns them, and copied; strings as bytes."""
    values = [ffi.new("char[]", item) if isinstance(item, bytes) else item for item in items]
    owned = [value for value in values if isinstance(value, ffi.CData)]
    if values and ffi.typeof(type).kind == "struct":
        values = [value[0] for value in values]
    result = ffi.new(f"{type}[]", values)
    if owned:
        _alive[result] = owned
    return result


def structures(type: str, count: int) -> Struct:
    """An array of so many structures with their sType, to be filled in place."""
    items = ffi.new(f"{type}[]", count)
    for item in items:
        item.sType = STRUCTURE_TYPES[type]
    return items


def chain(structures: Iterable[Struct]) -> Struct:
    """Link structures by pNext; returns the first (the others live as long as it), or NULL for none."""
    items = list(structures)
    if not items:
        return ffi.NULL
    for item, following in itertools.pairwise(items):
        item.pNext = following
        _alive.setdefault(item, []).append(following)
    return items[0]


def enumerate_all(function: Callable[..., Any], type: str, *arguments: Any) -> list[Struct]:
    """Vulkan's two-call idiom: all elements of a list whose length the driver tells; structures have sType."""
    while True:
        count = ffi.new("uint32_t *")
        function(*arguments, count, ffi.NULL)
        items = ffi.new(f"{type}[]", count[0])
        if type in STRUCTURE_TYPES:
            for item in items:
                item.sType = STRUCTURE_TYPES[type]
        if function(*arguments, count, items) != VK_INCOMPLETE:
            found = [items[i] for i in range(count[0])]
            # An element of an array does not keep the array alive: copy.
            return [ffi.new(f"{type} *", item) for item in found] if ffi.typeof(type).kind == "struct" else found

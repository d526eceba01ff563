"""The Vulkan binding: the standard's own names, generated from Khronos' registry, over cffi.

Structures are made by :func:`make`, functions are attributes of :class:`Functions`, constants are module attributes.
"""

from torchvk.runtime.vulkan._ffi import ffi
from torchvk.runtime.vulkan._registry import *  # noqa: F403
from torchvk.runtime.vulkan.api import Functions, Struct, array, chain, enumerate_all, load, make, structures

__all__ = ["Functions", "Struct", "array", "chain", "enumerate_all", "ffi", "load", "make", "structures"]

"""torchvk: quantize PyTorch models, lower them to Vulkan and run them on any GPU.

Importing this package imports neither torch nor executorch (nor even NumPy): its names are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torchvk.errors import TorchVkError

if TYPE_CHECKING:
    from torchvk.partitioner.vulkan_partitioner import VulkanPartitioner
    from torchvk.program import Program, load
    from torchvk.program.compare import compare
    from torchvk.quantizer.vulkan_quantizer import VulkanQuantizer, get_symmetric_quantization_config
    from torchvk.runtime import list_devices as devices

    __version__: str

__all__ = [
    "Program",
    "TorchVkError",
    "VulkanPartitioner",
    "VulkanQuantizer",
    "__version__",
    "compare",
    "devices",
    "get_symmetric_quantization_config",
    "load",
]

# name → (module, name there)
_LAZY = {
    "Program": ("torchvk.program", "Program"),
    "VulkanPartitioner": ("torchvk.partitioner.vulkan_partitioner", "VulkanPartitioner"),
    "VulkanQuantizer": ("torchvk.quantizer.vulkan_quantizer", "VulkanQuantizer"),
    "compare": ("torchvk.program.compare", "compare"),
    "devices": ("torchvk.runtime", "list_devices"),
    "get_symmetric_quantization_config": ("torchvk.quantizer.vulkan_quantizer", "get_symmetric_quantization_config"),
    "load": ("torchvk.program", "load"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("torchvk")
    elif name in _LAZY:
        module, attribute = _LAZY[name]
        value = getattr(importlib.import_module(module), attribute)
    else:
        raise AttributeError(f"module 'torchvk' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))

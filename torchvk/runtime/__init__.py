"""Graphs on Vulkan devices: devices, memory, kernels, plan, session. Knows nothing of torch."""

from torchvk.runtime.device import DeviceInfo, list_devices
from torchvk.runtime.instance import validation_messages
from torchvk.runtime.session import Session

__all__ = ["DeviceInfo", "Session", "list_devices", "validation_messages"]

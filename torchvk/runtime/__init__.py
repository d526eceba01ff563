"""Graphs on Vulkan devices: devices, memory, kernels, plan, session. Knows nothing of torch."""

from torchvk.runtime.device import DeviceInfo, list_devices
from torchvk.runtime.instance import validation_messages
from torchvk.runtime.profile import ProfileRow, by_operator, chrome_trace
from torchvk.runtime.session import Session, SessionDescription
from torchvk.runtime.tune import Tuning

__all__ = [
    "DeviceInfo",
    "ProfileRow",
    "Session",
    "SessionDescription",
    "Tuning",
    "by_operator",
    "chrome_trace",
    "list_devices",
    "validation_messages",
]

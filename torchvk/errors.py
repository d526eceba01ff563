"""Every error that torchvk raises on purpose derives from :class:`TorchVkError`."""

from __future__ import annotations


class TorchVkError(Exception):
    """Base class of every error that torchvk raises on purpose."""


class ArgumentError(TorchVkError, ValueError):
    """An argument has a value that cannot be used (wrong shape, unknown name, out of range)."""


class ArgumentTypeError(TorchVkError, TypeError):
    """An argument has a type or dtype that cannot be used."""


class FormatError(TorchVkError, ValueError):
    """A file or blob is damaged, hostile, of a newer version, or not what it was taken for."""


class UnsupportedError(TorchVkError):
    """The request is meaningful but torchvk, or this device, cannot carry it out."""


class MissingDependencyError(TorchVkError, ImportError):
    """An optional package that is needed for this request is not installed."""


class VulkanError(TorchVkError):
    """A Vulkan call failed, or no usable Vulkan loader, driver or device was found."""


class OutOfMemoryError(VulkanError):
    """The device or host has too little memory; the message holds the numbers."""


class DeviceLostError(VulkanError):
    """The device stopped answering; open a new session to go on."""


class ClosedError(TorchVkError):
    """The object was used after ``close()``."""

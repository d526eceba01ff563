"""SPIR-V modules, compiled from the Slang sources beside this file when the package is built."""

from __future__ import annotations

from functools import cache
from importlib import resources

from torchvk.errors import TorchVkError


def names() -> tuple[str, ...]:
    """Names of all compiled kernels."""
    folder = resources.files(__package__).joinpath("spirv")
    return tuple(sorted(entry.name.removesuffix(".spv") for entry in folder.iterdir() if entry.name.endswith(".spv")))


@cache
def load(name: str) -> bytes:
    """The SPIR-V words of a kernel."""
    try:
        return resources.files(__package__).joinpath("spirv", f"{name}.spv").read_bytes()
    except FileNotFoundError:
        raise TorchVkError(
            f"kernel {name!r} is missing from this installation; reinstall torchvk, or in a checkout run `make shaders`"
        ) from None

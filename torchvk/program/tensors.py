"""What a method that has CPU operators computes with: NumPy arrays, or torch tensors where torch is needed.

Both give the same small set of functions, so that the interpreter does not care. torch is imported only when a
:class:`TorchTensors` is made.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import numpy as np

from torchvk.errors import ArgumentTypeError, MissingDependencyError
from torchvk.program.pte import TensorValue

Array = np.ndarray[Any, Any]


def numpy_dtype(name: str) -> np.dtype[Any] | None:
    """The NumPy dtype of that name; None for those that NumPy lacks (bfloat16, float8)."""
    try:
        return np.dtype(name)
    except TypeError:
        return None


def strides(value: TensorValue) -> tuple[int, ...]:
    """Strides in elements of a dense tensor with ``value``'s dimension order."""
    result = [0] * len(value.shape)
    step = 1
    for dimension in reversed(value.dim_order):
        result[dimension] = step
        step *= max(value.shape[dimension], 1)
    return tuple(result)


class Tensors(Protocol):
    """The functions that the interpreter needs. "native" is the kind of tensor that it computes with."""

    def view(self, memory: Array, value: TensorValue) -> Any:
        """A native tensor of ``value``'s type over ``memory`` (uint8 [nbytes]), without copying."""

    def empty(self, value: TensorValue) -> Any:
        """A new native tensor for an operator to write: empty if its shape is only known afterwards."""

    def store(self, target: Any, source: Any) -> None:
        """Copy (and convert) ``source``, native or NumPy or torch, into ``target``."""

    def copy(self, source: Any, value: TensorValue) -> Any:
        """A new native tensor of ``value``'s dtype with ``source``'s shape and elements."""

    def array(self, tensor: Any) -> Array:
        """A native tensor as an array, sharing memory."""

    def give(self, tensor: Any, as_torch: bool) -> Any:
        """A copy for the caller to keep."""


class NumpyTensors:
    """Computes with NumPy arrays."""

    def view(self, memory: Array, value: TensorValue) -> Array:
        flat = memory.view(value.dtype)
        item = flat.dtype.itemsize
        return np.lib.stride_tricks.as_strided(flat, value.shape, [step * item for step in strides(value)])

    def empty(self, value: TensorValue) -> Array:
        return np.empty((0,) if value.dynamic else value.shape, value.dtype)

    def store(self, target: Array, source: Any) -> None:
        np.copyto(target, as_array(source), casting="unsafe")

    def copy(self, source: Any, value: TensorValue) -> Array:
        return as_array(source).astype(value.dtype, order="C")

    def array(self, tensor: Array) -> Array:
        return tensor

    def give(self, tensor: Array, as_torch: bool) -> Any:
        copied = np.array(tensor, order="C")
        return to_torch(copied) if as_torch else copied


class TorchTensors:
    """Computes with torch tensors on the CPU."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch

    def view(self, memory: Array, value: TensorValue) -> Any:
        dtype = getattr(self.torch, value.dtype)
        if memory.size == 0:
            return self.torch.empty(value.shape, dtype=dtype, device="cpu")
        return self.torch.from_numpy(memory).view(dtype).as_strided(value.shape, strides(value))

    def empty(self, value: TensorValue) -> Any:
        dtype = getattr(self.torch, value.dtype)
        if value.dynamic:
            return self.torch.empty(0, dtype=dtype, device="cpu")
        return self.torch.empty_strided(value.shape, strides(value), dtype=dtype, device="cpu")

    def store(self, target: Any, source: Any) -> None:
        if isinstance(source, np.ndarray):
            np.copyto(target.numpy(), source, casting="unsafe")
        else:
            target.copy_(source)

    def copy(self, source: Any, value: TensorValue) -> Any:
        if isinstance(source, np.ndarray):
            source = self.torch.from_numpy(np.array(source, order="C"))
        return source.to(getattr(self.torch, value.dtype), copy=True)

    def array(self, tensor: Any) -> Array:
        array: Array = tensor.numpy()
        return array

    def give(self, tensor: Any, as_torch: bool) -> Any:
        copied = tensor.clone(memory_format=self.torch.contiguous_format)
        if as_torch:
            return copied
        if numpy_dtype(str(copied.dtype).removeprefix("torch.")) is None:
            raise ArgumentTypeError(
                f"an output is {copied.dtype}, which NumPy has no dtype for; call with torch tensors to get it"
            )
        return copied.numpy()


def as_array(tensor: Any) -> Array:
    """An array, or a (detached) torch tensor on the CPU of any strides, as an array. Shares memory unless a negation
    is pending."""
    if isinstance(tensor, np.ndarray):
        return tensor
    array: Array = (tensor.resolve_neg() if tensor.is_neg() else tensor).numpy()
    return array


def to_torch(array: Array) -> Any:
    """A torch tensor that shares ``array``'s memory; torch is there, for the caller came with a tensor."""
    import torch

    return torch.from_numpy(array)


def import_torch(reason: str, package: str = "torch") -> Any:
    """Import torch (or torchao); raises :class:`MissingDependencyError` that says what needs it and how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(f"{reason}; install it with `pip install {package.partition('.')[0]}`") from error

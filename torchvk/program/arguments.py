"""What a method takes: the check of the caller's inputs, and their way into arrays."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from torchvk.errors import ArgumentError, ArgumentTypeError
from torchvk.program.pte import Plan, TensorValue, Value
from torchvk.program.tensors import Array, numpy_dtype


@dataclass(frozen=True)
class Parameter:
    """One input of a method.

    ``baked``: a number, string or None that the exported program was specialized on; the caller must give the same.
    """

    name: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    dynamic: bool = False
    baked: Any = None
    is_tensor: bool = True
    numpy: np.dtype[Any] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        if not self.is_tensor:
            return f"{self.baked!r}"
        sizes = (f"≤{size}" if self.dynamic else str(size) for size in self.shape)
        return f"{self.dtype}[{', '.join(sizes)}]"


def parameter(name: str, value: Value) -> Parameter:
    if isinstance(value, TensorValue):
        return Parameter(name, value.dtype, value.shape, value.dynamic, numpy=numpy_dtype(value.dtype))
    return Parameter(name, baked=value, is_tensor=False)


def parameters(plan: Plan, names: dict[int, str]) -> tuple[Parameter, ...]:
    """The inputs of a method; ``names``: what is known of value names (delegates keep them)."""
    return tuple(parameter(names.get(index, ""), plan.values[index]) for index in plan.inputs)


def check_inputs(method: str, wanted: Sequence[Parameter], inputs: Sequence[Any]) -> tuple[list[Any], bool]:
    """Check the caller's inputs; gives arrays, torch tensors (detached) or numbers, and whether torch was used.

    Raises :class:`ArgumentError` for a wrong number, shape or baked-in value and :class:`ArgumentTypeError` for a
    wrong type or dtype. Nothing is ever converted silently.
    """
    if len(inputs) != len(wanted):
        takes = ", ".join(f"{entry.name or index}: {entry}" for index, entry in enumerate(wanted))
        raise ArgumentError(
            f"{method} takes {len(wanted)} input{'' if len(wanted) == 1 else 's'} ({takes}), "
            f"{len(inputs)} {'was' if len(inputs) == 1 else 'were'} given; nested inputs are passed flat"
        )
    torch: Any = sys.modules.get("torch")
    tensor_type = getattr(torch, "Tensor", None)
    checked: list[Any] = []
    as_torch = False
    for position, (entry, given) in enumerate(zip(wanted, inputs, strict=True)):
        if type(given) is np.ndarray and given.dtype == entry.numpy and given.shape == entry.shape:
            checked.append(given)
        elif not entry.is_tensor:
            checked.append(_check_baked(method, position, entry, given))
        elif tensor_type is not None and isinstance(given, tensor_type):
            as_torch = True
            # In the order of what fails most often; attributes of torch tensors are not free.
            if (
                given.dtype is not getattr(torch, entry.dtype)
                or not _fits(entry, tuple(given.shape))
                or not given.is_cpu
                or given.layout is not torch.strided
            ):
                _refuse_torch(method, position, entry, given)
            checked.append(given.detach() if given.requires_grad else given)
        else:
            checked.append(_check_array(method, position, entry, given))
    return checked, as_torch


def _label(method: str, position: int, entry: Parameter) -> str:
    return f"{method}: input {position}" + (f" ({entry.name!r})" if entry.name else "")


def _fits(entry: Parameter, shape: tuple[int, ...]) -> bool:
    if not entry.dynamic:
        return shape == entry.shape
    return len(shape) == len(entry.shape) and all(size <= most for size, most in zip(shape, entry.shape, strict=True))


def _check_type(label: str, entry: Parameter, dtype: str, shape: tuple[int, ...]) -> None:
    if dtype != entry.dtype:
        raise ArgumentTypeError(f"{label} is {dtype}{list(shape)}, the method takes {entry}: convert it first")
    if not _fits(entry, shape):
        raise ArgumentError(f"{label} is {dtype}{list(shape)}, the method takes {entry}")


def _refuse_torch(method: str, position: int, entry: Parameter, given: Any) -> NoReturn:
    label = _label(method, position, entry)
    _check_type(label, entry, str(given.dtype).removeprefix("torch."), tuple(given.shape))
    if not given.is_cpu:
        raise ArgumentTypeError(f"{label} is on {given.device}; move it to the CPU first: .cpu()")
    raise ArgumentTypeError(f"{label} has layout {given.layout}; make it dense first: .to_dense()")


def _check_array(method: str, position: int, entry: Parameter, given: Any) -> Array:
    label = _label(method, position, entry)
    if not isinstance(given, (np.ndarray, np.generic)):
        hint = "; use np.asarray or torch.as_tensor" if isinstance(given, (bool, int, float, list, tuple)) else ""
        raise ArgumentTypeError(
            f"{label} must be a NumPy array or a torch tensor, {entry}, not {type(given).__name__}{hint}"
        )
    array = np.asarray(given)
    name = array.dtype.name if array.dtype.isnative else str(array.dtype)
    _check_type(label, entry, name, array.shape)
    return array


def _check_baked(method: str, position: int, entry: Parameter, given: Any) -> Any:
    label = _label(method, position, entry)
    # bool is an int for Python; ExecuTorch tells them apart, and so does a program that was specialized on one.
    same_kind = type(given) is type(entry.baked) or (isinstance(entry.baked, float) and type(given) is int)
    if not same_kind:
        raise ArgumentTypeError(
            f"{label} must be the {type(entry.baked).__name__} {entry.baked!r}, not {type(given).__name__}"
        )
    if given != entry.baked:
        raise ArgumentError(
            f"{label} must be {entry.baked!r}, not {given!r}: the program was exported for that value alone"
        )
    return entry.baked

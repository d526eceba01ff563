"""The operators that a .pte file leaves to the CPU: from their names to something that can be called.

Operators of ``executorch_prim``, ``dim_order_ops`` and those on symbolic sizes are carried out here, without torch.
All others are torch's own, through its dispatcher: ``aten::add.out`` is ``torch.ops.aten.add.out``. Where a library
has no out variant (``quantized_decomposed``, ``torchao``) the functional one runs and its result is copied.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchvk.errors import FormatError, TorchVkError, UnsupportedError
from torchvk.program.pte import DTYPES
from torchvk.program.tensors import import_torch

NAMESPACES = frozenset({"aten", "quantized_decomposed", "torchao"})
# Operators of torch's dispatcher that touch files, which no exported model needs.
DENIED = frozenset({"aten::from_file"})
# Where the namespaces that torch does not register by itself come from: (package, module).
REGISTERED_BY = {
    "quantized_decomposed": ("torch", "torch.ao.quantization.fx._decomposed"),
    "torchao": ("torchao", "torchao.quantization.quant_primitives"),
}
_NAME = re.compile(r"(?P<space>[A-Za-z]\w*)::(?P<base>\w+)(\.(?P<overload>\w+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Kernel:
    """How an operator is called.

    run(arguments) gets the first ``arguments`` of the call's values. The rest of the call's values are where
    results go, unless ``run`` returns None because it wrote them itself. ``outputs``: positions of arguments that
    are written and never read; ``written``: all positions that are written. ``replaces``: the result is put in
    place of the value (numbers and views) instead of being copied into its memory.
    """

    name: str
    arguments: int
    run: Callable[[Sequence[Any]], Any]
    outputs: tuple[int, ...] = ()
    written: tuple[int, ...] = ()
    replaces: bool = False


def _number(function: Callable[..., Any]) -> Callable[[Sequence[Any]], Any]:
    def run(arguments: Sequence[Any]) -> Any:
        if not all(isinstance(argument, (bool, int, float)) for argument in arguments):
            raise TypeError("takes numbers")
        result = function(*arguments)
        # ExecuTorch's integers have 64 bits; Python's must not grow without end in a loop.
        if isinstance(result, int) and not -(2**63) <= result < 2**63:
            raise OverflowError("integer overflow")
        return result

    return run


def _view(arguments: Sequence[Any]) -> Any:
    tensor, shape = arguments
    return tensor.reshape(tuple(shape))


def _copy_index(arguments: Sequence[Any]) -> None:
    target, source, index = arguments
    if not 0 <= index < target.shape[0] or tuple(target.shape[1:]) != tuple(source.shape):
        raise IndexError(f"cannot put {list(source.shape)} at position {index} of {list(target.shape)}")
    target[index] = source


def _item(arguments: Sequence[Any]) -> Any:
    return arguments[0].item()


def _size(arguments: Sequence[Any]) -> int:
    tensor, dimension = arguments
    return int(tensor.shape[dimension])


def _first(arguments: Sequence[Any]) -> Any:
    return arguments[0]


def _nothing(arguments: Sequence[Any]) -> None:
    return None


_PRIMITIVES: dict[str, tuple[int, Callable[..., Any]]] = {
    "add": (2, operator.add),
    "sub": (2, operator.sub),
    "mul": (2, operator.mul),
    "floordiv": (2, operator.floordiv),
    "truediv": (2, operator.truediv),
    "mod": (2, operator.mod),
    "eq": (2, operator.eq),
    "ne": (2, operator.ne),
    "gt": (2, operator.gt),
    "lt": (2, operator.lt),
    "ge": (2, operator.ge),
    "le": (2, operator.le),
    "neg": (1, operator.neg),
    "ceil": (1, math.ceil),
    "round": (1, round),
    "trunc": (1, math.trunc),
    "sym_float": (1, float),
    "sym_int": (1, int),
    "sym_max": (2, max),
    "sym_min": (2, min),
    "sym_not": (1, operator.not_),
    "sym_ite": (3, lambda condition, yes, no: yes if condition else no),
}

BUILT_IN: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        *(
            Kernel(f"executorch_prim::{name}.Scalar", count, _number(function), replaces=True)
            for name, (count, function) in _PRIMITIVES.items()
        ),
        Kernel("executorch_prim::et_view.default", 2, _view, replaces=True),
        Kernel("executorch_prim::et_copy_index.tensor", 3, _copy_index, written=(0,)),
        Kernel("aten::sym_size.int", 2, _size, replaces=True),
        Kernel("aten::sym_numel", 1, lambda arguments: math.prod(arguments[0].shape), replaces=True),
        Kernel("aten::_local_scalar_dense", 1, _item, replaces=True),
        # What differs from a plain copy, dtype and dimension order, is in the type of the tensor that is written.
        Kernel("dim_order_ops::_to_dim_order_copy.out", 3, _first),
        Kernel("dim_order_ops::_clone_dim_order.out", 3, _first),
        Kernel("dim_order_ops::_empty_dim_order.out", 2, _nothing),
    )
}


def resolve(names: Collection[str], custom: Collection[str] = ()) -> dict[str, Kernel]:
    """Kernels for all of ``names``.

    ``custom``: namespaces that the caller registered with ``torch.library`` and lets the file call.
    Raises :class:`MissingDependencyError` naming the operators if torch (or torchao) is not installed and
    :class:`UnsupportedError` naming those that nobody knows.
    """
    found = {name: BUILT_IN[name] for name in names if name in BUILT_IN}
    rest = sorted(set(names) - found.keys())
    if not rest:
        return found
    torch = import_torch(f"{_listed(rest)} run on the CPU, with torch, which is not installed")
    unknown = []
    for name in rest:
        kernel = _from_torch(name, torch, custom)
        if kernel is None:
            unknown.append(name)
        else:
            found[name] = kernel
    if unknown:
        raise UnsupportedError(
            f"{_listed(unknown)}: no kernel for the CPU is known in this torch; if you registered a library of your "
            "own with torch.library, name it: torchvk.load(..., custom_operators=[namespace])"
        )
    return found


def _listed(names: Sequence[str]) -> str:
    return f"operator{'s' if len(names) > 1 else ''} {', '.join(names)}"


def _from_torch(name: str, torch: Any, custom: Collection[str]) -> Kernel | None:
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    space, base, overload = match["space"], match["base"], match["overload"] or "default"
    if (space not in NAMESPACES and space not in custom) or f"{space}::{base}" in DENIED:
        return None
    if space in REGISTERED_BY:
        package, module = REGISTERED_BY[space]
        import_torch(f"operator {name} needs {package}, which is not installed", package)
        import_torch(f"operator {name} needs {module}", module)
    packet = getattr(getattr(torch.ops, space), base, None)
    candidates = (overload, *_functional(overload))
    # Out variants of these are there once executorch's library is loaded, and end the process on shapes that grow.
    for candidate in reversed(candidates) if space in REGISTERED_BY else candidates:
        found = getattr(packet, candidate, None)
        qualified = f"{space}::{base}" + ("" if candidate == "default" else f".{candidate}")
        # Only the dispatcher's operators: TorchScript has more under the same names, aten::save among them.
        if isinstance(found, torch._ops.OpOverload) and torch._C._dispatch_has_kernel(qualified):
            # In-place changes of shape or storage would outlive the call.
            if torch.Tag.inplace_view in found.tags:
                return None
            return _kernel(name, found, torch)
    return None


def _functional(overload: str) -> tuple[str, ...]:
    """Names that the functional variant of an out variant can have: out → default, Tensor_out → Tensor, or tensor
    (ExecuTorch's out variants of quantized_decomposed are spelled unlike torch's functions)."""
    if overload == "out":
        return ("default",)
    stem = overload.removesuffix("_out")
    return (stem, stem.lower()) if stem != overload else ()


def _kernel(name: str, function: Any, torch: Any) -> Kernel:
    arguments = function._schema.arguments
    positional = sum(not argument.kwarg_only for argument in arguments)
    keywords = [argument.name for argument in arguments if argument.kwarg_only]
    outputs = tuple(position for position, argument in enumerate(arguments) if argument.is_out)
    written = tuple(
        position
        for position, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    # exir writes these as numbers, and torch would take the numbers, but without a look: some end the process.
    enumerations = _enumerations(torch)
    converted = [
        (position, enumerations[type])
        for position, argument in enumerate(arguments)
        if (type := re.sub(r"Optional\[(\w+)\]", r"\1", str(argument.real_type))) in enumerations
    ]

    def run(given: Sequence[Any]) -> Any:
        values = list(given)
        for position, members in converted:
            number = values[position]
            if number is not None:
                if number not in members:
                    raise TypeError(f"no such {arguments[position].name}: {number!r}")
                values[position] = members[number]
        result = function(*values[:positional], **dict(zip(keywords, values[positional:], strict=True)))
        return None if outputs else result

    return Kernel(name, len(arguments), run, outputs, written)


def _enumerations(torch: Any) -> dict[str, dict[int, Any]]:
    """torch's enumerations by their C++ names, and what ExecuTorch's numbers stand for."""
    formats = ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
    return {
        "ScalarType": {number: getattr(torch, name) for number, (name, _) in DTYPES.items()},
        "Layout": {0: torch.strided},
        "MemoryFormat": {number: getattr(torch, name) for number, name in enumerate(formats)},
        "Device": {},
    }


def failed(name: str, error: Exception) -> TorchVkError:
    """The error to raise when the CPU operator ``name`` raised ``error``."""
    text = str(error).split("\nException raised from", 1)[0]
    kind = FormatError if isinstance(error, (TypeError, OverflowError)) else TorchVkError
    return kind(f"operator {name} failed on the CPU: {text}")


def is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.number, np.bool_))

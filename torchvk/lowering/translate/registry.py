"""One torch operator → operators of torchvk: how translations are written and looked up.

A translation is a function ``f(t, **arguments)``: ``t`` is a :class:`Translator`, the arguments are those of the
torch operator's schema that the function names, with tensors as :class:`~torchvk.lowering.draft.Value`, everything
else as torch has it. It emits operators and returns the result, or a tuple for an operator with several (None where
torchvk does not compute that one). It raises :class:`~torchvk.lowering.refusal.Refused` for a case that it cannot do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch.fx import Node

from torchvk.graph import DType, TensorType
from torchvk.lowering.draft import Array, Draft, Value, constant
from torchvk.lowering.refusal import Refused
from torchvk.lowering.source import module_path, operator_name, overload
from torchvk.lowering.types import dtype_of, promote, type_of

Result = Value | tuple[Value | None, ...]
Translation = Callable[..., Result]
Operand = Value | bool | int | float
F = TypeVar("F", bound=Translation)

TRANSLATIONS: dict[str, Translation] = {}


def register(translation: Translation, *names: str) -> None:
    """Make ``translation`` that of the torch operators of these names, such as ``aten.add.Tensor``."""
    for name in names:
        if name in TRANSLATIONS:
            raise ValueError(f"{name} has two translations")
        TRANSLATIONS[name] = translation


def translates(*names: str) -> Callable[[F], F]:
    """:func:`register` as a decorator."""

    def decorate(translation: F) -> F:
        register(translation, *names)
        return translation

    return decorate


class Translator:
    """What a translation emits with: a draft, and the node's module, name and expected results."""

    def __init__(self, draft: Draft, node: Node) -> None:
        self.draft = draft
        self.node = node
        self.source = module_path(node)

    @property
    def out(self) -> TensorType:
        """dtype and shape of the (first) result, as torch has it."""
        value = self.node.meta.get("val")
        return type_of(value[0] if isinstance(value, (tuple, list)) else value)

    def op(self, name: str, *inputs: Value | None, **attributes: Any) -> Value:
        """Emit an operator with one output."""
        return self.draft.emit(name, inputs, attributes, self.node.name, self.source)[0]

    def constant(self, array: Array, dtype: DType | None = None) -> Value:
        return constant(array, self.node.name, dtype)

    def scalar(self, value: bool | int | float, dtype: DType) -> Value:
        """A 0-D constant; raises Refused for a number that ``dtype`` cannot hold."""
        try:
            with np.errstate(over="ignore"):
                return self.constant(np.array(value, dtype.numpy))
        except OverflowError:
            raise Refused(f"the number {value} does not fit into {dtype.value}") from None

    def full(self, shape: Sequence[int], value: bool | int | float, dtype: DType) -> Value:
        return self.op("full", shape=list(shape), value=as_number(value, dtype), dtype=dtype)

    def cast(self, value: Value, dtype: DType) -> Value:
        return value if value.dtype is dtype else self.op("cast", value, dtype=dtype)

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        return value if value.shape == tuple(shape) else self.op("reshape", value, shape=list(shape))

    def expand(self, value: Value, shape: Sequence[int]) -> Value:
        return value if value.shape == tuple(shape) else self.op("expand", value, shape=list(shape))

    def operand(self, operand: Operand, dtype: DType) -> Value:
        """A tensor or number as a tensor of ``dtype``."""
        return self.cast(operand, dtype) if isinstance(operand, Value) else self.scalar(operand, dtype)

    def operands(self, *operands: Operand, floating: bool = False) -> tuple[Value, ...]:
        """Tensors and numbers in the dtype that torch computes in; ``floating`` turns integers into float32."""
        dtype = promote(*(o.type if isinstance(o, Value) else o for o in operands))
        if floating and not dtype.is_float:
            dtype = DType.FLOAT32
        return tuple(self.operand(operand, dtype) for operand in operands)


def as_number(value: bool | int | float, dtype: DType) -> bool | int | float:
    """A Python number of the kind that ``dtype`` holds: attributes are strict about bool, int and float."""
    if dtype is DType.BOOL:
        return bool(value)
    return float(value) if dtype.is_float else int(value)


def dim_of(dim: int, rank: int) -> int:
    """A dimension counted from the front; torch lets 0-D tensors have dimensions 0 and -1."""
    limit = max(rank, 1)
    if not -limit <= dim < limit:
        raise Refused(f"dimension {dim} of a tensor of rank {rank}")
    return dim % limit


def torch_dtype(dtype: torch.dtype | None, default: DType) -> DType:
    """A ``dtype=`` argument, whose None means ``default``."""
    return default if dtype is None else dtype_of(dtype)


def arguments(node: Node, values: Callable[[Node], Any]) -> dict[str, Any]:
    """The node's arguments by the names of its schema, defaults filled in, nodes replaced by ``values(node)``."""

    def replace(argument: Any) -> Any:
        if isinstance(argument, Node):
            return values(argument)
        if isinstance(argument, (list, tuple)):
            return [replace(entry) for entry in argument]
        return argument

    schema = overload(node)._schema
    bound = {}
    for position, parameter in enumerate(schema.arguments):
        if position < len(node.args) and not parameter.kwarg_only:
            bound[parameter.name] = replace(node.args[position])
        elif parameter.name in node.kwargs:
            bound[parameter.name] = replace(node.kwargs[parameter.name])
        elif parameter.has_default_value():
            bound[parameter.name] = parameter.default_value
    return bound


def translate(draft: Draft, node: Node, values: Callable[[Node], Any]) -> Result:
    """Emit ``node``, whose operands are given by ``values``, into ``draft``; raises :class:`Refused`.

    The result is checked against what torch says of it, so that a translation cannot be wrong about dtype or shape.
    """
    name = operator_name(node)
    translation = TRANSLATIONS.get(name)
    if translation is None:
        raise Refused("torchvk has no operator for it")
    given = arguments(node, values)
    named = inspect.signature(translation).parameters
    accepted = given if any(p.kind is p.VAR_KEYWORD for p in named.values()) else _only(given, named)
    result = translation(Translator(draft, node), **accepted)
    expected = node.meta["val"]
    pairs = [(result, expected)] if isinstance(result, Value) else list(zip(result, expected, strict=True))
    for value, example in pairs:
        if value is not None and value.type != type_of(example):
            raise Refused(f"its translation gives {value.type} where torch gives {type_of(example)}")
    return result


def _only(given: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name in names}

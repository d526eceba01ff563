"""Which configuration an operator gets: by module name, module type, operator, or globally."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node
from torchao.quantization.pt2e.quantizer import QuantizationConfig

from torchvk.errors import ArgumentTypeError

_PACKETS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
_MODULES = (torch, torch.nn.functional, torch._C._nn, operator)


@dataclass
class Settings:
    """Configurations by what they are for; None switches quantization off there.

    Module names are paths such as ``layer1.0.conv2``, module types qualified class names, objects names of ATen
    operators without overload.
    """

    default: QuantizationConfig | None = None
    names: dict[str, QuantizationConfig | None] = field(default_factory=dict)
    types: dict[str, QuantizationConfig | None] = field(default_factory=dict)
    objects: dict[str, QuantizationConfig | None] = field(default_factory=dict)
    filter: Callable[[Node], bool] | None = None

    def is_empty(self) -> bool:
        """Whether there is no setting at all, not even one that switches off."""
        return self.default is None and not (self.names or self.types or self.objects)

    def find(self, node: Node) -> tuple[QuantizationConfig | None, bool]:
        """The configuration of ``node``, and whether it is more specific than the global one. The filter is not asked.

        The innermost module whose path was set wins, then the innermost whose class was set, then the operator.
        """
        stack = _module_stack(node)
        for path, _ in reversed(stack):
            while path:
                if path in self.names:
                    return self.names[path], True
                path = path.rpartition(".")[0]
        for _, name in reversed(stack):
            if name in self.types:
                return self.types[name], True
        found = operator_of(node)
        if found is not None and found in self.objects:
            return self.objects[found], True
        return self.default, False

    def unused(self, nodes: list[Node]) -> list[str]:
        """The settings that name a module or class that none of ``nodes`` comes from, or an operator that is not one
        of them, as the calls that made them: misspelled, most likely."""
        paths: set[str] = set()
        classes: set[str] = set()
        for node in nodes:
            for path, name in _module_stack(node):
                classes.add(name)
                while path:
                    paths.add(path)
                    path = path.rpartition(".")[0]
        operators = {operator_of(node) for node in nodes}
        return [
            *(f"set_module_name({name!r})" for name in self.names if name not in paths),
            *(f"set_module_type({name})" for name in self.types if name not in classes),
            *(f"set_object_type({name})" for name in self.objects if name not in operators),
        ]


def module_path(node: Node) -> str:
    """The path of the innermost module that ``node`` comes from, "" for the outermost."""
    stack = _module_stack(node)
    return stack[-1][0] if stack else ""


def class_name(module_type: object) -> str:
    """The qualified name of a subclass of ``torch.nn.Module``; raises ``ArgumentTypeError`` for others."""
    if not isinstance(module_type, type) or not issubclass(module_type, torch.nn.Module):
        raise ArgumentTypeError(f"module_type must be a subclass of torch.nn.Module, not {module_type!r}")
    return f"{module_type.__module__}.{module_type.__qualname__}"


def operator_of(node: Node) -> str | None:
    """The ATen operator of ``node`` without overload, as ``conv2d``; None for other nodes."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    return _plain(target._schema.name)


def operator_name(object_type: Any) -> str:
    """The ATen operator, without overload, that ``object_type`` means; in-place operators are their plain twins.

    It is an operator (``torch.ops.aten.conv2d``, with or without overload), or a function of ``torch``,
    ``torch.nn.functional`` or ``operator`` that an ATen operator is named after (``F.conv2d``, ``torch.add``).
    Raises ``ArgumentTypeError`` for anything else.
    """
    if isinstance(object_type, type):
        raise ArgumentTypeError(f"object_type must be an operator or a function; for {object_type} use set_module_type")
    if isinstance(object_type, _PACKETS):
        name = object_type._schema.name if isinstance(object_type, _PACKETS[0]) else object_type._qualified_op_name
        if name.startswith("aten::"):
            return _plain(name)
    elif callable(object_type):
        name = getattr(object_type, "__name__", "")
        known = any(getattr(module, name, None) is object_type for module in _MODULES if name)
        if known and hasattr(torch.ops.aten, name):
            return _plain(name)
    raise ArgumentTypeError(
        f"object_type must be an ATen operator (torch.ops.aten.conv2d) or a function that one is named after "
        f"(torch.nn.functional.conv2d), not {object_type!r}"
    )


def _plain(name: str) -> str:
    return name.removeprefix("aten::").removesuffix("_")


def _module_stack(node: Node) -> list[tuple[str, str]]:
    """Path and class of each module that ``node`` comes from, outermost first."""
    stack = []
    for path, kind in node.meta.get("nn_module_stack", {}).values():
        name = f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind)
        # A module called a second time is exported as "path@1"; older exports write L['self'].path.
        path = re.sub(r"@\d+", "", str(path))
        path = re.sub(r"^L\['self'\]\.?", "", path)
        stack.append((path, name))
    return stack

"""What the user wants on the GPU, apart from what can run there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from torchvk.errors import ArgumentTypeError
from torchvk.lowering.patterns.quantized_linear import PRODUCTS
from torchvk.lowering.source import module_types, operator_name

_LINEAR = frozenset({"aten.linear.default", "aten.linear"})


@dataclass(frozen=True)
class Choice:
    """Lists of operators, as names with or without overload, and of parts of module class names; None: no list."""

    operator_blocklist: frozenset[str] = frozenset()
    operator_allowlist: frozenset[str] | None = None
    nn_module_blocklist: frozenset[str] = frozenset()
    nn_module_allowlist: frozenset[str] | None = None

    @classmethod
    def parse(
        cls,
        operator_blocklist: Iterable[Any] | None,
        operator_allowlist: Iterable[Any] | None,
        nn_module_blocklist: Iterable[str] | None,
        nn_module_allowlist: Iterable[str] | None,
    ) -> Choice:
        return cls(
            _operators("operator_blocklist", operator_blocklist) or frozenset(),
            _operators("operator_allowlist", operator_allowlist),
            _modules("nn_module_blocklist", nn_module_blocklist) or frozenset(),
            _modules("nn_module_allowlist", nn_module_allowlist),
        )

    def reason(self, node: Node, inside: bool) -> str | None:
        """None, or which list keeps ``node`` off the GPU; ``inside``: it is part of a pattern and not its last node."""
        names = {operator_name(node), operator_name(node).rpartition(".")[0]}
        if operator_name(node) in PRODUCTS:
            names |= _LINEAR
        if names & self.operator_blocklist:
            return "its operator is in operator_blocklist"
        if not inside and self.operator_allowlist is not None and not names & self.operator_allowlist:
            return "its operator is not in operator_allowlist"
        types = module_types(node)
        if any(part in name for part in self.nn_module_blocklist for name in types):
            return "its module is in nn_module_blocklist"
        if inside or self.nn_module_allowlist is None:
            return None
        if not any(part in name for part in self.nn_module_allowlist for name in types):
            return "its module is not in nn_module_allowlist"
        return None


def _operators(parameter: str, entries: Iterable[Any] | None) -> frozenset[str] | None:
    if entries is None:
        return None
    if isinstance(entries, str) or not isinstance(entries, Iterable):
        raise ArgumentTypeError(f"{parameter} must be a list of operators, not {type(entries).__name__}")
    return frozenset(_name(parameter, entry) for entry in entries)


def _name(parameter: str, entry: Any) -> str:
    if isinstance(entry, str):
        return entry.replace("::", ".")
    qualified = getattr(entry, "_qualified_op_name", None)  # packets, of torch.ops and of the edge dialect
    if not qualified:
        target = entry if isinstance(entry, torch._ops.OpOverload) else getattr(entry, "_op", entry)
        schema = getattr(target, "_schema", None)
        if schema is not None:
            qualified = f"{schema.name}.{schema.overload_name or 'default'}"
    if qualified is None:
        raise ArgumentTypeError(
            f"{parameter} holds {entry!r}: operators are given as overloads or packets of torch.ops or exir_ops.edge, "
            'or as names such as "aten.add.Tensor"'
        )
    return str(qualified).replace("::", ".")


def _modules(parameter: str, entries: Iterable[str] | None) -> frozenset[str] | None:
    if entries is None:
        return None
    names = [] if isinstance(entries, str) else list(entries)
    if isinstance(entries, str) or not all(isinstance(name, str) for name in names):
        raise ArgumentTypeError(f"{parameter} must be a list of parts of module class names")
    return frozenset(names)

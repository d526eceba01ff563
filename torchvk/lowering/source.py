"""Reading an ExportedProgram: what each placeholder holds, which buffers change, which module a node is from."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node

from torchvk.lowering.types import is_fake

_CONSTANT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_MUTATIONS = (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)

# (name of a parameter or buffer, what is known of it) → tensors with data that it may be
FindData = Callable[[str, torch.Tensor], list[torch.Tensor]]


class Source:
    """An edge (or ATen) program. ``find_data`` helps out where the program holds tensors without data.

    exir shows partitioners a program whose parameters are fake tensors; what depends on their values (are these
    zero points zero?) needs the real ones.
    """

    def __init__(self, program: ExportedProgram, find_data: FindData | None = None) -> None:
        self.program = program
        self.nodes: list[Node] = list(program.graph.nodes)
        self.placeholders = [node for node in self.nodes if node.op == "placeholder"]
        self.output = next(node for node in self.nodes if node.op == "output")
        self._find_data = find_data
        self._targets: dict[Node, str] = {}
        self.user_inputs: list[Node] = []
        specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        for node in self.placeholders:
            spec = specs[node.name]
            if spec.kind in _CONSTANT_KINDS and spec.target is not None:
                self._targets[node] = spec.target
            else:
                self.user_inputs.append(node)
        mutated = {
            spec.target: spec.arg.name for spec in program.graph_signature.output_specs if spec.kind in _MUTATIONS
        }
        names = {node.name: node for node in self.nodes}
        # node → the buffer or input whose new value it is
        self.writes = {names[name]: str(target) for target, name in mutated.items() if name in names}
        # placeholder → the name of the buffer or input that the program changes
        self.mutable = {node: target for node, target in self._targets.items() if target in mutated} | {
            node: node.name for node in self.user_inputs if node.name in mutated
        }

    def is_constant(self, node: object) -> bool:
        """True for placeholders of parameters, buffers and constant tensors that nothing changes."""
        return isinstance(node, Node) and node in self._targets and node not in self.mutable

    def data(self, node: Node) -> torch.Tensor | None:
        """The tensor with data of a constant placeholder; None if the program does not hold it."""
        tensor = self._held(node)
        return None if tensor is None or is_fake(tensor) else tensor

    def candidates(self, node: Node) -> list[torch.Tensor]:
        """Tensors with data one of which is the constant's: exactly one where the program holds it."""
        tensor = self._held(node)
        if tensor is None:
            return []
        if not is_fake(tensor):
            return [tensor]
        return self._find_data(self._targets[node], tensor) if self._find_data else []

    def _held(self, node: Node) -> torch.Tensor | None:
        target = self._targets[node]
        found: Any = self.program.state_dict.get(target, self.program.constants.get(target))
        return found if isinstance(found, torch.Tensor) else None


def operator_name(node: Node) -> str:
    """Such as ``aten.add.Tensor``; for a Python function its name."""
    schema = getattr(overload(node), "_schema", None)
    if schema is None:
        return getattr(node.target, "__name__", str(node.target))
    return f"{schema.name.replace('::', '.')}.{schema.overload_name or 'default'}"


def overload(node: Node) -> Any:
    """The torch operator behind an edge operator."""
    target: Any = node.target
    return target if isinstance(target, torch._ops.OpOverload) else getattr(target, "_op", target)


def module_path(node: Node) -> str:
    """The path of the ``nn.Module`` that the node comes from, such as ``encoder.layer.0``; empty for the root."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    # Names are "encoder.layer.0" or "L['self'].encoder.layer.0"; list entries may be written "['0']".
    path = re.sub(r"^L\[['\"]self['\"]\]\.?", "", path)
    return re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path).lstrip(".")


def module_for(node: Node) -> str:
    """:func:`module_path`; where a node has none (PT2E's of a weight), that of the first of its readers that has."""
    nodes, seen = [node], {node}
    for each in nodes:
        if path := module_path(each):
            return path
        new = [user for user in each.users if user not in seen]
        nodes += new
        seen.update(new)
    return ""


def module_types(node: Node) -> tuple[str, ...]:
    """Qualified names of the classes of the modules that the node comes from, from the root inwards."""
    names = []
    for _, kind in (node.meta.get("nn_module_stack") or {}).values():
        names.append(kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}")
    return tuple(names)

"""What every operator family needs to annotate its nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationConfig, QuantizationSpecBase
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from torchvk.quantizer.config import is_static
from torchvk.quantizer.settings import Settings

_aten = torch.ops.aten
_DTYPES = (torch.float32, torch.float16)
_BATCH_NORM = (_aten.batch_norm.default,)
# What an operator that computes can do on the way out.
CLAMPS = (
    _aten.relu.default,
    _aten.relu6.default,
    _aten.hardtanh.default,
    _aten.clamp.default,
    _aten.clamp_min.default,
)


@dataclass(frozen=True)
class Scope:
    """A model, its nodes that hold constants, its tensors that in-place operators write to, and the user's settings."""

    model: GraphModule
    constants: frozenset[Node]
    written: frozenset[Node]
    settings: Settings

    def config(self, node: Node, *, on_request: bool = False, ask: bool = True) -> QuantizationConfig | None:
        """The configuration to annotate ``node`` with; None: leave it alone, also if it is annotated already.

        Also left alone is what reads or gives a tensor that is written to in place: quantized, it is another tensor.
        ``on_request``: only a setting that is more specific than the global one counts. ``ask``: ask the filter.
        """
        if annotated(node) or not self.written.isdisjoint((node, *node.all_input_nodes)):
            return None
        config, specific = self.settings.find(node)
        if config is None or (on_request and not specific):
            return None
        if ask and self.settings.filter is not None and not self.settings.filter(node):
            return None
        return config

    def static_config(self, node: Node, *, ask: bool = True) -> QuantizationConfig | None:
        """:meth:`config` if it has static activations, else None."""
        config = self.settings.find(node)[0]
        return self.config(node, ask=ask) if config is not None and is_static(config) else None

    def last(self, node: Node, config: QuantizationConfig, *, batch_norm: bool = False) -> Node:
        """The node whose output leaves the operator that ``node`` begins: a clamp that only it feeds, and before that
        a batch norm, unless a setting of their own says otherwise; else ``node``."""
        for targets in (_BATCH_NORM, CLAMPS) if batch_norm else (CLAMPS,):
            users = [user for user in node.users if is_call(user)]
            if len(users) != 1 or len(node.users) != 1:
                continue
            (user,) = users
            fits = user.target in targets and user.args[0] is node and is_float(user)
            fits = fits and not annotated(user) and user not in self.written
            theirs, specific = self.settings.find(user)
            if fits and (theirs == config or not specific):
                node = user
        return node


def is_call(node: Any) -> bool:
    """Whether ``node`` is a call of an operator."""
    return isinstance(node, Node) and node.op == "call_function"


def is_float(node: Any) -> bool:
    """Whether ``node`` gives a float32 or float16 tensor."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and value.dtype in _DTYPES


def annotated(node: Node) -> bool:
    """Whether ``node`` has an annotation already, of this or another quantizer."""
    annotation = node.meta.get(Q_ANNOTATION_KEY)
    return annotation is not None and annotation._annotated


def output_spec(node: Node) -> QuantizationSpecBase | None:
    """How the output of ``node`` is annotated to be quantized, None if it is not."""
    annotation = node.meta.get(Q_ANNOTATION_KEY)
    return None if annotation is None else annotation.output_qspec


def input_spec(node: Node, argument: Node) -> QuantizationSpecBase | None:
    """How ``node`` is annotated to quantize ``argument``, None if it is not."""
    annotation = node.meta.get(Q_ANNOTATION_KEY)
    return None if annotation is None else annotation.input_qspec_map.get(argument)


def annotate(
    node: Node,
    inputs: Mapping[Node, QuantizationSpecBase | None],
    output: QuantizationSpecBase | None = None,
    last: Node | None = None,
) -> None:
    """Write the specifications of ``node``'s inputs, and of its output or that of ``last``, the end of a chain."""
    last = last or node
    if last is not node:
        between = last
        while between is not node:
            between.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
                output_qspec=output if between is last else None, _annotated=True
            )
            between = between.args[0]
    node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
        input_qspec_map=dict(inputs), output_qspec=output if last is node else None, _annotated=True
    )

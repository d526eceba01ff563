"""What stays on the CPU and why."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torchvk.lowering.analysis import DELEGATED, Analysis
from torchvk.lowering.source import Source, module_path, operator_name


@dataclass(frozen=True)
class Refusal:
    """A node that was not claimed: its name in the graph, its operator, why, and the path of its ``nn.Module``."""

    node: str
    operator: str
    reason: str
    module: str

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        return f"{self.node} ({self.operator}{where}) stays on the CPU: {self.reason}"


def refusals(source: Source, analysis: Analysis) -> list[Refusal]:
    """In the order of the graph. Not listed are delegates, and what only picks one of an operator's results."""
    return [
        Refusal(node.name, operator_name(node), analysis.refused[node], module_path(node))
        for node in source.nodes
        if analysis.refused.get(node, DELEGATED) != DELEGATED and node.target is not operator.getitem
    ]

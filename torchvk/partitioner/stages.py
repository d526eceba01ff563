"""Claimed nodes → as few partitions as possible, none of which waits for itself."""

from __future__ import annotations

import operator

from torch.fx import Node

from torchvk.lowering.analysis import Analysis
from torchvk.lowering.source import Source

TOO_LITTLE = "only views and constants are here together, which the CPU has at no cost"
TORN = "its quantized operands are shared with a linear that must run before or after another operator on the CPU"


def partitions(source: Source, analysis: Analysis) -> list[list[Node]]:
    """Groups of claimed nodes, in the order in which they run, each in the order of the graph.

    GPU and CPU take turns: stage 0 of the GPU, stage 0 of the CPU, stage 1 of the GPU, … Every node goes into the
    first stage that has its operands, so that no group can depend on its own results, and a program whose nodes are
    all claimed is one group. What is given back is moved from ``analysis.claimed`` to ``analysis.refused``: matches
    that would be torn apart, and groups without work for the GPU.
    """
    while True:
        stages = _stages(source, analysis)
        _wait(source, analysis, stages)
        torn = [node for node in analysis.swallowed if len({stages[user] for user in node.users}) > 1]
        if not torn:
            break
        analysis.give_back(torn, TORN)
    groups: dict[int, list[Node]] = {}
    for node in source.nodes:
        if node in analysis.claimed:
            groups.setdefault(stages[node], []).append(node)
    kept = []
    for _, group in sorted(groups.items()):
        if any(node in analysis.work for node in group):
            kept.append(group)
        else:
            analysis.claimed.difference_update(group)
            analysis.refused.update(dict.fromkeys(group, TOO_LITTLE))
    return kept


def _stages(source: Source, analysis: Analysis) -> dict[Node, int]:
    stages: dict[Node, int] = {}
    for node in source.nodes:
        operands = node.all_input_nodes
        if node in analysis.claimed:
            # A CPU operand of stage s is there for the GPU's stage s + 1.
            stages[node] = max((stages[n] if n in analysis.claimed else stages[n] + 1 for n in operands), default=0)
        else:
            stages[node] = max((stages[n] for n in operands), default=-1)
    return stages


def _wait(source: Source, analysis: Analysis, stages: dict[Node, int]) -> None:
    """Move nodes to the stage that needs them: the inside of a match, which exists only there, and what is made of
    constants alone, rather than let it travel from group to group."""
    for node in reversed(source.nodes):
        users = list(node.users)
        movable = node in analysis.swallowed or node in analysis.constants
        if movable and users and all(user in analysis.claimed for user in users):
            stages[node] = max(stages[node], min(stages[user] for user in users))
    for node in source.nodes:
        # The results of one operator stay with it.
        if node in analysis.claimed and node.target is operator.getitem:
            stages[node] = stages[node.all_input_nodes[0]]

"""What a pattern gives: nodes that together become operators of torchvk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from torchvk.lowering.draft import Draft, Value

Values = Callable[[Node], Any]


@dataclass(frozen=True, eq=False)
class Match:
    """``anchor`` is the node whose value the match gives.

    The ``interior`` nodes are not computed at all, so no other node may read them. ``reads`` are the nodes whose
    values :attr:`emit` asks for.
    """

    anchor: Node
    interior: frozenset[Node]
    reads: tuple[Node, ...]
    emit: Callable[[Draft, Values], Value]

"""Annotation of embedding tables."""

from __future__ import annotations

import torch
from torch.fx import Node

from torchvk.quantizer.annotation import Scope, annotate, is_float
from torchvk.quantizer.config import per_channel


def annotate_embeddings(scope: Scope) -> list[Node]:
    """Annotate embeddings with a constant table that a setting other than the global one names; returns these nodes.

    The table gets a scale for each row, whatever the configuration says of other weights. Embeddings are float under
    a global configuration, as with ``quantize_``: errors in a table reach every layer.
    """
    found = []
    for node in scope.model.graph.nodes:
        if node.op != "call_function" or node.target is not torch.ops.aten.embedding.default:
            continue
        table = node.args[0]
        if not is_float(table) or table not in scope.constants:
            continue
        config = scope.config(node, on_request=True)
        if config is None:
            continue
        annotate(node, {table: per_channel(config.weight, 0, always=True)})
        found.append(node)
    return found

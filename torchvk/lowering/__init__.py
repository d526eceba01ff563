"""Exported subgraph → Graph: ``patterns`` turn many nodes into one operator, ``translate`` one node into operators."""

from torchvk.lowering.lower import lower
from torchvk.lowering.options import CompileOptions

__all__ = ["CompileOptions", "lower"]

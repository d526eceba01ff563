"""Many nodes → one operator. A file per operator, and files for what several of them have in common.

Each pattern is a function ``match(node, source) -> Match | None`` that raises
:class:`~torchvk.lowering.refusal.Refused` for nodes that are its own but that torchvk does not run.
"""

from torchvk.lowering.patterns import dynamic, quantized_embedding, quantized_linear
from torchvk.lowering.patterns.match import Match

# (match, nodes that share the fate of a refused one)
PATTERNS = (
    (quantized_linear.match, quantized_linear.chain),
    (quantized_embedding.match, quantized_embedding.chain),
    (dynamic.match, dynamic.chain),
)

__all__ = ["PATTERNS", "Match"]

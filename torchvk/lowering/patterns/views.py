"""Which elements a chain of views reads, asked of torch's own strided views."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Node

from torchvk.lowering.refusal import Refused
from torchvk.lowering.source import operator_name
from torchvk.lowering.translate.registry import arguments

_Apply = Callable[..., torch.Tensor]

# torch operator → the same as a view. Copies keep elements where they are.
VIEW_OPERATORS: dict[str, _Apply] = {
    "aten.permute_copy.default": lambda x, dims, **_: x.permute(dims),
    "aten.transpose_copy.int": lambda x, dim0, dim1, **_: x.transpose(dim0, dim1),
    "aten.t_copy.default": lambda x, **_: x.t(),
    "aten.view_copy.default": lambda x, size, **_: x.view(size),
    "aten._unsafe_view.default": lambda x, size, **_: x.view(size),
    "aten.expand_copy.default": lambda x, size, **_: x.expand(size),
    "aten.unsqueeze_copy.default": lambda x, dim, **_: x.unsqueeze(dim),
    "aten.squeeze_copy.default": lambda x, **_: x.squeeze(),
    "aten.squeeze_copy.dim": lambda x, dim, **_: x.squeeze(dim),
    "aten.squeeze_copy.dims": lambda x, dim, **_: x.squeeze(dim),
    "dim_order_ops._clone_dim_order.default": lambda x, **_: x,
    "aten.clone.default": lambda x, **_: x,
    "aten.alias_copy.default": lambda x, **_: x,
    "aten.detach_copy.default": lambda x, **_: x,
    # Conversions between floating dtypes; the pattern looks at the dtypes at both ends.
    "dim_order_ops._to_dim_order_copy.default": lambda x, **_: x,
    "aten._to_copy.default": lambda x, **_: x,
}


@dataclass(frozen=True)
class View:
    """An operand that reads ``base``, whose elements lie dense and row-major, with these sizes and strides."""

    base: Node
    nodes: tuple[Node, ...]
    """The views between, outermost first."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dense(self) -> bool:
        """True if the operand is the base with another shape."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


def base_of(node: Node) -> Node:
    """The node that a chain of views starts from."""
    while node.op == "call_function" and operator_name(node) in VIEW_OPERATORS:
        node = node.all_input_nodes[0]
    return node


def trace(node: Node) -> View:
    """The whole chain of views that ends in ``node``; raises :class:`Refused` if it is not one strided view."""
    chain = []
    base = base_of(node)
    current = node
    while current is not base:
        chain.append(current)
        current = current.all_input_nodes[0]
    x = torch.empty(base.meta["val"].shape, device="meta")
    try:
        for view in reversed(chain):
            given = arguments(view, lambda operand: operand)
            given.pop("self", None)
            x = VIEW_OPERATORS[operator_name(view)](x, **given)
    except RuntimeError:
        raise Refused(f"it reads {base.name} through views that rearrange its elements") from None
    return View(base, tuple(chain), tuple(x.shape), tuple(x.stride()))

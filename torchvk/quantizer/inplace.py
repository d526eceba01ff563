"""In-place operators: they become plain ones where nobody can tell, and elsewhere keep others from quantization."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node


def replace_in_place(model: GraphModule) -> None:
    """Turn ``relu_``, ``add_`` and their like into ``relu`` and ``add``, in place.

    Only where the tensor that is written to comes fresh from an operator, and no one else reads it: there, writing to
    it and making a new one are the same. (A quantized input is another tensor than the float one: what an in-place
    operator writes to it would be lost on all that share memory with the float tensor.)
    """
    for node in model.graph.nodes:
        plain = _plain_overload(node)
        if plain is None or not node.args or not isinstance(node.args[0], Node):
            continue
        if _is_fresh(node.args[0]) and list(node.args[0].users) == [node] and _same_type(node, node.args[0]):
            node.target = plain
    model.recompile()


def written_tensors(model: GraphModule) -> set[Node]:
    """The nodes that share memory, or may do so, with a tensor that an in-place operator writes to."""
    found: set[Node] = set()
    for node in model.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        for argument, description in zip(node.args, node.target._schema.arguments, strict=False):
            if description.alias_info is not None and description.alias_info.is_write:
                pending = [argument] if isinstance(argument, Node) else []
                while pending:
                    each = pending.pop()
                    if each not in found:
                        found.add(each)
                        pending += [] if each.op != "call_function" or _is_fresh(each) else each.all_input_nodes
                        pending += [user for user in each.users if user.op == "call_function" and not _is_fresh(user)]
    return found


def _plain_overload(node: Node) -> torch._ops.OpOverload | None:
    """``aten.relu.default`` for ``aten.relu_.default``; None for what is not in-place or has no such twin."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    name = target._schema.name.removeprefix("aten::")
    if not name.endswith("_") or name.startswith("_") or not target._schema.is_mutable:
        return None
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    plain = None if packet is None else getattr(packet, target._overloadname, None)
    if plain is None or plain._schema.is_mutable or len(plain._schema.arguments) != len(target._schema.arguments):
        return None
    return plain if isinstance(plain, torch._ops.OpOverload) else None


def _is_fresh(node: Node) -> bool:
    """Whether the result of ``node`` shares no memory with its operands, as far as its schema says."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    if target._schema.is_mutable or any(result.alias_info is not None for result in target._schema.returns):
        return False
    # dropout, reshape and flatten may return their operand without saying so.
    return not target.has_kernel_for_dispatch_key(composite) or _name(target) in _FRESH_COMPOSITES


_FRESH_COMPOSITES = frozenset(
    {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
    | {"linear", "matmul", "batch_norm", "layer_norm", "instance_norm", "group_norm"}
    | {"max_pool1d", "max_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "silu", "relu6", "softmax"}
    | {"upsample_nearest1d", "upsample_nearest2d", "avg_pool1d", "hardsigmoid", "mean", "sum", "concat"}
)


def _name(target: torch._ops.OpOverload) -> str:
    return str(target._schema.name).removeprefix("aten::")


def _same_type(node: Node, other: Node) -> bool:
    """In-place operators keep dtype and shape of what they write to; plain ones may promote."""
    values = [each.meta.get("val") for each in (node, other)]
    if not all(isinstance(value, torch.Tensor) for value in values):
        return False
    operands = [n.meta.get("val") for n in node.all_input_nodes]
    return all(isinstance(v, torch.Tensor) and v.dtype == values[0].dtype for v in operands) and all(
        v.numel() <= values[0].numel() and v.dim() <= values[0].dim() for v in operands
    )

"""The layers of a graph: what each module of the network gives, as values that can be looked at.

Nodes keep the path of the module that they come from. :func:`observe` makes a copy of a graph that also gives those
values as outputs, with activations and residual additions taken out of the layers that they were fused into, so that
a layer is seen alone. int8 values come with the scale and zero point that the operators around them know them by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import msgspec
import numpy as np

from torchvk import ops
from torchvk.graph import DType, Graph, Node, Role, Tensor
from torchvk.ops.quantized_sum import added_by

Array = np.ndarray[Any, Any]

# operators with an epilogue → the input that is added after it
RESIDUAL = {"linear": 3, "quantized_linear": 4, "conv": 3, "quantized_conv": 6}
# The node that does what an epilogue does. ("silu" is two.)
ACTIVATIONS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "relu": ("relu", {}),
    "gelu": ("gelu", {"approximate": "none"}),
    "gelu_tanh": ("gelu", {"approximate": "tanh"}),
    "relu6": ("clamp", {"min": 0.0, "max": 6.0}),
    "hardswish": ("hardswish", {}),
}
EIGHT_BIT = (DType.INT8, DType.UINT8)
LAYER = -1  # in place of an input: the bare layer's result
# How many nodes behind a layer's own may be meant when another file names the same module.
BEHIND = 3


@dataclass(frozen=True, slots=True)
class Affine:
    """value = (q − zero_point) · scale, in float32; both broadcast, by blocks, over q."""

    scale: Array
    zero_point: Array

    def dequantize(self, q: Array) -> Array:
        shifted = q.astype(np.float32) - _blocks(self.zero_point, q.shape).astype(np.float32)
        return np.asarray(shifted * _blocks(self.scale, q.shape).astype(np.float32))


@dataclass(frozen=True, slots=True)
class Layer:
    """What a module gives: one of ``values``, positions of extra outputs. The first is that of its last node; the
    others are there because one file may fuse what another does in two steps. ``reads``: paths of the layers that
    it depends on next."""

    path: str
    operator: str
    values: tuple[int, ...]
    reads: tuple[str, ...]


@dataclass(frozen=True)
class Observed:
    """``graph`` gives ``own`` outputs as before, and then one value for each entry of ``quantized``."""

    graph: Graph
    own: int
    layers: tuple[Layer, ...]
    quantized: tuple[Affine | None, ...] = field(repr=False)

    def values(self, outputs: Sequence[Array]) -> list[Array]:
        """The extra outputs, as float32 or float64."""
        return [
            affine.dequantize(output) if affine is not None else output.astype(np.float64, copy=False)
            for output, affine in zip(outputs[self.own :], self.quantized, strict=True)
        ]


def observe(graph: Graph, alternatives: bool = False) -> Observed:
    """A copy of ``graph`` whose outputs also hold what its layers give.

    alternatives: with the values that another file may have under a layer's name, not its last node's alone.
    """
    split, before = _unfused(graph)
    affine = _quantization(split)
    taken_out = {value for values in before.values() for value in values}
    last = {
        node.source: number
        for number, node in enumerate(split.nodes)
        if _seen(split, node, affine) and node.outputs[0] not in taken_out
    }
    readers = _readers(split)
    chosen: dict[int, int] = {}
    layers = []
    makers = {output: node for node in split.nodes for output in node.outputs}
    at = {split.nodes[number].outputs[0]: path for path, number in last.items()}
    for path, number in sorted(last.items(), key=lambda item: item[1]):
        node = split.nodes[number]
        values = [node.outputs[0]]
        if alternatives:
            values += before.get(values[0], [])
            values += _behind(split, values[0], readers, affine)
        positions = tuple(chosen.setdefault(value, len(chosen)) for value in dict.fromkeys(values))
        layers.append(Layer(path, node.op, positions, _reads(split.nodes[number], path, at, makers)))
    tensors = [
        replace(tensor, role=Role.OUTPUT) if index in chosen else tensor for index, tensor in enumerate(split.tensors)
    ]
    whole = replace(split, tensors=tuple(tensors), outputs=(*split.outputs, *chosen))
    whole.validate()
    return Observed(whole, len(split.outputs), tuple(layers), tuple(affine.get(value) for value in chosen))


def _seen(graph: Graph, node: Node, affine: Mapping[int, Affine]) -> bool:
    """Floats, or integers of which it is known what they stand for."""
    return len(node.outputs) == 1 and (graph.tensors[node.outputs[0]].dtype.is_float or node.outputs[0] in affine)


# Activations and residuals out of the layers


def _unfused(graph: Graph) -> tuple[Graph, dict[int, list[int]]]:
    """The same with a node for each epilogue and residual; and what the result of such a layer went through before.

    The layer's path stays with the layer; what follows it has none, as no module is known for it.
    """
    tensors, nodes = list(graph.tensors), []
    before: dict[int, list[int]] = {}

    def emit(op: str, attributes: Mapping[str, Any], inputs: Sequence[int], like: Tensor) -> int:
        operator = ops.get(op)
        plain = msgspec.to_builtins(msgspec.convert(dict(attributes), operator.attributes))
        tensors.append(replace(like, role=Role.TEMPORARY))
        nodes.append(Node(op, tuple(inputs), (len(tensors) - 1,), plain))
        return len(tensors) - 1

    for node in graph.nodes:
        slot = RESIDUAL.get(node.op, len(node.inputs))
        residual = node.inputs[slot] if slot < len(node.inputs) else None
        result = graph.tensors[node.outputs[0]]
        parts = _parts(node, residual, result) if node.op in RESIDUAL else []
        if not parts:
            nodes.append(node)
            continue
        bare = {"sum_dtype": None} if node.attributes.get("sum_dtype") else {"epilogue": "none"}
        dtype = DType(node.attributes["output_dtype"]) if "sum_dtype" in bare else result.dtype
        tensors.append(replace(result, role=Role.TEMPORARY, dtype=dtype))
        steps = [len(tensors) - 1]
        inputs = tuple(None if at == slot else index for at, index in enumerate(node.inputs))
        nodes.append(replace(node, inputs=inputs, outputs=(steps[0],), attributes={**node.attributes, **bare}))
        for op, attributes, other in parts:
            others = [] if other is None else [steps[0] if other == LAYER else other]
            steps.append(emit(op, attributes, [steps[-1], *others], result))
        # The last step makes what the graph knew as the layer's result.
        tensors.pop()
        nodes[-1] = replace(nodes[-1], outputs=node.outputs)
        before[steps[0]] = [*steps[1:-1], node.outputs[0]]
    return replace(graph, tensors=tuple(tensors), nodes=tuple(nodes)), before


def _parts(node: Node, residual: int | None, result: Tensor) -> list[tuple[str, Mapping[str, Any], int | None]]:
    """What follows the bare layer: operators, and what each reads beside the result of the one before."""
    if node.attributes.get("sum_dtype"):
        added = added_by(ops.get(node.op).decode(node))
        assert added is not None
        return [("quantized_arithmetic", asdict(added), residual)]
    name = node.attributes.get("epilogue", "none")
    if not result.dtype.is_float:
        return []
    parts: list[tuple[str, Mapping[str, Any], int | None]] = []
    if name == "silu":
        parts = [("sigmoid", {}, None), ("mul", {}, LAYER)]
    elif name in ACTIVATIONS:
        parts = [(*ACTIVATIONS[name], None)]
    if residual is not None:
        parts.append(("add", {}, residual))
    if name == "sum_relu":
        parts.append(("relu", {}, None))
    return parts


def _readers(graph: Graph) -> dict[int, list[Node]]:
    readers: dict[int, list[Node]] = {}
    for node in graph.nodes:
        for index in dict.fromkeys(node.inputs):
            if index is not None:
                readers.setdefault(index, []).append(node)
    return readers


def _behind(graph: Graph, value: int, readers: Mapping[int, list[Node]], affine: Mapping[int, Affine]) -> Iterable[int]:
    """What simple nodes that alone read the value, and nothing else that is computed, make of it: activations,
    normalizations by constants, views."""
    for _ in range(BEHIND):
        nodes = readers.get(value, [])
        if len(nodes) != 1 or not _seen(graph, nodes[0], affine):
            return
        others = [i for i in nodes[0].inputs if i is not None and i != value and graph.tensors[i].data is None]
        output = nodes[0].outputs[0]
        if others or graph.tensors[output].type.numel != graph.tensors[value].type.numel:
            return
        value = output
        yield value


def _reads(node: Node, path: str, at: Mapping[int, str], makers: Mapping[int, Node]) -> tuple[str, ...]:
    """The layers next before a node of layer ``path``."""
    found: dict[str, None] = {}
    todo, done = list(node.inputs), set[int]()
    while todo:
        index = todo.pop()
        if index is None or index in done:
            continue
        done.add(index)
        if at.get(index, path) != path:
            found[at[index]] = None
        elif index in makers:
            todo += makers[index].inputs
    return tuple(found)


# What 8-bit values stand for


def _quantization(graph: Graph) -> dict[int, Affine]:
    """Scale and zero point of each 8-bit value: as the operator says that made it, or one that reads it; operators
    that only move or select values pass them on."""
    known: dict[int, Affine] = {}
    for node in graph.nodes:
        _note(graph, known, node.outputs[0], _said(node, "output"))
        if node.op in ("quantize", "dequantize"):
            _note(graph, known, node.outputs[0] if node.op == "quantize" else node.inputs[0], _given(graph, node))
    for node in graph.nodes:
        for slot, name in enumerate(("input", "other")):
            if slot < len(node.inputs):
                _note(graph, known, node.inputs[slot], _said(node, name))
    moves = [node for node in graph.nodes if _moves(graph, node)]
    for nodes in (moves, moves[::-1], moves):
        for node in nodes:
            inside, outside = node.inputs[0], node.outputs[0]
            assert inside is not None
            _note(graph, known, outside, _everywhere(known.get(inside)))
            _note(graph, known, inside, _everywhere(known.get(outside)))
    return known


def _note(graph: Graph, known: dict[int, Affine], index: int | None, affine: Affine | None) -> None:
    if index is not None and affine is not None and graph.tensors[index].dtype in EIGHT_BIT:
        known.setdefault(index, affine)


def _said(node: Node, name: str) -> Affine | None:
    scale = node.attributes.get(f"{name}_scale")
    # Where activations are not static their attributes have defaults, which mean nothing.
    meant = name != "input" or node.attributes.get("activation", "static") == "static"
    if not meant or not isinstance(scale, float | int):
        return None
    return Affine(np.array(scale, np.float32), np.array(node.attributes.get(f"{name}_zero_point") or 0))


def _given(graph: Graph, node: Node) -> Affine | None:
    """The scale and zero point that are constant inputs."""
    inputs = (*node.inputs, None)[1:3]
    if inputs[0] is None or any(index is not None and graph.tensors[index].data is None for index in inputs):
        return None
    zero_point = np.array(0) if inputs[1] is None else graph.constant_array(inputs[1])
    return Affine(graph.constant_array(inputs[0]), zero_point)


def _moves(graph: Graph, node: Node) -> bool:
    if len(node.outputs) != 1 or not node.inputs or node.inputs[0] is None or node.op == "lookup":
        return False
    if any(name.endswith("_scale") for name in node.attributes):
        return False
    inside, outside = graph.tensors[node.inputs[0]], graph.tensors[node.outputs[0]]
    return inside.dtype in EIGHT_BIT and outside.dtype is inside.dtype and inside.data is None


def _everywhere(affine: Affine | None) -> Affine | None:
    """Only what is the same for all elements survives a move."""
    return affine if affine is not None and affine.scale.size == affine.zero_point.size == 1 else None


def _blocks(parameter: Array, shape: tuple[int, ...]) -> Array:
    """A parameter whose every size divides that of the value, repeated to blocks of the value's shape."""
    if parameter.size == 1:
        return parameter.reshape(())
    for axis, size in enumerate(shape):
        parameter = np.repeat(parameter, size // parameter.shape[axis], axis)
    return parameter

"""An exported subgraph → Graph."""

from __future__ import annotations

import operator
from typing import Any

from torch.export import ExportedProgram
from torch.fx import Node

from torchvk import ops
from torchvk.errors import UnsupportedError
from torchvk.graph import Graph
from torchvk.lowering.analysis import Analysis, analyze
from torchvk.lowering.draft import Draft, Value
from torchvk.lowering.options import CompileOptions
from torchvk.lowering.passes import optimize
from torchvk.lowering.passes.float16 import to_float16
from torchvk.lowering.refusal import Refused
from torchvk.lowering.source import Source, operator_name
from torchvk.lowering.translate import translate
from torchvk.lowering.types import to_numpy, type_of


def lower(program: ExportedProgram, options: CompileOptions | None = None) -> Graph:
    """The whole of ``program``, in the edge dialect, as a checked graph.

    Inputs are the program's user inputs in order, outputs its user outputs; parameters, buffers and constants become
    constants of the graph.

    Raises:
        UnsupportedError: a node that torchvk does not run; the message has every such node with its reason.
    """
    options = options or CompileOptions()
    source = Source(program)
    analysis = analyze(source, options)
    if analysis.refused:
        lines = [f"{node.name} ({operator_name(node)}): {reason}" for node, reason in analysis.refused.items()]
        raise UnsupportedError("torchvk cannot run " + "; ".join(lines))
    try:
        draft = optimize(_translate(source, analysis))
        if options.force_fp16:
            draft = optimize(to_float16(draft, keep_interface=True))
    except Refused as refusal:
        raise UnsupportedError(f"torchvk cannot run this program: {refusal}") from None
    graph = draft.graph()
    ops.check(graph)
    return graph


def _translate(source: Source, analysis: Analysis) -> Draft:
    draft = Draft()
    values: dict[Node, Any] = {}

    def value(node: Node) -> Any:
        if node not in values:
            data = source.data(node) if source.is_constant(node) else None
            if data is None:
                raise Refused(f"{node.name} has no value")
            values[node] = Value(type_of(data), node.name, True, to_numpy(data))
        return values[node]

    for node in source.user_inputs:
        values[node] = Value(type_of(node.meta["val"]), node.name)
        draft.inputs.append(values[node])
    for node in source.nodes:
        if node.op != "call_function" or node in analysis.swallowed:
            continue
        if node in analysis.matches:
            values[node] = analysis.matches[node].emit(draft, value)
        elif node.target is operator.getitem:
            values[node] = value(node.args[0])[node.args[1]]
        else:
            values[node] = translate(draft, node, value)
    draft.outputs = [value(node) for node in source.output.args[0]]
    return draft

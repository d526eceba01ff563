"""Which nodes of a program torchvk runs, and why it does not run the others.

The partitioner and :func:`torchvk.lowering.lower` both ask :func:`analyze`: what it claims is translated by trying
it out, with the same code that emits the final graph, so that nothing can be claimed and then fail.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from torchvk import ops
from torchvk.lowering.draft import Draft, Value
from torchvk.lowering.options import CompileOptions
from torchvk.lowering.passes.float16 import to_float16
from torchvk.lowering.patterns import PATTERNS, Match
from torchvk.lowering.refusal import Refused
from torchvk.lowering.source import Source, operator_name
from torchvk.lowering.translate import translate
from torchvk.lowering.types import type_of

DELEGATED = "it is a delegate already"

# node → None, or why the user does not want it on the GPU; True for a node inside of a pattern
Accept = Callable[[Node, bool], str | None]


@dataclass
class Analysis:
    """``claimed`` are the nodes that torchvk runs, ``refused`` those that it does not, with the reason in words.

    ``matches`` maps the last node of a pattern to it; nodes that a pattern swallows are claimed, too.
    ``work`` are the claimed nodes that a kernel must run for: neither views nor computed from constants alone.
    ``constants`` are the claimed nodes that depend on constants alone.
    """

    claimed: set[Node] = field(default_factory=set)
    refused: dict[Node, str] = field(default_factory=dict)
    matches: dict[Node, Match] = field(default_factory=dict)
    swallowed: set[Node] = field(default_factory=set)
    work: set[Node] = field(default_factory=set)
    constants: set[Node] = field(default_factory=set)

    def give_back(self, nodes: Iterable[Node], reason: str) -> None:
        """Refuse the matches that swallow these nodes, and those that share a node with one of them."""
        lost = set(nodes)
        while True:
            hit = [match for match in self.matches.values() if not lost.isdisjoint(match.interior)]
            if not hit:
                return
            for match in hit:
                del self.matches[match.anchor]
                lost |= match.interior
                for node in (match.anchor, *match.interior):
                    self.claimed.discard(node)
                    self.swallowed.discard(node)
                    self.work.discard(node)
                    self.refused.setdefault(node, reason)


def analyze(source: Source, options: CompileOptions | None = None, accept: Accept | None = None) -> Analysis:
    """Decide for every call of ``source``."""
    options = options or CompileOptions()
    analysis = Analysis()
    calls = [node for node in source.nodes if node.op in ("call_function", "call_method", "call_module")]
    _match_patterns(calls, source, options, accept or (lambda node, inside: None), analysis)
    for node in calls:
        if node in analysis.refused or node in analysis.claimed:
            continue
        if node.target is operator.getitem and isinstance(node.args[0], Node):
            _follow(node, node.args[0], analysis)
            continue
        try:
            _check_node(node, source, options)
            reason = accept(node, False) if accept else None
            if reason is not None:
                raise Refused(reason)
            _try_out(node, source, options, analysis)
        except Refused as refusal:
            analysis.refused[node] = str(refusal)
        else:
            analysis.claimed.add(node)
    return analysis


def _follow(node: Node, producer: Node, analysis: Analysis) -> None:
    """Picking one result of an operator goes where the operator goes."""
    if producer in analysis.refused:
        analysis.refused[node] = analysis.refused[producer]
        return
    analysis.claimed.add(node)
    if producer in analysis.constants:
        analysis.constants.add(node)


def _match_patterns(
    calls: list[Node],
    source: Source,
    options: CompileOptions,
    accept: Callable[[Node, bool], str | None],
    analysis: Analysis,
) -> None:
    matches: dict[Node, Match] = {}
    for pattern, chain in PATTERNS:
        for node in calls:
            found = None
            try:
                found = pattern(node, source)
                if found is None:
                    continue
                for each in (node, *found.interior):
                    _check_node(each, source, options, results=each is node)
                    reason = accept(each, each is not node)
                    if reason is not None:
                        raise Refused(reason)
                for each in found.reads:
                    _value(each, source)
                draft = Draft()
                found.emit(draft, lambda each: _value(each, source))
                _check_options(draft, options)
            except Refused as refusal:
                _refuse(analysis, node, found.interior if found else chain(node), str(refusal))
            else:
                matches[node] = found
    _drop_broken(matches, analysis)
    analysis.matches = matches
    analysis.swallowed = {node for match in matches.values() for node in match.interior}
    analysis.claimed |= analysis.swallowed | set(matches)
    analysis.work |= set(matches)


def _refuse(analysis: Analysis, node: Node, inside: frozenset[Node], reason: str) -> None:
    for each in (node, *inside):
        analysis.refused.setdefault(each, reason)


def _drop_broken(matches: dict[Node, Match], analysis: Analysis) -> None:
    """A node inside of a match is not computed: whoever else reads it breaks the match, and so do those it breaks."""
    while True:
        swallowed = {node for match in matches.values() for node in match.interior}
        read = {node for match in matches.values() for node in match.reads}
        broken = {}
        for anchor, match in matches.items():
            for node in match.interior:
                others = [u for u in node.users if u not in swallowed and not _inside(node, matches.get(u))]
                if others or node in read or node in analysis.refused:
                    broken[anchor] = others[0].name if others else node.name
        for anchor, name in broken.items():
            match = matches.pop(anchor)
            reason = f"{name} reads its quantized operands and is not a quantized linear that torchvk runs"
            _refuse(analysis, anchor, match.interior, analysis.refused.get(anchor, reason))
        if not broken:
            return


def _inside(node: Node, match: Match | None) -> bool:
    return match is not None and node in match.interior


def _check_node(node: Node, source: Source, options: CompileOptions, results: bool = True) -> None:
    if node.op != "call_function":
        raise Refused(f"nodes of kind {node.op} are not supported")
    if options.require_dynamic_shapes:
        raise Refused("require_dynamic_shapes is set, and torchvk fixes the shapes when it lowers")
    if node in source.writes:
        raise Refused(f"it gives {source.writes[node]!r} a new value: state on the device is not supported")
    for operand in node.all_input_nodes:
        if operand in source.mutable:
            raise Refused(
                f"it reads {source.mutable[operand]!r}, which the program changes: state on the device is not supported"
            )
        if operand.op == "get_attr":
            raise Refused(DELEGATED if operator_name(node) == "executorch_call_delegate" else "it is control flow")
    if results:
        for value in _flatten(node.meta.get("val")):
            type_of(value)


def _try_out(node: Node, source: Source, options: CompileOptions, analysis: Analysis) -> None:
    draft = Draft()
    values: dict[Node, Any] = {}

    def value(operand: Node) -> Any:
        if operand not in values:
            values[operand] = _value(operand, source)
        return values[operand]

    result = translate(draft, node, value)
    if isinstance(result, tuple):
        for user in node.users:
            if user.target is not operator.getitem or result[int(user.args[1])] is None:
                raise Refused("torchvk does not compute all of its results that the program uses")
    _check_options(draft, options)
    if all(source.is_constant(each) or each in analysis.constants for each in node.all_input_nodes):
        analysis.constants.add(node)
    elif not all(ops.get(call.op).alias for call in draft.calls):
        analysis.work.add(node)


def _check_options(draft: Draft, options: CompileOptions) -> None:
    if options.force_fp16:
        to_float16(draft)


def _value(node: Node, source: Source) -> Any:
    """What ``node`` gives, as far as it is known before anything runs."""
    example = node.meta.get("val")
    try:
        if isinstance(example, (tuple, list)):
            return tuple(Value(type_of(each), node.name) for each in example)
        return Value(type_of(example), node.name, constant=source.is_constant(node))
    except Refused as refusal:
        raise Refused(f"its input {node.name}: {refusal}") from None


def _flatten(example: Any) -> list[torch.Tensor]:
    return list(example) if isinstance(example, (tuple, list)) else [example]

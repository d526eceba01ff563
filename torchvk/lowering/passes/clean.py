"""Compute nothing twice, and nothing that is not read."""

from __future__ import annotations

import msgspec

from torchvk.lowering.draft import Array, Call, Draft, Value
from torchvk.lowering.passes.rewrite import Rewriter, rewrite

# Constants are compared by content up to this size; larger equal ones become one when the graph is written.
MAX_COMPARED_BYTES = 1 << 16


def share(draft: Draft) -> Draft:
    """Common subexpressions: equal operators with equal attributes and operands become one."""
    known: dict[object, Value] = {}
    constants: dict[object, Value] = {}

    def same(value: Value | None) -> int | None:
        if value is None:
            return None
        if value.array is not None and value.array.nbytes <= MAX_COMPARED_BYTES:
            value = constants.setdefault((value.type, _content(value.array)), value)
        return id(value)

    def rule(rewriter: Rewriter, call: Call) -> Value | None:
        attributes = msgspec.msgpack.encode(call.attributes)
        key = (call.op, attributes, tuple(map(same, call.inputs)))
        first = known.setdefault(key, call.outputs[0])
        return None if first is call.outputs[0] else first

    return rewrite(_share_several(draft), rule)


def _share_several(draft: Draft) -> Draft:
    """The same for operators with several results, which rules do not see."""
    known: dict[object, Call] = {}
    renamed: dict[Value, Value] = {}
    calls = []
    for old in draft.calls:
        inputs = tuple(renamed.get(value, value) if value is not None else None for value in old.inputs)
        call = Call(old.op, old.attributes, inputs, old.outputs, old.source)
        if len(call.outputs) > 1:
            first = known.setdefault((call.op, msgspec.msgpack.encode(call.attributes), tuple(map(id, inputs))), call)
            if first is not call:
                renamed.update(zip(call.outputs, first.outputs, strict=True))
                continue
        calls.append(call)
    return Draft(list(draft.inputs), calls, [renamed.get(value, value) for value in draft.outputs])


def _content(array: Array) -> bytes:
    return array.tobytes()


def remove_dead(draft: Draft) -> Draft:
    """Leave out calls whose outputs nobody reads."""
    needed = set(draft.outputs)
    kept = []
    for call in reversed(draft.calls):
        if any(output in needed for output in call.outputs):
            kept.append(call)
            needed.update(value for value in call.inputs if value is not None)
    return Draft(list(draft.inputs), kept[::-1], list(draft.outputs))

"""The frame that the passes share: walk over the calls, and put something else in their place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torchvk.lowering.draft import Call, Draft, Value
from torchvk.lowering.refusal import Refused


@dataclass
class Rewriter:
    """A new draft in the making. ``made`` gives the call that produced a value of it."""

    draft: Draft
    uses: dict[Value, int]
    made: dict[Value, Call] = field(default_factory=dict)

    def op(self, name: str, *inputs: Value | None, like: Call, attributes: object = None) -> Value:
        """Emit an operator with one output, under the name and module of the call that it replaces."""
        (output,) = self.draft.emit(name, inputs, attributes, like.outputs[0].name, like.source)
        self.made[output] = self.draft.calls[-1]
        return output

    def reshape(self, value: Value, shape: tuple[int, ...], like: Call) -> Value:
        return (
            value if value.shape == shape else self.op("reshape", value, like=like, attributes={"shape": list(shape)})
        )

    def producer(self, value: Value | None, op: str) -> Call | None:
        """The call that gives ``value``, if it is an ``op``."""
        call = self.made.get(value) if value is not None else None
        return call if call is not None and call.op == op else None


# (rewriter, call with new operands) → the value that takes the place of its only output, or None to keep the call
Rule = Callable[[Rewriter, Call], Value | None]


def rewrite(draft: Draft, rules: dict[str, Rule] | Rule) -> Draft:
    """Apply to each call the rule of its operator (or the one rule).

    A rule that raises Refused, since what it wants cannot run, leaves the call as it is. ``Rewriter.uses`` counts
    readers of the old draft's values; values that a rule makes are not in it.
    """
    new = Draft(inputs=list(draft.inputs))
    rewriter = Rewriter(new, draft.uses())
    renamed: dict[Value, Value] = {}

    def now(value: Value | None) -> Value | None:
        return None if value is None else renamed.get(value, value)

    for old in draft.calls:
        call = Call(old.op, old.attributes, tuple(map(now, old.inputs)), old.outputs, old.source)
        rule = rules.get(call.op) if isinstance(rules, dict) else rules
        length = len(new.calls)
        result = None
        if rule is not None and len(call.outputs) == 1:
            try:
                result = rule(rewriter, call)
            except Refused:
                del new.calls[length:]
        if result is None:
            new.calls.append(call)
            rewriter.made.update(dict.fromkeys(call.outputs, call))
        elif result.type != call.outputs[0].type:
            raise AssertionError(f"{call.op} of type {call.outputs[0].type} was rewritten to {result.type}")
        else:
            renamed[call.outputs[0]] = result
            rewriter.uses[result] = rewriter.uses.get(result, 0) + rewriter.uses.get(call.outputs[0], 0)
    new.outputs = [renamed.get(value, value) for value in draft.outputs]
    return new

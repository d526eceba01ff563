"""The graph while it is being made: like ``torchvk.graph``, but values are objects and constants are arrays.

Passes take a draft and give a new one (see ``torchvk.lowering.passes``); :meth:`Draft.graph` ends the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np

from torchvk import ops
from torchvk.errors import FormatError
from torchvk.graph import DType, Graph, TensorType
from torchvk.graph.build import GraphBuilder
from torchvk.lowering.refusal import Refused

Array = np.ndarray[Any, Any]


@dataclass(eq=False, slots=True)
class Value:
    """A tensor; ``constant`` ones have their data in ``array``, or None while a partition is only tried out."""

    type: TensorType
    name: str = ""
    constant: bool = False
    array: Array | None = field(default=None, repr=False)

    @property
    def dtype(self) -> DType:
        return self.type.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.type.shape


@dataclass(eq=False, slots=True)
class Call:
    """One application of an operator; ``attributes`` is the operator's own dataclass."""

    op: str
    attributes: Any
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value, ...]
    source: str = ""

    @property
    def alias(self) -> bool:
        return ops.get(self.op).alias


@dataclass(eq=False)
class Draft:
    """Calls in topological order. ``outputs`` may name inputs, constants, and one value twice."""

    inputs: list[Value] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)

    def emit(
        self,
        op: str,
        inputs: Sequence[Value | None],
        attributes: Any = None,
        name: str = "",
        source: str = "",
    ) -> tuple[Value, ...]:
        """Append a call, with attributes as a mapping or the operator's dataclass; gives its outputs.

        Raises :class:`Refused` with the operator's own reason if it cannot run with these types.
        """
        attributes = decode_attributes(op, attributes)
        types = [None if value is None else value.type for value in inputs]
        reason = ops.supports(op, attributes, types)
        if reason is not None:
            raise Refused(reason)
        operator = ops.get(op)
        for slot in operator.constant_inputs:
            value = inputs[slot] if slot < len(inputs) else None
            if value is not None and not value.constant:
                raise Refused(f"input {slot} of {op} must be a constant")
        outputs = tuple(Value(type, name) for type in operator.infer(attributes, types))
        self.calls.append(Call(op, attributes, tuple(inputs), outputs, source))
        return outputs

    def uses(self) -> dict[Value, int]:
        """How often each value is read, the graph's outputs included."""
        counts: dict[Value, int] = {}
        for value in (*(v for call in self.calls for v in call.inputs), *self.outputs):
            if value is not None:
                counts[value] = counts.get(value, 0) + 1
        return counts

    def graph(self) -> Graph:
        """The finished graph. Constants that no call reads are left out; equal ones are stored once."""
        builder = GraphBuilder()
        index: dict[Value, int] = {value: builder.input(value.name, value.type) for value in self.inputs}

        def place(value: Value) -> int:
            if value not in index:
                if value.array is None:
                    raise AssertionError(f"{value.name!r} is read but neither computed nor a constant with data")
                index[value] = builder.constant(value.name, value.array, value.dtype)
            return index[value]

        for call in self.calls:
            inputs = [None if value is None else place(value) for value in call.inputs]
            types = [output.type for output in call.outputs]
            outputs = builder.node(call.op, inputs, types, call.attributes, call.outputs[0].name, call.source)
            index.update(zip(call.outputs, outputs, strict=True))
        return builder.build([place(value) for value in self.outputs])


def decode_attributes(op: str, attributes: Any) -> Any:
    """A mapping (or None) as the attribute dataclass of operator ``op``."""
    if attributes is not None and not isinstance(attributes, Mapping):
        return attributes
    try:
        operator = ops.get(op)
    except FormatError:
        raise Refused(f"operator {op!r} is not part of this torchvk") from None
    try:
        decoded: Any = msgspec.convert(dict(attributes or {}), operator.attributes, strict=True)
    except msgspec.ValidationError as error:
        raise Refused(f"operator {op!r} has no such attributes: {error}") from None
    # msgspec leaves defaults to the class. Files name every attribute: defaults may change, what was lowered must not.
    return replace(decoded)


def constant(array: Array, name: str = "", dtype: DType | None = None) -> Value:
    """A constant; ``dtype``: INT4 or INT2 for int8 data that is to be stored packed."""
    return Value(TensorType(dtype or DType.of(array.dtype), tuple(array.shape)), name, True, array)


def is_constant(values: Iterable[Value | None]) -> bool:
    """True if all values that are there are constants with data."""
    return all(value is None or value.array is not None for value in values)

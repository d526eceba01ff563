"""What a .pte file holds, in words and as data: no device is needed, and nothing is run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from torchvk.errors import TorchVkError
from torchvk.graph import Graph, Role, from_bytes
from torchvk.program.pte import Delegate, DelegateCall, KernelCall, ListValue, Plan, PteFile, TensorValue, Value
from torchvk.program.source import ProgramSource, located, open_source

BACKEND = "TorchVkBackend"
ON_THE_CPU = (
    "left to the CPU by the partitioner when the file was written; the file does not hold the reasons, "
    "VulkanPartitioner(...).report gave them"
)


@dataclass(frozen=True, slots=True)
class TensorDescription:
    """``type`` like ``float32[1, 128]``; numbers and strings that were baked in are given as they are."""

    name: str
    type: str


@dataclass(frozen=True, slots=True)
class DelegateDescription:
    """One delegate. For those of another backend only ``backend`` and ``bytes`` are known."""

    backend: str
    bytes: int
    constant_bytes: int = 0
    operators: Mapping[str, int] = field(default_factory=dict)
    inputs: tuple[TensorDescription, ...] = ()
    outputs: tuple[TensorDescription, ...] = ()
    calls: int = 1


@dataclass(frozen=True, slots=True)
class MethodDescription:
    """One method. ``cpu_operators``: name → number of calls; ``constant_bytes``: of constants outside delegates."""

    name: str
    inputs: tuple[TensorDescription, ...]
    outputs: tuple[TensorDescription, ...]
    delegates: tuple[DelegateDescription, ...]
    cpu_operators: Mapping[str, int]
    cpu_reason: str
    constant_bytes: int

    @property
    def gpu_operators(self) -> int:
        return sum(sum(delegate.operators.values()) * delegate.calls for delegate in self.delegates)


@dataclass(frozen=True, slots=True)
class ProgramDescription:
    """What :func:`describe` and :meth:`Program.describe` give; ``str()`` of it is made for reading."""

    name: str
    bytes: int
    methods: tuple[MethodDescription, ...]
    named_data: Mapping[str, int]

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.bytes} bytes, {_count(len(self.methods), 'method')}"]
        for method in self.methods:
            lines.append(f"method {method.name}")
            lines += [f"  input   {entry.name or position}: {entry.type}" for position, entry in _each(method.inputs)]
            lines += [f"  output  {position}: {entry.type}" for position, entry in _each(method.outputs)]
            for position, delegate in enumerate(method.delegates):
                lines.append(
                    f"  delegate {position}: {delegate.backend}, {delegate.bytes} bytes, "
                    f"{delegate.constant_bytes} of them constants"
                )
                lines += [f"    {count:5} × {name}" for name, count in delegate.operators.items()]
            if method.cpu_operators:
                lines.append(f"  on the CPU ({method.cpu_reason}):")
                lines += [f"    {count:5} × {name}" for name, count in method.cpu_operators.items()]
                lines.append(f"    with {method.constant_bytes} bytes of constants")
            else:
                lines.append("  on the CPU: nothing")
        lines += [f"named data {key!r}: {size} bytes" for key, size in self.named_data.items()]
        return "\n".join(lines)


def describe(source: ProgramSource) -> ProgramDescription:
    """Describe a .pte file, also one with delegates of other backends. Raises :class:`FormatError`."""
    from torchvk.program.pte import decode

    opened = open_source(source)
    with located(opened.name):
        return describe_file(opened.name, decode(opened.view))


class Graphs:
    """The graphs in delegates; each is checked and decoded once, also where methods share a delegate."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], Graph] = {}

    def __call__(self, delegate: Delegate) -> Graph:
        key = (np.frombuffer(delegate.data, np.uint8).ctypes.data, len(delegate.data))
        if key not in self._known:
            self._known[key] = from_bytes(delegate.data)
        return self._known[key]


def describe_file(name: str, file: PteFile, graph_of: Callable[[Delegate], Graph] | None = None) -> ProgramDescription:
    graph_of = graph_of or Graphs()
    methods = tuple(_method(plan, graph_of) for plan in file.plans)
    return ProgramDescription(name, file.size, methods, {key: len(data) for key, data in file.named_data.items()})


def value_names(plan: Plan, graphs: Mapping[int, Graph]) -> dict[int, str]:
    """Names of the method's values, as far as the delegates that take them know any. ``graphs``: by delegate."""
    names: dict[int, str] = {}
    for call in _calls(plan):
        graph = graphs.get(call.delegate)
        if graph is not None:
            tensors = [graph.tensors[index].name for index in (*graph.inputs, *graph.outputs)]
            for index, name in zip(call.arguments, tensors, strict=False):
                names.setdefault(index, name)
    return names


def _calls(plan: Plan) -> list[DelegateCall]:
    return [step for chain in plan.chains for step in chain if isinstance(step, DelegateCall)]


def _method(plan: Plan, graph_of: Callable[[Delegate], Graph]) -> MethodDescription:
    graphs: dict[int, Graph] = {}
    for index, delegate in enumerate(plan.delegates):
        if delegate.backend == BACKEND:
            with located(f"method {plan.name!r}, delegate {index}"):
                graphs[index] = graph_of(delegate)
    calls = Counter(call.delegate for call in _calls(plan))
    names = value_names(plan, graphs)
    kernels = Counter(
        plan.operators[step.operator] for chain in plan.chains for step in chain if isinstance(step, KernelCall)
    )
    constants = {
        id(value.constant): value.nbytes
        for value in plan.values
        if isinstance(value, TensorValue) and value.constant is not None
    }
    return MethodDescription(
        name=plan.name,
        inputs=tuple(_value(names.get(index, ""), plan.values[index]) for index in plan.inputs),
        outputs=tuple(_value(names.get(index, ""), plan.values[index]) for index in plan.outputs),
        delegates=tuple(
            _delegate(delegate, graphs.get(index), calls[index]) for index, delegate in enumerate(plan.delegates)
        ),
        cpu_operators=dict(kernels.most_common()),
        cpu_reason=ON_THE_CPU if kernels else "",
        constant_bytes=sum(constants.values()),
    )


def _delegate(delegate: Delegate, graph: Graph | None, calls: int) -> DelegateDescription:
    if graph is None:
        return DelegateDescription(delegate.backend, len(delegate.data), calls=calls)
    return DelegateDescription(
        backend=delegate.backend,
        bytes=len(delegate.data),
        constant_bytes=sum(tensor.type.nbytes for tensor in graph.tensors if tensor.role is Role.CONSTANT),
        operators=dict(Counter(node.op for node in graph.nodes).most_common()),
        inputs=_tensors(graph, graph.inputs),
        outputs=_tensors(graph, graph.outputs),
        calls=calls,
    )


def _tensors(graph: Graph, indices: tuple[int, ...]) -> tuple[TensorDescription, ...]:
    return tuple(TensorDescription(graph.tensors[index].name, str(graph.tensors[index].type)) for index in indices)


def _value(name: str, value: Value) -> TensorDescription:
    if isinstance(value, ListValue):
        raise TorchVkError("lists as inputs or outputs of a method are not supported")
    return TensorDescription(name, str(value) if isinstance(value, TensorValue) else repr(value))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _each(entries: tuple[TensorDescription, ...]) -> enumerate[TensorDescription]:
    return enumerate(entries)

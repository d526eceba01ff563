"""Graph + Capabilities → Plan: which dispatches run, in which order, on which bytes. Pure Python, no Vulkan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from torchvk.errors import TorchVkError, UnsupportedError
from torchvk.graph import Graph, Node, TensorType
from torchvk.ops import Arg, Capabilities, Dispatch, Kernels, Layout, choose_kernels, get
from torchvk.runtime.arena import lay_out
from torchvk.runtime.order import fused, live, stages_of
from torchvk.runtime.steps import (
    ALIGNMENT,
    PADDING,
    TEXEL,
    Constant,
    Kind,
    Plan,
    Step,
    Storage,
    bytes_of_whole,
    covered,
)

MAX_PUSH = 128  # what Vulkan promises
NOTHING_TUNED: Mapping[str, str] = MappingProxyType({})


@dataclass
class Draft:
    """Storages and steps while they are collected."""

    graph: Graph
    capabilities: Capabilities
    tuned: Mapping[str, str] = field(default_factory=dict)
    storages: list[Storage] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)
    constant_storages: dict[tuple[object, ...], int] = field(default_factory=dict)
    # Graph tensor → storage; constants are found through constant_storages.
    tensors: dict[int, int] = field(default_factory=dict)
    # What a dispatch that writes only scratch computes → the scratch storages that hold it.
    computed: dict[tuple[object, ...], tuple[int, ...]] = field(default_factory=dict)
    parts: dict[tuple[int, tuple[int, int]], int] = field(default_factory=dict)
    # What was chosen for equal nodes: models repeat their layers.
    chosen: dict[tuple[object, ...], Kernels] = field(default_factory=dict)

    def storage(self, kind: Kind, nbytes: int, offset: int = 0) -> int:
        self.storages.append(Storage(kind, -(-nbytes // PADDING) * PADDING, offset))
        return len(self.storages) - 1

    def constant(self, tensor: int, layout: Layout | None) -> int:
        """The storage of a constant; the same bytes read in the same way are one storage."""
        declared = self.graph.tensors[tensor]
        key = (declared.data, declared.type, layout and layout.name)
        if key not in self.constant_storages:
            index = self.storage("constant", declared.type.nbytes, len(self.constants))
            self.constant_storages[key] = index
            self.constants.append(Constant(tensor, layout))
        return self.constant_storages[key]

    def of(self, tensor: int, layout: Layout | None = None) -> int:
        """The storage of a graph tensor."""
        if tensor in self.tensors:
            return self.tensors[tensor]
        return self.constant(tensor, layout)

    def bind(self, arg: Arg, storage: int) -> int:
        """The storage, or the part of it, that ``arg`` binds."""
        if arg.part is None:
            return storage
        key = (storage, arg.part)
        if key not in self.parts:
            (first, nbytes), whole = arg.part, self.storages[storage]
            if first % ALIGNMENT or not 0 <= first < first + nbytes <= whole.nbytes:
                raise TorchVkError(f"a kernel binds {nbytes:,} bytes from {first:,} on of {whole}")
            self.parts[key] = self.storage(whole.kind, nbytes, first)
            self.storages[-1] = replace(self.storages[-1], whole=storage)
        return self.parts[key]

    def kernels(self, node: Node, inputs: Sequence[TensorType | None], outputs: Sequence[TensorType]) -> Kernels:
        attributes = get(node.op).decode(node)
        constants = tuple(type is not None and type.constant for type in inputs)
        key = (node.op, str(attributes), *inputs, constants, *outputs)
        if key not in self.chosen:
            self.chosen[key] = choose_kernels(node.op, attributes, inputs, outputs, self.capabilities, self.tuned)
        return self.chosen[key]

    def step(
        self, node: int, dispatch: Dispatch, storage_of: Callable[[Arg], int], waits: tuple[int, ...] = ()
    ) -> Step:
        """The dispatch on the storages of its arguments. ``waits``: what it is to wait for, too, as if it read that."""
        buffers = tuple(self.bind(arg, storage_of(arg)) for arg in dispatch.buffers)
        reads = tuple(b for b, arg in zip(buffers, dispatch.buffers, strict=True) if arg.read)
        writes = tuple(b for b, arg in zip(buffers, dispatch.buffers, strict=True) if arg.write)
        return Step(node, dispatch, buffers, (*reads, *waits), writes)

    def copy(self, source: int, target: int) -> None:
        self.steps.append(Step(None, None, (source, target), (source,), (target,)))

    def plan(self, steps: Sequence[Step], inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Plan:
        """The steps in stages, and where all bytes lie."""
        return lay_out(self.storages, self.constants, stages_of(steps, self.storages), inputs, outputs)


def make_plan(
    graph: Graph,
    capabilities: Capabilities,
    *,
    stage_inputs: bool = False,
    stage_outputs: bool = False,
    tuned: Mapping[str, str] = NOTHING_TUNED,
) -> Plan:
    """Choose kernels, share storages, drop what is not needed, order, and lay out memory.

    ``tuned`` names the variant to take for a shape class (ops.shape_class), where the operator still offers it.
    With ``stage_inputs`` (``stage_outputs``) kernels do not touch the input (output) storages, which only the host
    side of a copy uses. Raises UnsupportedError, naming the node, where a limit of the device is passed.
    """
    draft = Draft(graph, capabilities, tuned)
    inputs = _add_inputs(draft, stage_inputs)
    for position in range(len(graph.nodes)):
        _add_node(draft, position)
    outputs = _add_outputs(draft, stage_outputs)
    steps = fused(live(draft.steps, draft.storages), draft.storages)
    _check_written(draft, steps)
    return draft.plan(steps, inputs, outputs)


def _add_inputs(draft: Draft, staged: bool) -> tuple[int, ...]:
    result = []
    for tensor in draft.graph.inputs:
        declared = draft.graph.tensors[tensor]
        nbytes = declared.type.nbytes
        _check_range(draft, nbytes, f"input {declared.name!r}")
        outside = draft.storage("input", nbytes)
        result.append(outside)
        if staged:
            inside = draft.storage("arena", nbytes)
            draft.copy(outside, inside)
            draft.tensors[tensor] = inside
        else:
            draft.tensors[tensor] = outside
    return tuple(result)


def _add_node(draft: Draft, position: int) -> None:
    graph, node = draft.graph, draft.graph.nodes[position]
    where = f"node {position} ({node.op!r}{' from ' + node.source if node.source else ''})"
    operator = get(node.op)
    if operator.alias:
        assert node.inputs[0] is not None
        draft.tensors[node.outputs[0]] = draft.of(node.inputs[0])
        return
    for index in node.outputs:
        nbytes = graph.tensors[index].type.nbytes
        _check_range(draft, nbytes, f"{where}: output {graph.tensors[index].type}")
        draft.tensors[index] = draft.storage("arena", nbytes)
    types = [None if index is None else graph.tensors[index].type for index in node.inputs]
    output_types = [graph.tensors[index].type for index in node.outputs]
    kernels = draft.kernels(node, types, output_types)
    for nbytes in kernels.scratch:
        _check_range(draft, nbytes, f"{where}: scratch memory")
    scratch = [draft.storage("arena", nbytes) for nbytes in kernels.scratch]
    # Scratch that several dispatches write holds something else after each: never shared.
    writers = [0] * len(scratch)
    for dispatch in kernels.dispatches:
        for arg in dispatch.buffers:
            if arg.role == "scratch" and arg.write:
                writers[arg.index] += 1
    for dispatch in kernels.dispatches:
        _check_dispatch(dispatch, draft.capabilities, where)
        if 0 in dispatch.groups:
            continue
        _add_dispatch(draft, position, dispatch, scratch, writers)


def _add_dispatch(draft: Draft, position: int, dispatch: Dispatch, scratch: list[int], writers: list[int]) -> None:
    node = draft.graph.nodes[position]

    def storage_of(arg: Arg) -> int:
        if arg.role == "scratch":
            return scratch[arg.index]
        if arg.role == "output":
            return draft.tensors[node.outputs[arg.index]]
        tensor = node.inputs[arg.index]
        if tensor is None:
            raise TorchVkError(f"node {position} ({node.op!r}) binds its absent input {arg.index}")
        return draft.of(tensor, arg.layout)

    step = draft.step(position, dispatch, storage_of)
    for arg, b in zip(dispatch.buffers, step.buffers, strict=True):
        if arg.texels and draft.storages[b].nbytes // TEXEL > draft.capabilities.max_texels:
            raise UnsupportedError(
                f"node {position} ({node.op!r}): kernel {dispatch.kernel!r} reads {draft.storages[b].nbytes:,} bytes "
                f"as texels; this device binds at most {draft.capabilities.max_texels * TEXEL:,} at once"
            )
    if all(
        arg.role == "input" or (arg.role == "scratch" and writers[arg.index] == 1 and arg.read != arg.write)
        for arg in dispatch.buffers
    ) and not any(arg.part for arg in dispatch.buffers if arg.write):
        key = _computation(draft, step, dispatch)
        if key in draft.computed:
            written = (arg for arg in dispatch.buffers if arg.write)
            for arg, known in zip(written, draft.computed[key], strict=True):
                scratch[arg.index] = known
            return
        draft.computed[key] = step.writes
    draft.steps.append(step)


def _computation(draft: Draft, step: Step, dispatch: Dispatch) -> tuple[object, ...]:
    """Equal for dispatches that write the same numbers."""
    buffers = zip(dispatch.buffers, step.buffers, strict=True)
    return (
        dispatch.kernel,
        # 1 == 1.0 in Python, but they specialize differently.
        tuple((type(value), value) for value in dispatch.constants),
        dispatch.push,
        dispatch.groups,
        tuple(("write", draft.storages[b].nbytes) if arg.write else b for arg, b in buffers),
    )


def _add_outputs(draft: Draft, staged: bool) -> tuple[int, ...]:
    """Give every graph output a storage of its own; where it shares one with another, copy."""
    result: list[int] = []
    for tensor in draft.graph.outputs:
        declared = draft.graph.tensors[tensor]
        if declared.dtype.packed:
            raise UnsupportedError(f"output {declared.name!r} is {declared.dtype.value}, which cannot leave the device")
        source = draft.of(tensor)
        if draft.storages[source].kind == "arena" and not staged:
            draft.storages[source] = replace(draft.storages[source], kind="output")
            result.append(source)
        else:
            result.append(draft.storage("output", declared.type.nbytes))
            if declared.type.nbytes:
                draft.copy(source, result[-1])
    return tuple(result)


def _check_range(draft: Draft, nbytes: int, what: str) -> None:
    limit = draft.capabilities.max_storage_range
    if nbytes > limit:
        raise UnsupportedError(f"{what} has {nbytes:,} bytes; this device binds at most {limit:,} at once")


def _check_dispatch(dispatch: Dispatch, capabilities: Capabilities, where: str) -> None:
    limits = capabilities.max_workgroup_count
    if len(dispatch.groups) != 3 or any(not 0 <= n <= limit for n, limit in zip(dispatch.groups, limits, strict=True)):
        raise UnsupportedError(
            f"{where}: kernel {dispatch.kernel!r} needs {list(dispatch.groups)} workgroups, "
            f"this device has at most {list(limits)}"
        )
    if len(dispatch.push) > MAX_PUSH or len(dispatch.push) % 4:
        raise TorchVkError(f"{where}: kernel {dispatch.kernel!r} has {len(dispatch.push)} bytes of push constants")
    for arg in dispatch.buffers:
        if arg.role == "input" and arg.write:
            raise TorchVkError(f"{where}: kernel {dispatch.kernel!r} writes input {arg.index}")
        if arg.texels and arg.write:
            raise TorchVkError(f"{where}: kernel {dispatch.kernel!r} writes a buffer of texels")


def _check_written(draft: Draft, steps: Sequence[Step]) -> None:
    """Every output that has bytes is written, and nothing is read that was not."""
    storages = draft.storages
    written: dict[int, list[tuple[int, int]]] = {}  # by whole storages

    def is_written(index: int) -> bool:
        storage = storages[index]
        if storage.kind in ("input", "constant") or storage.nbytes == 0:
            return True
        begin, end = bytes_of_whole(storages, index)
        return covered(begin, end, written.get(index if storage.whole is None else storage.whole, ()))

    for step in steps:
        if not all(map(is_written, step.reads)):
            name = "a copy" if step.node is None else f"node {step.node} ({draft.graph.nodes[step.node].op!r})"
            raise TorchVkError(f"{name} reads memory that nothing wrote")
        for b in step.writes:
            whole = storages[b].whole
            written.setdefault(b if whole is None else whole, []).append(bytes_of_whole(storages, b))
    for tensor in draft.graph.outputs:
        if not is_written(draft.of(tensor)):
            raise TorchVkError(f"output {draft.graph.tensors[tensor].name!r} is never written")

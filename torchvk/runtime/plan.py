"""Graph + Capabilities → Plan: which dispatches run, in which order, on which bytes. Pure Python, no Vulkan.

The steps of a plan stand in stages. Steps of one stage do not depend on each other and may overlap; a barrier
stands between stages, so that there is one only where something depends on something.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from torchvk.errors import TorchVkError, UnsupportedError
from torchvk.graph import Graph, Node, TensorType
from torchvk.ops import Arg, Capabilities, Dispatch, Kernels, Layout, choose_kernels, get
from torchvk.ops.fusion import fuse
from torchvk.ops.operator import PART_ALIGNMENT

ALIGNMENT = PART_ALIGNMENT
PADDING = 16  # kernels may read whole uint4 words
MAX_PUSH = 128  # what Vulkan promises
TEXEL = 16  # bytes of a uint4
NOTHING_TUNED: Mapping[str, str] = MappingProxyType({})

Kind = Literal["input", "output", "constant", "arena"]


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes that kernels see. ``nbytes`` is padded to PADDING (0 stays 0).

    ``offset`` counts from the start of the kind's buffer; for a constant it is its position in Plan.constants.
    ``whole``: of a part, the storage that it is a part of (``offset`` counts from there until memory is laid out, and
    for constants always).
    """

    kind: Kind
    nbytes: int
    offset: int = 0
    whole: int | None = None


@dataclass(frozen=True, slots=True)
class Constant:
    """A constant tensor as kernels want it: its raw bytes, or rearranged by a layout. Equal data are one."""

    tensor: int
    layout: Layout | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """A dispatch, or (``dispatch`` None) a copy of all bytes of buffers[0] to buffers[1].

    ``buffers`` are positions in Plan.storages, in binding order; ``writes`` says which of them are written and
    ``reads`` which are read. ``node`` is a position in Graph.nodes, or None for a copy.
    """

    node: int | None
    dispatch: Dispatch | None
    buffers: tuple[int, ...]
    reads: tuple[int, ...]
    writes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What the runtime records. ``inputs`` and ``outputs`` give the storage of each graph input and output."""

    storages: tuple[Storage, ...]
    stages: tuple[tuple[Step, ...], ...]
    constants: tuple[Constant, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    input_bytes: int
    output_bytes: int
    arena_bytes: int

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(step for stage in self.stages for step in stage)

    @property
    def barriers(self) -> int:
        return max(len(self.stages) - 1, 0)


@dataclass
class _Draft:
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

    def copy(self, source: int, target: int) -> None:
        self.steps.append(Step(None, None, (source, target), (source,), (target,)))


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
    draft = _Draft(graph, capabilities, tuned)
    inputs = _add_inputs(draft, stage_inputs)
    for position in range(len(graph.nodes)):
        _add_node(draft, position)
    outputs = _add_outputs(draft, stage_outputs)
    steps = _fused(_live(draft.steps, draft.storages), draft.storages)
    _check_written(draft, steps)
    stages = _schedule(steps, draft.storages)
    return _lay_out(draft, stages, inputs, outputs)


def _add_inputs(draft: _Draft, staged: bool) -> tuple[int, ...]:
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


def _add_node(draft: _Draft, position: int) -> None:
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


def _add_dispatch(draft: _Draft, position: int, dispatch: Dispatch, scratch: list[int], writers: list[int]) -> None:
    node = draft.graph.nodes[position]
    buffers = []
    for arg in dispatch.buffers:
        if arg.role == "scratch":
            buffers.append(scratch[arg.index])
        elif arg.role == "output":
            buffers.append(draft.tensors[node.outputs[arg.index]])
        else:
            tensor = node.inputs[arg.index]
            if tensor is None:
                raise TorchVkError(f"node {position} ({node.op!r}) binds its absent input {arg.index}")
            buffers.append(draft.of(tensor, arg.layout))
        buffers[-1] = draft.bind(arg, buffers[-1])
    for arg, b in zip(dispatch.buffers, buffers, strict=True):
        if arg.texels and draft.storages[b].nbytes // TEXEL > draft.capabilities.max_texels:
            raise UnsupportedError(
                f"node {position} ({node.op!r}): kernel {dispatch.kernel!r} reads {draft.storages[b].nbytes:,} bytes "
                f"as texels; this device binds at most {draft.capabilities.max_texels * TEXEL:,} at once"
            )
    written = [(i, arg) for i, arg in enumerate(dispatch.buffers) if arg.write]
    if all(
        arg.role == "input" or (arg.role == "scratch" and writers[arg.index] == 1 and arg.read != arg.write)
        for arg in dispatch.buffers
    ) and not any(arg.part for _, arg in written):
        key = (
            dispatch.kernel,
            # 1 == 1.0 in Python, but they specialize differently.
            tuple((type(value), value) for value in dispatch.constants),
            dispatch.push,
            dispatch.groups,
            tuple(
                ("write", draft.storages[b].nbytes) if arg.write else b
                for arg, b in zip(dispatch.buffers, buffers, strict=True)
            ),
        )
        if key in draft.computed:
            for (_, arg), known in zip(written, draft.computed[key], strict=True):
                scratch[arg.index] = known
            return
        draft.computed[key] = tuple(buffers[i] for i, _ in written)
    draft.steps.append(
        Step(
            position,
            dispatch,
            tuple(buffers),
            reads=tuple(b for b, arg in zip(buffers, dispatch.buffers, strict=True) if arg.read),
            writes=tuple(b for b, arg in zip(buffers, dispatch.buffers, strict=True) if arg.write),
        )
    )


def _add_outputs(draft: _Draft, staged: bool) -> tuple[int, ...]:
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


def _check_range(draft: _Draft, nbytes: int, what: str) -> None:
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


def _live(steps: Sequence[Step], storages: Sequence[Storage]) -> list[Step]:
    """The steps that an output depends on."""
    meeting = _meeting(storages)
    needed = {index for index, storage in enumerate(storages) if storage.kind == "output"}
    kept = []
    for step in reversed(steps):
        if any(not needed.isdisjoint(meeting[b]) for b in step.writes):
            needed.update(step.reads)
            kept.append(step)
    return kept[::-1]


def _meeting(storages: Sequence[Storage]) -> list[tuple[int, ...]]:
    """By storage, those that share bytes with it: itself and, where there are parts, its whole and other parts."""
    families: dict[int, list[int]] = {}
    for index, storage in enumerate(storages):
        if storage.whole is not None:
            families.setdefault(storage.whole, [storage.whole]).append(index)
    meeting: list[tuple[int, ...]] = [(index,) for index in range(len(storages))]
    for family in families.values():
        for index in family:
            begin, end = _bytes_of_whole(storages, index)
            others = [(other, *_bytes_of_whole(storages, other)) for other in family]
            meeting[index] = tuple(
                other for other, first, last in others if index == other or (first < end and begin < last)
            )
    return meeting


def _bytes_of_whole(storages: Sequence[Storage], index: int) -> tuple[int, int]:
    """Where a storage lies in that of which it is a part."""
    storage = storages[index]
    begin = 0 if storage.whole is None else storage.offset
    return begin, begin + storage.nbytes


def _fused(steps: Sequence[Step], storages: Sequence[Storage]) -> list[Step]:
    """The same with fewer dispatches: where torchvk.ops.fusion makes two one, the second joins the first."""
    meeting = _meeting(storages)
    kept: list[Step] = []
    writer: dict[int, int] = {}  # storage → position of the step that wrote it last
    touched: set[int] = set()
    for step in steps:
        position = writer.get(step.reads[0], -1) if len(step.reads) == 1 else -1
        first = kept[position] if position >= 0 else None
        if (
            first is not None
            and first.dispatch is not None
            and step.dispatch is not None
            and first.writes == step.reads
            and touched.isdisjoint(step.writes)
            and (dispatch := fuse(first.dispatch, step.dispatch)) is not None
        ):
            buffers, writes = (*first.buffers, *step.writes), (*first.writes, *step.writes)
            kept[position] = replace(first, dispatch=dispatch, buffers=buffers, writes=writes)
        else:
            kept.append(step)
            position = len(kept) - 1
        writer.update({other: -1 for b in step.writes for other in meeting[b]})
        writer.update(dict.fromkeys(step.writes, position))
        touched.update(other for b in step.buffers for other in meeting[b])
    return kept


def _check_written(draft: _Draft, steps: Sequence[Step]) -> None:
    """Every output that has bytes is written, and nothing is read that was not."""
    storages = draft.storages
    written: dict[int, list[tuple[int, int]]] = {}  # by whole storages

    def is_written(index: int) -> bool:
        storage = storages[index]
        if storage.kind in ("input", "constant") or storage.nbytes == 0:
            return True
        begin, end = _bytes_of_whole(storages, index)
        return covered(begin, end, written.get(index if storage.whole is None else storage.whole, ()))

    for step in steps:
        if not all(map(is_written, step.reads)):
            name = "a copy" if step.node is None else f"node {step.node} ({draft.graph.nodes[step.node].op!r})"
            raise TorchVkError(f"{name} reads memory that nothing wrote")
        for b in step.writes:
            whole = storages[b].whole
            written.setdefault(b if whole is None else whole, []).append(_bytes_of_whole(storages, b))
    for tensor in draft.graph.outputs:
        if not is_written(draft.of(tensor)):
            raise TorchVkError(f"output {draft.graph.tensors[tensor].name!r} is never written")


def covered(begin: int, end: int, ranges: Iterable[tuple[int, int]]) -> bool:
    """Whether the ranges, together, cover the bytes from ``begin`` to ``end``."""
    for first, last in sorted(ranges):
        if first > begin:
            break
        begin = max(begin, last)
    return begin >= end


def _schedule(steps: Sequence[Step], storages: Sequence[Storage]) -> list[list[Step]]:
    """Stages: every step as early as its dependencies allow, so that there are as few barriers as can be.

    A step that depends on no other runs just before it is needed instead, which keeps memory short-lived.
    """
    meeting = _meeting(storages)
    level: list[int] = []
    last_write: dict[int, int] = {}
    last_read: dict[int, int] = {}
    waiting: dict[int, list[int]] = {}  # storage → first-stage steps that touch it
    for position, step in enumerate(steps):
        after = [last_write.get(other, -1) for b in (*step.reads, *step.writes) for other in meeting[b]]
        after += [last_read.get(other, -1) for b in step.writes for other in meeting[b]]
        level.append(1 + max(after, default=-1))
        for b in step.reads:
            last_read[b] = max(last_read.get(b, -1), level[-1])
        for b in step.writes:
            last_write[b] = max(last_write.get(b, -1), level[-1])
        if level[-1] == 0:
            for b in {*step.reads, *step.writes}:
                waiting.setdefault(b, []).append(position)
    first_use: dict[int, int] = {}
    for position, step in enumerate(steps):
        if level[position] > 0:
            conflicts = {p for b in step.writes for other in meeting[b] for p in waiting.get(other, ())}
            conflicts |= {
                p
                for b in step.reads
                for other in meeting[b]
                for p in waiting.get(other, ())
                if other in steps[p].writes
            }
            for p in conflicts:
                first_use[p] = min(first_use.get(p, level[position]), level[position])
    for position, use in first_use.items():
        level[position] = use - 1
    stages: list[list[Step]] = [[] for _ in range(max(level, default=-1) + 1)]
    for position, step in enumerate(steps):
        stages[level[position]].append(step)
    return stages


def _lay_out(
    draft: _Draft, stages: Sequence[Sequence[Step]], inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> Plan:
    """Offsets: inputs and outputs side by side, temporaries by lifetime in the arena."""
    storages = list(draft.storages)
    totals: dict[Kind, int] = {"input": 0, "output": 0}
    outside: dict[Kind, tuple[int, ...]] = {"input": inputs, "output": outputs}
    for kind, indices in outside.items():
        for index in indices:
            storages[index] = replace(storages[index], offset=totals[kind])
            totals[kind] += _align(storages[index].nbytes)
    begin: dict[int, int] = {}
    end: dict[int, int] = {}
    for number, stage in enumerate(stages):
        for step in stage:
            for b in step.buffers:
                whole = storages[b].whole
                b = b if whole is None else whole
                if storages[b].kind == "arena":
                    begin.setdefault(b, number)
                    end[b] = number
    offsets, arena = place({b: (storages[b].nbytes, begin[b], end[b]) for b in begin})
    for index, offset in offsets.items():
        storages[index] = replace(storages[index], offset=offset)
    for index, storage in enumerate(storages):
        if storage.whole is not None:
            whole_of = storages[storage.whole]
            offset = storage.offset if whole_of.kind == "constant" else whole_of.offset + storage.offset
            storages[index] = replace(storage, kind=whole_of.kind, offset=offset)
    return Plan(
        tuple(storages),
        tuple(map(tuple, stages)),
        tuple(draft.constants),
        inputs,
        outputs,
        totals["input"],
        totals["output"],
        arena,
    )


def _align(size: int) -> int:
    """The next multiple of the alignment; empty tensors get an address, too."""
    return max(-(-size // ALIGNMENT), 1) * ALIGNMENT


def place(wanted: dict[int, tuple[int, int, int]]) -> tuple[dict[int, int], int]:
    """Arena offsets for {id: (bytes, first stage, last stage)}, and the arena's size.

    Largest first, each into the smallest gap that fits between those alive at the same time ("greedy by size",
    Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020).
    """
    placed: list[tuple[int, int, int, int]] = []  # offset, end, first, last
    offsets: dict[int, int] = {}
    for index, (nbytes, first, last) in sorted(wanted.items(), key=lambda item: (-item[1][0], item[0])):
        size = _align(nbytes)
        best, best_gap, at = None, None, 0
        for offset, end, other_first, other_last in placed:
            if other_first > last or other_last < first:
                continue
            gap = offset - at
            if gap >= size and (best_gap is None or gap < best_gap):
                best, best_gap = at, gap
            at = max(at, end)
        offsets[index] = at if best is None else best
        placed.append((offsets[index], offsets[index] + size, first, last))
        placed.sort()
    return offsets, max((end for _, end, _, _ in placed), default=0)

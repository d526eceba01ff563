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
from torchvk.graph import DType, Graph
from torchvk.ops import Capabilities, Dispatch, Layout, choose_kernels, get
from torchvk.ops.fusion import fuse

ALIGNMENT = 256  # the largest minStorageBufferOffsetAlignment that Vulkan allows
PADDING = 16  # kernels may read whole uint4 words
MAX_PUSH = 128  # what Vulkan promises
TEXEL = 16  # bytes of a uint4
NOTHING_TUNED: Mapping[str, str] = MappingProxyType({})

Kind = Literal["input", "output", "constant", "arena"]


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes that kernels see. ``nbytes`` is padded to PADDING (0 stays 0).

    ``offset`` counts from the start of the kind's buffer; for a constant it is its position in Plan.constants.
    """

    kind: Kind
    nbytes: int
    offset: int = 0


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
    steps = _fused(_live(draft.steps, draft.storages))
    _check_written(draft, steps)
    stages = _schedule(steps)
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
    attributes = operator.decode(node)
    kernels = choose_kernels(node.op, attributes, types, output_types, draft.capabilities, draft.tuned)
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
    ):
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
        if declared.dtype is DType.INT4:
            raise UnsupportedError(f"output {declared.name!r} is int4, which cannot leave the device")
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
    needed = {index for index, storage in enumerate(storages) if storage.kind == "output"}
    kept = []
    for step in reversed(steps):
        if not needed.isdisjoint(step.writes):
            needed.update(step.reads)
            kept.append(step)
    return kept[::-1]


def _fused(steps: Sequence[Step]) -> list[Step]:
    """The same with fewer dispatches: where torchvk.ops.fusion makes two one, the second joins the first."""
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
        writer.update(dict.fromkeys(step.writes, position))
        touched.update(step.buffers)
    return kept


def _check_written(draft: _Draft, steps: Sequence[Step]) -> None:
    """Every output that has bytes is written, and nothing is read that was not."""
    written = {i for i, storage in enumerate(draft.storages) if storage.kind in ("input", "constant")}
    written |= {i for i, storage in enumerate(draft.storages) if storage.nbytes == 0}
    for step in steps:
        unwritten = set(step.reads) - written
        if unwritten:
            name = "a copy" if step.node is None else f"node {step.node} ({draft.graph.nodes[step.node].op!r})"
            raise TorchVkError(f"{name} reads memory that nothing wrote")
        written.update(step.writes)
    for tensor in draft.graph.outputs:
        index = draft.of(tensor)
        if index not in written:
            raise TorchVkError(f"output {draft.graph.tensors[tensor].name!r} is never written")


def _schedule(steps: Sequence[Step]) -> list[list[Step]]:
    """Stages: every step as early as its dependencies allow, so that there are as few barriers as can be.

    A step that depends on no other runs just before it is needed instead, which keeps memory short-lived.
    """
    level: list[int] = []
    last_write: dict[int, int] = {}
    last_read: dict[int, int] = {}
    waiting: dict[int, list[int]] = {}  # storage → first-stage steps that touch it
    for position, step in enumerate(steps):
        after = [last_write.get(b, -1) for b in (*step.reads, *step.writes)]
        after += [last_read.get(b, -1) for b in step.writes]
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
            conflicts = {p for b in step.writes for p in waiting.get(b, ())}
            conflicts |= {p for b in step.reads for p in waiting.get(b, ()) if b in steps[p].writes}
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
                if storages[b].kind == "arena":
                    begin.setdefault(b, number)
                    end[b] = number
    offsets, arena = place({b: (storages[b].nbytes, begin[b], end[b]) for b in begin})
    for index, offset in offsets.items():
        storages[index] = replace(storages[index], offset=offset)
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


def hazards(plan: Plan) -> list[str]:
    """What is wrong with a plan's order and memory, in words; empty for a sound plan.

    Two accesses to the same bytes, one of them a write, must not stand in one stage; and what a step reads must
    be what was last written there, by a step that wrote the same storage.
    """
    found = []
    holder: dict[Kind, list[tuple[int, int, int]]] = {"arena": [], "output": []}  # (begin, end, storage) now valid
    for number, stage in enumerate(plan.stages):
        accesses: list[tuple[int, Storage, int, bool]] = []
        for position, step in enumerate(stage):
            for b in step.reads:
                storage = plan.storages[b]
                accesses.append((position, storage, b, False))
                if storage.nbytes and storage.kind in holder and b not in {h[2] for h in holder[storage.kind]}:
                    found.append(
                        f"stage {number}: step {position} reads storage {b}, which is not (or no longer) there"
                    )
            accesses += [(position, plan.storages[b], b, True) for b in step.writes]
        found += [f"stage {number}: {text}" for text in _conflicts(accesses)]
        for step in stage:
            for b in step.writes:
                storage = plan.storages[b]
                if storage.kind not in holder:
                    found.append(f"stage {number}: writes a storage of kind {storage.kind}")
                    continue
                begin, end = storage.offset, storage.offset + storage.nbytes
                kept = [h for h in holder[storage.kind] if h[1] <= begin or h[0] >= end]
                holder[storage.kind] = [*kept, (begin, end, b)]
    return found


def _conflicts(accesses: Iterable[tuple[int, Storage, int, bool]]) -> list[str]:
    """Accesses (step, storage, its position, writes) to the same bytes that may meet, one of them a write.

    One dispatch may read and write the same storage (it accumulates), but not two that overlap.
    """
    found = []
    items = sorted(accesses, key=lambda item: (item[1].kind, item[1].offset))
    for i, (step, storage, b, writes) in enumerate(items):
        for other_step, other, other_b, other_writes in items[i + 1 :]:
            if other.kind != storage.kind or other.offset >= storage.offset + storage.nbytes:
                break
            if (step != other_step or b != other_b) and (writes or other_writes):
                found.append(f"steps {step} and {other_step} touch the same bytes of the {storage.kind} buffer")
    return found

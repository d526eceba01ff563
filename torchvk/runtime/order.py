"""The order of a plan's steps: what no output needs is dropped, two become one where they can, the rest gets stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torchvk.ops.fusion import fuse
from torchvk.runtime.steps import Step, Storage, meeting


def live(steps: Sequence[Step], storages: Sequence[Storage]) -> list[Step]:
    """The steps that an output depends on."""
    others = meeting(storages)
    needed = {index for index, storage in enumerate(storages) if storage.kind == "output"}
    kept = []
    for step in reversed(steps):
        if any(not needed.isdisjoint(others[b]) for b in step.writes):
            needed.update(step.reads)
            kept.append(step)
    return kept[::-1]


def fused(steps: Sequence[Step], storages: Sequence[Storage]) -> list[Step]:
    """The same with fewer dispatches: where torchvk.ops.fusion makes two one, the second joins the first."""
    others = meeting(storages)
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
        writer.update({other: -1 for b in step.writes for other in others[b]})
        writer.update(dict.fromkeys(step.writes, position))
        touched.update(other for b in step.buffers for other in others[b])
    return kept


def stages_of(steps: Sequence[Step], storages: Sequence[Storage]) -> list[list[Step]]:
    """Every step as early as its dependencies allow, so that there are as few barriers as can be.

    A step that depends on no other runs just before it is needed instead, which keeps memory short-lived.
    """
    others = meeting(storages)
    level = _earliest(steps, others)
    for position, use in _first_uses(steps, level, others).items():
        level[position] = use - 1
    stages: list[list[Step]] = [[] for _ in range(max(level, default=-1) + 1)]
    for position, step in enumerate(steps):
        stages[level[position]].append(step)
    return stages


def _earliest(steps: Sequence[Step], others: Sequence[tuple[int, ...]]) -> list[int]:
    """The first stage in which each step can run. ``others``: see ``meeting``."""
    level: list[int] = []
    last_write: dict[int, int] = {}
    last_read: dict[int, int] = {}
    for step in steps:
        after = [last_write.get(other, -1) for b in (*step.reads, *step.writes) for other in others[b]]
        after += [last_read.get(other, -1) for b in step.writes for other in others[b]]
        level.append(1 + max(after, default=-1))
        for b in step.reads:
            last_read[b] = max(last_read.get(b, -1), level[-1])
        for b in step.writes:
            last_write[b] = max(last_write.get(b, -1), level[-1])
    return level


def _first_uses(steps: Sequence[Step], level: Sequence[int], others: Sequence[tuple[int, ...]]) -> Mapping[int, int]:
    """Of the steps of the first stage, by position: the first stage that depends on it, if one does."""
    waiting: dict[int, list[int]] = {}  # storage → first-stage steps that touch it
    for position, step in enumerate(steps):
        if level[position] == 0:
            for b in {*step.reads, *step.writes}:
                waiting.setdefault(b, []).append(position)
    first_use: dict[int, int] = {}
    for position, step in enumerate(steps):
        if level[position] == 0:
            continue
        conflicts = {p for b in step.writes for other in others[b] for p in waiting.get(other, ())}
        for b in step.reads:
            for other in others[b]:
                conflicts.update(p for p in waiting.get(other, ()) if other in steps[p].writes)
        for p in conflicts:
            first_use[p] = min(first_use.get(p, level[position]), level[position])
    return first_use

"""Whether a plan's order and memory are sound: a check that shares nothing with how plans are made."""

from __future__ import annotations

from collections.abc import Iterable

from torchvk.runtime.steps import Kind, Plan, Storage, covered


def hazards(plan: Plan) -> list[str]:
    """What is wrong with a plan's order and memory, in words; empty for a sound plan.

    Two accesses to the same bytes, one of them a write, must not stand in one stage; and what a step reads must
    be what was last written there, by steps that wrote the same storage or parts of it.
    """
    found = []
    # (begin, end, whole storage) of the bytes that are valid now
    holder: dict[Kind, list[tuple[int, int, int]]] = {"arena": [], "output": []}
    for number, stage in enumerate(plan.stages):
        accesses: list[tuple[int, Storage, int, bool]] = []
        for position, step in enumerate(stage):
            for b in step.reads:
                storage = plan.storages[b]
                accesses.append((position, storage, b, False))
                if storage.kind in holder and not _holds(holder[storage.kind], b, storage):
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
                whole = b if storage.whole is None else storage.whole
                pieces = [
                    p
                    for h in holder[storage.kind]
                    for p in ((h[0], min(h[1], begin), h[2]), (max(h[0], end), h[1], h[2]))
                ]
                holder[storage.kind] = [*(p for p in pieces if p[0] < p[1]), (begin, end, whole)]
    return found


def _holds(valid: Iterable[tuple[int, int, int]], index: int, storage: Storage) -> bool:
    """Whether all bytes of the storage, the ``index``-th of the plan, are valid."""
    whole = index if storage.whole is None else storage.whole
    own = [(begin, end) for begin, end, holder in valid if holder == whole]
    return covered(storage.offset, storage.offset + storage.nbytes, own)


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

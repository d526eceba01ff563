"""Where a plan's storages lie: inputs and outputs side by side, temporaries by lifetime in the arena."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torchvk.runtime.steps import ALIGNMENT, Constant, Kind, Plan, Step, Storage


def lay_out(
    storages: Sequence[Storage],
    constants: Sequence[Constant],
    stages: Sequence[Sequence[Step]],
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
) -> Plan:
    """The plan, with the offsets of all storages."""
    storages = list(storages)
    totals: dict[Kind, int] = {"input": 0, "output": 0}
    outside: dict[Kind, tuple[int, ...]] = {"input": inputs, "output": outputs}
    for kind, indices in outside.items():
        for index in indices:
            storages[index] = replace(storages[index], offset=totals[kind])
            totals[kind] += _align(storages[index].nbytes)
    offsets, arena = place(_lifetimes(storages, stages))
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
        tuple(constants),
        inputs,
        outputs,
        totals["input"],
        totals["output"],
        arena,
    )


def _lifetimes(storages: Sequence[Storage], stages: Sequence[Sequence[Step]]) -> dict[int, tuple[int, int, int]]:
    """Bytes, first and last stage of every storage of the arena; parts count as their whole."""
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
    return {b: (storages[b].nbytes, begin[b], end[b]) for b in begin}


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

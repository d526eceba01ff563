"""What a plan is made of: storages, constants, and steps in stages. Plain data.

Steps of one stage do not depend on each other and may overlap; a barrier stands between stages, so that there is one
only where something depends on something.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torchvk.ops import Dispatch, Layout
from torchvk.ops.operator import PART_ALIGNMENT

ALIGNMENT = PART_ALIGNMENT
PADDING = 16  # kernels may read whole uint4 words
TEXEL = 16  # bytes of a uint4

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


def meeting(storages: Sequence[Storage]) -> list[tuple[int, ...]]:
    """By storage, those that share bytes with it: itself and, where there are parts, its whole and other parts."""
    families: dict[int, list[int]] = {}
    for index, storage in enumerate(storages):
        if storage.whole is not None:
            families.setdefault(storage.whole, [storage.whole]).append(index)
    found: list[tuple[int, ...]] = [(index,) for index in range(len(storages))]
    for family in families.values():
        for index in family:
            begin, end = bytes_of_whole(storages, index)
            others = [(other, *bytes_of_whole(storages, other)) for other in family]
            found[index] = tuple(
                other for other, first, last in others if index == other or (first < end and begin < last)
            )
    return found


def bytes_of_whole(storages: Sequence[Storage], index: int) -> tuple[int, int]:
    """Where a storage lies in that of which it is a part."""
    storage = storages[index]
    begin = 0 if storage.whole is None else storage.offset
    return begin, begin + storage.nbytes


def covered(begin: int, end: int, ranges: Iterable[tuple[int, int]]) -> bool:
    """Whether the ranges, together, cover the bytes from ``begin`` to ``end``."""
    for first, last in sorted(ranges):
        if first > begin:
            break
        begin = max(begin, last)
    return begin >= end

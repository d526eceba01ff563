"""Weights packed as the matrix units of a device want them: every lane's own elements together.

Which elements of a cooperative matrix a lane holds is the device's own affair. A probe (torchvk.runtime) reads it from
the device once; here it is plain data, from which the packing follows. See quantized_linear_fragments.slang.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torchvk.ops.matrix import Tile

Array = np.ndarray[Any, Any]

UNIT = 32  # columns that are loaded together


@dataclass(frozen=True, slots=True)
class Fragment:
    """Where the lanes of a subgroup hold the elements of matrix A, of ``rows`` × ``columns``.

    ``elements``: lane by lane, the elements (row · columns + column) in the order in which the lane has them.
    ``dtype``: float16 or int8.
    """

    rows: int
    columns: int
    lanes: int
    elements: tuple[int, ...]
    dtype: str = "float16"

    @property
    def per_lane(self) -> int:
        return len(self.elements) // self.lanes

    @property
    def table(self) -> Array:
        return np.array(self.elements, np.int64).reshape(self.lanes, -1)

    @property
    def digest(self) -> str:
        return _digest(self)

    @property
    def complete(self) -> bool:
        """Whether every element has one place, and a lane's elements of a unit fill two or four words of int4."""
        return _complete(self)

    def slots(self) -> tuple[int, int, int] | None:
        """(slots, slot shift, lane shift): pair p of lane l's elements lies in row
        ``order[l >> lane shift][(p >> slot shift) % slots]``, see ``row_order``; None if that does not hold."""
        return _slots(self)

    def row_order(self) -> Array:
        """The rows, lane group by lane group and slot by slot: the order of scales."""
        found = self.slots()
        assert found is not None
        slots, slot_shift, lane_shift = found
        pairs = (self.table // self.columns)[:, 0::2]
        return pairs[:: 1 << lane_shift][:, [slot << slot_shift for slot in range(slots)]].reshape(-1)

    def suits(self, tile: Tile, dtype: str) -> bool:
        """Whether it is matrix A of the tile's products of this dtype."""
        rows, _, columns = tile.shape
        return (self.dtype, self.rows, self.columns, self.lanes) == (dtype, rows, columns, tile.lanes)

    def pack_weight(self, weight: Array, bits: int) -> Array:
        """A padded int8 or float16 [n, columns] (whole units) as words [blocks of rows][units][lanes][a lane's].

        For float16: int4, stored as q + 8: nibble 2p + h of a word, elements 8j … 8j + 7 of a lane's, at bit 4p + 16h;
        int8, stored as q + 128: elements 4j, 4j + 2, 4j + 1, 4j + 3 in a word's bytes. For int8: int4 elements 8j …
        8j + 3 in the low halves of a word's bytes, 8j + 4 … 8j + 7 in the high ones; int8 in order. float16 in order.
        """
        n, columns = weight.shape
        blocks = -(-n // self.rows)
        if n % self.rows:
            weight = np.concatenate([weight, np.zeros((blocks * self.rows - n, columns), weight.dtype)])
        per_unit = UNIT // self.columns
        shape = (blocks, self.rows, columns // UNIT, per_unit, self.columns)
        # Blocks, units, fragments of a unit, rows × columns.
        tiles = weight.reshape(shape).transpose(0, 2, 3, 1, 4).reshape(blocks, columns // UNIT, per_unit, -1)
        # Lanes before the fragments of a unit: a lane's elements of a unit lie together.
        of_lanes = tiles[..., self.table].swapaxes(2, 3)
        if bits == 16:
            return np.ascontiguousarray(of_lanes).view(np.uint32).reshape(-1)
        elements = of_lanes.reshape(-1, 8 if bits == 4 else 4)
        if self.dtype == "int8":
            packed = elements if bits == 8 else elements[:, :4] & 15 | elements[:, 4:] << 4
            return np.ascontiguousarray(packed).view(np.uint32).reshape(-1)
        values = elements.view(np.uint8) + np.uint8(8 if bits == 4 else 128)
        if bits == 8:
            return np.ascontiguousarray(values[:, [0, 2, 1, 3]]).view(np.uint32).reshape(-1)
        # Elements 0, 2 and 4, 6 in the two lower bytes, 1, 3 and 5, 7 in the upper ones.
        low, high = values[:, [0, 4, 1, 5]], values[:, [2, 6, 3, 7]]
        return np.ascontiguousarray(low | high << np.uint8(4)).view(np.uint32).reshape(-1)

    def pack_scale(self, scale: Array) -> Array:
        """Scales [n, groups] as float16 [groups][blocks of rows][lane groups][slots], two slots at least."""
        n, groups = scale.shape
        found = self.slots()
        assert found is not None
        blocks = -(-n // self.rows)
        padded = np.zeros((groups, blocks * self.rows), np.float16)
        with np.errstate(over="ignore"):
            padded[:, :n] = scale.T.astype(np.float16)
        ordered = padded.reshape(groups, blocks, self.rows)[..., self.row_order()]
        if found[0] == 1:
            ordered = np.repeat(ordered, 2, -1)
        return np.ascontiguousarray(ordered)


# A device has a few fragments, each of which is asked about for every layer.
@functools.lru_cache
def _digest(fragment: Fragment) -> str:
    return hashlib.sha256(repr(fragment).encode()).hexdigest()[:12]


@functools.lru_cache
def _complete(fragment: Fragment) -> bool:
    whole = sorted(fragment.elements) == list(range(fragment.rows * fragment.columns)) and UNIT % fragment.columns == 0
    return whole and fragment.per_lane * UNIT // fragment.columns in (16, 32)


@functools.lru_cache
def _slots(fragment: Fragment) -> tuple[int, int, int] | None:
    if not fragment.complete:
        return None
    rows = fragment.table // fragment.columns
    if np.any(rows[:, 0::2] != rows[:, 1::2]):
        return None
    pairs = rows[:, 0::2]
    for slots, slot_shift in ((1, 0), (2, 0), (2, 1), (2, 2)):
        slot = (np.arange(pairs.shape[1]) >> slot_shift) % slots
        for lane_shift in range(7):
            group = np.arange(fragment.lanes) >> lane_shift
            if (group[-1] + 1) * slots != fragment.rows:
                continue
            order = np.full((group[-1] + 1, slots), -1)
            order[np.ix_(group, slot)] = pairs
            if np.array_equal(order[np.ix_(group, slot)], pairs):
                return slots, slot_shift, lane_shift
    return None

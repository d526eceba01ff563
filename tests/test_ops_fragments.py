"""Weights packed to fragments of cooperative matrices, taken apart as the kernel does it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from torchvk.ops.fragments import UNIT, Fragment


def nvidia() -> Fragment:
    """Matrix A of mma.sync.m16n8k16 (PTX manual): quads of lanes share a row, and have the one eight further down."""
    elements = []
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 2
        for down, right in ((0, 0), (8, 0), (0, 8), (8, 8)):
            elements += [(row + down) * 16 + column + right + h for h in (0, 1)]
    return Fragment(16, 16, 32, tuple(elements))


def nvidia_int8() -> Fragment:
    """Matrix A of 16 x 32 int8 on an H200: quads of lanes share a row, four neighbours are in a register."""
    elements = []
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 4
        for down, right in ((0, 0), (0, 16), (8, 0), (8, 16)):
            elements += [(row + down) * 32 + column + right + i for i in range(4)]
    return Fragment(16, 32, 32, tuple(elements), "int8")


def rows_in_lanes() -> Fragment:
    """A lane has a row."""
    return Fragment(8, 8, 8, tuple(range(64)))


def columns_in_lanes() -> Fragment:
    """Mesa's lavapipe: a lane has a column."""
    return Fragment(8, 8, 8, tuple(8 * row + lane for lane in range(8) for row in range(8)))


def test_slots() -> None:
    assert nvidia().slots() == (2, 0, 2)
    assert rows_in_lanes().slots() == (1, 0, 0)
    assert columns_in_lanes().slots() is None
    twice = (*range(63), 0)
    assert not Fragment(8, 8, 8, twice).complete
    assert Fragment(8, 8, 8, twice).slots() is None
    assert nvidia().digest != replace(nvidia(), elements=nvidia().elements[::-1]).digest


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("fragment", [nvidia(), rows_in_lanes(), columns_in_lanes()], ids=["nvidia", "rows", "columns"])
def test_weights(fragment: Fragment, bits: int, rng: np.random.Generator) -> None:
    n, units = 37, 3
    weight = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), (n, units * UNIT)).astype(np.int8)
    words = fragment.pack_weight(weight, bits)
    blocks, per_unit = -(-n // fragment.rows), UNIT // fragment.columns
    assert words.nbytes == blocks * fragment.rows * units * UNIT * bits // 8
    words = words.reshape(blocks, units, fragment.lanes, -1)
    found = np.zeros((blocks * fragment.rows, units * UNIT), np.int64)
    # As fragment_w of quantized_linear_fragments.slang has it: pairs of 16-bit numbers.
    for f in range(per_unit):
        for element in range(fragment.per_lane):
            pair = (f * fragment.per_lane + element) // 2
            if bits == 4:
                word, at = words[..., pair // 4], 4 * (pair % 4) + 16 * (element % 2)
            else:
                word, at = words[..., pair // 2], 8 * (pair % 2) + 16 * (element % 2)
            value = (word >> np.uint32(at) & np.uint32((1 << bits) - 1)).astype(np.int64) - (1 << (bits - 1))
            for lane in range(fragment.lanes):
                row, column = divmod(int(fragment.table[lane, element]), fragment.columns)
                found[row :: fragment.rows, f * fragment.columns + column :: UNIT] = value[..., lane]
    np.testing.assert_array_equal(found[:n], weight)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("small", [False, True], ids=["nvidia", "columns"])
def test_weights_as_they_are(small: bool, bits: int, rng: np.random.Generator) -> None:
    """int8 matrices take int4 as two nibbles, one in the high half of a byte each, and int8 as it is; so is float16."""
    fragment = replace(columns_in_lanes(), dtype="int8") if small else nvidia_int8()
    if bits == 16:
        fragment = columns_in_lanes() if small else nvidia()
    n, units = 37, 3
    weight = rng.integers(-(1 << (min(bits, 8) - 1)), 1 << (min(bits, 8) - 1), (n, units * UNIT))
    weight = weight.astype(np.float16 if bits == 16 else np.int8)
    packed = fragment.pack_weight(weight, bits)
    blocks, per_unit = -(-n // fragment.rows), UNIT // fragment.columns
    values = packed.view(weight.dtype).astype(np.int64)
    if bits == 4:
        words = packed.reshape(-1, 1) << np.array([4, 0], np.uint32) & 0xF0F0F0F0
        values = words.astype(np.uint32).view(np.int8).astype(np.int64) // 16
    values = values.reshape(blocks, units, fragment.lanes, per_unit, -1)
    found = np.zeros((blocks * fragment.rows, units * UNIT), np.int64)
    for lane, elements in enumerate(fragment.table):
        for i, element in enumerate(elements):
            row, column = divmod(int(element), fragment.columns)
            for f in range(per_unit):
                found[row :: fragment.rows, f * fragment.columns + column :: UNIT] = values[:, :, lane, f, i]
    np.testing.assert_array_equal(found[:n], weight)


@pytest.mark.parametrize("fragment", [nvidia(), rows_in_lanes()], ids=["nvidia", "rows"])
def test_scales(fragment: Fragment, rng: np.random.Generator) -> None:
    n, groups = 21, 5
    scale = rng.standard_normal((n, groups)).astype(np.float16)
    slots, slot_shift, lane_shift = fragment.slots() or (0, 0, 0)
    packed = fragment.pack_scale(scale).reshape(groups, -(-n // fragment.rows), fragment.rows // slots, 2)
    for lane in range(fragment.lanes):
        for pair in range(fragment.per_lane // 2):
            row = int(fragment.table[lane, 2 * pair]) // fragment.columns
            slot = (pair >> slot_shift) % slots
            got = packed[:, :, lane >> lane_shift, slot].T.reshape(-1, groups)[: -(-(n - row) // fragment.rows)]
            np.testing.assert_array_equal(got, scale[row :: fragment.rows])

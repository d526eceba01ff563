"""Matrix products whose rows are no whole number of tiles: the rest is multiplied beside the tiles, by other kernels.

A row of large tiles for a few rows may cost as much as all before it: a GPU that is busy with the tiles takes a second
round for those that are left over. A kernel for few rows needs a fraction of that, at the same time. Neither knows of
the other: each sees its own rows of the operands and of the result, as a part of the buffers (Arg.part).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torchvk.ops.operator import PART_ALIGNMENT, Arg, Dispatch, Kernels

LEAST_TILES = 4  # of rows, below which one more matters little
# Tiles that a large GPU runs at once. (MobileNetV2 on an H200, one image, float16 / int8: 337 / 298 µs; with 256
# 340 / 296, with a second dispatch wherever rows are left over 363 / 303.)
ONE_ROUND = 128


def whole_rows(m: int, tile_m: int, across: int) -> int:
    """The rows that tiles, ``across`` side by side, multiply: all, or without the last few that others shall."""
    rest = m % tile_m
    if m < LEAST_TILES * tile_m or -(-m // tile_m) * across <= ONE_ROUND:
        return m
    return m - rest if 0 < rest <= tile_m // 2 else m


def stacked(
    before: Kernels, parts: Sequence[tuple[int, Kernels]], row_bytes: Mapping[tuple[str, int], int]
) -> Kernels | None:
    """``before``, then all parts beside each other: (rows, kernels for so many) of the rows one after another.

    ``row_bytes``: of the buffers that have a row a row, by role and index. Scratch buffers of a part that have the
    index of one of ``before`` are that one, others are its own. None if parts begin where no binding can.
    """
    dispatches, scratch = list(before.dispatches), list(before.scratch)
    first = 0
    for rows, kernels in parts:
        shift = len(scratch) - len(before.scratch)

        def of_rows(arg: Arg, first: int = first, rows: int = rows, shift: int = shift) -> Arg:
            if (size := row_bytes.get((arg.role, arg.index))) is not None:
                begin, length = arg.part or (0, rows * size)
                return replace(arg, part=(first * size + begin, length))
            if arg.role == "scratch" and arg.index >= len(before.scratch):
                return replace(arg, index=arg.index + shift)
            return arg

        dispatches += [replace(each, buffers=tuple(map(of_rows, each.buffers))) for each in kernels.dispatches]
        scratch += kernels.scratch[len(before.scratch) :]
        first += rows
    return Kernels(tuple(dispatches), tuple(scratch)) if all(map(_binds, dispatches)) else None


def _binds(dispatch: Dispatch) -> bool:
    return all(arg.part is None or arg.part[0] % PART_ALIGNMENT == 0 for arg in dispatch.buffers)

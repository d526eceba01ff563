"""Operands for operator tests, and how results are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

Array = np.ndarray[Any, Any]

FLOATS = ("float32", "float16")
INTS = ("int64", "int32", "int16", "int8", "uint8")
NUMBERS = (*FLOATS, *INTS)
ALL = (*NUMBERS, "bool")
SPECIAL = (0.0, -0.0, 1.0, -1.0, 0.5, 2.0, -2.5, 3.0, -7.0, 1e4, np.inf, -np.inf, np.nan)
LEAST_NORMAL = {"float32": 2.0**-126, "float16": 2.0**-14}


def random(dtype: str, shape: Sequence[int], seed: int = 0) -> Array:
    """Random values of the whole range of an integer dtype, or of a few units for floats."""
    generator = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return np.asarray(generator.normal(0, 3, shape)).astype(kind)
    if kind.kind == "b":
        return np.asarray(generator.integers(0, 2, shape)).astype(kind)
    limits = np.iinfo(kind)
    return np.asarray(generator.integers(limits.min, limits.max, shape, kind, endpoint=True)).astype(kind)


def special(dtype: str) -> Array:
    """Values at which operators differ: signs, zeros, limits, infinities, NaN; an odd number of them."""
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return np.array(SPECIAL, kind)
    if kind.kind == "b":
        return np.array([False, True, True])
    limits = np.iinfo(kind)
    values = {0, 1, 2, 3, 7, limits.max, limits.max - 1, limits.min, max(limits.min, -1), max(limits.min, -3)}
    # Around the word boundary of int64.
    values |= {value for value in (2**32 - 1, 2**32, 2**32 + 5, -(2**32), -(2**32) - 1) if value <= limits.max}
    return np.array(sorted(v for v in values if v >= limits.min), kind)


def pairs(dtype: str) -> tuple[Array, Array]:
    """Every special value with every other, as [n, 1] and [1, n]."""
    values = special(dtype)
    return values[:, None], values[None, :]


def assert_same(got: Array, want: Array, ulps: float = 0, absolute: float = 0) -> None:
    """Equal dtype and shape; integers and bools equal; floats within ``ulps`` units in the last place of ``want`` plus
    ``absolute``; NaN where NaN. A result below the normal range may be 0: devices may flush denormals."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    if got.dtype.kind != "f":
        np.testing.assert_array_equal(got, want)
        return
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    least = LEAST_NORMAL[got.dtype.name]
    with np.errstate(all="ignore"):
        exact = want.astype(np.float64)
        unit = np.spacing(np.maximum(np.abs(want), want.dtype.type(least))).astype(np.float64)
        allowed = ulps * np.where(np.isfinite(unit), unit, 0) + absolute
        close = (got == want) | (np.abs(got.astype(np.float64) - exact) <= allowed)
        # float16 denormals are exact: they are computed as float32.
        close |= (got == 0) & (np.abs(exact) < 2.0**-126) | np.isnan(want)
    wrong = np.flatnonzero(~close)
    assert wrong.size == 0, (
        f"{wrong.size} of {got.size} differ; at {wrong[:5]}: got {got.ravel()[wrong[:5]]}, "
        f"want {want.ravel()[wrong[:5]]}"
    )


def shapes(max_rank: int = 8, max_size: int = 5, min_size: int = 0) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of few elements."""
    small = st.lists(st.integers(min_size, max_size), max_size=max_rank).map(tuple)
    return small.filter(lambda shape: int(np.prod(shape, dtype=np.int64)) <= 3000)


@st.composite
def broadcastable(draw: st.DrawFn, count: int) -> list[tuple[int, ...]]:
    """Shapes of ``count`` operands that broadcast together."""
    whole = draw(shapes())
    result = []
    for _ in range(count):
        kept = tuple(1 if draw(st.booleans()) and draw(st.booleans()) else size for size in whole)
        result.append(kept[draw(st.integers(0, len(kept))) if draw(st.booleans()) else 0 :])
    return result

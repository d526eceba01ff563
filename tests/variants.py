"""Kernels for devices other than the one at hand: capabilities that a test makes up, and results held to a bound."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from torchvk.ops import Capabilities, operator

Array = np.ndarray[Any, Any]

EPSILON = 2.0**-24  # float32: half a unit in the last place of 1
HALF_EPSILON = 2.0**-11

# Any GPU may have at most 128 invocations and 16 KiB of shared memory a workgroup; most have 1024 and 32 KiB or more.
GPU = Capabilities(
    tier=1,
    kind="discrete",
    subgroup_size=32,
    max_workgroup_invocations=1024,
    max_workgroup_size=(1024, 1024, 64),
    max_workgroup_count=(2**31 - 1, 65535, 65535),
    shared_memory=49152,
    max_storage_range=2**32 - 1,
    max_texels=2**27,
)
CPU = replace(GPU, kind="cpu", subgroup_size=8, max_workgroup_count=(65535, 65535, 65535))
DEVICES = {
    "smallest": replace(
        GPU,
        tier=0,
        kind="integrated",
        subgroup_size=16,
        max_workgroup_invocations=128,
        max_workgroup_size=(128, 128, 64),
        shared_memory=16384,
    ),
    "gpu_0": replace(GPU, tier=0),
    "gpu_1": GPU,
    "gpu_2": replace(GPU, tier=2),
    "cpu_0": replace(CPU, tier=0),
    "cpu_1": replace(CPU, shuffle=True),
}


@contextmanager
def chosen_for(name: str, **changes: Any) -> Iterator[None]:
    """The operator's kernels are chosen as if the device's capabilities had these changes."""
    known = operator.get(name)
    operator._registry[name] = replace(
        known,
        kernels=lambda attributes, inputs, outputs, capabilities: known.kernels(
            attributes, inputs, outputs, replace(capabilities, **changes)
        ),
        variants=lambda attributes, inputs, outputs, capabilities: known.variants(
            attributes, inputs, outputs, replace(capabilities, **changes)
        ),
    )
    try:
        yield
    finally:
        operator._registry[name] = known


def assert_within(got: Array, exact: Array, bound: Any, dtype: str | np.dtype[Any]) -> None:
    """Dtype and shape, NaN and infinities in the same places, and |got - exact| <= bound (absolute, in float64) plus
    the rounding of ``exact`` to the dtype."""
    assert got.dtype == np.dtype(dtype)
    assert got.shape == exact.shape
    with np.errstate(all="ignore"):
        stored = exact.astype(dtype).astype(np.float64)
        given = got.astype(np.float64)
        finite = np.isfinite(stored)
        np.testing.assert_array_equal(given[~finite], stored[~finite])
        # Half a step of float16's denormals is 2^-25; float32 results below the normal range may be flushed.
        half = np.dtype(dtype) == np.float16
        rounding = np.maximum(np.abs(exact) * HALF_EPSILON, 2.0**-25) if half else np.abs(exact) * EPSILON + 2.0**-126
        error = np.where(finite, np.abs(given - exact), 0)
        allowed = np.broadcast_to(np.asarray(bound) * (1 + HALF_EPSILON) + rounding, error.shape)
    wrong = np.flatnonzero(finite & ~(error <= allowed))
    assert wrong.size == 0, (
        f"{wrong.size} of {got.size} are off; at {wrong[:5]}: got {got.ravel()[wrong[:5]]}, "
        f"exact {exact.ravel()[wrong[:5]]}, off by {error.ravel()[wrong[:5]]}, allowed {allowed.ravel()[wrong[:5]]}"
    )

"""Upsampling against torch: which elements are taken, and how they are weighed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import run_op
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import ALL, assert_same, random
from test_ops_pooling import check, first

from torchvk import ops
from torchvk.graph import DType, TensorType
from torchvk.ops.upsampling import UpsampleBilinearAttributes, UpsampleNearestAttributes

sizes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20)), min_size=1, max_size=3)


@pytest.mark.tier
@settings(max_examples=20, deadline=None)
@given(sizes, st.sampled_from((1, 3, 4)), st.sampled_from(ALL))
def test_nearest(sizes: list[tuple[int, int]], channels: int, dtype: str) -> None:
    x = random(dtype, (2, *(size for size, _ in sizes), channels))
    scale = [np.float32(size) / np.float32(wanted) for size, wanted in sizes]
    attributes = UpsampleNearestAttributes([wanted for _, wanted in sizes], [float(value) for value in scale])
    (result,) = ops.get("upsample_nearest").reference(attributes, [x])
    if dtype == "float32":
        want = F.interpolate(first(x).contiguous(), size=attributes.size)
        assert_same(result, np.ascontiguousarray(want.movedim(1, -1).numpy()))
    assert_same(run_op("upsample_nearest", attributes, [x])[0], result)


@pytest.mark.tier
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_bilinear(align_corners: bool, dtype: str) -> None:
    for channels, size, wanted in ((3, (5, 7), (11, 4)), (4, (1, 6), (3, 1)), (1, (8, 3), (8, 7))):
        x = random(dtype, (2, *size, channels))
        want = F.interpolate(first(x).float(), size=wanted, mode="bilinear", align_corners=align_corners)
        if align_corners:
            scale = [(old - 1) / (new - 1) if new > 1 else 0.0 for old, new in zip(size, wanted, strict=True)]
        else:
            scale = [old / new for old, new in zip(size, wanted, strict=True)]
        attributes = UpsampleBilinearAttributes(list(wanted), scale, align_corners)
        # Weights of 2^-24 a place, of which there are up to 8, times values of up to 16.
        check("upsample_bilinear", attributes, x, want.to(torch.from_numpy(x).dtype), ulps=1, absolute=2.0**-17)


def test_sizes_that_make_no_sense() -> None:
    x = [TensorType(DType.FLOAT32, (1, 4, 4, 3))]
    reason = ops.supports("upsample_nearest", UpsampleNearestAttributes([8], [0.5]), x)
    assert "each of 2 spatial" in str(reason)
    reason = ops.supports("upsample_nearest", UpsampleNearestAttributes([8, 8], [0.5, float("nan")]), x)
    assert "scales of" in str(reason)
    reason = ops.supports("upsample_bilinear", UpsampleBilinearAttributes([8, 0], [0.5, 0.5]), x)
    assert "cannot make" in str(reason)

"""attention against NumPy in float64 and torch; kernels for CPUs and GPUs on this device.

Bounds, in units of 2^-24: a score of width d is off by at most d + 3 roundings of scale · Σ|q k|, and one of itself and
its mask; a probability by twice the largest of these, what softmax adds (see test_ops_normalization), and the sums over
the keys by a rounding a key. Matrix units take float16 probabilities: half a unit in 11 bits more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_op
from variants import DEVICES, EPSILON, HALF_EPSILON, Array, assert_within

from torchvk import ops, shaders
from torchvk.errors import UnsupportedError
from torchvk.graph import DType, TensorType
from torchvk.ops.attention import AttentionAttributes, Sizes, choose
from torchvk.ops.operator import CooperativeMatrixShape, OperatorError
from torchvk.runtime.device import max_tier, open_device

FLOATS = ("float32", "float16")


def exact(q: Array, k: Array, v: Array, mask: Array | None, attributes: AttentionAttributes) -> tuple[Array, Array]:
    """The result in float64, and how far float32 may be off."""
    share = q.shape[2] // k.shape[2]
    queries, keys, values = (x.astype(np.float64).transpose(0, 2, 1, 3) for x in (q, k, v))
    keys, values = (np.repeat(x, share, axis=1) for x in (keys, values))
    with np.errstate(all="ignore"):
        scores = queries @ keys.transpose(0, 1, 3, 2) * attributes.scale
        sizes = np.abs(queries) @ np.abs(keys).transpose(0, 1, 3, 2) * abs(attributes.scale)
        off = ((q.shape[3] + 3) * sizes + np.abs(scores)) * EPSILON
        if mask is not None:
            added = mask.astype(np.float64)
            lowest = added <= (-65504 if q.dtype == np.float16 else -3e38)
            scores = np.where(lowest, added, scores + added)
            off = np.where(lowest, 0, off + np.where(lowest, 0, np.abs(added) + np.abs(scores)) * EPSILON)
        largest = scores.max(-1, keepdims=True)
        weights = np.exp(scores - largest)
        weights /= weights.sum(-1, keepdims=True)
        if attributes.masked_rows == "zero":
            weights = np.where(largest == -np.inf, 0, weights)
        # What has no weight has no error.
        below = np.where(weights > 1e-30, largest - scores, 0)
        off = np.where(weights > 1e-30, off, 0)
        relative = (
            2 * off.max(-1, keepdims=True)
            + 1e-7 * below * EPSILON
            + below * EPSILON
            + (k.shape[1] / 8 + 20 + k.shape[1]) * EPSILON
        )
        bound = (weights * relative) @ np.abs(values) + 2.0**-120
    return (weights @ values).transpose(0, 2, 1, 3), np.nan_to_num(bound.transpose(0, 2, 1, 3))


def on_matrices(attributes: AttentionAttributes, operands: list[Array | None]) -> bool:
    """Whether this device, as it says it is, would take matrix units."""
    types = [None if x is None else TensorType(DType.of(x.dtype), x.shape) for x in operands]
    operator, capabilities = ops.get("attention"), open_device().physical.capabilities(max_tier(None))
    chosen = operator.kernels(attributes, types, operator.infer(attributes, types), capabilities)
    return any("matrix" in dispatch.kernel for dispatch in chosen.dispatches)


def check(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None = None,
    scale: float | None = None,
    rows: Any = "nan",
) -> None:
    attributes = AttentionAttributes(q.shape[3] ** -0.5 if scale is None else scale, rows)
    want, bound = exact(q, k, v, mask, attributes)
    assert_within(ops.get("attention").reference(attributes, [q, k, v, mask])[0], want, bound, q.dtype)
    if on_matrices(attributes, [q, k, v, mask]):
        share = q.shape[2] // k.shape[2]
        largest = np.abs(np.repeat(v, share, axis=2).astype(np.float64)).max(1, keepdims=True)
        bound = bound + 2 * HALF_EPSILON * largest
    assert_within(run_op("attention", attributes, [q, k, v, mask])[0], want, bound, q.dtype)


def operands(
    rng: np.random.Generator, batch: int, queries: int, keys: int, heads: int, width: int, dtype: str, share: int = 1
) -> tuple[Array, Array, Array]:
    def one(tokens: int, heads: int) -> Array:
        return rng.standard_normal((batch, tokens, heads, width)).astype(dtype)

    return one(queries, heads), one(keys, heads // share), one(keys, heads // share)


@pytest.mark.usefixtures("device_kind")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "width"),
    [
        (1, 128, 128, 2, 32),
        (2, 17, 65, 3, 32),
        (1, 5, 3, 2, 20),
        (2, 1, 130, 2, 64),
        (1, 33, 40, 1, 96),
        (1, 20, 70, 1, 256),
        (3, 1, 1, 1, 2),
        (1, 40, 8, 2, 6),
        (2, 70, 130, 2, 32),
        (1, 30, 100, 3, 128),
    ],
)
def test_sizes(
    rng: np.random.Generator, dtype: str, batch: int, queries: int, keys: int, heads: int, width: int
) -> None:
    q, k, v = operands(rng, batch, queries, keys, heads, width, dtype)
    check(q, k, v)
    check(q, k, v, rng.standard_normal((batch, heads, queries, keys)).astype(dtype))


@pytest.mark.usefixtures("device_kind")
@pytest.mark.parametrize("width", [3, 33])
def test_odd_width(rng: np.random.Generator, width: int) -> None:
    check(*operands(rng, 2, 9, 11, 2, width, "float32"))


@pytest.mark.usefixtures("device_kind")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape", [(2, 1, 1, 44), (1, 1, 19, 44), (1, 4, 1, 44), (2, 4, 19, 1), (1, 1, 1, 1), (2, 1, 19, 44)]
)
def test_masks_broadcast(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> None:
    mask = rng.standard_normal(shape).astype(dtype)
    if mask.size > 1:
        mask[rng.random(shape) < 0.4] = -np.inf
    q, k, v = operands(rng, 2, 19, 44, 4, 32, dtype, share=2)
    check(q, k, v, mask, rows="zero")


@pytest.mark.usefixtures("device_kind")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", ["nan", "zero"])
def test_masked_rows(rng: np.random.Generator, dtype: str, rows: str) -> None:
    """All of a row -∞: NaN or zeros. All of it the lowest finite number: the mean, since no score is left."""
    q, k, v = operands(rng, 1, 20, 70, 2, 32, dtype)
    mask = np.zeros((1, 1, 20, 70), dtype)
    mask[0, 0, 3], mask[0, 0, 4, :65], mask[0, 0, 5, 1:] = -np.inf, -np.inf, -np.inf
    mask[0, 0, 7] = np.finfo(dtype).min
    mask[0, 0, 8, :40] = np.finfo(dtype).min
    check(q, k, v, mask, rows=rows)
    attributes = AttentionAttributes(32**-0.5, rows)  # type: ignore[arg-type]
    (got,) = run_op("attention", attributes, [q, k, v, mask])
    assert np.isnan(got[0, 3]).all() if rows == "nan" else (got[0, 3] == 0).all()
    np.testing.assert_allclose(got[0, 7], v[0].astype(np.float64).mean(0), atol=1e-3 if dtype == "float16" else 1e-6)


@pytest.mark.usefixtures("device_kind")
def test_not_finite(rng: np.random.Generator) -> None:
    """NaN and infinity spread to the rows and columns that they reach, as in torch, and no further."""
    q, k, v = operands(rng, 1, 18, 70, 1, 32, "float32")
    q[0, 2, 0, 5] = np.nan
    q[0, 4, 0, 5] = np.inf
    v[0, 66, 0, 7] = np.inf
    (got,) = run_op("attention", AttentionAttributes(1.0), [q, k, v, None])
    heads = [torch.from_numpy(x.transpose(0, 2, 1, 3)) for x in (q, k, v)]
    want = torch.softmax(heads[0] @ heads[1].transpose(-1, -2), -1) @ heads[2]
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want.numpy().transpose(0, 2, 1, 3)))


@pytest.mark.usefixtures("device_kind")
def test_large_scores(rng: np.random.Generator) -> None:
    """The largest score grows from block to block, and exp of the scores would overflow."""
    q, k, v = operands(rng, 1, 16, 200, 1, 32, "float32")
    k *= np.linspace(1, 40, 200, dtype=np.float32)[None, :, None, None]
    check(q, k, v, scale=1.0)


@pytest.mark.usefixtures("device_kind")
def test_same_as_torch(rng: np.random.Generator) -> None:
    q, k, v = operands(rng, 2, 30, 30, 4, 32, "float32")
    mask = np.where(rng.random((2, 1, 30, 30)) < 0.3, -np.inf, 0).astype(np.float32)
    heads = [torch.from_numpy(x.transpose(0, 2, 1, 3)) for x in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=torch.from_numpy(mask))
    (got,) = run_op("attention", AttentionAttributes(32**-0.5, "zero"), [q, k, v, mask])
    np.testing.assert_allclose(got, want.numpy().transpose(0, 2, 1, 3), rtol=1e-5, atol=1e-5)


def test_nothing() -> None:
    x = np.zeros((0, 4, 2, 8), np.float32)
    y = np.zeros((2, 0, 2, 8), np.float32)
    k = np.zeros((2, 3, 2, 8), np.float32)
    with pytest.raises(OperatorError):
        ops.get("attention").infer(AttentionAttributes(1.0), [TensorType(DType.FLOAT32, x.shape)] * 3)
    (got,) = run_op("attention", AttentionAttributes(1.0), [y, k, k, None])
    assert got.shape == y.shape


@pytest.mark.parametrize(
    ("q", "k", "v", "mask"),
    [
        ((2, 3, 4), (2, 3, 4), (2, 3, 4), None),
        ((2, 3, 4, 8), (2, 3, 4, 9), (2, 3, 4, 9), None),
        ((2, 3, 4, 8), (2, 3, 4, 8), (2, 5, 4, 8), None),
        ((2, 3, 4, 8), (2, 3, 3, 8), (2, 3, 3, 8), None),
        ((2, 3, 4, 8), (2, 3, 4, 8), (2, 3, 4, 8), (3, 3)),
        ((2, 3, 4, 8), (2, 3, 4, 8), (2, 3, 4, 8), (2, 2, 3, 3)),
    ],
)
def test_refused(q: Any, k: Any, v: Any, mask: Any) -> None:
    types = [None if shape is None else TensorType(DType.FLOAT32, shape) for shape in (q, k, v, mask)]
    assert ops.supports("attention", AttentionAttributes(1.0), types) is not None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.FLOAT16])
@pytest.mark.parametrize("width", [8, 32, 48, 64, 128, 200, 256])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (128, 128), (4096, 4096)])
def test_choice(device: str, dtype: DType, width: int, queries: int, keys: int) -> None:
    capabilities = DEVICES[device]
    sizes = Sizes(2, queries, keys, 4, 1, width)
    try:
        choice = choose(sizes, dtype, 0, capabilities)
    except UnsupportedError:
        assert capabilities.kind == "cpu"
        assert keys * width > 100_000
        return
    assert choice.kernel in shaders.names()
    assert choice.local_size <= capabilities.max_workgroup_invocations
    assert choice.queries >= 1


def test_many_queries_take_larger_tiles() -> None:
    few = choose(Sizes(1, 128, 128, 12, 1, 32), DType.FLOAT32, 0, replace(DEVICES["gpu_1"]))
    many = choose(Sizes(32, 128, 128, 12, 1, 32), DType.FLOAT32, 0, replace(DEVICES["gpu_1"]))
    assert few.queries < many.queries


def matrices(*shapes: tuple[int, int, int]) -> tuple[CooperativeMatrixShape, ...]:
    return tuple(CooperativeMatrixShape(m, n, k, "float16", "float16", "float32", "float32") for m, n, k in shapes)


NVIDIA = replace(DEVICES["gpu_2"], shuffle=True, cooperative_matrices=matrices((16, 8, 8), (16, 8, 16), (16, 16, 16)))


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({}, "attention_matrix_16x16x16x32_32_1"),
        ({"subgroup_size": 64}, "attention_matrix_16x16x16x64_32_4"),
        ({"subgroup_size": 16, "cooperative_matrices": matrices((8, 16, 16))}, "attention_matrix_8x16x16x16_32_4"),
        ({"subgroup_size": 8, "cooperative_matrices": matrices((8, 8, 8))}, "attention_matrix_8x8x8x8_32_4"),
        ({"cooperative_matrices": matrices((8, 8, 8))}, "attention_tiled_32_16"),
        ({"shuffle": False}, "attention_tiled_32_16"),
        ({"shared_memory": 8192}, "attention_tiled_32_16"),
        ({"tier": 1}, "attention_tiled_32_16"),
    ],
)
def test_choice_of_matrices(changes: dict[str, Any], kernel: str) -> None:
    capabilities = replace(NVIDIA, **changes)
    choice = choose(Sizes(1, 128, 128, 12, 1, 32), DType.FLOAT16, 0, capabilities)
    assert choice.kernel == kernel
    assert choice.kernel in shaders.names()
    assert "tiled" in choose(Sizes(1, 128, 128, 12, 1, 32), DType.FLOAT32, 0, capabilities).kernel
    assert "tiled" in choose(Sizes(1, 128, 128, 12, 1, 36), DType.FLOAT16, 0, capabilities).kernel


def test_many_queries_share_a_workgroup() -> None:
    assert choose(Sizes(32, 128, 128, 12, 1, 32), DType.FLOAT16, 0, NVIDIA).local_size == 128
    assert choose(Sizes(1, 128, 128, 12, 1, 32), DType.FLOAT16, 0, NVIDIA).local_size == 32

"""softmax, log_softmax and layer_norm against torch in float64; kernels for CPUs and for GPUs on this device.

Bounds, in units of 2^-24 (float32's rounding) and with n elements a line:
- softmax: exp is within 2 ulp, its argument x - max rounds once, which exp turns into |x - max| / 2 ulp; the sum is
  off by as many roundings as a chain of blocks has; the product adds two.
- log_softmax: absolute, the same for x - max - log(sum): log turns the sum's relative error into an absolute one.
- layer_norm: the mean's error is a few roundings of the largest |x|, magnified by 1 / deviation.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_op
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import FLOATS, random, shapes
from variants import DEVICES, EPSILON, Array, assert_within, chosen_for

from torchvk import ops
from torchvk.graph import DType, TensorType
from torchvk.ops.normalization import MAX_LINE, LayerNormAttributes, NormalizeAttributes, SoftmaxAttributes

KINDS = ("this", "gpu")
NAMES = ("softmax", "log_softmax")


def as_kind(name: str, kind: str) -> Any:
    return nullcontext() if kind == "this" else chosen_for(name, kind="discrete")


def chain(count: int) -> float:
    """Roundings on the way of one element into a sum: pairwise at best (NumPy), blocks of 8 one after the other."""
    return count / 8 + 12


def check_softmax(name: str, x: Array, dim: int) -> None:
    wide = torch.from_numpy(np.array(x, np.float64))
    exact = getattr(torch, name)(wide, dim).numpy()
    count = x.shape[dim] if x.ndim else 1
    with np.errstate(all="ignore"):
        if x.size:
            below = np.abs(x.astype(np.float64) - np.max(np.atleast_1d(x).astype(np.float64), dim, keepdims=True))
            below = below.reshape(x.shape)
        else:
            below = np.zeros(x.shape)
        # A finite line may hold -inf: exp gives exactly 0, and its logarithm exactly -inf.
        below = np.where(np.isfinite(below), below, 0)
        roundings = (chain(count) + 8 + below) * EPSILON
        bound = np.abs(exact) * roundings + 2.0**-126 if name == "softmax" else roundings + np.abs(exact) * EPSILON * 2
    attributes = SoftmaxAttributes(dim)
    for got in (ops.get(name).reference(attributes, [x])[0], run_op(name, attributes, [x])[0]):
        assert_within(got, exact, bound, x.dtype)


def check_layer_norm(x: Array, dims: int, weight: Array | None, bias: Array | None, eps: float = 1e-5) -> None:
    def wide(a: Array | None) -> torch.Tensor | None:
        return None if a is None else torch.from_numpy(a.astype(np.float64))

    shape = x.shape[x.ndim - dims :]
    given = wide(x)
    assert given is not None
    exact = torch.nn.functional.layer_norm(given, shape, wide(weight), wide(bias), eps).numpy()
    over = tuple(range(x.ndim - dims, x.ndim))
    if x.size:
        deviation = np.sqrt(x.astype(np.float64).var(over, keepdims=True) + eps)
        largest = np.abs(x.astype(np.float64)).max(over, keepdims=True)
    else:
        deviation = largest = np.ones(1)
    gain = 1 if weight is None else np.abs(weight.astype(np.float64))
    normal = (np.abs(x.astype(np.float64)) + largest) / deviation
    # A running mean forgets its early roundings as it goes: a few count, whatever the number of elements.
    bound = 8 * EPSILON * normal * gain + 4 * EPSILON * np.abs(exact)
    bound = bound + (0 if bias is None else 2 * EPSILON * np.abs(bias.astype(np.float64)))
    attributes = LayerNormAttributes(dims, eps)
    inputs = [x, weight, bias]
    for got in (ops.get("layer_norm").reference(attributes, inputs)[0], run_op("layer_norm", attributes, inputs)[0]):
        assert_within(got, exact, bound, x.dtype)


# softmax


@pytest.mark.tier
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((), 0),
        ((1,), 0),
        ((9, 7), 1),
        ((9, 8), 1),
        ((9, 7), 0),
        ((3, 101, 5), 1),
        ((2, 1000), 1),
        ((1, 2 * MAX_LINE + 1), 1),
        ((2, 5000, 3), 1),
        ((2, 0, 3), 0),
        ((2, 0, 3), 1),
    ],
)
def test_softmax(kind: str, dtype: str, name: str, shape: tuple[int, ...], dim: int) -> None:
    with as_kind(name, kind):
        check_softmax(name, random(dtype, shape), dim)


@pytest.mark.tier
@settings(max_examples=20, deadline=None)
@given(
    st.data(),
    shapes(max_rank=8),
    st.sampled_from(FLOATS),
    st.sampled_from(NAMES),
    st.floats(0, 30),
    st.sampled_from(KINDS),
)
def test_softmax_of_any_shape(
    data: st.DataObject, shape: tuple[int, ...], dtype: str, name: str, scale: float, kind: str
) -> None:
    dim = data.draw(st.integers(0, max(len(shape) - 1, 0)))
    with as_kind(name, kind):
        check_softmax(name, np.asarray(random(dtype, shape) * np.dtype(dtype).type(scale)), dim)


@pytest.mark.tier
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [6, 40, 70])
def test_softmax_of_masked_and_broken_lines(kind: str, dtype: str, name: str, count: int) -> None:
    """All -inf, one +inf or NaN: NaN, as torch; some -inf: they are 0. Great values do not overflow."""
    x = random(dtype, (8, count))
    x[0] = -np.inf
    x[1, 2:] = -np.inf
    x[2, -1] = np.inf
    x[3, 3] = np.nan
    x[4] = 60000
    x[5, : count // 2] = -60000
    x[6, :5] = -np.inf
    with as_kind(name, kind):
        check_softmax(name, x, 1)
        check_softmax(name, np.ascontiguousarray(x.T), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_softmax_of_rising_lines(kind: str) -> None:
    """Every block holds a new largest element: the sum is rescaled each time."""
    with as_kind("softmax", kind):
        check_softmax("softmax", np.linspace(-50, 50, 3000, dtype=np.float32)[None], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_softmax_sum_to_one(kind: str) -> None:
    with as_kind("softmax", kind):
        (got,) = run_op("softmax", SoftmaxAttributes(1), [random("float32", (20, 333)) * 5])
    np.testing.assert_allclose(got.sum(1, dtype=np.float64), 1, rtol=chain(333) * EPSILON)


# layer_norm


@pytest.mark.tier
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "dims"),
    [((1,), 1), ((5, 384), 1), ((5, 77), 1), ((3, 7, 11), 2), ((2, 3, 4), 3), ((2, 5001), 1), ((0, 5), 1), ((5, 0), 1)],
)
@pytest.mark.parametrize("operands", ["", "weight", "bias", "weight bias"])
def test_layer_norm(kind: str, dtype: str, shape: tuple[int, ...], dims: int, operands: str) -> None:
    own = shape[len(shape) - dims :]
    weight = random(dtype, own, 1) if "weight" in operands else None
    bias = random(dtype, own, 2) if "bias" in operands else None
    with as_kind("layer_norm", kind):
        check_layer_norm(random(dtype, shape), dims, weight, bias)


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_mean_does_not_cancel(kind: str) -> None:
    """Mean 4096, deviation 1: Σx² - (Σx)² / n would have no digit left of the variance."""
    x = (4096 + np.random.default_rng(0).standard_normal((4, 384))).astype(np.float32)
    exact = torch.nn.functional.layer_norm(torch.from_numpy(x).double(), (384,), None, None, 1e-5).numpy()
    with as_kind("layer_norm", kind):
        (got,) = run_op("layer_norm", LayerNormAttributes(1), [x])
    # The mean is rounded to 4096 · 2^-24 a few times, against a deviation of 1.
    np.testing.assert_allclose(got, exact, atol=8 * 4096 * EPSILON)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [8, 77])
def test_broken_rows_of_layer_norm(kind: str, count: int) -> None:
    """NaN and infinity make their own row NaN and no other; a constant row is 0, by eps."""
    x = random("float32", (4, count))
    x[0, 1], x[1, 2], x[2] = np.nan, np.inf, 3
    with as_kind("layer_norm", kind):
        (got,) = run_op("layer_norm", LayerNormAttributes(1), [x])
    eager = torch.nn.functional.layer_norm(torch.from_numpy(x), (count,)).numpy()
    np.testing.assert_array_equal(np.isnan(got), np.isnan(eager))
    assert np.isnan(got[:2]).all()
    np.testing.assert_array_equal(got[2], np.zeros(count, np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_eps_counts(kind: str) -> None:
    x = random("float32", (3, 40)) * np.float32(0.01)
    with as_kind("layer_norm", kind):
        check_layer_norm(x, 1, None, None, eps=0.5)
        check_layer_norm(x, 1, None, None, eps=1e-12)


# The choice of kernels


@pytest.mark.parametrize(
    ("device", "dtype", "shape", "kernels"),
    [
        ("cpu_1", "float32", (32, 384), ["line"]),
        ("cpu_0", "float16", (32, 384), ["line"]),
        ("cpu_1", "float16", (32, 385), ["statistics", "apply"]),
        ("cpu_1", "float32", (1, 30522), ["statistics", "statistics", "apply"]),
        ("gpu_0", "float32", (32, 384), ["line_group"]),
        ("gpu_1", "float32", (32, 384), ["line_subgroup"]),
        ("gpu_2", "float16", (32, 384), ["line_subgroup"]),
        ("gpu_1", "float16", (32, 385), ["statistics_group", "apply"]),
        ("smallest", "float32", (32, 384), ["line_group"]),
        ("gpu_1", "float32", (32, 16), ["line"]),
        ("gpu_1", "float32", (32, 30522), ["line_subgroup"]),
    ],
)
@pytest.mark.parametrize("name", ["softmax", "layer_norm"])
def test_choice(device: str, dtype: str, shape: tuple[int, ...], kernels: list[str], name: str) -> None:
    operator, inputs, capabilities = ops.get(name), [TensorType(DType(dtype), shape)], DEVICES[device]
    attributes: Any = SoftmaxAttributes(1) if name == "softmax" else LayerNormAttributes(1)
    chosen = operator.kernels(attributes, inputs, operator.infer(attributes, inputs), capabilities)
    if name == "layer_norm" and kernels == ["line_subgroup"] and shape[1] % 4 == 0:
        kernels = ["rows_f16" if dtype == "float16" else "rows_f32"]
    assert [dispatch.kernel for dispatch in chosen.dispatches] == [f"{name}_{kernel}" for kernel in kernels]
    for dispatch in chosen.dispatches:
        assert int(dispatch.constants[0]) <= capabilities.max_workgroup_invocations


def test_small_grids_take_all_lines() -> None:
    with chosen_for("softmax", kind="discrete", max_workgroup_count=(7, 65535, 65535)):
        check_softmax("softmax", random("float32", (50, 40)), 1)
    limited = replace(DEVICES["gpu_1"], max_workgroup_count=(7, 65535, 65535))
    operator, inputs = ops.get("softmax"), [TensorType(DType.FLOAT32, (50, 40))]
    (dispatch,) = operator.kernels(SoftmaxAttributes(1), inputs, inputs, limited).dispatches
    assert dispatch.groups[0] <= 7
    assert dispatch.groups[0] * dispatch.groups[1] >= 50


# Shapes


@pytest.mark.parametrize(
    ("name", "attributes", "inputs", "message"),
    [
        ("softmax", SoftmaxAttributes(2), [("float32", (2, 3))], "distinct dimensions from 0 to 1"),
        ("softmax", SoftmaxAttributes(-1), [("float32", (2, 3))], "distinct dimensions from 0 to 1"),
        ("log_softmax", SoftmaxAttributes(0), [("int64", (2, 3))], "float32 or float16"),
        ("softmax", SoftmaxAttributes(0), [], "takes 1 input"),
        ("softmax", SoftmaxAttributes(0), [None], "needs its input"),
        ("layer_norm", LayerNormAttributes(0), [("float32", (2, 3))], "from 1 to 2 trailing"),
        ("layer_norm", LayerNormAttributes(3), [("float32", (2, 3))], "from 1 to 2 trailing"),
        ("layer_norm", LayerNormAttributes(1), [("int32", (2, 3))], "float32 or float16"),
        ("layer_norm", LayerNormAttributes(1), [("float32", (2, 3)), ("float32", (2,))], r"weight float32\[3\]"),
        ("layer_norm", LayerNormAttributes(1), [("float32", (2, 3)), None, ("float16", (3,))], r"bias float32\[3\]"),
        ("layer_norm", LayerNormAttributes(1), [], "were given"),
    ],
)
def test_operands_that_make_no_sense(
    name: str, attributes: Any, inputs: list[tuple[str, Any] | None], message: str
) -> None:
    types = [None if given is None else TensorType(DType(given[0]), given[1]) for given in inputs]
    with pytest.raises(ops.OperatorError, match=message):
        ops.get(name).infer(attributes, types)


# l2_normalize


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "dim"), [((3, 384), 1), ((5, 7), 0), ((4, 33), 1), ((2, 300, 3), 1), ((2, 5000), 1), ((6, 1), 1)]
)
def test_l2_normalize(rng: np.random.Generator, kind: str, dtype: str, shape: tuple[int, ...], dim: int) -> None:
    x = rng.standard_normal(shape).astype(dtype)
    x[(0,) * dim + (slice(None),)] = 0
    exact = torch.nn.functional.normalize(torch.from_numpy(x.astype(np.float64)), dim=dim).numpy()
    bound = (chain(shape[dim]) + 8) * EPSILON * np.abs(exact)
    attributes = NormalizeAttributes(dim, 1e-12)
    with as_kind("l2_normalize", kind):
        for got in (ops.get("l2_normalize").reference(attributes, [x])[0], run_op("l2_normalize", attributes, [x])[0]):
            assert_within(got, exact, bound, dtype)


def test_l2_normalize_not_finite() -> None:
    x = np.array([[1, np.nan, 2], [3, np.inf, 4], [1e-20, 0, 0]], np.float32)
    expected = torch.nn.functional.normalize(torch.from_numpy(x), dim=1).numpy()
    np.testing.assert_array_equal(run_op("l2_normalize", NormalizeAttributes(1, 1e-12), [x])[0], expected)

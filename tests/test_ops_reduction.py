"""Reductions, arg-max and cumulative sums against torch and float64; kernels for CPUs and for GPUs on this device.

A float sum in blocks is off by at most (2 √n + 10) · 2^-24 · Σ|x| (the docstring of torchvk.ops.reduction).
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_op
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import ALL, FLOATS, INTS, NUMBERS, assert_same, random, shapes, special
from variants import CPU, DEVICES, EPSILON, GPU, Array, assert_within, chosen_for

from torchvk import ops
from torchvk.graph import DType, TensorType
from torchvk.ops.reduction import MAX_CHAIN, ArgAttributes, ReduceAttributes, ScanAttributes, axes, choose

KINDS = ("this", "gpu")
EXACT = ("amax", "amin", "any", "all")
REDUCTIONS = ("sum", "mean", "prod", *EXACT)


def as_kind(name: str, kind: str) -> Any:
    return nullcontext() if kind == "this" else chosen_for(name, kind="discrete")


def tensor(x: Array) -> torch.Tensor:
    return torch.from_numpy(np.array(x))


def eager(name: str, x: Array, dims: tuple[int, ...], keepdim: bool) -> Array:
    """torch's result, floats in float64 where the order of the operations matters."""
    given = tensor(x)
    if name in ("sum", "mean", "prod") and given.is_floating_point():
        given = given.double()
    if name != "prod":
        return np.asarray(getattr(torch, name)(given, dims, keepdim=keepdim).numpy())
    for dim in sorted(dims, reverse=True):
        given = torch.prod(given, dim, keepdim=keepdim)
    return np.asarray(given.numpy())


def check(name: str, x: Array, dims: tuple[int, ...], keepdim: bool = False) -> None:
    """Reference and kernel against torch."""
    attributes = ReduceAttributes(dims, keepdim)
    want = eager(name, x, dims, keepdim)
    operator = ops.get(name)
    for got in (operator.reference(attributes, [x])[0], run_op(name, attributes, [x])[0]):
        if x.dtype.kind != "f" or name in EXACT:
            assert_same(got, want)
        elif name == "prod":
            count = math.prod(x.shape[d] for d in dims) if x.ndim else 1
            assert_within(got, want, count * EPSILON * np.abs(want), x.dtype)
        else:
            size = eager("sum", np.abs(x), dims, keepdim)
            count = math.prod(x.shape[d] for d in dims) if x.ndim else 1
            bound = (2 * math.sqrt(count) + 10) * EPSILON * size
            if name == "mean":
                # Its own division: 2.5 units in the last place.
                bound = bound / max(count, 1) + 6 * EPSILON * np.abs(want)
            assert_within(got, want, bound, x.dtype)


def moderate(dtype: str, shape: Any, seed: int = 0) -> Array:
    """Integers of a few units, so that products mean something; floats near 1."""
    x = random(dtype, shape, seed)
    if x.dtype.kind == "f":
        return (1 + x / 100).astype(dtype)
    return np.asarray(x % 3).astype(dtype)


# Kernels


@pytest.mark.tier
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_every_dtype(kind: str, dtype: str, name: str) -> None:
    """Rows, columns and scattered dimensions, with an odd number of results, which do not fill their last word."""
    if name == "mean" and dtype not in FLOATS:
        with pytest.raises(ops.OperatorError, match="mean takes float32, float16"):
            ops.get("mean").infer(ReduceAttributes((0,)), [TensorType(DType(dtype), (2,))])
        return
    values = moderate if name == "prod" else random
    with as_kind(name, kind):
        check(name, values(dtype, (7, 83)), (1,))
        check(name, values(dtype, (70, 5)), (0,), keepdim=True)
        check(name, values(dtype, (3, 2, 5, 4)), (0, 2))


@pytest.mark.tier
@settings(max_examples=25, deadline=None)
@given(st.data(), shapes(), st.sampled_from(ALL), st.sampled_from(REDUCTIONS), st.booleans(), st.sampled_from(KINDS))
def test_any_shape_and_dimensions(
    data: st.DataObject, shape: tuple[int, ...], dtype: str, name: str, keepdim: bool, kind: str
) -> None:
    dims = data.draw(st.sets(st.integers(0, max(len(shape) - 1, 0)), min_size=1).map(lambda s: tuple(sorted(s))))
    dtype = dtype if name != "mean" or dtype in FLOATS else "float32"
    x = moderate(dtype, shape)
    if name in ("amax", "amin") and shape and math.prod(shape[d] for d in dims) == 0:
        with pytest.raises(ops.OperatorError, match="no value"):
            ops.get(name).infer(ReduceAttributes(dims), [TensorType(DType(dtype), shape)])
        return
    with as_kind(name, kind):
        check(name, x, dims, keepdim)


@pytest.mark.parametrize("kind", KINDS)
def test_alternating_dimensions_of_rank_8(kind: str) -> None:
    x = random("float32", (2, 3, 2, 3, 2, 3, 2, 3))
    with as_kind("sum", kind), as_kind("amax", kind):
        check("sum", x, (0, 2, 4, 6))
        check("amax", x, (1, 3, 5, 7), keepdim=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["sum", "mean", "prod", "any", "all"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "bool", "uint8"])
def test_no_elements(kind: str, name: str, dtype: str) -> None:
    if name == "mean" and dtype not in FLOATS:
        return
    with as_kind(name, kind):
        check(name, random(dtype, (0, 3)), (0,))
        check(name, random(dtype, (0, 3)), (1,))


@pytest.mark.tier
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", NUMBERS)
def test_special_values(kind: str, dtype: str) -> None:
    """Every pair: NaN wins over everything, infinities and limits of integers stand."""
    values = special(dtype)
    table = np.stack(np.broadcast_arrays(values[:, None], values[None, :]), -1)
    for name in ("amax", "amin", "any", "all", *(("sum",) if dtype in INTS else ())):
        with as_kind(name, kind):
            check(name, table, (2,))


@pytest.mark.parametrize("kind", KINDS)
def test_infinities_and_nan_in_sums(kind: str) -> None:
    x = np.array([[1, np.inf, 2], [np.inf, -np.inf, 0], [np.nan, 1, 1], [3e38, 3e38, 1]], np.float32)
    with as_kind("sum", kind):
        (got,) = run_op("sum", ReduceAttributes((1,)), [x])
    np.testing.assert_array_equal(got, np.array([np.inf, np.nan, np.nan, np.inf], np.float32))


@pytest.mark.tier
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(70001,), (2, 70001)])
def test_long_reductions(kind: str, dtype: str, shape: tuple[int, ...]) -> None:
    """Longer than a loop of lavapipe may be, and few enough to be cut into segments."""
    for name in ("sum", "amin") if dtype in NUMBERS else ("sum", "all"):
        with as_kind(name, kind):
            check(name, random(dtype, shape), (len(shape) - 1,))


def test_many_long_reductions() -> None:
    """Threads enough, but each chain too long for one thread."""
    assert choose(200, 100, MAX_CHAIN + 1, True, CPU).segments == 2
    check("sum", random("float16", (200, MAX_CHAIN + 1)), (1,))


@pytest.mark.parametrize("kind", KINDS)
def test_sums_do_not_drift(kind: str) -> None:
    """2^24 and more ones one after the other would stop at 2^24; blocks do not."""
    with as_kind("sum", kind):
        (got,) = run_op("sum", ReduceAttributes((0,)), [np.ones(2**24 + 2**10, np.float32)])
    assert got == 2**24 + 2**10


# argmax, argmin


def check_arg(name: str, x: Array, dim: int, keepdim: bool = False) -> None:
    want = getattr(torch, name)(tensor(x), dim, keepdim=keepdim).numpy()
    attributes = ArgAttributes(dim, keepdim)
    assert_same(ops.get(name).reference(attributes, [x])[0], want)
    assert_same(run_op(name, attributes, [x])[0], want)


@pytest.mark.tier
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("name", ["argmax", "argmin"])
def test_arg(kind: str, dtype: str, name: str) -> None:
    x = random(dtype, (5, 90, 3))
    with as_kind(name, kind):
        check_arg(name, x, 1)
        check_arg(name, x, 2, keepdim=True)
        check_arg(name, random(dtype, (30001,)), 0)
        check_arg(name, random(dtype, ()), 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["argmax", "argmin"])
def test_arg_takes_the_first(kind: str, name: str) -> None:
    values = np.array([0.0, -0.0, 1.0, np.nan, np.inf, -np.inf], np.float32)
    table = np.stack(np.meshgrid(values, values, values, indexing="ij"), -1).reshape(-1, 3)
    with as_kind(name, kind):
        check_arg(name, table, 1)
        check_arg(name, np.ones((3, 1000), np.int64), 1)
        check_arg(name, np.tile(table, (1, 100)), 1)


def test_arg_needs_elements() -> None:
    for name in ("argmax", "argmin"):
        with pytest.raises(ops.OperatorError, match="no value"):
            ops.get(name).infer(ArgAttributes(1), [TensorType(DType.FLOAT32, (3, 0))])
        with pytest.raises(ops.OperatorError, match="takes float32"):
            ops.get(name).infer(ArgAttributes(0), [TensorType(DType.BOOL, (3,))])


# cumsum


def check_scan(x: Array, dim: int) -> None:
    given = tensor(x).double() if x.dtype.kind == "f" else tensor(x)
    want = torch.cumsum(given, dim).numpy()
    attributes = ScanAttributes(dim)
    for got in (ops.get("cumsum").reference(attributes, [x])[0], run_op("cumsum", attributes, [x])[0]):
        if x.dtype.kind != "f":
            assert_same(got, want)
        else:
            # Compensated: what one addition loses to the compensation itself, n^2 · 2^-48, is below this.
            size = torch.cumsum(tensor(np.abs(x)).double(), dim).numpy()
            assert_within(got, want, 2 * EPSILON * np.abs(want) + 2.0**-40 * size, x.dtype)


@pytest.mark.tier
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ALL)
def test_cumsum(kind: str, dtype: str) -> None:
    with as_kind("cumsum", kind):
        check_scan(random(dtype, (3, 301, 2)), 1)
        check_scan(random(dtype, (5, 7)), 1)
        check_scan(random(dtype, (0, 7)), 1)
        check_scan(random(dtype, ()), 0)


@pytest.mark.tier
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int32"])
def test_long_cumsum(kind: str, dtype: str) -> None:
    with as_kind("cumsum", kind):
        x = random(dtype, (2, 70001))
        check_scan(x if dtype != "float16" else (x / 100).astype(dtype), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_cumsum_after_infinity(kind: str) -> None:
    x = np.array([1, np.inf, 2, -np.inf, 1], np.float32)
    with as_kind("cumsum", kind):
        (got,) = run_op("cumsum", ScanAttributes(0), [x])
    np.testing.assert_array_equal(got, np.array([1, np.inf, np.inf, np.nan, np.nan], np.float32))


# The choice of kernels


@pytest.mark.parametrize(
    ("device", "shape", "dims", "kernels"),
    [
        ("cpu_1", (384, 384), (1,), ["reduce_float"]),
        ("cpu_0", (1, 100000), (1,), ["reduce_float", "reduce_float"]),
        ("gpu_0", (384, 384), (1,), ["reduce_float_group"]),
        ("gpu_1", (384, 384), (1,), ["reduce_float_subgroup"]),
        ("gpu_2", (384, 384), (1,), ["reduce_float_subgroup"]),
        ("smallest", (384, 384), (1,), ["reduce_float_group"]),
        ("gpu_1", (100000, 8), (1,), ["reduce_float"]),
        ("gpu_1", (384, 8192), (0,), ["pool_float_shared"]),
        ("gpu_1", (2**20,), (0,), ["reduce_float_subgroup", "reduce_float_subgroup"]),
    ],
)
def test_choice(device: str, shape: tuple[int, ...], dims: tuple[int, ...], kernels: list[str]) -> None:
    operator, attributes, inputs = ops.get("sum"), ReduceAttributes(dims), [TensorType(DType.FLOAT32, shape)]
    capabilities = DEVICES[device]
    chosen = operator.kernels(attributes, inputs, operator.infer(attributes, inputs), capabilities)
    assert [dispatch.kernel for dispatch in chosen.dispatches] == kernels
    for dispatch in chosen.dispatches:
        assert int(dispatch.constants[0]) <= capabilities.max_workgroup_invocations
        assert all(n <= limit for n, limit in zip(dispatch.groups, capabilities.max_workgroup_count, strict=True))


def test_segments_cover_the_elements() -> None:
    for results, count in ((1, 70001), (3, 12289), (1, 10**6), (1000, 50000)):
        for capabilities in (CPU, GPU):
            choice = choose(results, results, count, True, capabilities)
            length = -(-count // choice.segments)
            assert choice.segments * length >= count > (choice.segments - 1) * length
            assert capabilities is GPU or length <= MAX_CHAIN


def test_neighbouring_dimensions_merge() -> None:
    kept, reduced = axes((2, 3, 1, 4, 5), (1, 3))
    assert (kept.sizes, kept.strides) == ((2, 5), (60, 1))
    assert (reduced.sizes, reduced.strides) == ((12,), (5,))


# Shapes


@pytest.mark.parametrize("dims", [(), (2,), (-1,), (0, 0)])
def test_dimensions_that_make_no_sense(dims: tuple[int, ...]) -> None:
    with pytest.raises(ops.OperatorError, match="distinct dimensions from 0 to 1"):
        ops.get("sum").infer(ReduceAttributes(dims), [TensorType(DType.FLOAT32, (2, 3))])


def test_result_types() -> None:
    def result(name: str, dtype: DType) -> DType:
        return ops.get(name).infer(ReduceAttributes((0,)), [TensorType(dtype, (2,))])[0].dtype

    assert [result(name, DType.BOOL) for name in ("sum", "prod", "amax", "any")] == [
        DType.INT64,
        DType.INT64,
        DType.BOOL,
        DType.BOOL,
    ]
    assert [result(name, DType.UINT8) for name in ("sum", "amax", "any", "all")] == [
        DType.INT64,
        DType.UINT8,
        DType.UINT8,
        DType.UINT8,
    ]
    assert result("sum", DType.FLOAT16) is DType.FLOAT16

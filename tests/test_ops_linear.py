"""matmul and linear against float64 and torch, the kernels for CPUs and those for GPUs (run on this device).

A sum of K products in float32, in any order, is off by at most K · 2^-24 · Σ|a||b| (Higham, Accuracy and Stability of
Numerical Algorithms, section 3.1: γ_K, of which the rounding of the products is a part); one more for the bias.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from harness import every_variant, run_op
from hypothesis import given, settings
from hypothesis import strategies as st
from variants import CPU, DEVICES, EPSILON, GPU, Array, assert_within, chosen_for

from torchvk import ops
from torchvk.errors import UnsupportedError
from torchvk.graph import DType, TensorType
from torchvk.ops.epilogue import apply_epilogue
from torchvk.ops.linear import LinearAttributes, MatmulAttributes
from torchvk.ops.linear_kernels import MAX_CPU_K, Product, choose

DTYPES = ("float32", "float16")
KINDS = ("this", "gpu")


def as_kind(name: str, kind: str) -> Any:
    return nullcontext() if kind == "this" else chosen_for(name, kind="discrete")


def random(dtype: str, *shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def swapped(x: Array, swap: bool) -> Array:
    return np.ascontiguousarray(x.swapaxes(-1, -2)) if swap else x


def check_linear(
    x: Array, weight: Array, bias: Array | None, epilogue: Any = "none", residual: Array | None = None
) -> None:
    wide_x, wide_w = x.astype(np.float64), weight.astype(np.float64)
    exact = wide_x @ wide_w.T
    size = np.abs(wide_x) @ np.abs(wide_w).T
    if bias is not None:
        exact, size = exact + bias, size + np.abs(bias)
    bound = (x.shape[-1] + 1) * EPSILON * size
    if epilogue != "none":
        # The slope of all of them is below 1.13, their own error a few ulp of what they are given.
        bound = 1.13 * bound + 8 * EPSILON * size
    exact = apply_epilogue(epilogue, exact, residual)
    if residual is not None:
        bound = bound + EPSILON * (size + np.abs(residual))
    attributes = LinearAttributes(epilogue)
    (reference,) = ops.get("linear").reference(attributes, [x, weight, bias, residual])
    assert_within(reference, exact, bound, x.dtype)
    for (got,) in every_variant("linear", attributes, [x, weight, bias, residual], constants=(1,)):
        assert_within(got, exact, bound, x.dtype)


def check_matmul(a: Array, b: Array, transpose_a: bool = False, transpose_b: bool = False) -> None:
    """``a`` [*, M, K] and ``b`` [*, K, N], handed over as the attributes say."""
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    exact, bound = wide_a @ wide_b, a.shape[-1] * EPSILON * (np.abs(wide_a) @ np.abs(wide_b))
    operands = [swapped(a, transpose_a), swapped(b, transpose_b)]
    attributes = MatmulAttributes(transpose_a, transpose_b)
    (reference,) = ops.get("matmul").reference(attributes, operands)
    assert_within(reference, exact, bound, a.dtype)
    for (got,) in every_variant("matmul", attributes, operands):
        assert_within(got, exact, bound, a.dtype)


# Kernels


@pytest.mark.tier
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k", "bias"),
    [
        (1, 70, 132, True),
        (1, 1, 1, False),
        (3, 33, 9, True),
        (4, 64, 64, False),
        (2, 33, 264, True),
        (20, 68, 40, True),
        (65, 130, 35, False),
    ],
)
def test_linear(kind: str, dtype: str, m: int, n: int, k: int, bias: bool) -> None:
    with as_kind("linear", kind):
        check_linear(random(dtype, m, k), random(dtype, n, k, seed=1), random(dtype, n, seed=2) if bias else None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("epilogue", "m", "n"), [("sum_relu", 1, 9), ("gelu", 6, 34), ("gelu_tanh", 3, 16), ("silu", 40, 7)]
)
def test_epilogue_and_residual(kind: str, dtype: str, epilogue: str, m: int, n: int) -> None:
    with as_kind("linear", kind):
        x, weight, bias = random(dtype, m, 40), random(dtype, n, 40, seed=1), random(dtype, n, seed=2)
        check_linear(x, weight, bias, epilogue, random(dtype, m, n, seed=3))
        check_linear(x, weight, bias, epilogue)
        check_linear(x, weight, None, "none", random(dtype, m, n, seed=3))


@pytest.mark.tier
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "m", "n", "k", "transpose_a", "transpose_b"),
    [
        # Half of the combinations; both dtypes have all that can be transposed.
        (*size, transpose_a, transpose_a ^ bool(number % 2))
        for number, size in enumerate(
            [
                ("float32", 12, 36, 8),
                ("float32", 33, 17, 41),
                ("float32", 2, 67, 30),
                ("float16", 17, 70, 34),
                ("float16", 1, 5, 260),
            ]
        )
        for transpose_a in (False, True)
    ],
)
def test_matmul_transposed(kind: str, transpose_a: bool, transpose_b: bool, dtype: str, m: int, n: int, k: int) -> None:
    with as_kind("matmul", kind):
        check_matmul(random(dtype, 2, m, k), random(dtype, 2, k, n, seed=1), transpose_a, transpose_b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("batch_a", "batch_b"),
    [
        ((), (3,)),
        ((3,), ()),
        ((2, 3), (2, 3)),
        ((2, 1, 3), (4, 1)),
        ((1, 2), (3, 1)),
        ((2, 1, 2, 1, 2, 1), (1, 3, 1, 2, 1, 3)),
        ((0, 2), (1,)),
    ],
)
def test_leading_dimensions_broadcast(kind: str, batch_a: tuple[int, ...], batch_b: tuple[int, ...]) -> None:
    with as_kind("matmul", kind):
        check_matmul(random("float32", *batch_a, 5, 6), random("float32", *batch_b, 6, 7, seed=1))


@pytest.mark.tier
@settings(max_examples=15, deadline=None)
@given(st.integers(5, 40), st.integers(1, 140), st.integers(1, 140), st.sampled_from(KINDS))
def test_linear_of_any_size(m: int, n: int, k: int, kind: str) -> None:
    with as_kind("linear", kind):
        check_linear(random("float32", m, k), random("float32", n, k, seed=1), None)


@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 1, 3, 1, 2, 6), (0, 6), (2, 0, 6)])
def test_linear_takes_any_rank(shape: tuple[int, ...]) -> None:
    check_linear(random("float32", *shape), random("float32", 5, 6, seed=1), random("float32", 5, seed=2))


@pytest.mark.parametrize("kind", KINDS)
def test_empty_sums_are_zero_or_the_bias(kind: str) -> None:
    with as_kind("linear", kind), as_kind("matmul", kind):
        check_linear(random("float32", 3, 0), random("float32", 5, 0), random("float32", 5))
        check_linear(random("float32", 3, 4), random("float32", 0, 4), None)
        check_matmul(random("float32", 2, 3, 0), random("float32", 2, 0, 9))


@pytest.mark.tier
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("m", [3, 6])
def test_nan_and_infinity_stay_in_their_row_and_column(kind: str, transpose_a: bool, transpose_b: bool, m: int) -> None:
    """With K and N no multiples of what kernels load at once: nothing of the neighbours may leak in."""
    a, b = random("float32", m, 7), random("float32", 7, 9, seed=1)
    a[1, 0], a[2, 6], b[6, 4], b[0, 7] = np.nan, np.inf, -np.inf, np.nan
    with as_kind("matmul", kind), np.errstate(invalid="ignore"):
        check_matmul(a, b, transpose_a, transpose_b)


@pytest.mark.parametrize("kind", KINDS)
def test_float16_accumulates_in_float32(kind: str) -> None:
    """4096 · 1 · 1 in float16 steps would stop at 2048; 300 · 300 overflows before it cancels."""
    with as_kind("linear", kind):
        (got,) = run_op("linear", None, [np.ones((2, 4096), np.float16), np.ones((3, 4096), np.float16)])
        np.testing.assert_array_equal(got, np.full((2, 3), 4096, np.float16))
        x, w = np.array([[300, 300, 1]], np.float16), np.array([[300, -300, 1]], np.float16)
        (got,) = run_op("linear", None, [x, w])
        np.testing.assert_array_equal(got, np.ones((1, 1), np.float16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("changes", [{"max_texels": 0}, {"shuffle": False}, {"max_texels": 0, "tier": 0}])
@pytest.mark.parametrize("m", [1, 5, 17])
def test_cpus_without_texels_or_shuffles(dtype: str, changes: dict[str, Any], m: int) -> None:
    with chosen_for("linear", **changes):
        check_linear(random(dtype, m, 20), random(dtype, 10, 20, seed=1), None)


@pytest.mark.parametrize("counts", [(3, 2, 2), (1, 1, 1), (65535, 1, 65535)])
def test_workgroup_limits_are_kept(counts: tuple[int, int, int]) -> None:
    """Tiles spread over x and y, batches over z, with what is left in a loop."""
    with chosen_for("matmul", kind="discrete", max_workgroup_count=(counts[0], 65535, counts[2])):
        check_matmul(random("float32", 5, 70, 3), random("float32", 5, 3, 200, seed=1))


def test_the_same_weight_and_input_may_be_both_operands() -> None:
    x = random("float32", 6, 6)
    check_linear(x, x, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_eager_torch(dtype: str) -> None:
    """torch sums in another order: both are within the bound of each other."""
    x, w, bias = random(dtype, 5, 96), random(dtype, 31, 96, seed=1), random(dtype, 31, seed=2)
    eager = torch.nn.functional.linear(torch.from_numpy(x), torch.from_numpy(w), torch.from_numpy(bias)).numpy()
    (got,) = ops.get("linear").reference(LinearAttributes(), [x, w, bias])
    bound = 2 * 97 * EPSILON * (np.abs(x.astype(np.float64)) @ np.abs(w.astype(np.float64)).T + np.abs(bias))
    # float16: each side rounds once, to neighbouring values at most.
    assert_within(got, eager.astype(np.float64), bound + (np.abs(eager) * 2.0**-10 if dtype == "float16" else 0), dtype)


# The choice of kernels


@pytest.mark.parametrize(
    ("device", "m", "transpose_b", "kernel"),
    [
        ("smallest", 1, True, "gemv_rows_f32"),
        ("gpu_0", 4, True, "gemv_rows_f32"),
        ("gpu_1", 4, True, "gemv_rows_f32_subgroup"),
        ("gpu_2", 1, True, "gemv_rows_f32_subgroup"),
        ("gpu_1", 1, False, "gemv_columns_f32"),
        ("gpu_0", 5, True, "gemm_blocked_f32_32x32x4"),
        ("gpu_2", 128, False, "gemm_blocked_f32_32x32x4"),
        ("cpu_0", 1, True, "gemm_lanes_f32_1_texels"),
        ("cpu_0", 128, True, "gemm_lanes_f32_4_texels"),
        ("cpu_1", 5, True, "gemm_lanes_f32_4_broadcast_texels"),
        ("cpu_1", 128, True, "gemm_lanes_f32_16_broadcast_texels"),
    ],
)
def test_choice(device: str, m: int, transpose_b: bool, kernel: str) -> None:
    product = Product(m, 256, 512, DType.FLOAT32, transpose_b=transpose_b)
    choice = choose(product, DEVICES[device])
    assert choice.kernel == kernel
    assert choice.local_size <= DEVICES[device].max_workgroup_invocations
    half = choose(replace(product, dtype=DType.FLOAT16), DEVICES[device])
    assert half.kernel == kernel.replace("gemv_rows_f32", "gemv_rows_f16_wide").replace("f32", "f16")
    unaligned = choose(replace(product, dtype=DType.FLOAT16, k=516), DEVICES[device])
    assert unaligned.kernel == kernel.replace("f32", "f16")


def test_transposed_a_is_never_a_gemv() -> None:
    assert choose(Product(1, 8, 8, DType.FLOAT32, transpose_a=True), GPU).kernel == "gemm_blocked_f32_32x32x4"


def test_tensors_above_the_texel_limit_are_bound_as_storage() -> None:
    product = Product(16, 64, 64, DType.FLOAT32, transpose_b=True)
    assert choose(product, replace(CPU, max_texels=1024)).texels
    assert not choose(product, replace(CPU, max_texels=1023)).texels


def test_small_workgroups_make_small_tiles() -> None:
    choice = choose(Product(64, 64, 64, DType.FLOAT32), DEVICES["smallest"])
    assert (choice.tile_m, choice.tile_n, choice.local_size) == (32, 32, 128)


def test_broadcast_batches_become_rows() -> None:
    """[8, 5, 64] · [64, 32] is one product of 40 rows; its work is counted once."""
    matmul = ops.get("matmul")
    inputs = [TensorType(DType.FLOAT32, (8, 5, 64)), TensorType(DType.FLOAT32, (64, 32))]
    (dispatch,) = matmul.kernels(MatmulAttributes(), inputs, matmul.infer(MatmulAttributes(), inputs), GPU).dispatches
    assert dispatch.groups[2] == 1
    assert dispatch.flops == 2 * 40 * 32 * 64
    assert dispatch.bytes == 4 * (40 * 64 + 64 * 32 + 40 * 32)


def test_odd_rows_of_halves_are_rounded_from_scratch() -> None:
    linear = ops.get("linear")
    for n, dispatches, scratch in ((8, 1, ()), (7, 2, (4 * 3 * 7,))):
        inputs = [TensorType(DType.FLOAT16, (3, 4)), TensorType(DType.FLOAT16, (n, 4))]
        kernels = linear.kernels(LinearAttributes(), inputs, linear.infer(LinearAttributes(), inputs), GPU)
        assert (len(kernels.dispatches), kernels.scratch) == (dispatches, scratch)


def test_inner_sizes_beyond_a_cpu_are_an_error_with_numbers() -> None:
    product = Product(1, 1, MAX_CPU_K + 1, DType.FLOAT32, transpose_b=True)
    with pytest.raises(UnsupportedError, match=r"200001.*200000"):
        choose(product, CPU)
    assert choose(product, GPU).kernel == "gemv_rows_f32_subgroup"


@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_inner_size(kind: str) -> None:
    """Loops of lavapipe end after 65535 iterations: the limit above must lie below that."""
    x = np.ones((2, MAX_CPU_K), np.float32)
    with as_kind("linear", kind):
        (got,) = run_op("linear", None, [x, x[:1]])
    np.testing.assert_array_equal(got, np.full((2, 1), MAX_CPU_K, np.float32))


# Shapes


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("matmul", [("float32", (2, 3)), ("float32", (4, 5))], "inner sizes 3 and 4 differ"),
        ("matmul", [("float32", (2, 3)), ("float16", (3, 5))], "of one dtype"),
        ("matmul", [("int32", (2, 3)), ("int32", (3, 5))], "float32 or float16"),
        ("matmul", [("float32", (3,)), ("float32", (3, 5))], "rank 2 and more"),
        ("matmul", [("float32", (2, 2, 3)), ("float32", (3, 3, 5))], "do not broadcast"),
        ("matmul", [("float32", (2, 3))], "2 operands"),
        ("matmul", [("float32", (2, 3)), None], "one is missing"),
        ("linear", [("float32", (2, 3)), ("float32", (5, 4))], "inner sizes 3 and 4 differ"),
        ("linear", [("float32", (2, 3)), ("float16", (5, 3))], "of one dtype"),
        ("linear", [("float32", ()), ("float32", (5, 3))], "rank 1 and more"),
        ("linear", [("float32", (3,)), ("float32", (1, 5, 3))], r"weight \[N, K\]"),
        ("linear", [("float32", (3,)), ("float32", (5, 3)), ("float32", (3,))], r"bias float32\[5\]"),
        ("linear", [("float32", (3,)), ("float32", (5, 3)), ("float16", (5,))], r"bias float32\[5\]"),
        ("linear", [("float32", (3,))], "a weight"),
        ("linear", [None, ("float32", (5, 3))], "needs an input and a weight"),
    ],
)
def test_operands_that_make_no_sense(name: str, inputs: list[tuple[str, Any] | None], message: str) -> None:
    types = [None if given is None else TensorType(DType(given[0]), given[1]) for given in inputs]
    operator = ops.get(name)
    with pytest.raises(ops.OperatorError, match=message):
        operator.infer(operator.attributes(), types)


def test_shapes() -> None:
    a, b = TensorType(DType.FLOAT16, (2, 1, 4, 3)), TensorType(DType.FLOAT16, (5, 6, 4))
    attributes = MatmulAttributes(transpose_a=True, transpose_b=True)
    assert ops.get("matmul").infer(attributes, [a, b]) == (TensorType(DType.FLOAT16, (2, 5, 3, 6)),)
    x, w = TensorType(DType.FLOAT32, (2, 7, 3)), TensorType(DType.FLOAT32, (9, 3))
    assert ops.get("linear").infer(LinearAttributes(), [x, w, None]) == (TensorType(DType.FLOAT32, (2, 7, 9)),)

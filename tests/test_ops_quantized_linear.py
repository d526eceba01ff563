"""quantized_linear on the device, against float64. (Against eager modules: test_quantized_linear_eager.py.)"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from harness import check_plan, every_variant, one_node_graph, run_graph, run_op
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import DTYPES, OPERATOR, attributes, capabilities
from variants import chosen_for

from torchvk.graph import DType, TensorType
from torchvk.graph.build import GraphBuilder
from torchvk.ops import rows as row_parts
from torchvk.ops.epilogue import apply_epilogue
from torchvk.ops.quantization import quantize
from torchvk.runtime.device import max_tier, open_device
from torchvk.runtime.plan import make_plan

Array = np.ndarray[Any, Any]
EPSILON = {np.float32: 2.0**-24, np.float16: 2.0**-11}  # half a unit in the last place, of 1


def operands(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    n: int,
    group: int,
    bits: int,
    dtype: Any,
    bias: Any = None,
    zeros: bool = False,
) -> list[Array | None]:
    """x, weight, scale, bias (of that dtype, or None), and zero points behind no residual; extremes included."""
    k = shape[-1]
    top = 1 << (bits - 1)
    weight = rng.integers(-top, top, (n, k)).astype(np.int8)
    weight[0, 0], weight[-1, -1] = -top, top - 1
    scale = (0.5 + rng.random((n, k // group))).astype(dtype) / dtype(top * k**0.5)
    x = rng.standard_normal(shape).astype(dtype)
    inputs = [x, weight, scale, None if bias is None else rng.standard_normal(n).astype(bias)]
    if zeros:
        zero_point = rng.integers(-top, top, scale.shape).astype(np.int8)
        zero_point[0, 0], zero_point[-1, -1] = top - 1, -top
        inputs += [None, zero_point]
    return inputs


def expected(chosen: Any, inputs: list[Array | None]) -> tuple[Array, Array]:
    """The result in float64 from the quantized operands, and how far float32 arithmetic may be from it.

    A sum of t terms, each rounded a few times, is off by at most (t + few) · 2^-24 · Σ |terms|, in any order.
    Terms: groups with quantized activations (their sums are exact), else columns.
    """
    x, weight, scale, bias, residual, zero_point = (*inputs, None, None)[:6]
    assert x is not None
    assert weight is not None
    assert scale is not None
    rows = x.reshape(-1, x.shape[-1])
    w = weight.astype(np.float64)
    if zero_point is not None:
        w -= np.repeat(zero_point, chosen.group_size, axis=1)
    w *= np.repeat(scale.astype(np.float64), chosen.group_size, axis=1)
    terms = weight.shape[1]
    values = rows.astype(np.float64)
    if chosen.scheme is not None:
        q, row_scale, zero_point = quantize(rows, chosen.scheme)
        values = (q - zero_point) * row_scale.astype(np.float64)
        # GEMV adds the two halves of a unit apart from each other.
        terms = 2 * -(-weight.shape[1] // 16)
    y = values @ w.T
    size = np.abs(values) @ np.abs(w).T
    if bias is not None:
        y = y + bias
        size = size + np.abs(bias)
    bound = (terms + 6) * EPSILON[np.float32] * size
    # The epilogue in float64; its slope is below 1.13 for all of them, its own error a few ulp.
    added = None if residual is None else residual.reshape(y.shape).astype(np.float64)
    y = apply_epilogue(chosen.epilogue, y, added)
    bound = bound * 1.13 + (0 if chosen.epilogue == "none" else 8 * EPSILON[np.float32] * size)
    if added is not None:
        bound = bound + EPSILON[np.float32] * (size + np.abs(added))
    if x.dtype == np.float16 and chosen.scheme is None:
        # Matrix units take weights as eager mode does: rounded to float16.
        bound = bound + EPSILON[np.float16] * size
    if x.dtype == np.float16:
        # Rounded once, at the end; below 2^-14 by half a unit of the denormals.
        bound = bound + EPSILON[np.float16] * np.abs(y) + 2.0**-25
    shape = (*x.shape[:-1], len(weight))
    return y.reshape(shape), bound.reshape(shape)


def check(chosen: Any, inputs: list[Array | None], bits: int, **options: Any) -> Array:
    """Run on the device, by every variant unless one is named, and hold against float64; the (first) result."""
    run = run_op if "variant" in options else every_variant
    packed = {f"int{bits}": {1}} if bits < 8 else {}
    made: Any = run("quantized_linear", chosen, inputs, **packed, **options)
    results: list[Array] = [*made] if run is run_op else [result for (result,) in made]
    assert inputs[0] is not None
    y, bound = expected(chosen, inputs)
    for result in results:
        assert result.dtype == inputs[0].dtype
        assert result.shape == y.shape
        assert np.all(np.abs(result - y) <= bound), np.max(np.abs(result - y) / bound)
    return results[0]


# The operator on the device

# (shape of x, N, group size): M below, at and above the tiles' sizes, N odd, prime and 4 mod 8, K odd for one group,
# groups of half a unit, of units and of sizes that are spread.
CASES = [
    ((1, 32), 16, 32),
    ((3, 64), 7, 16),
    ((5, 97), 33, 97),
    ((70, 256), 68, 64),
    ((2, 2, 3, 1, 48), 31, 16),
    ((9, 240), 12, 24),
    ((33,), 1, 33),
    ((2, 768), 5, 256),
]


@pytest.mark.parametrize(
    ("case", "device_kind"),
    [
        (case, kind)
        for case in CASES
        for kind in ("cpu", "cpu without shuffles", "gpu", "gpu of tier 0")
        # Without shuffles only the way that x takes to the lanes differs.
        if kind != "cpu without shuffles" or case in CASES[:4]
    ],
    ids=str,
    indirect=["device_kind"],
)
@pytest.mark.parametrize("activation", ["none", "dynamic_per_token"])
def test_every_kernel_gives_the_product(case: Any, activation: str, device_kind: str, rng: np.random.Generator) -> None:
    shape, n, group = case
    # A quarter of the combinations for each case: a pipeline of the large kernels takes lavapipe seconds.
    number = CASES.index(case) + 3 * (activation == "none")
    bits, dtype = [(4, np.float32), (8, np.float32), (8, np.float16), (4, np.float16)][number % 4]
    bias = [None, np.float32, dtype][rng.integers(3)]
    inputs = operands(rng, shape, n, group, bits, dtype, bias)
    check(attributes(group, activation, dtype), inputs, bits)


@pytest.mark.parametrize(
    ("activation", "bits", "dtype"), [("none", 4, np.float32), ("dynamic_per_token", 8, np.float16)]
)
def test_rows_that_fill_no_tile(
    activation: str, bits: int, dtype: Any, rng: np.random.Generator, monkeypatch: Any
) -> None:
    """They are multiplied by another kernel beside the tiles; each sees its own rows of the buffers."""
    monkeypatch.setattr(row_parts, "ONE_ROUND", 0)
    inputs = [*operands(rng, (131, 96), 34, 96, bits, dtype, dtype), rng.standard_normal((131, 34)).astype(dtype)]
    chosen = attributes(96, activation, dtype, epilogue="relu")
    with chosen_for("quantized_linear", kind="discrete"):
        graph, _ = one_node_graph("quantized_linear", chosen, inputs, int4={1} if bits == 4 else ())
        types = [graph.tensors[index].type for index in graph.nodes[0].inputs if index is not None]
        capabilities = open_device().physical.capabilities(max_tier(None))
        offered = OPERATOR.variants(
            chosen, types, OPERATOR.infer(chosen, types), replace(capabilities, kind="discrete")
        )
        in_parts = [name for name, kernels in offered if any(arg.part for arg in kernels.dispatches[-1].buffers)]
        assert in_parts
        for name in in_parts[:2]:
            check(chosen, inputs, bits, variant=name)
        odd = [*operands(rng, (131, 96), 33, 96, bits, np.float16)]
        check(attributes(96, activation, np.float16), odd, bits, variant=in_parts[0])


@pytest.mark.parametrize("activation", ["none", "dynamic_per_token"])
def test_zero_points_of_weights(activation: str, device_kind: str, rng: np.random.Generator) -> None:
    """One row and many, groups of half a unit, of units and of all columns; and 2-bit weights without them."""
    cases = [((1, 64), 31, 16, 4), ((3, 96), 5, 96, 8), ((9, 2, 96), 34, 32, 4), ((20, 80), 9, 16, 8)]
    cases += [((2, 96), 7, 32, 2), ((11, 80), 6, 16, 2), ((1, 96), 9, 96, 2), ((1, 97), 9, 97, 2)]
    for case, (shape, n, group, bits) in enumerate(cases):
        if device_kind == "cpu without shuffles" and case % 2:
            continue  # as with them but for the way that x takes
        dtype = DTYPES[case // 2 % 2]
        inputs = operands(rng, shape, n, group, bits, dtype, np.float32, zeros=case < 7)
        check(attributes(group, activation, dtype), inputs, bits)


@pytest.mark.parametrize("device_kind", ["cpu", "gpu", "gpu of tier 0"], indirect=True)
@pytest.mark.parametrize("activation", ["none", "dynamic_per_token"])
@pytest.mark.parametrize(
    ("epilogue", "m", "n"), [("sum_relu", 1, 9), ("gelu", 6, 34), ("gelu_tanh", 3, 16), ("silu", 40, 7)]
)
def test_epilogue_and_residual(
    epilogue: str, m: int, n: int, activation: str, device_kind: str, rng: np.random.Generator
) -> None:
    cases = ((np.float32, True), (np.float16, True), (np.float16, False))
    dtype, with_residual = cases[(m + (activation == "none")) % 3]
    inputs = operands(rng, (2, m, 64), n, 32, 4, dtype, np.float32)
    inputs.append((3 * rng.standard_normal((2, m, n))).astype(dtype) if with_residual else None)
    check(attributes(32, activation, dtype, epilogue=epilogue), inputs, 4)


@pytest.mark.parametrize(("bits", "k"), [(8, 1100), (4, 9000)])
def test_long_groups_have_exact_sums(bits: int, k: int, device_kind: str, rng: np.random.Generator) -> None:
    """One group of equal extremes: the integer sum passes 2^24, and is right to the last bit. (GEMV sums units.)"""
    weight = np.full((3, k), -(1 << (bits - 1)), np.int8)
    weight[1, ::2] += 1
    weight[2] = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), k)
    # Range 0 … 255, so that the scale is 1 and x its own integer.
    x = rng.integers(0, 256, (5, k)).astype(np.float32)
    x[:, 0], x[:, 1] = 0, 255
    x[1, 1:] = 255
    chosen = attributes(k, "dynamic_per_token")
    (y,) = run_op("quantized_linear", chosen, [x, weight, np.ones((3, 1), np.float32)], int4={1} if bits == 4 else ())
    exact = x.astype(np.int64) @ weight.astype(np.int64).T
    assert np.array_equal(y, exact.astype(np.float32))


@pytest.mark.parametrize("max_tier", [0, None])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_shape(max_tier: int | None, data: st.DataObject) -> None:
    group = data.draw(st.sampled_from([1, 5, 8, 16, 32, 48, 64, 128]), "group")
    groups = data.draw(st.integers(1, max(1, 200 // group)), "groups")
    shape = (*data.draw(st.lists(st.integers(0, 4), max_size=3), "leading"), group * groups)
    bits = data.draw(st.sampled_from([2, 4, 8]))
    dtype = data.draw(st.sampled_from(DTYPES))
    activation = data.draw(st.sampled_from(["none", "dynamic_per_token", "dynamic_per_tensor"]))
    symmetric = data.draw(st.booleans())
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    n, zeros = data.draw(st.integers(1, 40), "n"), data.draw(st.booleans(), "zeros")
    inputs = operands(generator, shape, n, group, bits, dtype, zeros=zeros)
    check(attributes(group, activation, dtype, symmetric=symmetric), inputs, bits, max_tier=max_tier)


@pytest.mark.parametrize("activation", ["none", "dynamic_per_token", "dynamic_per_tensor"])
def test_nothing_in_nothing_out(activation: str) -> None:
    for shape, n in (((0, 32), 5), ((2, 0, 3, 32), 5), ((4, 32), 0)):
        weight, scale = np.zeros((n, 32), np.int8), np.zeros((n, 1), np.float32)
        (y,) = run_op("quantized_linear", attributes(32, activation), [np.zeros(shape, np.float32), weight, scale])
        assert y.shape == (*shape[:-1], n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite(dtype: Any, device_kind: str, rng: np.random.Generator) -> None:
    """Weight only: what float arithmetic gives. Per token: the row is NaN. Per tensor: all is."""
    inputs = operands(rng, (5, 64), 6, 32, 8, dtype)
    x = inputs[0]
    assert x is not None
    assert inputs[1] is not None
    inputs[1][inputs[1] == 0] = 1  # 0 · inf is NaN
    x[1, 3], x[2, 40], x[4, 0], x[4, 1] = np.inf, np.nan, np.finfo(dtype).max, np.finfo(dtype).min
    (y,) = run_op("quantized_linear", attributes(32, "none", dtype), inputs)
    (reference,) = OPERATOR.reference(attributes(32, "none", dtype), inputs)
    assert np.array_equal(np.isnan(y[:4]), np.isnan(reference[:4]))
    assert np.array_equal(y[1], reference[1])
    # The range of the last row overflows.
    (y,) = run_op("quantized_linear", attributes(32, "dynamic_per_token", dtype), inputs)
    assert np.isnan(y).all(axis=1).tolist() == [False, True, True, False, True]
    assert np.isfinite(y[[0, 3]]).all()
    (y,) = run_op("quantized_linear", attributes(32, "dynamic_per_tensor", dtype), inputs)
    assert np.isnan(y).all()


def test_rows_of_zeros_are_zero(device_kind: str) -> None:
    inputs: list[Array | None] = [
        np.zeros((3, 32), np.float32),
        np.full((2, 32), -8, np.int8),
        np.ones((2, 1), np.float32),
    ]
    for qparams in ("torchao", "pt2e"):
        for activation in ("dynamic_per_token", "dynamic_per_tensor"):
            (y,) = run_op("quantized_linear", attributes(32, activation, qparams=qparams), inputs, int4={1})
            assert np.array_equal(y, np.zeros((3, 2)))


def shared_input_graph(group_sizes: tuple[int, ...], activation: str) -> Any:
    builder = GraphBuilder()
    x = builder.input("x", TensorType(DType.FLOAT32, (6, 64)))
    outputs: list[int] = []
    for n, group in enumerate(group_sizes, 3):
        weight = builder.constant(f"weight{n}", np.full((n, 64), n - 5, np.int8), DType.INT4)
        scale = builder.constant(f"scale{n}", np.full((n, 64 // group), 0.25, np.float32))
        chosen = attributes(group, activation)
        types = [builder.tensors[index].type for index in (x, weight, scale)]
        outputs += builder.node("quantized_linear", (x, weight, scale), OPERATOR.infer(chosen, types), chosen)
    return builder.build(outputs)


@pytest.mark.parametrize("activation", ["dynamic_per_token", "dynamic_per_tensor"])
def test_layers_with_one_input_quantize_it_once(activation: str, rng: np.random.Generator) -> None:
    """Also where their widths and group sizes differ."""
    graph = shared_input_graph((16, 32, 64), activation)
    check_plan(graph)
    plan = make_plan(graph, capabilities())
    kernels = [step.dispatch.kernel for step in plan.steps if step.dispatch is not None]
    passes = 1 if activation == "dynamic_per_token" else 3
    assert sum(kernel.startswith("quantize_") for kernel in kernels) == passes
    assert len(kernels) == passes + 3
    x = rng.standard_normal((6, 64)).astype(np.float32)
    for n, y in enumerate(run_graph(graph, [x]), 3):
        assert y.shape == (6, n)
        assert np.ptp(y, axis=1).max() == 0  # all output channels are alike

"""quantized_linear with 8-bit activations in, and 8-bit results out: exact integer sums, and float64 for the rest."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from harness import every_variant, run_op
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from variants import chosen_for

from torchvk import ops
from torchvk.graph import DType
from torchvk.ops.quantized_linear import QuantizedLinearAttributes

Array = np.ndarray[Any, Any]
RANGE = {"int8": (-128, 127), "uint8": (0, 255)}


@st.composite
def cases(draw: st.DrawFn) -> tuple[QuantizedLinearAttributes, list[Array | None], set[int]]:
    """Attributes, operands and which of these are int4."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    k = draw(st.sampled_from([1, 32, 40, 48, 64, 97, 128, 300]))
    n = draw(st.sampled_from([1, 8, 51, 36, 64]))
    lead = draw(st.sampled_from([(), (1,), (3,), (2, 3), (17,), (1, 2, 2, 9)]))
    group = draw(st.sampled_from([g for g in (k, 16, 20, 32) if k % g == 0]))
    bits = draw(st.sampled_from([4, 8]))
    x_type = draw(st.sampled_from(["int8", "uint8"]))
    low, high = RANGE[x_type]
    x = rng.integers(low, high, (*lead, k), x_type, endpoint=True)
    zero = draw(st.sampled_from([low, (low + high + 1) // 2, int(rng.integers(low, high))]))
    limit = 1 << (bits - 1)
    weight = rng.integers(-limit, limit, (n, k), np.int8)
    half = draw(st.booleans())
    scale = rng.uniform(0.001, 0.01, (n, k // group)).astype(np.float16 if half else np.float32)
    bias = rng.standard_normal(n).astype(np.float32) if draw(st.booleans()) else None
    given: dict[str, Any] = {"group_size": k if group == k else group, "activation": "static"}
    given |= {"input_scale": float(np.float32(rng.uniform(0.01, 0.1))), "input_zero_point": zero}
    given["epilogue"] = draw(st.sampled_from(["none", "relu", "silu"]))
    given["dtype"] = DType.FLOAT16 if draw(st.booleans()) else DType.FLOAT32
    if (output := draw(st.sampled_from([None, "int8", "uint8"]))) is not None:
        low, high = RANGE[output]
        bounds = sorted(map(int, rng.integers(low, high, 2, endpoint=True))) if draw(st.booleans()) else (low, high)
        given |= {"output_dtype": output, "output_scale": float(np.float32(0.002 * k**0.5))}
        given |= {"output_zero_point": int(rng.integers(low, high)), "output_min": bounds[0], "output_max": bounds[1]}
    return QuantizedLinearAttributes(**given), [x, weight, scale, bias], {1} if bits == 4 else set()


def exact(attributes: QuantizedLinearAttributes, inputs: list[Array | None]) -> tuple[Array, Array]:
    """The float result in float64, and the magnitude that its rounding scales with."""
    x, weight, scale, bias = (None if each is None else each.astype(np.float64) for each in inputs)
    assert x is not None
    assert weight is not None
    assert scale is not None
    w = (weight.reshape(len(weight), -1, attributes.group_size) * scale[..., None]).reshape(weight.shape)
    rows = (x - attributes.input_zero_point) * attributes.input_scale
    y, size = rows @ w.T, np.abs(rows) @ np.abs(w).T
    if bias is not None:
        y, size = y + bias, size + np.abs(bias)
    if attributes.epilogue == "relu":
        y = np.maximum(y, 0)
    elif attributes.epilogue == "silu":
        y = y / (1 + np.exp(-y))
    return y, size


def check(attributes: QuantizedLinearAttributes, inputs: list[Array | None], y: Array) -> None:
    want, size = exact(attributes, inputs)
    assert y.shape == want.shape
    # Sums of groups and bias are rounded, and added up in float32; silu costs a few units more.
    error = size * 2.0**-22 + 1e-6
    if attributes.output_dtype is None:
        assert y.dtype == attributes.dtype.numpy
        assert np.all(np.abs(y - want) <= error + np.abs(want) * (2.0**-10 if y.dtype == np.float16 else 0))
        return
    assert y.dtype == np.dtype(attributes.output_dtype)
    lowest, highest = ((want + sign * error) / attributes.output_scale for sign in (-1, 1))
    limits = attributes.output_min, attributes.output_max
    lowest, highest = (np.clip(np.rint(b) + attributes.output_zero_point, *limits) for b in (lowest, highest))
    assert np.all((lowest <= y) & (y <= highest))
    # Only where the exact value is within rounding of a tie is there a choice at all.
    assert np.mean(lowest != highest) <= 0.01 + 2 / y.size


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_device(case: tuple[QuantizedLinearAttributes, list[Array | None], set[int]]) -> None:
    attributes, inputs, int4 = case
    (reference,) = ops.get("quantized_linear").reference(attributes, inputs)
    check(attributes, inputs, reference)
    for (y,) in every_variant("quantized_linear", attributes, inputs, int4=int4):
        check(attributes, inputs, y)
    (y,) = run_op("quantized_linear", attributes, inputs, int4=int4, max_tier=0)
    check(attributes, inputs, y)


def eight_bits(rng: np.random.Generator, prefix: str) -> dict[str, Any]:
    """dtype, zero point and bounds of a quantization."""
    dtype = str(rng.choice([*RANGE]))
    low, high = RANGE[dtype]
    numbers = {"zero_point": low + int(rng.integers(100, 160)), "min": low + int(rng.integers(9)), "max": high - 5}
    return {f"{prefix}_{name}": value for name, value in {"dtype": dtype, **numbers}.items()}


@pytest.mark.tier
@pytest.mark.parametrize(
    ("kind", "bits", "m", "n", "k"),
    [
        ("this", 8, 1, 64, 64),
        ("this", 8, 37, 34, 96),
        ("gpu", 8, 1, 64, 64),
        ("gpu", 8, 3, 51, 40),
        ("gpu", 4, 37, 34, 40),
        ("gpu", 8, 70, 64, 80),
    ],
)
def test_sums_of_8_bit_residuals(kind: str, bits: int, m: int, n: int, k: int, rng: np.random.Generator) -> None:
    """By every kernel the bytes of the layer and quantized_arithmetic behind it. All numbers before the sum have few
    bits, so that there is no rounding that could differ but that to 8 bits."""
    x = rng.integers(-128, 127, (m, k), np.int8, endpoint=True)
    top = 1 << (bits - 1)
    weight = rng.integers(-top, top, (n, k)).astype(np.int8)
    scale = np.exp2(rng.integers(-2, 1, (n, 1))).astype(np.float32) / top
    bias = rng.integers(-99, 99, n).astype(np.float32) / 8
    attributes = {"group_size": k, "activation": "static", "input_scale": 2.0**-5, "input_zero_point": 2}
    attributes |= {"output_scale": 0.5, **eight_bits(rng, "output")}
    added = {"residual_scale": 0.37, "residual_zero_point": 5, "sum_scale": 0.61, **eight_bits(rng, "sum")}
    residual = rng.integers(0, 255, (m, n), np.uint8, endpoint=True).view(str(rng.choice([*RANGE])))
    operator = ops.get("quantized_linear")
    (alone,) = operator.reference(QuantizedLinearAttributes(**attributes), [x, weight, scale, bias])
    both = {"operation": "add", "input_scale": 0.5, "input_zero_point": attributes["output_zero_point"]}
    both |= {"other_scale": 0.37, "other_zero_point": 5}
    both |= {name.replace("sum", "output"): value for name, value in added.items() if name.startswith("sum")}
    (wanted,) = run_op("quantized_arithmetic", both, [alone, residual])
    assert len(np.unique(wanted)) > min(50, m * n / 4)
    chosen = QuantizedLinearAttributes(**attributes, **added)
    inputs = [x, weight, scale, bias, residual]
    np.testing.assert_array_equal(operator.reference(chosen, inputs)[0], wanted)
    with nullcontext() if kind == "this" else chosen_for("quantized_linear", kind="discrete"):
        for (got,) in every_variant("quantized_linear", chosen, inputs, int4={1} if bits == 4 else ()):
            np.testing.assert_array_equal(got, wanted)

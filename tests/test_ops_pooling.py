"""Pooling against torch, over the parameters that torch has."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
import torch.nn.functional as F
from harness import run_op
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import Array, assert_same, random
from variants import chosen_for

from torchvk import ops
from torchvk.graph import DType, TensorType
from torchvk.ops.pooling import AdaptiveAvgPoolAttributes, AvgPoolAttributes, MaxPoolAttributes
from torchvk.ops.quantized_pooling import QuantizedAdaptiveAvgPoolAttributes, QuantizedAvgPoolAttributes

MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVG_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
ADAPTIVE = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def last(x: torch.Tensor) -> Array:
    return np.ascontiguousarray(x.movedim(1, -1).numpy())


def first(x: Array) -> torch.Tensor:
    return torch.from_numpy(x).movedim(-1, 1)


def check(name: str, attributes: Any, x: Array, want: torch.Tensor, ulps: float = 0, absolute: float = 0) -> None:
    """Reference and kernel, channels last, against torch's result."""
    expected = last(want)
    assert_same(ops.get(name).reference(attributes, [x])[0], expected, ulps, absolute)
    assert_same(run_op(name, attributes, [x])[0], expected, ulps, absolute)


@st.composite
def cases(draw: st.DrawFn, dilated: bool) -> tuple[int, dict[str, Any], tuple[int, ...]]:
    """Rank, torch's arguments, and the shape of an input that they make sense for; channels last."""
    rank = draw(st.integers(1, 3))
    numbers = {name: [] for name in ("kernel_size", "stride", "padding", "dilation")}
    sizes = []
    for _ in range(rank):
        kernel, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2)) if dilated else 1
        numbers["kernel_size"].append(kernel)
        numbers["stride"].append(draw(st.integers(1, 3)))
        numbers["padding"].append(draw(st.integers(0, kernel // 2)))
        numbers["dilation"].append(dilation)
        sizes.append((kernel - 1) * dilation + 1 + draw(st.integers(0, 4)))
    if not dilated:
        del numbers["dilation"]
    arguments = {**numbers, "ceil_mode": draw(st.booleans())}
    return rank, arguments, (draw(st.integers(1, 2)), *sizes, draw(st.sampled_from((1, 3, 4, 6))))


def attributes_of(arguments: dict[str, Any], output: tuple[int, ...]) -> dict[str, Any]:
    kept = {name: arguments[name] for name in ("stride", "padding", "dilation") if name in arguments}
    return {"kernel": arguments["kernel_size"], "output": list(output), **kept}


@pytest.mark.tier
@settings(max_examples=25, deadline=None)
@given(cases(dilated=True), st.sampled_from(("float32", "float16", "int8", "uint8")))
def test_max_pool(case: tuple[int, dict[str, Any], tuple[int, ...]], dtype: str) -> None:
    rank, arguments, shape = case
    x = random(dtype, shape)
    if x.dtype.kind == "f":
        x.flat[::7] = np.nan
        x.flat[3::5] = -np.inf
    # torch has no uint8 kernel for all ranks: its values are those of int32.
    wide = x if x.dtype.kind == "f" else x.astype(np.float32)
    want = MAX_POOLS[rank](first(wide), **arguments)
    if x.dtype.kind != "f":
        want = want.clamp(min=int(np.iinfo(x.dtype).min)).to(torch.int8 if dtype == "int8" else torch.uint8)
    check("max_pool", MaxPoolAttributes(**attributes_of(arguments, want.shape[2:])), x, want)


@pytest.mark.tier
@settings(max_examples=25, deadline=None)
@given(cases(dilated=False), st.booleans(), st.sampled_from((None, 1, 5)), st.sampled_from(("float32", "float16")))
def test_avg_pool(
    case: tuple[int, dict[str, Any], tuple[int, ...]], include: bool, divisor: int | None, dtype: str
) -> None:
    rank, arguments, shape = case
    x = random(dtype, shape)
    if rank > 1:
        arguments["divisor_override"] = divisor
    want = AVG_POOLS[rank](first(x).float(), count_include_pad=include, **arguments).to(first(x).dtype)
    given = attributes_of(arguments, want.shape[2:])
    attributes = AvgPoolAttributes(**given, count_include_pad=include, divisor=(divisor or 0) if rank > 1 else 0)
    # Two roundings of the result in another order; sums of up to 27 elements may cancel.
    check("avg_pool", attributes, x, want, ulps=1, absolute=27 * 2.0**-22 if dtype == "float32" else 2.0**-20)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3), st.sampled_from((2, 4)))
def test_adaptive_avg_pool(sizes: list[tuple[int, int]], channels: int) -> None:
    x = random("float32", (2, *(size for size, _ in sizes), channels))
    output = [size for _, size in sizes]
    want = ADAPTIVE[len(sizes)](first(x), output)
    check("adaptive_avg_pool", AdaptiveAvgPoolAttributes(output), x, want, ulps=1, absolute=2.0**-14)


PARAMETERS = {
    "equal": {"input_scale": 0.05, "input_zero_point": -3, "output_scale": 0.05, "output_zero_point": -3},
    "other": {"input_scale": 0.05, "input_zero_point": 7, "output_scale": 0.021, "output_zero_point": -11},
}


def pt2e(x: Array, parameters: dict[str, Any], function: Any) -> torch.Tensor:
    """dequantize, pool and quantize as a converted module does."""
    low, high = np.iinfo(x.dtype).min, np.iinfo(x.dtype).max
    q = first(x).contiguous()
    decomposed = torch.ops.quantized_decomposed
    given = (parameters["input_scale"], parameters["input_zero_point"])
    real = function(decomposed.dequantize_per_tensor(q, *given, low, high, q.dtype))
    if parameters.get("output_dtype", "") is None:
        return real
    wanted = (parameters["output_scale"], parameters["output_zero_point"])
    return decomposed.quantize_per_tensor(real, *wanted, low, high, q.dtype)


@pytest.mark.tier
@pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS)
@pytest.mark.parametrize(("channels", "dtype"), [(8, "int8"), (5, "int8"), (4, "uint8")])
def test_quantized_averages_equal_eager(parameters: dict[str, Any], channels: int, dtype: str) -> None:
    """Small windows: every element, ties included."""
    parameters = {**parameters, "output_dtype": dtype}
    if dtype == "uint8":
        parameters |= {"input_zero_point": 128, "output_zero_point": 131, "output_min": 0, "output_max": 255}
    x = random(dtype, (2, 12, 10, channels))
    want = pt2e(x, parameters, lambda y: F.avg_pool2d(y, 3, 2, 1, count_include_pad=False))
    check(
        "quantized_avg_pool", QuantizedAvgPoolAttributes([3, 3], [2, 2], [1, 1], [6, 5], False, **parameters), x, want
    )
    want = pt2e(x, parameters, lambda y: F.avg_pool2d(y, 2))
    check("quantized_avg_pool", QuantizedAvgPoolAttributes([2, 2], [2, 2], [0, 0], [6, 5], **parameters), x, want)
    want = pt2e(x, parameters, lambda y: F.adaptive_avg_pool2d(y, (5, 3)))
    check("quantized_adaptive_avg_pool", QuantizedAdaptiveAvgPoolAttributes([5, 3], **parameters), x, want)


@pytest.mark.parametrize("channels", [12, 3])
@pytest.mark.parametrize("kind", ["this", "discrete"])
def test_means_of_large_windows(channels: int, kind: str) -> None:
    """Shared by a workgroup on a GPU; of integers exact but for the last rounding."""
    window = {"kernel": [9, 11], "stride": [1, 1], "padding": [0, 0], "output": [1, 1]}
    parameters = {**PARAMETERS["other"], "output_dtype": "int8"}
    for name, dtype in (("avg_pool", "float32"), ("quantized_avg_pool", "int8"), ("avg_pool", "float16")):
        x = random(dtype, (2, 9, 11, channels))
        with nullcontext() if kind == "this" else chosen_for(name, kind=kind):
            if dtype != "int8":
                want = first(x).float().mean((2, 3), keepdim=True).to(first(x).dtype)
                check(name, AvgPoolAttributes(**window), x, want, ulps=1, absolute=2.0**-20)
                continue
            want = pt2e(x, parameters, lambda y: y.mean((2, 3), keepdim=True))
            check(name, QuantizedAvgPoolAttributes(**window, **parameters), x, want)
            parameters["output_dtype"] = None
            want = pt2e(x, parameters, lambda y: y.mean((2, 3), keepdim=True))
            check(name, QuantizedAvgPoolAttributes(**window, **parameters), x, want, absolute=2.0**-18)


def test_windows_that_make_no_sense() -> None:
    x = [TensorType(DType.FLOAT32, (1, 4, 4, 3))]

    def reason(**changes: Any) -> str | None:
        window = {"kernel": [2, 2], "stride": [2, 2], "padding": [0, 0], "dilation": [1, 1], "output": [2, 2]}
        return ops.supports("max_pool", MaxPoolAttributes(**window | changes), x)

    assert reason() is None
    assert "more than half" in str(reason(padding=[2, 0]))
    assert "lies outside" in str(reason(output=[4, 2]))
    assert "each of 2 spatial" in str(reason(kernel=[2]))
    assert "at least 1" in str(reason(stride=[0, 1]))
    assert "out of range" in str(reason(kernel=[2**31, 1]))
    huge = [TensorType(DType.FLOAT32, (1, 400, 400, 3))]
    assert "at most 12288" in str(ops.supports("avg_pool", AvgPoolAttributes([200, 200], [1, 1], [0, 0], [1, 1]), huge))

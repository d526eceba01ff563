"""8-bit results, over a hundred thousand elements in all, beside what PT2E's converted modules compute: eager mode's
dequantize, operator, quantize.

torchvk's sums are exact, eager's are float32: an element may differ, by one step, where eager's rounding carries it
over a tie. That error is at most about sqrt(K) ulp of sums of a hundred steps, 1e-5 steps, and so is the share of
elements that differ. One in ten thousand is allowed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
import torch.nn.functional as F
from convolutions import Convolution, first, last
from harness import every_variant
from variants import Array

from torchvk import ops

QD = torch.ops.quantized_decomposed
RANGE = {torch.int8: (-128, 127), torch.uint8: (0, 255)}


def dequantized(q: Array, scale: float, zero: int) -> torch.Tensor:
    x = torch.from_numpy(q)
    return QD.dequantize_per_tensor(x, scale, zero, *RANGE[x.dtype], x.dtype)  # type: ignore[no-any-return]


def weights(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Array, Array, torch.Tensor]:
    """int8 with a scale for each row, and the floats."""
    q, scale = rng.integers(-128, 128, shape, np.int8), rng.uniform(0.001, 0.003, shape[0]).astype(np.float32)
    zeros = torch.zeros(shape[0], dtype=torch.int64)
    floats = QD.dequantize_per_channel(torch.from_numpy(q), torch.from_numpy(scale), zeros, 0, -128, 127, torch.int8)
    return q, scale, floats


def compare(
    name: str,
    given: dict[str, Any],
    inputs: list[Array | None],
    y: torch.Tensor,
    dtype: torch.dtype,
    allowed: float = 1e-4,
) -> None:
    """The reference and every variant against eager's float result ``y``, quantized to the whole of the range."""
    low, high = RANGE[dtype]
    scale = float(y.max() - y.min()) / 255
    zero = min(max(low - round(float(y.min()) / scale), low), high)
    want = QD.quantize_per_tensor(y, scale, zero, low, high, dtype).numpy().astype(np.int32)
    assert len(np.unique(want)) > 200
    named = {"output_dtype": str(dtype).removeprefix("torch."), "output_scale": scale, "output_zero_point": zero}
    attributes = ops.get(name).attributes(**given, **named, output_min=low, output_max=high)
    for (got,) in (ops.get(name).reference(attributes, inputs), *every_variant(name, attributes, inputs)):
        steps = np.abs(got.astype(np.int32) - want)
        assert steps.max() <= 1
        assert np.count_nonzero(steps) <= allowed * want.size


def test_linear(rng: np.random.Generator) -> None:
    x = rng.integers(0, 256, (900, 99), np.uint8)
    q, scale, w = weights(rng, (64, 99))
    bias = rng.standard_normal(64).astype(np.float32)
    y = F.linear(dequantized(x, 0.017, 131), w, torch.from_numpy(bias))
    given = {"group_size": 99, "activation": "static", "input_scale": 0.017, "input_zero_point": 131}
    compare("quantized_linear", given, [x, q, scale[:, None], bias], y, torch.int8)


def test_conv(rng: np.random.Generator) -> None:
    case = Convolution(1, (60, 58), (3, 3), (1, 1), (1, 0), (1, 1), 1, 16, 16)
    x = rng.integers(-128, 128, (1, *case.size, 16), np.int8)
    q, scale, w = weights(rng, (16, 16, 3, 3))
    bias = rng.standard_normal(16).astype(np.float32)
    y = F.conv2d(torch.from_numpy(first(dequantized(x, 0.021, -5).numpy())), w, torch.from_numpy(bias), padding=(1, 0))
    given = {**case.attributes, "activation": "static", "input_scale": 0.021, "input_zero_point": -5}
    operands = [x, case.weight(q), scale, bias]
    compare("quantized_conv", given, operands, torch.from_numpy(last(y.numpy())), torch.uint8)


def test_arithmetic(rng: np.random.Generator) -> None:
    """Nothing differs: each of the three steps is rounded as eager mode's."""
    for operation in ("add", "sub", "mul"):
        a, b = rng.integers(-128, 128, (12_000,), np.int8), rng.integers(0, 256, (12_000,), np.uint8)
        (sa, za), (sb, zb) = (float(rng.uniform(0.01, 0.1)), 17), (float(rng.uniform(0.01, 0.1)), 99)
        y = getattr(torch, operation)(dequantized(a, sa, za), dequantized(b, sb, zb))
        given = {"operation": operation, "input_scale": sa, "input_zero_point": za}
        given |= {"other_scale": sb, "other_zero_point": zb}
        compare("quantized_arithmetic", given, [a, b], y, torch.int8, allowed=0)

"""conv against torch's convolutions in float64, the reference and the kernels of every kind of device.

A sum of K products in float32, in any order, is off by at most K · 2^-24 · Σ|x||w| (see test_ops_linear.py); one more
for the bias.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from convolutions import Convolution, convolutions, first, last
from harness import every_variant, run_op
from hypothesis import given, settings
from hypothesis import strategies as st
from variants import DEVICES, EPSILON, Array, assert_within, chosen_for

from torchvk import ops
from torchvk.graph import DType, TensorType
from torchvk.ops.conv import ConvAttributes
from torchvk.ops.epilogue import apply_epilogue

OPERATOR = ops.get("conv")


def exact(case: Convolution, x: Array, weight: Array, bias: Array | None) -> Array:
    """torch's own, in float64, channels last."""
    module = case.module(bias is not None).double()
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(weight.astype(np.float64)))
        if bias is not None:
            module.bias.copy_(torch.from_numpy(bias.astype(np.float64)))
        return last(module(torch.from_numpy(first(x).astype(np.float64))).numpy())


class Operands:
    """Random ones, and what bounds the error of the result."""

    def __init__(self, case: Convolution, dtype: str, bias: bool, residual: bool, epilogue: str, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)

        def random(*shape: int) -> Array:
            return np.asarray(generator.standard_normal(shape)).astype(dtype)

        x = random(case.images, *case.size, case.channels * case.groups)
        weight = random(*case.module().weight.shape)
        b = random(case.outputs * case.groups) if bias else None
        y = exact(case, x, weight, b)
        size = exact(case, np.abs(x), np.abs(weight), None if b is None else np.abs(b))
        bound = (case.channels * int(np.prod(case.kernel)) + 1) * EPSILON * size
        if epilogue != "none":
            # The slope of all of them is at most 1.5, their own error a few ulp of what they are given.
            bound = 1.5 * bound + 8 * EPSILON * size
        r = random(*y.shape) if residual else None
        y = apply_epilogue(epilogue, y, r)
        if r is not None:
            bound = bound + EPSILON * (size + np.abs(r))
        self.attributes = ConvAttributes(**case.attributes, epilogue=epilogue)
        self.operands = [x, case.weight(weight), b, r]
        self.exact, self.bound, self.dtype = y, bound, dtype

    def check_reference(self) -> None:
        (got,) = OPERATOR.reference(self.attributes, self.operands)
        assert_within(got, self.exact, self.bound, self.dtype)

    def check_kernels(self, but: str | None = None) -> None:
        for (got,) in every_variant("conv", self.attributes, self.operands, but, constants=(1,)):
            assert_within(got, self.exact, self.bound, self.dtype)


@given(convolutions(), st.sampled_from(("float32", "float16")), st.booleans(), st.booleans(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_reference(case: Convolution, dtype: str, bias: bool, residual: bool, seed: int) -> None:
    Operands(case, dtype, bias, residual, "none", seed).check_reference()


@pytest.mark.tier
@given(convolutions(), st.sampled_from(("float32", "float16")), st.booleans(), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_any_convolution(case: Convolution, dtype: str, extras: bool, seed: int) -> None:
    epilogue = ("relu", "sum_relu")[seed % 2] if extras else "none"
    operands = Operands(case, dtype, extras, extras, epilogue, seed)
    operands.check_kernels()


CASES = {
    "rows of one image": Convolution(1, (5, 6), (3, 3), (1, 1), (1, 1), (1, 1), 1, 8, 70),
    "large strides": Convolution(2, (9, 11), (3, 5), (2, 3), (1, 2), (1, 1), 1, 12, 33),
    "colours": Convolution(2, (13, 15), (7, 7), (2, 2), (3, 3), (1, 1), 1, 3, 20),
    "odd channels": Convolution(1, (4, 5), (2, 3), (1, 1), (1, 1), (2, 1), 1, 97, 11),
    "odd groups": Convolution(1, (7,), (3,), (1,), (2,), (1,), 3, 5, 7),
    "groups": Convolution(1, (6, 6), (3, 3), (1, 1), (1, 1), (1, 1), 2, 16, 8),
    "many channels": Convolution(2, (6, 7), (3, 3), (2, 1), (1, 1), (1, 1), 2, 32, 36),
    "depthwise": Convolution(2, (7, 9), (3, 3), (2, 1), (1, 1), (1, 1), 32, 1, 1),
    "depthwise, dilated": Convolution(1, (9, 9), (5, 5), (1, 1), (4, 4), (2, 2), 20, 1, 1),
    "depthwise with multiplier": Convolution(1, (5, 5), (3, 3), (1, 1), (0, 0), (1, 1), 6, 1, 3),
    "transposed": Convolution(1, (4, 5), (4, 4), (2, 2), (1, 1), (1, 1), 1, 8, 12, True, (0, 1)),
    "volumes": Convolution(1, (3, 4, 5), (3, 2, 3), (1, 2, 1), (1, 0, 1), (1, 1, 1), 1, 4, 8),
}


@pytest.mark.tier
@pytest.mark.parametrize("kind", ["this", "gpu"])
@pytest.mark.parametrize("name", CASES)
def test_kernels(name: str, kind: str) -> None:
    but = "blocked" if kind == "gpu" else None  # see test_ops_conv_blocked
    with nullcontext() if kind == "this" else chosen_for("conv", kind="discrete"):
        for dtype, residual in (("float32", False), ("float16", True)):
            Operands(CASES[name], dtype, True, residual, "sum_relu" if residual else "relu").check_kernels(but)


@pytest.mark.parametrize("epilogue", ["gelu", "hardswish", "relu6", "sum_relu"])
def test_epilogue_and_residual(epilogue: str) -> None:
    Operands(CASES["rows of one image"], "float32", True, True, epilogue).check_kernels()


def test_no_images() -> None:
    attributes = CASES["depthwise"].attributes
    x, weight = np.zeros((0, 7, 9, 32), np.float32), np.ones((3, 3, 32), np.float32)
    (got,) = run_op("conv", attributes, [x, weight], constants=(1,))
    assert got.shape == (0, 4, 9, 32)


@pytest.mark.parametrize(
    ("changes", "x", "weight", "message"),
    [
        ({}, (1, 5, 4), (3, 3, 5), "the 4 channels|takes a weight \\[O, \\*kernel, 4\\]"),
        ({"groups": 3}, (1, 5, 4), (3, 3, 4), "3 groups do not divide the 4 channels"),
        ({"groups": 2}, (1, 5, 4), (3, 3, 2), "2 groups do not divide the 3 channels of the result"),
        ({"groups": 4}, (1, 5, 4), (3, 3, 1), "takes a weight \\[\\*kernel, O\\]"),
        ({"padding": [0, -4]}, (1, 5, 4), (3, 3, 4), "does not fit"),
        ({"padding": [0]}, (1, 5, 4), (3, 3, 4), "differ in number"),
        ({"stride": [0]}, (1, 5, 4), (3, 3, 4), "must be 1 or more"),
        ({}, (1, 5, 4), (3, 15001, 4), "does not fit"),
        ({"padding": [60000, 0]}, (1, 5, 4), (3, 15001, 4), "sums over 60004 products"),
        ({"stride": [70000]}, (1, 5, 4), (3, 3, 4), "strides above 65535"),
    ],
)
def test_what_makes_no_sense(changes: dict[str, Any], x: Any, weight: Any, message: str) -> None:
    usual = {"stride": [1], "padding": [1, 1], "dilation": [1], "input_dilation": [1]}
    types = [TensorType(DType.FLOAT32, x), TensorType(DType.FLOAT32, weight)]
    reason = ops.supports("conv", ConvAttributes(**{**usual, **changes}), types)
    assert reason is not None
    assert re.search(message, reason), reason


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.FLOAT16])
def test_every_device_has_kernels(device: str, dtype: DType) -> None:
    for case in CASES.values():
        attributes = ConvAttributes(**case.attributes)
        x = TensorType(dtype, (case.images, *case.size, case.channels * case.groups))
        weight = TensorType(dtype, case.weight(case.module().weight.detach().numpy()).shape)
        outputs = OPERATOR.infer(attributes, [x, weight])
        kernels = OPERATOR.kernels(attributes, [x, weight], outputs, DEVICES[device])
        assert all(len(dispatch.push) <= 128 for dispatch in kernels.dispatches)

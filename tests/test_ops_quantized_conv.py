"""quantized_conv against torch's convolutions of the dequantized operands in float64.

With 8-bit activations the sums are exact: what is left is the rounding of sum · scale + bias in float32, a few ulp. So
a quantized result differs by at most one step, and only next to a tie: how many do is counted.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from convolutions import Convolution, convolutions, first, last
from harness import every_variant, one_node_graph, run_op
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops_conv import CASES
from test_ops_conv import Operands as FloatOperands
from variants import DEVICES, EPSILON, HALF_EPSILON, Array, assert_within, chosen_for

from torchvk import ops
from torchvk.graph import DType, TensorType
from torchvk.ops.epilogue import apply_epilogue
from torchvk.ops.quantized_conv_case import QuantizedConvAttributes
from torchvk.runtime import Session

OPERATOR = ops.get("quantized_conv")


class Operands:
    """Random ones of a scheme, and the exact result before it is quantized."""

    def __init__(
        self,
        case: Convolution,
        x_dtype: str = "int8",
        activation: str = "static",
        bits: int = 8,
        output: str | None = "int8",
        bias: bool = True,
        epilogue: str = "none",
        dtype: str = "float32",
        residual: bool = False,
        seed: int = 0,
    ) -> None:
        generator = np.random.default_rng(seed)
        outputs = case.outputs * case.groups
        shape = (case.images, *case.size, case.channels * case.groups)
        limit = 1 << (bits - 1)
        weight = generator.integers(-limit, limit, case.module().weight.shape, np.int8)
        scale = generator.uniform(0.01, 0.03, outputs).astype(np.float32)
        self.bits, self.output = bits, output
        zero, x_scale = 0, np.float32(1)
        if activation == "none":
            x = generator.standard_normal(shape).astype(x_dtype)
        else:
            limits = np.iinfo(x_dtype)
            x = generator.integers(limits.min, limits.max, shape, x_dtype, endpoint=True)
            zero, x_scale = int(generator.integers(limits.min, limits.max, endpoint=True)), np.float32(0.0173)
        b = generator.standard_normal(outputs).astype(np.float32) * 4 if bias else None
        real = (x.astype(np.float64) - zero) * np.float64(x_scale)
        # A transposed weight has its channels of y second.
        channels = scale.astype(np.float64).reshape(case.groups, 1, case.outputs)
        if case.transposed:
            spread = np.broadcast_to(channels, (case.groups, case.channels, case.outputs)).reshape(-1, case.outputs)
            factors = spread.reshape(*weight.shape[:2], *(1,) * case.rank)
        else:
            factors = channels.reshape(-1, *(1,) * (case.rank + 1))
        y = self.convolve(case, real, weight * factors)
        size = self.convolve(case, np.abs(real), np.abs(weight * factors))
        k = case.channels * int(np.prod(case.kernel))
        # The last is what float64 leaves of sums that are 0.
        self.bound = 6 * EPSILON * np.abs(y) + (k + 2) * 2.0**-52 * size
        if activation == "none":
            self.bound = (k + 3) * EPSILON * size
            if x_dtype == "float16":  # the weight may be made float16
                self.bound = self.bound + HALF_EPSILON * size
        if b is not None:
            y = y + b
            self.bound = self.bound + EPSILON * (np.abs(y) + np.abs(b))
        self.dtype = x_dtype if activation == "none" else dtype
        r = generator.standard_normal(y.shape).astype(self.dtype) if residual else None
        if r is not None:
            self.bound = self.bound + EPSILON * (np.abs(y) + 2 * np.abs(r))
        self.exact = apply_epilogue(epilogue, y, r)
        steps = {"output_scale": float(np.abs(self.exact).max() / 100 + 1e-3), "output_zero_point": 7}
        limits = {"int8": (-120, 127), "uint8": (3, 250)}
        self.attributes = QuantizedConvAttributes(
            **case.attributes,
            activation=activation,  # type: ignore[arg-type]
            input_scale=float(x_scale) if activation == "static" else 1.0,
            input_zero_point=zero if activation == "static" else 0,
            dtype=DType(dtype),
            epilogue=epilogue,  # type: ignore[arg-type]
            **(
                {}
                if output is None
                else {**steps, "output_dtype": output, "output_min": limits[output][0], "output_max": limits[output][1]}
            ),
        )
        dynamic = activation == "dynamic"
        ones = (1,) * len(shape)
        self.operands: list[Array | None] = [
            *(x, case.weight(weight), scale, b),
            np.full(ones, x_scale) if dynamic else None,
            np.full(ones, zero, np.int32) if dynamic else None,
        ]
        if r is not None:
            self.operands.append(r)

    def convolve(self, case: Convolution, x: Array, weight: Array) -> Array:
        module = case.module(bias=False).double()
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(weight))
            return last(module(torch.from_numpy(first(x))).numpy())

    @property
    def options(self) -> dict[str, Any]:
        return {"int4": (1,)} if self.bits == 4 else {}

    def check(self, got: Array) -> tuple[int, int]:
        """Elements, and those that are one step off (more is an error)."""
        if self.output is None:
            assert_within(got, self.exact, 1.2 * self.bound + 8 * EPSILON * np.abs(self.exact), self.dtype)
            return 0, 0
        a = self.attributes
        assert got.dtype == np.dtype(self.output)
        real = self.exact / a.output_scale
        wanted = np.clip(np.rint(real) + a.output_zero_point, a.output_min, a.output_max)
        off = np.abs(got.astype(np.float64) - wanted)
        assert off.max(initial=0) <= 1
        # The float32 value's rounding, and that of its product with the rounded 1 / scale.
        room = 1.2 * self.bound / a.output_scale + 3 * EPSILON * np.abs(real)
        assert np.all((np.abs(real - np.floor(real) - 0.5) <= room) | (off == 0))
        return off.size, int((off > 0).sum())


@st.composite
def schemes(draw: st.DrawFn) -> Operands:
    activation = draw(st.sampled_from(("static", "static", "dynamic", "none")))
    x_dtype = draw(st.sampled_from(("float32", "float16") if activation == "none" else ("int8", "uint8")))
    return Operands(
        draw(convolutions(max_rank=2)),
        x_dtype,
        activation,
        bits=draw(st.sampled_from((8, 8, 4))),
        output=draw(st.sampled_from((None, "int8", "uint8"))),
        bias=draw(st.booleans()),
        epilogue=draw(st.sampled_from(("none", "relu", "sum_relu"))),
        residual=draw(st.booleans()),
        dtype=draw(st.sampled_from(("float32", "float16"))),
        seed=draw(st.integers(0, 99)),
    )


@pytest.mark.hypothesis
def test_any_convolution() -> None:
    counts = []

    @given(schemes(), st.integers(0, 2))
    @settings(max_examples=40, deadline=None)
    def run(operands: Operands, on_device: int) -> None:
        counts.append(operands.check(OPERATOR.reference(operands.attributes, operands.operands)[0]))
        if on_device == 0:
            for (got,) in every_variant("quantized_conv", operands.attributes, operands.operands, **operands.options):
                counts.append(operands.check(got))

    run()
    total, off = (sum(column) for column in zip(*counts, strict=True))
    assert off <= max(2, 1e-4 * total), f"{off} of {total}"


@pytest.mark.tier
@pytest.mark.parametrize(
    ("name", "kind", "bits"),
    [
        *((name, "this", 8) for name in CASES),
        *((name, "gpu", 4) for name in CASES),
        *((name, "this", 4) for name in ("rows of one image", "colours", "depthwise")),
        ("depthwise", "gpu", 8),
    ],
)
def test_kernels(name: str, kind: str, bits: int) -> None:
    total = off = 0
    but = "blocked" if kind == "gpu" else None  # see test_ops_conv_blocked
    with nullcontext() if kind == "this" else chosen_for("quantized_conv", kind="discrete"):
        for x_dtype, activation, output in (("int8", "static", "int8"), ("float32", "none", None)):
            epilogue = "relu" if output else "sum_relu"
            given = {"bits": bits, "output": output, "epilogue": epilogue, "residual": True}
            operands = Operands(CASES[name], x_dtype, activation, **given)  # type: ignore[arg-type]
            a, inputs = operands.attributes, operands.operands
            for (got,) in every_variant("quantized_conv", a, inputs, but, **operands.options):
                count, wrong = operands.check(got)
                total, off = total + count, off + wrong
    assert off <= max(1, 1e-4 * total), f"{off} of {total}"


@pytest.mark.tier
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in ("colours", "many channels", "depthwise") for kind in ("this", "gpu")),
        ("narrow groups", "gpu"),
    ],
)
def test_sums_of_8_bit_residuals(name: str, kind: str) -> None:
    """By every kernel the bytes of the layer and quantized_arithmetic behind it. All numbers before the sum have few
    bits, so that there is no rounding that could differ but that to 8 bits."""
    rng = np.random.default_rng(len(name))
    narrow = Convolution(1, (6, 7), (3, 3), (1, 1), (1, 1), (1, 1), 8, 4, 8)
    operands = Operands(CASES.get(name, narrow), "uint8", output="uint8")
    step = float(np.exp2(np.rint(np.log2(operands.attributes.output_scale))))
    alone = replace(operands.attributes, input_scale=2.0**-6, output_scale=step)
    x, weight, scale, bias = operands.operands[:4]
    assert scale is not None
    assert bias is not None
    inputs = [x, weight, np.exp2(np.rint(np.log2(scale))), np.rint(8 * bias) / np.float32(8)]
    (q,) = OPERATOR.reference(alone, inputs)
    residual = rng.integers(-128, 127, q.shape, np.int8, endpoint=True)
    both = {"operation": "add", "input_scale": step, "input_zero_point": alone.output_zero_point}
    both |= {"other_scale": step / 1.7, "other_zero_point": -9}
    ends = {"dtype": "int8", "scale": step * 1.9, "zero_point": 3, "min": -110, "max": 111}
    (wanted,) = run_op(
        "quantized_arithmetic", both | {f"output_{key}": end for key, end in ends.items()}, [q, residual]
    )
    assert len(np.unique(wanted)) > 50
    fused: Any = {f"sum_{key}": end for key, end in ends.items()}
    fused |= {"residual_scale": step / 1.7, "residual_zero_point": -9}
    inputs += [None, None, residual]
    np.testing.assert_array_equal(OPERATOR.reference(replace(alone, **fused), inputs)[0], wanted)
    with nullcontext() if kind == "this" else chosen_for("quantized_conv", kind="discrete"):
        for (got,) in every_variant("quantized_conv", replace(alone, **fused), inputs):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", [("int8", "static"), ("uint8", "dynamic"), ("float16", "none")])
def test_every_device_has_kernels(device: str, scheme: tuple[str, str]) -> None:
    for case in CASES.values():
        operands = Operands(case, *scheme)
        types = [None if a is None else TensorType(DType.of(a.dtype), a.shape) for a in operands.operands]
        outputs = OPERATOR.infer(operands.attributes, types)
        kernels = OPERATOR.kernels(operands.attributes, types, outputs, DEVICES[device])
        assert all(len(dispatch.push) <= 128 for dispatch in kernels.dispatches)


@pytest.mark.parametrize("activation", ["static", "none"])
def test_four_bits_stay_four_bits(activation: str) -> None:
    x_dtype = "float32" if activation == "none" else "int8"
    operands = Operands(CASES["many channels"], x_dtype, activation, bits=4, output=None)
    graph, arguments = one_node_graph("quantized_conv", operands.attributes, operands.operands, int4=(1,))
    weight = operands.operands[1]
    assert weight is not None
    with Session(graph) as session:
        operands.check(session.run(arguments)[0])
        constants = session.describe().constant_bytes
    # Beside the weight, whose rows are padded to 16 bytes, scale, bias and sums of 4 bytes a channel; all are padded.
    assert weight.size / 2 <= constants <= weight.size / 2 + len(weight) * (16 + 3 * 4) + 4 * 256
    assert constants < 0.7 * weight.size


def test_no_images() -> None:
    operands = Operands(CASES["depthwise"])
    empty = [np.zeros((0, 7, 9, 32), np.int8), *operands.operands[1:]]
    assert run_op("quantized_conv", operands.attributes, empty)[0].shape == (0, 4, 9, 32)


def test_columns_of_some_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two at a time, and one that is left; each dispatch sees its own images of x, y and a residual."""
    monkeypatch.setattr("torchvk.ops.conv_kernels.COLUMNS_AT_ONCE", 2 * 64 * 32)
    case = Convolution(5, (16, 16), (3, 3), (2, 2), (1, 1), (1, 1), 1, 3, 12)
    with chosen_for("quantized_conv", kind="discrete"), chosen_for("conv", kind="discrete"):
        operands = Operands(case, "uint8", "static", output="int8", epilogue="relu")
        types = [None if a is None else TensorType(DType.of(a.dtype), a.shape) for a in operands.operands]
        outputs = OPERATOR.infer(operands.attributes, types)
        offered = OPERATOR.variants(operands.attributes, types, outputs, DEVICES["gpu_1"])
        ways = [kernels.dispatches for name, kernels in offered if name.startswith("columns")]
        assert ways
        assert all([each.kernel for each in way].count("quantized_conv_columns") == 3 for way in ways)
        for (got,) in every_variant("quantized_conv", operands.attributes, operands.operands):
            operands.check(got)
        FloatOperands(case, "float16", True, True, "relu").check_kernels()
        # Each part has scratch memory for the sums of its own parts of K, beside the columns, which all share.
        monkeypatch.setattr("torchvk.ops.conv_kernels.COLUMNS_AT_ONCE", 4 * 64 * 880)
        case = Convolution(5, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1), 1, 97, 12)
        FloatOperands(case, "float32", True, True, "none").check_kernels()

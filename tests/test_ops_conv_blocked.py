"""Kernels of conv and quantized_conv that GPUs without matrix units take by default: register blocks, narrow groups."""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_ops_conv
import test_ops_quantized_conv
from convolutions import Convolution, convolutions
from harness import run_op, variant_names
from hypothesis import given, settings
from hypothesis import strategies as st
from variants import DEVICES, GPU, assert_within, chosen_for

from torchvk.graph import DType
from torchvk.ops.conv_blocked import BLOCKS, blocked
from torchvk.ops.convolution import Geometry

# "together" and "pairs": narrow groups, which may share tiles; "taps": words of one step lie under several.
CASES = {
    "together": Convolution(2, (7, 6), (3, 3), (2, 1), (1, 1), (1, 2), 8, 4, 4),
    "pairs": Convolution(1, (5, 9), (3, 3), (1, 2), (0, 1), (1, 1), 4, 16, 20),
    "taps": Convolution(1, (9, 7), (3, 2), (2, 2), (1, 0), (1, 1), 3, 12, 5),
    "whole steps": Convolution(1, (7, 6), (3, 3), (1, 1), (2, 1), (2, 1), 1, 32, 35),
    "volumes": Convolution(1, (3, 4, 5), (3, 2, 3), (1, 2, 1), (1, 0, 1), (1, 1, 1), 2, 8, 8),
    "transposed": Convolution(1, (4, 5), (4, 4), (2, 2), (1, 1), (1, 1), 2, 8, 12, True, (0, 1)),
    "columns": Convolution(1, (9, 9), (5, 5), (2, 2), (2, 2), (1, 1), 1, 3, 20),
}


def chosen(offered: list[str], tiles: slice) -> list[str]:
    """Register blocks of some tiles, and the kernel for narrow groups."""
    return [*[name for name in offered if "blocked" in name][tiles], *({"narrow"} & set(offered))]


def run_integer(operands: test_ops_quantized_conv.Operands, tiles: slice = slice(1)) -> set[str]:
    """Holds kernels to the exact result; the last part of the names of those that there were."""
    a, inputs = operands.attributes, operands.operands
    with chosen_for("quantized_conv", kind="discrete", cooperative_matrices=()):
        names = chosen(variant_names("quantized_conv", a, inputs, **operands.options), tiles)
        for name in names:
            operands.check(run_op("quantized_conv", a, inputs, variant=name, **operands.options)[0])
    return {name.split("_")[-1] for name in names}


def run_floats(operands: test_ops_conv.Operands, tiles: slice = slice(1)) -> set[str]:
    a, inputs = operands.attributes, operands.operands
    with chosen_for("conv", kind="discrete", cooperative_matrices=()):
        names = chosen(variant_names("conv", a, inputs, constants=(1,)), tiles)
        for name in names:
            (got,) = run_op("conv", a, inputs, constants=(1,), variant=name)
            assert_within(got, operands.exact, operands.bound, operands.dtype)
    return {name.split("_")[-1] for name in names}


@pytest.mark.tier
@pytest.mark.parametrize("name", CASES)
def test_kernels(name: str) -> None:
    case, turn = CASES[name], list(CASES).index(name) % 2
    bytes_out = "uint8" if case.outputs % 4 == 0 else None
    scheme = [("int8", "static", 4, bytes_out), ("uint8", "dynamic", 8, None)][turn]
    assert run_integer(test_ops_quantized_conv.Operands(case, *scheme, epilogue="relu", residual=True))
    if name != "columns":
        dtype = "float16" if case.outputs % 4 == 0 and turn else "float32"
        assert run_floats(test_ops_conv.Operands(case, dtype, True, True, "relu"))


def test_every_tile() -> None:
    names = {block.name for block in BLOCKS}
    narrow = replace(CASES["together"], images=1, size=(23, 11), dilation=(2, 1))  # 121 pixels
    seen = run_integer(test_ops_quantized_conv.Operands(narrow), slice(None))
    seen |= run_integer(test_ops_quantized_conv.Operands(replace(narrow, outputs=8)), slice(None))
    assert seen == {*names, "narrow"}
    wide = Convolution(1, (11, 10), (2, 2), (1, 1), (1, 1), (2, 1), 2, 8, 64)
    for dtype in ("float32", "float16"):
        assert run_floats(test_ops_conv.Operands(wide, dtype, True, False, "none"), slice(None)) == {*names, "narrow"}


@pytest.mark.hypothesis
@given(convolutions(max_channels=5), st.booleans(), st.sampled_from((4, 8, 32)), st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_any_convolution(case: Convolution, whole: bool, bits: int, seed: int) -> None:
    case = replace(case, channels=4 * case.channels, outputs=4 * case.outputs if whole else case.outputs)
    if bits < 32:
        run_integer(test_ops_quantized_conv.Operands(case, bits=bits, output="int8" if whole else None, seed=seed))
    else:
        run_floats(test_ops_conv.Operands(case, "float32", False, False, "none", seed))


def geometry(size: int, channels: int, outputs: int, groups: int) -> Geometry:
    one, ones = (1, size, size), (1, 1, 1)
    return Geometry(1, one, one, (1, 3, 3), ones, (0, 1, 1), ones, ones, groups, channels, outputs, groups == channels)


def test_choice() -> None:
    def names(g: Geometry, x: DType, y: DType = DType.FLOAT32, device: str = "gpu_0") -> list[tuple[str, int]]:
        return [(each.block.name, each.together) for each in blocked(g, x, y, DEVICES[device])]

    assert names(geometry(56, 64, 64, 1), DType.INT8)[0] == ("32x32", 1)
    assert names(geometry(112, 64, 64, 1), DType.INT8)[0] == ("64x64", 1)
    # 8 groups of 4 channels have 32 channels of y, or 2 in floating point 8.
    assert names(geometry(112, 128, 128, 32), DType.INT8)[0] == ("128x32", 8)
    assert names(geometry(112, 128, 128, 32), DType.FLOAT32)[0] == ("128x32", 2)
    assert names(geometry(112, 512, 512, 32), DType.FLOAT32)[0] == ("128x32", 1)
    assert names(geometry(56, 64, 512, 16), DType.INT8)[0] == ("128x32", 1)  # 8 groups have 256 channels of y
    assert names(geometry(56, 128, 128, 128), DType.INT8) == []
    assert names(geometry(9, 6, 8, 1), DType.INT8) == names(geometry(9, 8, 6, 1), DType.INT8, DType.INT8) == []
    assert names(geometry(112, 64, 64, 1), DType.INT8, device="cpu_0") == []
    smallest = names(geometry(112, 64, 64, 1), DType.INT8, device="smallest")
    assert smallest
    assert GPU.shared_memory >= max(
        each.block.shared for each in blocked(geometry(112, 64, 64, 1), DType.INT8, DType.INT8, GPU)
    )

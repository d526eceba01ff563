"""quantized_linear without a device: rules, packed weights, which kernels a device gets."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from harness import one_node_graph
from quantized import OPERATOR, attributes, capabilities
from spirv import contract_errors

from torchvk import ops
from torchvk.errors import UnsupportedError
from torchvk.graph import DType, TensorType, unpack_bits
from torchvk.ops import OperatorError
from torchvk.ops.quantized_linear_kernels import choose
from torchvk.ops.quantized_packing import UNIT, Packing
from torchvk.runtime.plan import make_plan


def types(x: Any, weight: Any, scale: Any, bias: Any = None, *more: Any, **named: Any) -> list[TensorType | None]:
    values = (x, weight, scale, bias, *more, *named.values())
    return [None if value is None else TensorType(DType(value[0]), tuple(value[1])) for value in values]


BLOCKED = "quantized_gemm_blocked_integer_32x32"
GOOD: dict[str, Any] = {
    "x": ("float32", (2, 64)),
    "weight": ("int4", (5, 64)),
    "scale": ("float32", (5, 2)),
    "bias": ("float32", (5,)),
}


@pytest.mark.parametrize(
    ("changes", "chosen", "words"),
    [
        ({"x": ("int32", (2, 64))}, {}, "x must be float32 or float16"),
        ({"x": ("float32", ())}, {}, "of rank 1 or more"),
        ({"x": ("float32", (2, 63))}, {}, "x has 63 columns"),
        ({"weight": ("uint8", (5, 64))}, {}, "int4 or int8"),
        ({"weight": ("int8", (64,))}, {}, "of rank 2"),
        ({"weight": None}, {}, "must be there"),
        (
            {"x": ("float32", (2, 0)), "weight": ("int8", (5, 0)), "scale": ("float32", (5, 0))},
            {},
            "at least one input",
        ),
        ({"scale": ("float32", (5, 4))}, {}, r"float32 or float16 \[5, 2\]"),
        ({"scale": ("int8", (5, 2))}, {}, "the scale must be"),
        ({"bias": ("float32", (4,))}, {}, "the bias must be"),
        ({"bias": ("float16", (5,))}, {}, "the bias must be"),
        ({"residual": None, "zero_point": ("uint8", (5, 2))}, {}, r"must be int8 \[5, 2\]"),
        ({"residual": None, "zero_point": ("int8", (5,))}, {}, r"must be int8 \[5, 2\]"),
        ({}, {"group_size": 48}, "48 does not divide the 64"),
        ({}, {"group_size": 0}, "0 does not divide"),
        ({}, {"activation": "dynamic_per_token", "quant_max": 255}, "are not int8"),
        ({}, {"activation": "dynamic_per_token", "quant_min": 5, "quant_max": 5}, "are not int8"),
        ({}, {"activation": "dynamic_per_token", "eps": float("nan")}, "eps must be"),
    ],
)
def test_operands_that_make_no_sense(changes: dict[str, Any], chosen: dict[str, Any], words: str) -> None:
    assert OPERATOR.infer(attributes(32), types(**GOOD)) == (TensorType(DType.FLOAT32, (2, 5)),)
    with pytest.raises(OperatorError, match=words):
        OPERATOR.infer(attributes(**{"group_size": 32, **chosen}), types(**{**GOOD, **changes}))


def test_operands_count() -> None:
    with pytest.raises(OperatorError, match="2 operands were given"):
        OPERATOR.infer(attributes(32), types(**GOOD)[:2])


def test_sizes_that_are_not_supported() -> None:
    k = (1 << 16) + 32
    wide = types(("float32", (1, k)), ("int4", (1, k)), ("float32", (1, 1)))
    assert "overflow int32" in str(ops.supports("quantized_linear", attributes(k, "dynamic_per_token"), wide))
    assert ops.supports("quantized_linear", attributes(k), wide) is None
    tall = types(("float32", (1 << 20, 4096)), ("int8", (1, 4096)), ("float32", (1, 1)))
    assert "elements" in str(ops.supports("quantized_linear", attributes(4096), tall))


@pytest.mark.parametrize(("k", "group"), [(64, 32), (97, 97), (48, 16), (240, 24), (20, 5), (7, 1), (256, 256)])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_hold_every_weight(k: int, group: int, bits: int, rng: np.random.Generator) -> None:
    """Unpacked by the words that describe the layout, not by its inverse."""
    top = 1 << (bits - 1)
    weight = rng.integers(-top, top, (3, k)).astype(np.int8)
    packing = Packing.of(TensorType(DType(f"int{bits}"), (3, k)), group)
    packed = packing.pack(weight).reshape(-1).view(np.uint8)
    assert packed.nbytes == packing.nbytes == 3 * packing.columns * bits // 8
    assert packing.columns % UNIT == 0
    assert packing.columns >= packing.groups * packing.pitch
    if packing.groups > 1:
        assert packing.pitch == 16 or packing.pitch % UNIT == 0
    rows = packed.reshape(3, packing.columns // UNIT, -1)
    found = np.zeros((3, packing.columns), np.int8)
    for column in range(packing.columns):
        unit, within = divmod(column, UNIT)
        if bits == 8:
            found[:, column] = rows[:, unit, within].view(np.int8)
        else:
            word, place = divmod(within, 8)
            byte = rows[:, unit, 4 * word + place % 4]
            found[:, column] = (byte << (0 if place >= 4 else 4)).view(np.int8) >> 4
    expected = np.zeros_like(found)
    for column in range(k):
        expected[:, column // group * packing.pitch + column % group] = weight[:, column]
    assert np.array_equal(found, expected)
    layout = packing.layout
    assert (layout is None) == (bits == 8 and k == packing.columns)


def test_four_bits_stay_four_bits() -> None:
    packing = Packing.of(TensorType(DType.INT4, (1024, 1024)), 32)
    assert packing.nbytes == 1024 * 1024 // 2
    assert unpack_bits(np.array([0xF8], np.uint8), 4, (1, 2)).tolist() == [[-8, -1]]


@pytest.mark.parametrize(
    ("changes", "kernels"),
    [
        (
            {},
            [
                "quantized_linear_lanes_1_broadcast",
                "quantized_linear_lanes_4_broadcast",
                "quantized_linear_lanes_8_broadcast",
            ],
        ),
        ({"shuffle": False}, ["quantized_linear_lanes_1", "quantized_linear_lanes_4", "quantized_linear_lanes_8"]),
        ({"tier": 0}, ["quantized_gemv", "quantized_gemv", BLOCKED]),
        (
            {"subgroup_size": 4},
            ["quantized_gemv_subgroup", "quantized_gemv_subgroup", BLOCKED],
        ),
        (
            {"max_texels": 1000},
            ["quantized_gemv_subgroup", "quantized_gemv_subgroup", BLOCKED],
        ),
        (
            {"kind": "discrete"},
            ["quantized_gemv_subgroup", "quantized_gemv_subgroup", BLOCKED],
        ),
        ({"kind": "integrated", "tier": 2}, ["quantized_gemv_subgroup"] * 2 + [BLOCKED]),
    ],
)
def test_the_kernel_follows_the_device(changes: dict[str, Any], kernels: list[str]) -> None:
    packing = Packing.of(TensorType(DType.INT4, (1024, 1024)), 32)
    device = capabilities(**changes)
    assert [choose(m, packing, True, device).kernel for m in (1, 3, 32)] == kernels


@pytest.mark.parametrize("tier", [0, 1, 2])
@pytest.mark.parametrize("kind", ["cpu", "discrete"])
@pytest.mark.parametrize("invocations", [128, 1024])
def test_dispatches_keep_the_contract(tier: int, kind: Any, invocations: int) -> None:
    """Interfaces as in the SPIR-V, every row and column covered, limits kept: for devices that are not there."""
    device = capabilities(tier=tier, kind=kind, max_workgroup_invocations=invocations, max_workgroup_count=(50, 50, 50))
    for m, n, k, group, bits, dtype, activation in itertools.product(
        (1, 4, 40), (1, 31), (97, 128), (None, 32), (4, 8), ("float32", "float16"), ("none", "dynamic_per_tensor")
    ):
        size = group if group and k % group == 0 else k
        given = types((dtype, (m, k)), (f"int{bits}", (n, k)), (dtype, (n, k // size)), (dtype, (n,)))
        chosen = attributes(size, activation)
        outputs = OPERATOR.infer(chosen, given)
        for dispatch in OPERATOR.kernels(chosen, given, outputs, device).dispatches:
            assert contract_errors(dispatch, device) == []
            assert all(count <= 50 for count in dispatch.groups)
            assert dispatch.constants[0] <= invocations
            assert len(dispatch.push) <= 128
        choice = choose(m, Packing.of(given[1], size), activation != "none", device)  # type: ignore[arg-type]
        tiles = -(-m // choice.tile_m) * -(-n // choice.tile_n)
        assert np.prod(OPERATOR.kernels(chosen, given, outputs, device).dispatches[-1].groups) >= min(tiles, 1)


def test_int4_constants_are_given_packed() -> None:
    """The graph that the harness builds holds half a byte a weight, and so does the device."""
    weight = np.zeros((16, 64), np.int8)
    graph, _ = one_node_graph(
        "quantized_linear",
        attributes(32),
        [np.zeros((1, 64), np.float32), weight, np.zeros((16, 2), np.float32)],
        int4={1},
    )
    assert [t.data.size for t in graph.tensors if t.dtype is DType.INT4 and t.data is not None] == [16 * 32]


def test_texels_have_limits() -> None:
    """The plan refuses more texels than the device binds, and kernels that would write some."""
    graph, _ = one_node_graph(
        "quantized_linear",
        attributes(32),
        [np.zeros((1, 64), np.float32), np.zeros((16, 64), np.int8), np.zeros((16, 2), np.float32)],
    )
    plan = make_plan(graph, capabilities())
    assert [arg.texels for arg in plan.steps[-1].dispatch.buffers] == [True] * 5 + [False] * 2 + [True]  # type: ignore[union-attr]
    choice = make_plan(graph, capabilities(max_texels=63)).steps[-1].dispatch
    assert choice is not None
    assert not any(arg.texels for arg in choice.buffers)


def test_plans_refuse_more_texels_than_the_device_binds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvk.ops.quantized_linear_kernels.reads_texels", lambda *_: True)
    inputs: list[Any] = [np.zeros((1, 64), np.float32), np.zeros((16, 64), np.int8), np.zeros((16, 2), np.float32)]
    graph, _ = one_node_graph("quantized_linear", attributes(32), inputs)
    with pytest.raises(UnsupportedError, match=r"reads 1,024 bytes as texels.* at most 1,008"):
        make_plan(graph, capabilities(max_texels=63))

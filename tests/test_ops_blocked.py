"""Register-blocked matrix products: every tile on this device, and which tile a device gets."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from harness import run_op
from quantized import attributes as quantized_attributes
from spirv import contract_errors, reflect
from variants import DEVICES, EPSILON, GPU, assert_within, chosen_for

from torchvk import ops
from torchvk.graph import DType, TensorType
from torchvk.ops import blocked, linear_kernels, quantized_linear_kernels, rows
from torchvk.ops.linear import LinearAttributes
from torchvk.ops.linear_kernels import Product, choose

FLOAT = [*itertools.product(("f32",), blocked.FLOAT), *itertools.product(("f16",), blocked.HALF)]
QUANTIZED = [
    *itertools.product(("f32",), blocked.WEIGHTS),
    *itertools.product(("f16",), blocked.WEIGHTS_HALF),
    *itertools.product(("integer",), blocked.INTEGER),
]


def named(case: Any) -> str:
    return case if isinstance(case, str) else case.name


@pytest.mark.parametrize(("name", "block"), FLOAT, ids=named)
def test_blocks_say_what_the_kernels_take(name: str, block: blocked.Block) -> None:
    assert reflect(f"gemm_blocked_{name}_{block.name}").shared == block.shared


@pytest.mark.parametrize(("name", "block"), QUANTIZED, ids=named)
def test_blocks_say_what_the_kernels_for_quantized_weights_take(name: str, block: blocked.Block) -> None:
    assert reflect(f"quantized_gemm_blocked_{name}_{block.name}").shared == block.shared


@pytest.mark.parametrize(("name", "block"), FLOAT, ids=named)
@pytest.mark.parametrize(("splits", "n", "k"), [(1, 134, 83), (2, 134, 84), (3, 136, 128)])
def test_every_tile(
    name: str, block: blocked.Block, splits: int, n: int, k: int, rng: np.random.Generator, monkeypatch: Any
) -> None:
    """One tile and a bit in both directions, K odd, a multiple of 4, and of all steps; with all that follows."""
    dtype = "float32" if name == "f32" else "float16"
    x, w = rng.standard_normal((block.m + 3, k)).astype(dtype), rng.standard_normal((n, k)).astype(dtype)
    bias, residual = rng.standard_normal(n).astype(dtype), rng.standard_normal((block.m + 3, n)).astype(dtype)
    monkeypatch.setattr(linear_kernels, "choose", lambda *_: linear_kernels._block_choice(block, name, splits))
    with chosen_for("linear", kind="discrete"):
        (got,) = run_op("linear", LinearAttributes("sum_relu"), [x, w, bias, residual], constants=(1,), max_tier=1)
    wide = [value.astype(np.float64) for value in (x, w, bias, residual)]
    exact = np.maximum(wide[0] @ wide[1].T + wide[2] + wide[3], 0)
    size = np.abs(wide[0]) @ np.abs(wide[1]).T + np.abs(wide[2]) + np.abs(wide[3])
    assert_within(got, exact, (k + 2) * EPSILON * size, dtype)


@pytest.mark.parametrize(("name", "block"), QUANTIZED, ids=named)
@pytest.mark.parametrize(("bits", "group"), [(4, 16), (4, 32), (8, 64), (8, 192)])
def test_every_tile_for_quantized_weights(
    name: str, block: blocked.Block, bits: int, group: int, rng: np.random.Generator, monkeypatch: Any
) -> None:
    """Groups of half a unit, of one, of several and of all K."""
    m, n, k = block.m + 3, 134, 192
    dtype: Any = "float16" if name == "f16" else "float32"
    top = 1 << (bits - 1)
    x = rng.standard_normal((m, k)).astype(dtype)
    w = rng.integers(-top, top, (n, k)).astype(np.int8)
    scale = rng.uniform(0.5, 1.5, (n, k // group)).astype(dtype) / np.asarray(top, dtype)
    bias = rng.standard_normal(n).astype(dtype)
    dynamic = name == "integer"
    attributes = quantized_attributes(group, "dynamic_per_token" if dynamic else "none", epilogue="relu")
    monkeypatch.setattr(quantized_linear_kernels, "few_rows", lambda _: ())
    monkeypatch.setattr(
        quantized_linear_kernels,
        "choose",
        lambda *_: quantized_linear_kernels._block_choice(block, dynamic, name == "f16"),
    )
    options: Any = {"int4": (1,)} if bits == 4 else {}
    with chosen_for("quantized_linear", kind="discrete"):
        (got,) = run_op("quantized_linear", attributes, [x, w, scale, bias], max_tier=1, **options)
    values = x.astype(np.float64)
    if dynamic:
        q, row_scale, zero_point = ops.quantized_linear.quantize(x, attributes.scheme)
        values = (q.astype(np.float64) - zero_point) * row_scale.astype(np.float64)
    wide = (w.reshape(n, -1, group) * scale[..., None].astype(np.float64)).reshape(n, k)
    exact = np.maximum(values @ wide.T + bias.astype(np.float64), 0)
    size = np.abs(values) @ np.abs(wide).T + np.abs(bias.astype(np.float64))
    assert_within(got, exact, (k + 3) * EPSILON * size, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.FLOAT16])
def test_every_variant_keeps_the_contract(device: str, dtype: DType) -> None:
    """Interfaces and limits of every kernel that a device is offered, from tiny to large."""
    for m, n, k in ((5, 7, 3), (70, 130, 1030), (128, 384, 1536), (600, 5000, 64)):
        inputs = [TensorType(dtype, (m, k)), TensorType(dtype, (n, k))]
        operator = ops.get("linear")
        outputs = operator.infer(LinearAttributes(), inputs)
        for _, kernels in operator.variants(LinearAttributes(), inputs, outputs, DEVICES[device]):
            for dispatch in kernels.dispatches:
                assert contract_errors(dispatch, DEVICES[device]) == []


def test_the_tile_follows_the_size() -> None:
    def tile(m: int, n: int, device: str = "gpu_1") -> tuple[int, int]:
        choice = choose(Product(m, n, 4096, DType.FLOAT32, transpose_b=True), DEVICES[device])
        return choice.tile_m, choice.tile_n

    assert tile(512, 4096) == (64, 128)
    assert tile(128, 384) == (32, 32)
    assert tile(512, 4096, "smallest") == (64, 64)


@pytest.mark.parametrize("n", [4096, 14336])
def test_a_row_more_is_multiplied_beside_the_tiles(n: int) -> None:
    inputs = [[TensorType(DType.FLOAT32, (m, 4096)), TensorType(DType.FLOAT32, (n, 4096))] for m in (512, 513)]
    operator = ops.get("linear")
    (even,), (main, rest) = (
        operator.kernels(LinearAttributes(), types, operator.infer(LinearAttributes(), types), GPU).dispatches
        for types in inputs
    )
    assert (main.kernel, main.groups) == (even.kernel, even.groups)
    assert rest.kernel.startswith("gemv")
    assert main.flops + rest.flops == 2 * 513 * n * 4096


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("n", [132, 133])
def test_the_rows_that_are_left_over(dtype: str, n: int, rng: np.random.Generator, monkeypatch: Any) -> None:
    """Four tiles above each other and three rows, by two kernels."""
    m, k = 4 * 64 + 3, 40
    monkeypatch.setattr(rows, "ONE_ROUND", 0)
    x, w = rng.standard_normal((m, k)).astype(dtype), rng.standard_normal((n, k)).astype(dtype)
    residual = rng.standard_normal((m, n)).astype(dtype)
    block = next(block for block in blocked.HALF if block.name == "64x64")
    name = "f16" if dtype == "float16" else "f32"
    chosen = linear_kernels.choose
    choices = {m: linear_kernels._block_choice(block, name)}
    monkeypatch.setattr(
        linear_kernels, "choose", lambda product, device: choices.get(product.m) or chosen(product, device)
    )
    with chosen_for("linear", kind="discrete"):
        (got,) = run_op("linear", LinearAttributes("relu"), [x, w, None, residual], constants=(1,), max_tier=1)
        # A residual may be a constant, such as a table of positions, whose rows are bound in parts, too.
        fixed = run_op("linear", LinearAttributes("relu"), [x, w, None, residual], constants=(1, 3), max_tier=1)[0]
    np.testing.assert_array_equal(got, fixed)
    wide = [value.astype(np.float64) for value in (x, w, residual)]
    size = np.abs(wide[0]) @ np.abs(wide[1]).T + np.abs(wide[2])
    assert_within(got, np.maximum(wide[0] @ wide[1].T, 0) + wide[2], (k + 2) * EPSILON * size, dtype)


def test_few_tiles_share_a_long_sum() -> None:
    def splits(m: int, n: int, k: int, device: str = "gpu_1") -> int:
        return choose(Product(m, n, k, DType.FLOAT32, transpose_b=True), DEVICES[device]).splits

    assert splits(128, 384, 1536) == 8
    assert splits(16, 4096, 4096) == 4
    assert splits(128, 384, 384) == splits(512, 4096, 4096) == 1


def test_odd_halves_are_not_split() -> None:
    """Neighbouring rows would share words of the result."""
    operator = ops.get("linear")
    for n, parts in ((64, True), (65, False)):
        inputs = [TensorType(DType.FLOAT16, (32, 4096)), TensorType(DType.FLOAT16, (n, 4096))]
        names = [
            name
            for name, _ in operator.variants(
                LinearAttributes(), inputs, operator.infer(LinearAttributes(), inputs), GPU
            )
        ]
        assert any("split" in name for name in names) == parts

"""Products on float16 cooperative matrices: the choice everywhere, the kernels where a device has them.

With the old lavapipe there are none; what runs then is the choice (pure), held against the SPIR-V.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from harness import run_op, variant_names
from quantized import attributes
from spirv import contract_errors
from test_ops_fragments import columns_in_lanes, nvidia
from variants import CPU, EPSILON, GPU, HALF_EPSILON, Array, assert_within, chosen_for

from torchvk import ops
from torchvk.graph import DType, TensorType
from torchvk.ops import CooperativeMatrixShape
from torchvk.ops.epilogue import apply_epilogue
from torchvk.ops.linear import LinearAttributes, MatmulAttributes
from torchvk.ops.matrix import Tile, pick, plausible, tiles_of
from torchvk.ops.matrix_half import FRAGMENT_TILES, HALF_FRAGMENT_TILES, TILES

SHAPES = tuple(
    CooperativeMatrixShape(m, n, k, "float16", "float16", "float32", "float32")
    for m, n, k in ((16, 8, 8), (16, 8, 16), (16, 16, 16), (8, 8, 8))
)
ALL_FRAGMENT_TILES = tuple({tile.name: tile for tile in (*FRAGMENT_TILES, *HALF_FRAGMENT_TILES)}.values())
MATRIX_GPU = replace(GPU, tier=2, cooperative_matrices=SHAPES, fragments=(nvidia(),))
SMALL = replace(MATRIX_GPU, subgroup_size=8, shared_memory=32768, fragments=(columns_in_lanes(),))
LINEAR, MATMUL, QUANTIZED = map(ops.get, ("linear", "matmul", "quantized_linear"))


def half(*shape: int) -> TensorType:
    return TensorType(DType.FLOAT16, shape)


def float32(*shape: int) -> TensorType:
    return TensorType(DType.FLOAT32, shape)


def variants(operator: ops.Operator, attributes: Any, inputs: list[Any], capabilities: ops.Capabilities) -> Any:
    """The operator's variants, all of them held against their SPIR-V."""
    outputs = operator.infer(attributes, inputs)
    found = operator.variants(attributes, inputs, outputs, capabilities)
    if found:
        assert found[0][1] == operator.kernels(attributes, inputs, outputs, capabilities)
        assert len({name for name, _ in found}) == len(found)
    for _, kernels in found:
        for dispatch in kernels.dispatches:
            assert contract_errors(dispatch, capabilities) == []
    return found


@pytest.mark.parametrize("capabilities", [MATRIX_GPU, SMALL], ids=["32 lanes", "8 lanes"])
@pytest.mark.parametrize(("m", "n", "k"), [(17, 1, 1), (128, 384, 1536), (513, 4096, 4096), (2048, 100, 77)])
def test_choice(capabilities: ops.Capabilities, m: int, n: int, k: int) -> None:
    found = variants(LINEAR, LinearAttributes(), [half(m, k), half(n, k), half(n)], capabilities)
    assert all("gemm_matrix" in kernels.dispatches[0].kernel for _, kernels in found)
    assert found
    found = variants(MATMUL, MatmulAttributes(True, False), [half(6, k, m), half(6, k, n)], capabilities)
    assert found
    for bits in (DType.INT4, DType.INT8):
        inputs = [half(m, 32 * k), TensorType(bits, (n, 32 * k)), half(n, k), half(n)]
        found = variants(QUANTIZED, attributes(32), inputs, capabilities)
        kernels = [dispatch.kernel for dispatch in found[0][1].dispatches]
        assert any("matrix" in kernel or "fragments" in kernel for kernel in kernels)
        # Groups need scales within a row where lanes find them; one scale a row does not.
        assert any("fragments" in name for name, _ in found) == (k == 1 or capabilities is MATRIX_GPU)
        inputs[2] = half(n, 1)
        assert any("fragments" in name for name, _ in variants(QUANTIZED, attributes(32 * k), inputs, capabilities))


def test_without_matrices() -> None:
    for capabilities in (GPU, CPU, replace(MATRIX_GPU, tier=1), replace(MATRIX_GPU, kind="cpu")):
        inputs: list[Any] = [half(100, 64), half(64, 64)]
        kernels = LINEAR.kernels(LinearAttributes(), inputs, [half(100, 64)], capabilities)
        assert "matrix" not in kernels.dispatches[0].kernel
        inputs = [half(100, 64), TensorType(DType.INT4, (64, 64)), half(64, 2)]
        kernels = QUANTIZED.kernels(attributes(32), inputs, [half(100, 64)], capabilities)
        assert not any("matrix" in d.kernel or "fragments" in d.kernel for d in kernels.dispatches)


def test_float32_only_where_allowed() -> None:
    """float32 graphs multiply float32, unless the user said otherwise."""
    allowed = replace(MATRIX_GPU, matmul_precision="high")
    for k, expected in ((64, True), (68, False)):
        types: list[Any] = [float32(100, k), float32(64, k)]
        kernels = LINEAR.kernels(LinearAttributes(), types, [float32(100, 64)], allowed)
        assert ("matrix" in kernels.dispatches[0].kernel) == expected
        kernels = LINEAR.kernels(LinearAttributes(), types, [float32(100, 64)], MATRIX_GPU)
        assert "matrix" not in kernels.dispatches[0].kernel
    inputs: list[Any] = [float32(100, 64), TensorType(DType.INT4, (64, 64)), float32(64, 2)]
    for capabilities, expected in ((allowed, True), (MATRIX_GPU, False)):
        kernels = QUANTIZED.kernels(attributes(32), inputs, [float32(100, 64)], capabilities)
        assert any("matrix" in d.kernel or "fragments" in d.kernel for d in kernels.dispatches) == expected


def test_tiles() -> None:
    """Small products get many workgroups, large ones large tiles; one row more costs one row of tiles more."""
    tiles = tiles_of(TILES, MATRIX_GPU, "float16", "float32")
    large, small = pick(tiles, 4096, 4096), pick(tiles, 128, 384)
    assert large.m * large.n > small.m * small.n
    assert pick(tiles, 513, 4096).count(513, 4096) <= 1.5 * pick(tiles, 512, 4096).count(512, 4096)
    assert small in tiles
    assert plausible(tiles, 128, 384)
    for tile in (*TILES, *ALL_FRAGMENT_TILES):
        assert tile.threads <= 1024
        assert tile.shared(8, both=tile in TILES) <= 49152
        assert tile.depth // tile.subgroups[2] % tile.shape[2] == 0
        assert tile.m == tile.subgroups[0] * tile.defines()["FRAGS_M"] * tile.shape[0]
        assert tile.n == tile.subgroups[1] * tile.defines()["FRAGS_N"] * tile.shape[1]


def test_directives_agree_with_tiles() -> None:
    """The kernel lines in the shaders have each tile's macros."""
    from pathlib import Path

    from torchvk import shaders

    folder = Path(shaders.__file__).parent
    for file, prefix, tiles in (
        ("linear_matrix", "gemm_matrix", TILES),
        ("quantized_linear_matrix", "quantized_matrix", TILES),
        ("quantized_linear_fragments", "quantized_fragments", ALL_FRAGMENT_TILES),
    ):
        lines = [line for line in (folder / f"{file}.slang").read_text().splitlines() if line.startswith("//@kernel")]
        assert [line.split()[1] for line in lines] == [f"{prefix}_{tile.name}" for tile in tiles]
        for line, tile in zip(lines, tiles, strict=True):
            defines = tile.weights_first() if "fragments" in file else tile.defines()
            assert {f"-D{name}={value}" for name, value in defines.items()} <= set(line.split())


# On a device that has cooperative matrices

needs_matrices = pytest.mark.skipif(
    "__import__('torchvk').runtime.device.open_device().info.tier < 2", reason="a device without cooperative matrices"
)


def all_variants(name: str, attributes: Any, inputs: list[Any], **options: Any) -> list[tuple[str, Array]]:
    with chosen_for(name, kind="discrete", **options.pop("changes", {})):
        names = variant_names(name, attributes, inputs, **options)
        assert any("x8x8x8_" in name or "x16x16" in name for name in names)
        return [(variant, run_op(name, attributes, inputs, variant=variant, **options)[0]) for variant in names]


@needs_matrices
@pytest.mark.parametrize(
    ("m", "n", "k", "dtype", "constants"),
    [
        (64, 64, 64, "float16", ()),
        (33, 35, 37, "float16", ()),
        (70, 34, 104, "float32", ()),
        (131, 34, 96, "float16", (1,)),
        (33, 35, 160, "float16", (1,)),
    ],
)
def test_linear(m: int, n: int, k: int, dtype: str, constants: tuple[int, ...], rng: np.random.Generator) -> None:
    """Weights that are constants come in fragments, too."""
    x, weight, bias, residual = (rng.standard_normal(shape).astype(dtype) for shape in ((m, k), (n, k), (n,), (m, n)))
    x[0], weight[-1] = np.abs(x[0]) * 50, np.abs(weight[-1])
    wide_x, wide_w = (a.astype(np.float16).astype(np.float64) for a in (x, weight))
    exact = apply_epilogue("sum_relu", wide_x @ wide_w.T + bias, residual)
    size = np.abs(wide_x) @ np.abs(wide_w).T + np.abs(bias)
    bound = (k + 3) * EPSILON * size + EPSILON * np.abs(residual)
    changes: Any = {"changes": {"matmul_precision": "high"}, "constants": constants}
    for _, got in all_variants("linear", LinearAttributes("sum_relu"), [x, weight, bias, residual], **changes):
        assert_within(got, exact, bound, dtype)


@needs_matrices
@pytest.mark.parametrize(
    ("transpose_a", "transpose_b", "m", "n", "k"),
    [(False, False, 40, 48, 64), (True, False, 33, 35, 37), (True, True, 48, 40, 24)],
)
def test_matmul(transpose_a: bool, transpose_b: bool, m: int, n: int, k: int, rng: np.random.Generator) -> None:
    a = rng.standard_normal((2, 3, k, m) if transpose_a else (2, 3, m, k)).astype(np.float16)
    b = rng.standard_normal((1, 3, n, k) if transpose_b else (1, 3, k, n)).astype(np.float16)
    wide_a = a.astype(np.float64).swapaxes(-1, -2) if transpose_a else a.astype(np.float64)
    wide_b = b.astype(np.float64).swapaxes(-1, -2) if transpose_b else b.astype(np.float64)
    bound = (k + 1) * EPSILON * (np.abs(wide_a) @ np.abs(wide_b))
    for _, got in all_variants("matmul", MatmulAttributes(transpose_a, transpose_b), [a, b]):
        assert_within(got, wide_a @ wide_b, bound, np.float16)


@needs_matrices
def test_infinite_columns_stay_away(rng: np.random.Generator) -> None:
    """What lies behind a row, in memory, is the next row: it must not enter as 0 · ∞."""
    x = rng.standard_normal((40, 37)).astype(np.float16)
    weight = rng.standard_normal((33, 37)).astype(np.float16)
    x[1::2, 0], weight[1::2, 0] = np.inf, 2
    with np.errstate(all="ignore"):
        exact = x.astype(np.float64) @ weight.astype(np.float64).T
    bound = 38 * EPSILON * np.where(np.isfinite(exact), np.abs(x.astype(np.float64)) @ np.abs(weight.T), 0)
    for _, got in all_variants("linear", LinearAttributes(), [x, weight]):
        assert_within(got, exact, bound, np.float16)


@needs_matrices
@pytest.mark.parametrize(
    ("bits", "m", "n", "k", "group", "dtype", "zeros"),
    [
        (4, 33, 35, 96, 32, "float16", False),
        (4, 41, 33, 120, 24, "float32", True),
        (4, 32, 64, 128, 128, "float16", True),
        (4, 19, 34, 96, 16, "float16", True),
        (8, 20, 50, 96, 16, "float16", False),
        (8, 50, 66, 100, 100, "float16", False),
        (8, 17, 40, 256, 64, "float32", True),
        (2, 35, 33, 96, 32, "float16", True),
        (2, 33, 35, 80, 16, "float32", False),
    ],
)
def test_quantized_linear(
    bits: int, m: int, n: int, k: int, group: int, dtype: str, zeros: bool, rng: np.random.Generator
) -> None:
    low = -(1 << (bits - 1))
    x, bias, residual = (rng.standard_normal(shape).astype(dtype) for shape in ((m, k), (n,), (m, n)))
    weight = rng.integers(low, -low, (n, k)).astype(np.int8)
    scale = rng.uniform(0.01, 0.1, (n, k // group)).astype(dtype)
    zero = rng.integers(low, -low, scale.shape).astype(np.int8) if zeros else None
    numbers = weight.reshape(n, -1, group).astype(np.float64)
    numbers = numbers if zero is None else numbers - zero[..., None]
    wide = (numbers * scale[..., None]).reshape(n, k)
    exact = apply_epilogue("silu", x.astype(np.float64) @ wide.T + bias, None) + residual
    # Weight, scale and x are rounded to float16; SiLU's slope is below 1.1.
    size = np.abs(x.astype(np.float64)) @ np.abs(wide).T
    bound = 1.1 * (3 * HALF_EPSILON + (k + 2) * EPSILON) * size + 4 * EPSILON * (np.abs(exact) + np.abs(residual) + 1)
    options: Any = {"changes": {"matmul_precision": "high"}, **({f"int{bits}": (1,)} if bits < 8 else {})}
    settings = attributes(group, dtype=np.dtype(dtype).type, epilogue="silu")
    for _, got in all_variants("quantized_linear", settings, [x, weight, scale, bias, residual, zero], **options):
        assert_within(got, exact, bound, dtype)


def test_unused_shape_has_no_tiles() -> None:
    odd = replace(MATRIX_GPU, cooperative_matrices=SHAPES[:1])
    assert tiles_of(TILES, odd, "float16", "float32") == ()
    assert isinstance(TILES[0], Tile)

"""quantized_linear on 8-bit matrix units: which tiles a device gets, and (where there are such units) what they give.

The other tests of quantized_linear hold every variant that a device offers to the same bounds.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import variant_names
from quantized import OPERATOR, attributes
from spirv import contract_errors
from test_ops_fragments import columns_in_lanes, nvidia_int8
from test_ops_quantized_linear import check, operands
from variants import GPU

import torchvk.shaders
from torchvk.graph import DType, TensorType
from torchvk.ops import CooperativeMatrixShape
from torchvk.ops.quantized_linear_case import WEIGHT
from torchvk.ops.quantized_linear_matrix import FRAGMENT_TILES, TILES, fragment_kernel
from torchvk.runtime.device import max_tier, open_device

Array = np.ndarray[Any, Any]


def device(shape: tuple[int, int, int], subgroup_size: int, **changes: Any) -> Any:
    offered = CooperativeMatrixShape(*shape, "int8", "int8", "int32", "int32")
    return replace(GPU, tier=2, subgroup_size=subgroup_size, cooperative_matrices=(offered,), **changes)


def dispatches(m: int, n: int, k: int, group: int, bits: int, capabilities: Any, activation: str) -> list[Any]:
    chosen = attributes(group, activation)
    types = [
        TensorType(DType.FLOAT32, (m, k)),
        TensorType(DType(f"int{bits}"), (n, k)),
        TensorType(DType.FLOAT32, (n, k // group)),
    ]
    variants = OPERATOR.variants(chosen, types, OPERATOR.infer(chosen, types), capabilities)
    return [(name, kernels.dispatches[-1]) for name, kernels in variants]


def test_the_shader_lists_the_tiles() -> None:
    source = Path(torchvk.shaders.__path__[0], "quantized_linear_matrix_integer.slang").read_text()
    listed = [line for line in source.splitlines() if line.startswith("//@kernel")]
    assert listed == [tiles.directive(one) for tiles in TILES for one in (False, True)]
    source = Path(torchvk.shaders.__path__[0], "quantized_linear_fragments_integer.slang").read_text()
    listed = [line.split() for line in source.splitlines() if line.startswith("//@kernel")]
    assert [words[1] for words in listed] == [fragment_kernel(tile) for tile in FRAGMENT_TILES]
    for words, tile in zip(listed, FRAGMENT_TILES, strict=True):
        assert {f"-D{name}={value}" for name, value in tile.weights_first().items()} <= set(words)


@pytest.mark.parametrize("tiles", TILES, ids=lambda tiles: tiles.kernel(False))
def test_tiles_keep_the_contract(tiles: Any) -> None:
    """Interfaces as in the SPIR-V, every row and column covered, limits kept: on a device that has just enough."""
    capabilities = device(tiles.shape, tiles.lanes, shared_memory=tiles.shared_memory)
    for m, n, k, group, bits in ((17, 33, 97, 97, 8), (319, 500, 256, 32, 4), (127, 640, 128, 128, 4)):
        for activation in ("dynamic_per_token", "dynamic_per_tensor"):
            found = dict(dispatches(m, n, k, group, bits, capabilities, activation))
            dispatch = found[tiles.name]
            assert contract_errors(dispatch, capabilities) == []
            assert dispatch.kernel == tiles.kernel(k == group)
            assert dispatch.constants[0] == tiles.threads
            *_, tiles_n, count = struct.unpack_from("<7I", dispatch.push)
            assert tiles_n * tiles.tile_n >= n > (tiles_n - 1) * tiles.tile_n
            assert count == tiles_n * -(-m // tiles.tile_m) == np.prod(dispatch.groups)
    little = replace(capabilities, shared_memory=tiles.shared_memory - 1)
    assert tiles.name not in dict(dispatches(300, 500, 256, 32, 4, little, "dynamic_per_token"))


@pytest.mark.parametrize(("m", "n"), [(319, 500), (33, 4096), (60, 100)])
@pytest.mark.parametrize("lanes", [8, 32])
def test_fragments_keep_the_contract(m: int, n: int, lanes: int) -> None:
    """The same of the kernels that take weights as a lane holds them: for one scale an output channel."""
    fragment = nvidia_int8() if lanes == 32 else replace(columns_in_lanes(), dtype="int8")
    shape = (16, 16, 32) if lanes == 32 else (8, 8, 8)
    capabilities = device(shape, lanes, fragments=(fragment,))
    offered = {f"fragments_{tile.name}": tile for tile in FRAGMENT_TILES if tile.lanes == lanes}
    for bits, activation in ((4, "dynamic_per_token"), (8, "dynamic_per_tensor")):
        found = dispatches(m, n, 352, 352, bits, capabilities, activation)
        assert found[0][0] in offered
        for name, dispatch in found:
            assert contract_errors(dispatch, capabilities) == []
            packings = {arg.layout.name for arg in dispatch.buffers if arg.layout and arg.index == WEIGHT}
            assert len([packing for packing in packings if "sums" not in packing]) <= 1  # else it is uploaded twice
            if name in offered and not any(arg.part for arg in dispatch.buffers):
                *_, tiles_n, count = struct.unpack_from("<7I", dispatch.push)
                assert tiles_n * offered[name].n >= n > (tiles_n - 1) * offered[name].n
                assert count == offered[name].count(m, n) == np.prod(dispatch.groups)
        in_groups = dispatches(m, n, 352, 32, bits, capabilities, activation)
        assert not any("fragments" in name for name, _ in in_groups)
    for less in (replace(capabilities, fragments=()), replace(capabilities, subgroup_size=64)):
        assert not any("fragments" in name for name, _ in dispatches(m, n, 352, 352, 8, less, "dynamic_per_token"))


@pytest.mark.parametrize("fragments", [(), (nvidia_int8(),)])
def test_static_rows_of_whole_eights_are_read_where_they_lie(fragments: Any) -> None:
    capabilities = device((16, 16, 32), 32, fragments=fragments)
    for x, k, spread in (
        (DType.INT8, 64, False),
        (DType.INT8, 72, False),
        (DType.INT8, 76, True),
        (DType.UINT8, 80, True),
    ):
        types = [TensorType(x, (320, k)), TensorType(DType.INT8, (64, k)), TensorType(DType.FLOAT32, (64, 1))]
        chosen = attributes(k, "static")
        _, kernels = OPERATOR.variants(chosen, types, OPERATOR.infer(chosen, types), capabilities)[0]
        expected = ["spread_bytes"] if spread else []
        assert [dispatch.kernel for dispatch in kernels.dispatches[:-1]] == expected
        assert contract_errors(kernels.dispatches[-1], capabilities) == []


def test_who_gets_matrix_units() -> None:
    nvidia = device((16, 16, 32), 32)

    def default(m: int, group: int, capabilities: Any) -> str:
        return dispatches(m, 4096, 4096, group, 4, capabilities, "dynamic_per_token")[0][1].kernel

    assert default(512, 32, nvidia).startswith("quantized_matrix_integer_16x16x32")
    assert default(512, 4096, nvidia).endswith("_one")
    # Few rows; groups of half a unit; no such matrices, or other subgroups.
    assert "matrix" not in default(4, 32, nvidia)
    assert "matrix" not in default(512, 16, nvidia)
    assert "matrix" not in default(512, 32, device((16, 8, 32), 32))
    assert "matrix" not in default(512, 32, replace(nvidia, subgroup_size=64))
    assert "matrix" not in default(512, 32, replace(nvidia, tier=1))


@pytest.mark.parametrize(
    ("m", "n", "k", "tile"),
    [
        (128, 384, 384, "32x32"),
        (128, 1536, 384, "32x32"),
        (128, 384, 1536, "32x32"),
        (17, 4096, 4096, "32x32"),
        (128, 4096, 4096, "64x64"),
        (128, 14336, 4096, "128x128"),
        (512, 4096, 4096, "128x128"),
        (8192, 16384, 4096, "128x128"),
    ],
)
def test_tiles_suit_the_size(m: int, n: int, k: int, tile: str) -> None:
    """As measured on an H200: small products want many workgroups, large ones large tiles."""
    names = [name for name, _ in dispatches(m, n, k, 32, 4, device((16, 16, 32), 32), "dynamic_per_token")]
    assert names[0].startswith(f"{tile}_")
    assert len(names) == 4  # three tiles and a way without matrix units


# M, N off the tiles' sizes, N odd; K of an odd number of units, not whole units, spread groups.
CASES = [
    ((17, 64), 16, 32),
    ((70, 97), 33, 97),
    ((130, 96), 131, 32),
    ((33, 160), 40, 160),
    ((19, 240), 12, 24),
    ((3, 11, 768), 72, 256),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_tiles(case: Any, rng: np.random.Generator) -> None:
    if open_device().physical.capabilities(max_tier(None)).tier < 2:
        pytest.skip("this device has no matrix units")
    shape, n, group = case
    # Making these pipelines takes lavapipe seconds: one combination a case.
    bits, dtype, symmetric, activation = (
        (4, np.float32, False, "dynamic_per_token"),
        (8, np.float16, False, "dynamic_per_tensor"),
        (4, np.float16, True, "dynamic_per_token"),
        (8, np.float32, False, "dynamic_per_token"),
    )[CASES.index(case) % 4]
    inputs = operands(rng, shape, n, group, bits, dtype, [None, np.float32, dtype][rng.integers(3)])
    chosen = attributes(group, activation, dtype, symmetric=symmetric)
    names = variant_names("quantized_linear", chosen, inputs, int4={1} if bits == 4 else ())
    for name in names:
        check(chosen, inputs, bits, variant=name)

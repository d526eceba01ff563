"""quantized_linear for few rows: which kernels devices get, and their results where a device can run them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from harness import run_op
from quantized import OPERATOR, attributes, capabilities
from spirv import contract_errors
from test_ops_quantized_linear import check, operands

from torchvk.graph import DType, TensorType
from torchvk.ops import Capabilities
from torchvk.ops.operator import CooperativeMatrixShape
from torchvk.ops.quantized_linear_gemv import scale_layout

HALF = CooperativeMatrixShape(16, 16, 16, "float16", "float16", "float32", "float32")
INTEGER = CooperativeMatrixShape(16, 16, 32, "int8", "int8", "int32", "int32")
GPU = capabilities(kind="discrete", tier=2, subgroup_size=32, shared_memory=49152, cooperative_matrices=(HALF, INTEGER))


def kernels_of(m: int, device: Capabilities, activation: str = "none", dtype: DType = DType.FLOAT16) -> list[str]:
    """The product's kernel in every variant, the default first."""
    x, weight = TensorType(dtype, (m, 4096)), TensorType(DType.INT4, (1024, 4096))
    types = (x, weight, TensorType(dtype, (1024, 128)))
    chosen = attributes(32, activation)
    found = OPERATOR.variants(chosen, types, OPERATOR.infer(chosen, types), device)
    return [kernels.dispatches[-1].kernel for _, kernels in found]


@pytest.mark.parametrize(
    ("m", "activation", "changes", "kernel"),
    [
        (1, "dynamic_per_token", {}, "gemv_quantize_1"),
        (1, "dynamic_per_tensor", {"tier": 1}, "gemv_quantize_1"),
        (3, "dynamic_per_token", {"tier": 1}, "gemv_integer_4"),
        (8, "dynamic_per_token", {}, "gemv_integer_8"),
        (16, "dynamic_per_token", {}, "skinny_integer_16x16x32"),
        (1, "none", {}, "gemv_float_1"),
        (2, "none", {"tier": 1}, "gemv_float_2"),
        (16, "none", {}, "skinny_half_16x16x16"),
        (1, "none", {"tier": 0}, "quantized_gemv"),
        (1, "none", {"shuffle": False}, "quantized_gemv_subgroup"),
        (1, "none", {"kind": "cpu", "subgroup_size": 8}, "quantized_linear_lanes_1_broadcast"),
    ],
)
def test_the_kernel_follows_the_device(m: int, activation: str, changes: dict[str, Any], kernel: str) -> None:
    assert kernels_of(m, replace(GPU, **changes), activation)[0].startswith(kernel)


def test_float32_keeps_to_float32() -> None:
    for m in (1, 4, 16):
        assert not any("skinny" in name for name in kernels_of(m, GPU, dtype=DType.FLOAT32))


@pytest.mark.parametrize("changes", [{}, {"tier": 1}, {"max_workgroup_invocations": 128, "shared_memory": 16384}])
def test_dispatches_keep_the_contract(changes: dict[str, Any]) -> None:
    """Interfaces as in the SPIR-V, and every column covered, for every variant of devices that are not there."""
    device = replace(GPU, **changes)
    for m, n, (k, group), bits, dtype, activation in itertools.product(
        (1, 3, 8, 16),
        (1, 34, 1031),
        ((64, 32), (97, 97), (4096, 4096), (14336, 128)),
        (4, 8),
        (DType.FLOAT32, DType.FLOAT16),
        ("none", "dynamic_per_token"),
    ):
        x, weight = TensorType(dtype, (m, k)), TensorType(DType.INT4 if bits == 4 else DType.INT8, (n, k))
        types = (x, weight, TensorType(dtype, (n, k // group)), TensorType(DType.FLOAT32, (n,)))
        chosen = attributes(group, activation)
        variants = OPERATOR.variants(chosen, types, OPERATOR.infer(chosen, types), device)
        assert len({name for name, _ in variants}) == len(variants)
        for name, kernels in variants:
            for dispatch in kernels.dispatches:
                assert (errors := contract_errors(dispatch, device)) == [], (name, errors)


def test_scales_stand_in_blocks(rng: np.random.Generator) -> None:
    scale = rng.standard_normal((6, 5)).astype(np.float16)
    for columns in (2, 4):
        packed = scale_layout(6, 5, DType.FLOAT16, columns).pack(scale)
        for n, g in itertools.product(range(6), range(5)):
            assert packed[n // columns, g, n % columns] == scale[n, g]


# (rows, K, N, group): more pieces than a team has lanes, K that is padded, N odd, one group.
SHAPES = [
    (1, 2720, 37, 32),
    (1, 544, 70, 544),
    (2, 2112, 34, 64),
    (5, 97, 33, 97),
    (8, 320, 31, 32),
    (16, 1056, 40, 32),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["none", "dynamic_per_token"])
def test_every_variant(shape: Any, activation: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whatever the device; with cooperative matrices where it has them."""
    from torchvk.runtime.device import PhysicalDevice

    real = PhysicalDevice.capabilities
    monkeypatch.setattr(PhysicalDevice, "capabilities", lambda *a: replace(real(*a), kind="discrete"))
    m, k, n, group = shape
    bits, dtype = ((4, np.float16), (8, np.float32), (8, np.float16), (4, np.float32))[rng.integers(4)]
    inputs = operands(rng, (m, k), n, group, bits, dtype, [None, np.float32, dtype][rng.integers(3)])
    check(attributes(group, activation, dtype), inputs, bits)


@pytest.mark.parametrize("formula", ["torchao", "pt2e"])
def test_the_row_is_quantized_as_ever(formula: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized by the product's own workgroups or by a dispatch before: the same to the last bit."""
    from torchvk.runtime.device import PhysicalDevice

    real = PhysicalDevice.capabilities
    monkeypatch.setattr(PhysicalDevice, "capabilities", lambda *a: replace(real(*a), kind="discrete"))
    for dtype, symmetric in itertools.product((np.float32, np.float16), (False, True)):
        inputs = operands(rng, (1, 544), 9, 544, 8, dtype)
        assert inputs[0] is not None
        inputs[0] *= dtype(10.0 ** rng.integers(-3, 3))
        chosen = attributes(544, "dynamic_per_token", dtype, symmetric=symmetric, qparams=formula)
        names = {name.rsplit("_", 3)[0]: name for name in variant_names(chosen, inputs) if name.startswith("gemv")}
        results = [run_op("quantized_linear", chosen, inputs, variant=name)[0] for name in names.values()]
        assert len(results) == 2
        assert np.array_equal(*results)


def variant_names(chosen: Any, inputs: list[Any]) -> list[str]:
    from torchvk.runtime.device import open_device

    types = tuple(None if value is None else TensorType(DType.of(value.dtype), value.shape) for value in inputs)
    outputs = OPERATOR.infer(chosen, types)
    return [name for name, _ in OPERATOR.variants(chosen, types, outputs, open_device().physical.capabilities(None))]
